"""Pre-train a BERT on your own texts: masked words and next sentences, Devlin et al. 2019, on batches without padding.

TEXT is UTF-8 with one sentence a line and a blank line between documents, *.txt or *.txt.gz, or a directory of such
files. In the end --output holds the model with its vocabulary, which transformers and bertfast load, log.jsonl with a
line for each step, TensorBoard's logs/, curve.png, and the last checkpoints.

Whatever ends it (Ctrl-C, a crash, a machine that goes down), the same command goes on from the newest checkpoint, and
comes to the same weights. Several processes, on any number of machines that share --output, train one model:

    torchrun --nproc-per-node 2 -m bertfast pretrain TEXT... --output DIR
"""

import argparse
import hashlib
import math
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch

from bertfast.cli.files import check_model, find
from bertfast.cli.output import UsageError, print_note, print_table, progress_bar
from bertfast.config import BertConfig
from bertfast.errors import BertfastError
from bertfast.heads import BertForPreTraining
from bertfast.train.batches import PretrainingBatches
from bertfast.train.corpus import open_corpus
from bertfast.train.distributed import Processes, join_processes
from bertfast.train.interrupts import terminated_as_interrupted
from bertfast.train.masking import MASKINGS
from bertfast.train.optimizers import OPTIMIZERS
from bertfast.train.pairs import SHORTEST
from bertfast.train.pretraining import PRECISIONS, InterruptedTraining, Pretraining, PretrainingSettings, Record
from bertfast.train.progress import read_log
from bertfast.train.runs import RUN, held_directory, open_run
from bertfast.train.saving import write_together
from bertfast.train.sources import find_files
from bertfast.train.vocabulary import Vocabulary

HELP = "train a new BERT on your texts, or an old one further"

# layers, hidden, heads: Devlin et al. 2019, and Turc et al. 2019, Well-Read Students Learn Better.
SIZES = {
    "tiny": (2, 128, 2),
    "mini": (4, 256, 4),
    "small": (4, 512, 8),
    "medium": (8, 512, 8),
    "base": (12, 768, 12),
    "large": (24, 1024, 16),
}
_EPOCHS, _MOST_WARMUP = 40, 10_000  # as Devlin et al. 2019, appendix A.2
_VOCABULARY, _POSITIONS = 30_522, 512  # theirs
# Changing these changes nothing of what comes out, or no more than rounding does.
_FREE = {"command", "debug", "texts", "output", "save_every", "keep", "workers", "recompute"}


class _Interrupted(UsageError):
    status = 130


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("texts", metavar="TEXT", nargs="+", help="files, or directories of them")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="a new directory, or a run to go on")
    model = parser.add_argument_group("model")
    model.add_argument("--size", choices=SIZES, help="layers, hidden size and heads (default: base)")
    model.add_argument("--layers", type=_at_least(1), metavar="N")
    model.add_argument("--hidden", type=_at_least(1), metavar="N", help="the inner size is four times as much")
    model.add_argument("--heads", type=_at_least(1), metavar="N")
    model.add_argument("--dropout", type=_share, metavar="P", help="default: 0.1, or what --from has")
    model.add_argument(
        "--from", dest="checkpoint", metavar="MODEL", help="go on with the weights of a directory, or a hub id"
    )
    words = parser.add_argument_group("vocabulary")
    words.add_argument("--vocabulary", metavar="PATH", help="a vocab.txt, or a directory with one (default: --from's)")
    words.add_argument(
        "--vocabulary-size", type=_at_least(1), metavar="N", help=f"of a new one, from TEXT (default: {_VOCABULARY})"
    )
    words.add_argument("--cased", action="store_true", help="a new vocabulary keeps capital letters and accents")
    data = parser.add_argument_group("batches")
    data.add_argument(
        "--max-length",
        type=_at_least(SHORTEST),
        default=128,
        metavar="N",
        help="tokens of a pair of sentences (default: 128)",
    )
    data.add_argument(
        "--tokens-per-batch",
        type=_at_least(1),
        default=8192,
        metavar="N",
        help="of all processes together (default: 8192)",
    )
    data.add_argument(
        "--accumulate", type=_at_least(1), default=1, metavar="N", help="batches of one step (default: 1)"
    )
    data.add_argument("--masking", choices=MASKINGS, default="whole-word", help="default: whole-word")
    data.add_argument(
        "--workers", type=_at_least(0), default=0, metavar="N", help="processes that make batches ahead (default: none)"
    )
    training = parser.add_argument_group("training")
    length = training.add_mutually_exclusive_group()
    length.add_argument("--steps", type=_at_least(1), metavar="N")
    length.add_argument("--epochs", type=_at_least(1), metavar="N", help=f"default: {_EPOCHS}")
    training.add_argument("--optimizer", choices=OPTIMIZERS, default="adamw", help="default: adamw")
    training.add_argument(
        "--learning-rate", type=_positive, default=1e-4, metavar="R", help="default: 1e-4; LAMB takes ten times more"
    )
    training.add_argument(
        "--warmup",
        type=_at_least(0),
        metavar="N",
        help=f"steps in which the rate rises (default: a tenth, at most {_MOST_WARMUP})",
    )
    training.add_argument("--weight-decay", type=_not_negative, default=0.01, metavar="W", help="default: 0.01")
    training.add_argument(
        "--clip", type=_positive, default=1.0, metavar="NORM", help="of the gradient; inf for none (default: 1)"
    )
    training.add_argument(
        "--precision",
        choices=PRECISIONS,
        default="float32",
        help="of the GEMMs; weights are float32 (default: float32)",
    )
    training.add_argument("--seed", type=_at_least(0), default=0, metavar="N")
    machine = parser.add_argument_group("memory and disk")
    machine.add_argument(
        "--gradient-checkpointing", dest="recompute", action="store_true", help="less memory, a third more time"
    )
    machine.add_argument("--sharded", action="store_true", help="divide weights and optimizer among the processes")
    machine.add_argument(
        "--save-every", type=_at_least(1), default=1000, metavar="N", help="steps between checkpoints (default: 1000)"
    )
    machine.add_argument(
        "--keep", type=_at_least(1), default=2, metavar="N", help="how many of the last checkpoints (default: 2)"
    )


def _at_least(least: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"must be at least {least}, not {text}")
        return value

    parse.__name__ = "int"  # argparse names it where the text is no number
    return parse


def _number(fits: Callable[[float], bool], words: str) -> Callable[[str], float]:
    def parse(text: str) -> float:
        value = float(text)
        if not fits(value):
            raise argparse.ArgumentTypeError(f"must be {words}, not {text}")
        return value

    parse.__name__ = "float"
    return parse


_positive = _number(lambda value: value > 0, "greater than 0")
_not_negative = _number(lambda value: 0 <= value < math.inf, "a number of at least 0")
_share = _number(lambda value: 0 <= value < 1, "in [0, 1)")


def run(args: argparse.Namespace) -> int:
    with terminated_as_interrupted(), _mistakes():
        try:
            with join_processes() as processes:
                return _pretrain(args, processes)
        except InterruptedTraining as stopped:
            raise _Interrupted(f"{stopped}: the same command goes on from there") from stopped


@contextmanager
def _mistakes() -> Iterator[None]:
    """What the library says of values that do not fit was given here."""
    try:
        yield
    except BertfastError:
        raise
    except ValueError as error:
        raise UsageError(str(error)) from error


def _pretrain(args: argparse.Namespace, processes: Processes) -> int:
    if args.sharded and processes.count == 1:
        raise UsageError("--sharded divides a model among several processes: start them with torchrun")
    with ExitStack() as held:
        training = _prepare(args, processes, held)
        done, steps = training.resume(), training.settings.steps
        if processes.first and done:
            print_note(f"going on after step {done} of {steps}")
        with progress_bar(steps, "pretrain", quiet=not processes.first, unit="step") as bar:
            bar.initial = bar.n = done

            def report(record: Record) -> None:
                bar.set_postfix_str(_say(record), refresh=False)
                bar.update()

            training.run(report, _say_wait)
    if processes.first:
        _summarise(args.output)
    return 0


def _prepare(args: argparse.Namespace, processes: Processes, held: ExitStack) -> Pretraining:
    """The training, whose directory is held until the stack closes. The first process makes what all of them read."""
    goes_on, texts = False, args.output / "corpus"
    with processes.together():
        if processes.first:
            held.enter_context(held_directory(args.output))
            goes_on = _open(args, processes)
    with processes.together():
        if not (args.output / RUN).is_file():
            raise UsageError(f"{args.output} is not the same directory on all machines")
        vocabulary = Vocabulary.load(args.output)
        model = _model(args, vocabulary)
        if processes.first:
            _check_disk(args, model, 1 if goes_on else args.keep + 1)
            with _reading_bar("tokenise", args, quiet=goes_on) as advance:
                open_corpus(args.texts, vocabulary, texts, advance)
    with processes.together():
        batches = PretrainingBatches(
            open_corpus(args.texts, vocabulary, texts),
            vocabulary,
            tokens_per_batch=args.tokens_per_batch,
            max_length=args.max_length,
            seed=args.seed,
            masking=args.masking,
            rank=processes.rank,
            world_size=processes.count,
            workers=args.workers,
        )
        settings = _settings(args, batches)
    positions = model.config.max_position_embeddings
    return Pretraining(
        model,
        batches,
        lambda directory: vocabulary.save(directory, positions),
        settings,
        args.output,
        args.keep,
        processes,
    )


def _open(args: argparse.Namespace, processes: Processes) -> bool:
    """Make the output this run's, with its vocabulary in it. Returns whether it was one before."""
    settings = {f"--{name.replace('_', '-')}": value for name, value in vars(args).items() if name not in _FREE}
    for name in ("--vocabulary", "--checkpoint"):
        if settings[name] is not None and Path(settings[name]).exists():
            settings[name] = str(Path(settings[name]).resolve())
    settings["--from"] = settings.pop("--checkpoint")
    settings |= {"processes": processes.count, "device": processes.device.type, "TEXT": _fingerprint(args.texts)}
    goes_on = open_run(args.output, settings)
    if not goes_on or not (args.output / "tokenizer.json").is_file():
        vocabulary = _vocabulary(args)
        write_together(args.output, lambda folder: vocabulary.save(folder, _POSITIONS))
    return goes_on


def _fingerprint(texts: list[str]) -> str:
    """What distinguishes these texts from others, wherever they lie."""
    digest, files, size = hashlib.sha256(), find_files(texts), 0
    for path in files:
        with path.open("rb") as file:
            while part := file.read(1 << 20):
                digest.update(part)
                size += len(part)
    return f"{len(files)} files of {size} bytes, SHA-256 {digest.hexdigest()[:16]}"


def _vocabulary(args: argparse.Namespace) -> Vocabulary:
    if args.vocabulary is not None and args.vocabulary_size is not None:
        raise UsageError("--vocabulary is there already, and --vocabulary-size asks for a new one: give one of them")
    if args.vocabulary is not None:
        return Vocabulary.load(args.vocabulary, False if args.cased else None)
    if args.checkpoint is not None:
        if args.vocabulary_size is not None:
            raise UsageError("--from has word vectors for its own vocabulary only: leave --vocabulary-size out")
        check_model(args.checkpoint)
        path = find(args.checkpoint, "tokenizer.json") or find(args.checkpoint, "vocab.txt")
        if path is None:
            raise UsageError(f"{args.checkpoint} has no vocabulary: name it with --vocabulary")
        return Vocabulary.load(path.parent, False if args.cased else None)
    with _reading_bar("vocabulary", args) as advance:
        return Vocabulary.train(find_files(args.texts), args.vocabulary_size or _VOCABULARY, not args.cased, advance)


@contextmanager
def _reading_bar(description: str, args: argparse.Namespace, quiet: bool = False) -> Iterator[Callable[[int], object]]:
    """A bar over the bytes of the texts, and what moves it on."""
    size = sum(path.stat().st_size for path in find_files(args.texts))
    with progress_bar(size, description, quiet, unit="B") as bar:
        bar.unit_scale = True
        yield bar.update


def _model(args: argparse.Namespace, vocabulary: Vocabulary) -> BertForPreTraining:
    """A new model, or --from's, which fits the vocabulary and --max-length."""
    torch.manual_seed(args.seed)
    sizes = {"--size": args.size, "--layers": args.layers, "--hidden": args.hidden, "--heads": args.heads}
    if args.checkpoint is None:
        layers, hidden, heads = SIZES[args.size or "base"]
        hidden, dropout = args.hidden or hidden, 0.1 if args.dropout is None else args.dropout
        config = BertConfig(
            vocab_size=vocabulary.size,
            hidden_size=hidden,
            num_hidden_layers=args.layers or layers,
            num_attention_heads=args.heads or heads,
            intermediate_size=4 * hidden,
            max_position_embeddings=_POSITIONS,
            hidden_dropout_prob=dropout,
            attention_probs_dropout_prob=dropout,
            pad_token_id=vocabulary.padding_id,
        )
        model = BertForPreTraining(config)
    else:
        if given := [name for name, value in sizes.items() if value is not None]:
            raise UsageError(f"--from says how large the model is: leave {', '.join(given)} out")
        check_model(args.checkpoint)
        names = ("hidden_dropout_prob", "attention_probs_dropout_prob")
        changes = {} if args.dropout is None else dict.fromkeys(names, args.dropout)
        model = BertForPreTraining.from_pretrained(args.checkpoint, dtype=torch.float32, **changes)
        rows = model.config.vocab_size
        # A model may have more rows than words, to fill blocks of memory; other vocabularies are not told from that.
        if vocabulary.size > rows or (args.vocabulary is not None and vocabulary.size != rows):
            raise UsageError(
                f"the vocabulary has {vocabulary.size} words and {args.checkpoint} vectors for {rows}: "
                "give the one that it was trained with"
            )
    if args.max_length > model.config.max_position_embeddings:
        raise UsageError(
            f"--max-length {args.max_length} is more than the model's {model.config.max_position_embeddings} positions"
        )
    return model


def _check_disk(args: argparse.Namespace, model: torch.nn.Module, checkpoints: int) -> None:
    """UsageError unless there is room for so many checkpoints more, and the finished model."""
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    needed, free = weights * (3 * checkpoints + 1), shutil.disk_usage(args.output).free
    if needed > free:
        raise UsageError(
            f"{args.output} has {free / 1e9:.1f} GB left, and the checkpoints take {needed / 1e9:.1f} GB: "
            "make room, or lower --keep"
        )


def _settings(args: argparse.Namespace, batches: PretrainingBatches) -> PretrainingSettings:
    steps = args.steps
    if steps is None:
        steps = math.ceil(batches.steps(0) * (args.epochs or _EPOCHS) / args.accumulate)  # each has about as many
    warmup = min(steps // 10, _MOST_WARMUP) if args.warmup is None else args.warmup
    if warmup > steps:
        raise UsageError(f"--warmup {warmup} is longer than the whole training of {steps} steps")
    names = ("accumulate", "learning_rate", "weight_decay", "optimizer", "clip", "precision", "recompute", "sharded")
    same = {name: getattr(args, name) for name in (*names, "save_every", "seed")}
    return PretrainingSettings(steps=steps, warmup=warmup, **same)


def _say_wait() -> None:
    """To stderr, and not by print(), which may be what the signal interrupted."""
    os.write(2, b"bertfast: finishing this step, then saving\n")


def _say(record: Record) -> str:
    return (
        f"loss {record['loss']:.3f}, words {record['mlm_accuracy']:.1%}, pairs {record['nsp_accuracy']:.1%}, "
        f"{record['tokens'] / record['seconds']:,.0f} tokens/s"
    )


def _summarise(directory: Path) -> None:
    """The last tenth of the training in a table: a single step says little."""
    records = read_log(directory)
    last = records[-max(len(records) // 10, 1) :]
    mean = {key: math.fsum(record[key] for record in last) / len(last) for key in last[0]}
    tokens, seconds = (sum(record[key] for record in records) for key in ("tokens", "seconds"))
    print_table(
        [
            ("steps", f"{records[-1]['step']:,}"),
            ("tokens", f"{tokens:,}"),
            ("tokens/s", f"{tokens / seconds:,.0f}"),
            (
                f"masked words, the last {len(last)} steps",
                f"loss {mean['mlm_loss']:.3f}",
                f"{mean['mlm_accuracy']:.1%}",
            ),
            (
                f"next sentence, the last {len(last)} steps",
                f"loss {mean['nsp_loss']:.3f}",
                f"{mean['nsp_accuracy']:.1%}",
            ),
        ]
    )
    print(f"the model is in {directory}{os.sep}")

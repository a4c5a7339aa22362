"""Fine-tune a checkpoint for a task of your own: classify or score texts or pairs, tag words, answer questions.

  classification   a table with columns text (or sentence) and label
  pairs            a table with columns text_a, text_b (or sentence1, sentence2) and label
  regression       either of these, with numbers as labels
  ner              CoNLL (a word a line, its tag last, blank lines between sentences), or JSON lines: tokens, tags
  qa               SQuAD's JSON, v1.1 or v2

Tables are .csv, .tsv or JSON lines; everything may be .gz. After each epoch the model is evaluated, and the best one is
kept in the output directory, for transformers and for bertfast predict, with its metrics. Without --eval, a tenth of
FILE is held out for that.
"""

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from bertfast.cli.files import check_model
from bertfast.cli.numbers import integer, real
from bertfast.cli.output import UsageError, print_json, print_note, print_table, progress_bar
from bertfast.cli.task_models import load_model, load_tokenizer, longest
from bertfast.cli.tokens import quiet_transformers
from bertfast.train.extra import need
from bertfast.train.figures import draw_confusion
from bertfast.train.finetuning import Epoch, Examples, Settings, finetune, hold_out
from bertfast.train.interrupts import terminated_as_interrupted
from bertfast.train.runner import PRECISIONS, Runner
from bertfast.train.saving import CONFUSION_FILE, METRICS_FILE, save_model, without_nan, write_json, write_together
from bertfast.train.tasks import TASKS, Answers, Classification, Task

HELP = "fine-tune a checkpoint: classification, pairs, regression, named entities, question answering"

_QA_LENGTH = 384  # tokens of a window, as in BERT's own run on SQuAD, a third of which the windows share
_LARGEST_SEED = 2**63 - 1


class Interrupted(UsageError):
    """The user stopped the training: the message says what is left of it."""

    status = 130


def add_arguments(parser: argparse.ArgumentParser) -> None:
    default = Settings()
    parser.add_argument("model", metavar="MODEL", help="a directory, or the id of a hub repository")
    parser.add_argument("file", metavar="FILE", help="the rows to train on")
    parser.add_argument("--task", required=True, choices=TASKS)
    parser.add_argument("--output", required=True, metavar="DIR", help="a new or empty directory for the best model")
    parser.add_argument("--eval", metavar="FILE", help="the rows to evaluate on (default: a tenth of the others)")
    for kind in ("text", "pair", "label"):
        parser.add_argument(f"--{kind}-column", metavar="NAME", help=f"of the tables' {kind} column")
    positive = real(0, above=True)
    for name, kind, unit in (
        ("epochs", integer(1), "N"),
        ("batch-size", integer(1), "SEQUENCES"),
        ("learning-rate", positive, "X"),
        ("warmup", real(0, 1), "SHARE"),
        ("weight-decay", real(0), "X"),
        ("max-grad-norm", positive, "X"),
        ("seed", integer(0, _LARGEST_SEED), "N"),
    ):
        value = getattr(default, name.replace("-", "_"))
        parser.add_argument(f"--{name}", type=kind, default=value, metavar=unit, help=f"(default: {value})")
    parser.add_argument(
        "--max-length", type=integer(1), metavar="N", help="in tokens (default: the model's own, for qa 384)"
    )
    parser.add_argument(
        "--stride", type=integer(0), metavar="N", help="qa: tokens that windows share (default: a third)"
    )
    parser.add_argument("--max-answer-length", type=integer(1), metavar="N", help="qa: in tokens (default: 30)")
    parser.add_argument("--precision", choices=PRECISIONS, default="float32", help="bfloat16 is autocast")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")


def run(args: argparse.Namespace) -> int:
    task = _task(args)
    check_model(args.model)
    quiet_transformers()
    for module in (*task.packages, "matplotlib"):
        need(module, "fine-tuning")
    output = Path(args.output)
    _check_output(output)
    task, training, evaluation = _read(args, task)
    model, new = load_model(args.model, task, args.seed)
    tokenizer = load_tokenizer(args.model, task)
    length = longest(model, tokenizer, args.max_length, _QA_LENGTH if args.task == Answers.name else math.inf)
    task = replace(task, max_length=length)
    if isinstance(task, Answers) and args.stride is None:
        task = replace(task, stride=length // 3)
    runner = Runner(model, task.labels_of, tokenizer.pad_token_id or 0, args.precision)
    if runner.padded:
        print_note(f"batches are padded: {runner.padded}")
    if new:
        print_note(f"new, to be trained: {', '.join(new)}")
    examples = [
        _encode(task, rows, tokenizer, what) for rows, what in ((training, "training"), (evaluation, "evaluation"))
    ]
    settings = Settings(**{field.name: getattr(args, field.name) for field in fields(Settings)})
    report = {
        "task": task.name,
        "model": args.model,
        "training": {"file": args.file, "rows": len(training)},
        "evaluation": {"file": args.eval or args.file, "rows": len(evaluation), "held_out": args.eval is None},
        "settings": {**asdict(settings), "max_length": length, "precision": args.precision},
        "padded": runner.padded,
        "metric": task.metric,
        "epochs": [],
    }
    with terminated_as_interrupted():
        _train(runner, task, examples, settings, tokenizer, output, report)
    if args.json:
        print_json(without_nan(report))
    else:
        print(f"{output}: the best of {settings.epochs} epochs is number {report['best_epoch']}")
        print_table([(name, f"{value:.4f}") for name, value in report["metrics"].items()], indent="  ")
    return 0


def _task(args: argparse.Namespace) -> Task:
    """The task with what the command line says of it. UsageError for an option that is another task's."""
    kind = TASKS[args.task]
    names = ("text_column", "pair_column", "label_column", "stride", "max_answer_length")
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    known = {field.name for field in fields(kind)} - ({"pair_column"} if kind is Classification else set())
    if strange := [name for name in given if name not in known]:
        raise UsageError(f"--{strange[0].replace('_', '-')} is not for --task {args.task}")
    return kind(**given)


def _check_output(output: Path) -> None:
    try:
        if output.exists() and (not output.is_dir() or any(output.iterdir())):
            raise UsageError(f"{output} is there and not an empty directory: name a new one with --output")
    except OSError as error:
        raise UsageError(f"{output} cannot be written: {error.strerror}") from error


def _read(args: argparse.Namespace, task: Task) -> tuple[Task, Sequence[Any], Sequence[Any]]:
    """The task as its rows make it, the rows to train on and those to evaluate on."""
    rows = task.read(args.file)
    task = task.fit(rows)
    if args.eval is not None:
        return task, rows, task.read(args.eval)
    training, evaluation = hold_out(task, rows, args.seed)
    print_note(f"without --eval: {len(evaluation)} of the {len(rows)} rows are held out to evaluate on")
    return task, training, evaluation


def _encode(task: Task, rows: Sequence[Any], tokenizer: Any, what: str) -> Examples:
    features, changes = task.encode(rows, tokenizer)
    for change, count in changes.items():
        print_note(f"{what}: {count} {change}")
    return Examples(rows, features)


def _train(
    runner: Runner,
    task: Task,
    examples: Sequence[Examples],
    settings: Settings,
    tokenizer: Any,
    output: Path,
    report: dict[str, Any],
) -> None:
    """Train, tell of every epoch, keep the best model and complete the report."""
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{output} cannot be written: {error.strerror}") from error
    steps = math.ceil(len(examples[0].features) / settings.batch_size) * settings.epochs
    try:
        with progress_bar(steps, "fine-tuning", unit="step") as bar:
            for epoch in finetune(runner, task, *examples, settings, lambda loss: bar.update()):
                _keep(epoch, runner, task, examples[1].rows, tokenizer, output, report)
                metric = f"{task.metric} {epoch.metrics[task.metric]:.4f}"
                saved = ", the best so far" if epoch.best else ""
                line = f"epoch {epoch.number} of {settings.epochs}: loss {epoch.loss:.4f}, {metric}{saved}"
                bar.write(line, file=sys.stderr)
    except KeyboardInterrupt:
        best = report.get("best_epoch")
        left = f"{output} holds the best model so far, of epoch {best}" if best else "nothing was saved yet"
        raise Interrupted(f"interrupted; {left}") from None


def _keep(
    epoch: Epoch, runner: Runner, task: Task, rows: Sequence[Any], tokenizer: Any, output: Path, report: dict[str, Any]
) -> None:
    """Write what the epoch has brought, its model too where that is the best, and then the report is told of it."""
    told = {**report, "epochs": [*report["epochs"], {"epoch": epoch.number, "loss": epoch.loss, **epoch.metrics}]}
    if epoch.best:
        told |= {"best_epoch": epoch.number, "metrics": epoch.metrics}

    def write(folder: Path) -> None:
        if epoch.best:
            save_model(folder, runner.model, tokenizer, task)
            if (matrix := task.confusion(rows, epoch.predictions)) is not None:
                draw_confusion(matrix, task.labels, folder / CONFUSION_FILE)
        write_json(folder / METRICS_FILE, told)

    write_together(output, write)
    report |= told

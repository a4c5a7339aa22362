"""The proof that training learns, on real text that every machine has: the documentation of Python's own library.

    python -m benchmarks.learning [--minutes M] [--output FILE]

Pre-trains a small BERT on it with `bertfast pretrain`, fine-tunes that with `bertfast finetune` to tell sentences as
they were written from those whose words were shuffled, beside the same model with random weights, and has `bertfast
fill-mask` complete phrases. What it is asked about was in no text that it was trained on. Exits with 1 where it has not
learned what it should have; appends an "environment" and a "learning" record to --output.
"""

import argparse
import csv
import json
import logging
import math
import random
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from benchmarks.results import Writer
from bertfast import BertConfig, BertForPreTraining, machine, texts
from bertfast.cli.fill_mask import load_masked_lm, predict
from bertfast.cli.tokens import load_tokenizer
from bertfast.train.corpus import Corpus

VOCABULARY, TOKENS, PROBE = 2000, 1024, 12  # PROBE: steps that tell how fast this machine is
# Tokens of a pair. What stands beside a word is learned place by place: the fewer places, the sooner.
MAX_LENGTH, WARMUP = 20, 300
RECIPE = (
    *("--size", "mini", "--dropout", "0", "--learning-rate", "1e-3", "--save-every", "100000"),
    *("--warmup", str(WARMUP)),
    *("--masking", "token", "--max-length", str(MAX_LENGTH), "--precision", "bfloat16"),
    *("--vocabulary-size", str(VOCABULARY), "--tokens-per-batch", str(TOKENS)),
)
# Packages that sentences are held out of; how many of each to train on, and as many to be asked about; their most
# words, which are about MAX_LENGTH tokens.
PACKAGES, ROWS, WORDS = 10, 80, 16
FINE_TUNING = (
    *("--task", "classification", "--epochs", "6", "--batch-size", "16", "--learning-rate", "3e-4"),
    *("--max-length", str(MAX_LENGTH)),
)
# What has to be reached: below what frequencies say, in nats; share of pairs; of PHRASES.
MLM_LEAD, NSP_ACCURACY, PHRASES_RIGHT = 0.5, 0.6, 5
TOP = 10
# Of a kind that the documentation is full of, but not of it; with the words that fit.
PHRASES = {
    "The function will [MASK] a list with all the names that were found.": ("return",),
    "If the file does not [MASK], an error is raised.": ("exist",),
    "Return [MASK] if the string is empty and False otherwise.": ("true",),
    "It raises a ValueError [MASK] the argument is negative.": ("if", "when"),
    "This class can be used to [MASK] a new object.": ("create", "make"),
    "The default value of the second [MASK] is None.": ("argument", "parameter"),
    "Read a line from the [MASK] and return it.": ("file", "stream"),
    "This method must be [MASK] by subclasses.": ("overridden", "implemented", "defined"),
}


class Held(NamedTuple):
    """A sentence that no model has been trained on, and the package whose documentation it is of."""

    text: str
    package: str


class Claims:
    """Counts those that do not hold."""

    def __init__(self) -> None:
        self.failed = 0

    def check(self, holds: bool, words: str) -> None:
        """Print what was to be shown, and whether it was."""
        self.failed += not holds
        print(f"  {'yes' if holds else 'NO '}  {words}", flush=True)


def bertfast(*arguments: str | Path) -> str:
    """What the command prints. Ends this program where it fails."""
    command = [sys.executable, "-m", "bertfast", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}: {done.stderr}")
    return done.stdout


def divide(draw: random.Random) -> tuple[list[list[str]], list[Held], list[Held]]:
    """Documents to pre-train on, rows to fine-tune on, and rows to ask about, which have no sentence in common."""
    documents = [d for d in texts.documents(texts.library()) if d.name != "LICENSE"]
    by_package = defaultdict(list)
    for document in documents:
        by_package[document.name.split("/")[0]] += [s for s in document.sentences if 6 <= len(s.split()) <= WORDS]
    largest = sorted(by_package, key=lambda name: (-len(by_package[name]), name))[:PACKAGES]
    rows: list[list[Held]] = [[], []]
    for package in largest:
        drawn = draw.sample(by_package[package], 2 * ROWS)
        for kind, part in zip(rows, (drawn[:ROWS], drawn[ROWS:]), strict=True):
            kind += [Held(text, package) for text in part]
    out = {row.text for kind in rows for row in kind}
    left = [[sentence for sentence in document.sentences if sentence not in out] for document in documents]
    return [document for document in left if document], *rows


def pretrain(folder: Path, documents: Sequence[Sequence[str]], minutes: float, claims: Claims) -> dict[str, Any]:
    """A model in `folder`/model, from as many steps as the minutes have room for."""
    text, model = folder / "text.txt", folder / "model"
    text.write_text("\n\n".join("\n".join(document) for document in documents) + "\n", encoding="utf-8")
    bertfast("pretrain", text, "--output", folder / "probe", *RECIPE, "--steps", str(PROBE), "--warmup", "0")
    a_step = statistics.median(record["seconds"] for record in read(folder / "probe" / "log.jsonl"))
    steps = max(round(60 * minutes / a_step), 2 * WARMUP)
    words = sum(len(sentence.split()) for document in documents for sentence in document)
    print(f"pre-training on {words} words of {len(documents)} documents: {steps} steps of {TOKENS} tokens", flush=True)
    began = time.perf_counter()
    bertfast("pretrain", text, "--output", model, *RECIPE, "--steps", str(steps))
    log = read(model / "log.jsonl")
    last = log[-max(steps // 10, 1) :]
    found = {name: statistics.fmean(r[name] for r in last) for name in ("mlm_loss", "mlm_accuracy", "nsp_accuracy")}
    first, blind, frequencies = log[0]["mlm_loss"], math.log(VOCABULARY), entropy(model / "corpus")
    claims.check(abs(first - blind) < 0.3, f"the loss begins at ln({VOCABULARY}) = {blind:.2f}: {first:.2f}")
    claims.check(
        found["mlm_loss"] < frequencies - MLM_LEAD,
        f"it falls {MLM_LEAD} below {frequencies:.2f}, what words' frequencies alone say: {found['mlm_loss']:.2f}",
    )
    claims.check(
        found["nsp_accuracy"] > NSP_ACCURACY,
        f"next sentences are told from others in more than {NSP_ACCURACY:.0%} of cases: {found['nsp_accuracy']:.1%}",
    )
    tokens = sum(record["tokens"] for record in log)
    speed = tokens / (time.perf_counter() - began)
    print(f"       masked words right: {found['mlm_accuracy']:.1%}; {speed:.0f} tokens/s", flush=True)
    losses = {"first_mlm_loss": first, "entropy": frequencies}
    return {"words": words, "steps": steps, "tokens": tokens, "tokens_per_s": speed, **losses, **found}


def entropy(folder: Path) -> float:
    """Of the tokens of the one corpus in this folder, in nats: the loss of who knows how often each occurs."""
    [corpus] = folder.iterdir()
    counts = np.bincount(Corpus.open(corpus).tokens)
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log(shares)).sum())


def read(path: Path) -> list[dict[str, Any]]:
    """The lines of a log."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def finetune(folder: Path, training: Sequence[Held], asked: Sequence[Held], claims: Claims) -> dict[str, Any]:
    """How often the pre-trained model, and one with random weights, know whether words were shuffled."""
    print(f"fine-tuning: were a sentence's words shuffled? {len(training)} rows, {len(asked)} asked", flush=True)
    draw = random.Random(1)
    for name, rows in (("training.csv", training), ("asked.csv", asked)):
        with (folder / name).open("w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([("text", "label"), *every_other_shuffled(rows, draw)])
    torch.manual_seed(0)
    shutil.copytree(folder / "model", folder / "random", ignore=shutil.ignore_patterns("checkpoint*", "corpus", "logs"))
    BertForPreTraining(BertConfig.from_json(folder / "model" / "config.json")).save_pretrained(folder / "random")
    accuracy = {}
    for weights in ("model", "random"):
        told = bertfast(
            *("finetune", folder / weights, folder / "training.csv", "--eval", folder / "asked.csv"),
            *("--output", folder / f"tuned-{weights}", "--json", *FINE_TUNING),
        )
        accuracy[weights] = json.loads(told)["metrics"]["accuracy"]
    lead = accuracy["model"] - accuracy["random"]
    error = math.sqrt(sum(p * (1 - p) / len(asked) for p in accuracy.values()))
    claims.check(
        lead > 3 * error,
        f"pre-training pays: {accuracy['model']:.1%} right, {accuracy['random']:.1%} from random weights, "
        "50% by chance",
    )
    return {"accuracy": accuracy["model"], "accuracy_from_random": accuracy["random"]}


def every_other_shuffled(rows: Sequence[Held], draw: random.Random) -> list[tuple[str, str]]:
    """The sentences, every second one with its words in another order, and which they are."""
    found = []
    for number, row in enumerate(rows):
        words = row.text.split()
        shuffled = list(words)
        while number % 2 and shuffled == words:
            draw.shuffle(shuffled)
        found.append((" ".join(shuffled), "shuffled" if number % 2 else "written"))
    return found


def fill(folder: Path, documents: Iterable[Sequence[str]], asked: Sequence[Held], claims: Claims) -> dict[str, Any]:
    """How often a word that fits is among the first TOP, in phrases and in sentences that were held out."""
    print(f"filling masks: is a word that fits among the first {TOP}?")
    right = 0
    for phrase, fitting in PHRASES.items():
        told = json.loads(bertfast("fill-mask", folder / "model", phrase, "--top", str(TOP), "--json"))
        words = [word["token"] for word in told["masks"][0]]
        right += bool(set(words) & set(fitting))
        print(f"       {phrase} {', '.join(words[:5])}", flush=True)
    claims.check(right >= PHRASES_RIGHT, f"in {PHRASES_RIGHT} of {len(PHRASES)} phrases or more: {right}")
    counts = Counter(word for document in documents for sentence in document for word in plain_words(sentence))
    frequent = {word for word, _ in counts.most_common(TOP)}
    logging.getLogger("bertfast").setLevel(logging.ERROR)  # of the weights that filling masks has no place for
    model, tokenizer = load_masked_lm(str(folder / "model")), load_tokenizer(str(folder / "model"))
    draw, hits, guesses = random.Random(0), 0, 0
    for row in asked:
        word = draw.choice(plain_words(row.text) or ["the"])
        sentence = re.sub(rf"\b{word}\b", "[MASK]", row.text.lower(), count=1).replace("[mask]", "[MASK]")
        [words] = predict(model, tokenizer, sentence, TOP)[:1]
        hits += word in {token for token, _ in words}
        guesses += word in frequent
    share, blind = hits / len(asked), guesses / len(asked)
    claims.check(
        share > 2 * blind,
        f"in held-out sentences twice as often as one of the {TOP} most frequent words is it: {share:.1%}, {blind:.1%}",
    )
    return {"phrases": right, "held_out_words": share, "frequent_words": blind}


def plain_words(sentence: str) -> list[str]:
    """Its words of four letters and more, which are mostly not of grammar's."""
    return re.findall(r"(?<![\w.'-])[a-z]{4,}(?![\w'-]|\.\w)", sentence.lower())


def main(arguments: list[str] | None = None) -> int:
    """Train, ask, print; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.learning", description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=8.3, metavar="M", help="of pre-training (default: 8.3)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="JSON lines to append to")
    options = parser.parse_args(arguments)
    claims, began = Claims(), time.perf_counter()
    documents, training, asked = divide(random.Random(0))
    with tempfile.TemporaryDirectory(prefix="bertfast-learning-") as name:
        folder = Path(name)
        found = pretrain(folder, documents, options.minutes, claims)
        found |= finetune(folder, training, asked, claims)
        found |= fill(folder, documents, asked, claims)
    seconds = time.perf_counter() - began
    print(f"{f'{claims.failed} claims do not hold' if claims.failed else 'all claims hold'}, after {seconds:.0f} s")
    if options.output is not None:
        writer = Writer(options.output)
        writer.write("environment", **machine.environment())
        writer.write("learning", benchmark="learning", failed=claims.failed, seconds=seconds, **found)
    return 1 if claims.failed else 0


if __name__ == "__main__":
    sys.exit(main())

"""What a model that bertfast finetune has written says of new rows: one JSON object a row, in their order.

FILE is as for training, labels aside: they are not looked at, unless --metrics asks how right the predictions are.

  classification, pairs   label, score (its probability), scores (of all labels)
  regression              value
  ner                     tokens, tags, entities: type, start, end (words[start:end]), text, score
  qa                      id, answer, start, end (context[start:end]), score; no answer is "" without a place
"""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from typing import Any

from bertfast.cli.numbers import integer
from bertfast.cli.output import UsageError, print_note, print_table, progress_bar, replacing
from bertfast.cli.task_models import load_model, load_task, load_tokenizer
from bertfast.cli.tokens import quiet_transformers
from bertfast.train.extra import need
from bertfast.train.prediction import predict
from bertfast.train.runner import PRECISIONS, Runner

HELP = "predict with a model that finetune has written"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="the directory that bertfast finetune has written")
    parser.add_argument("file", metavar="FILE", help="the rows to predict")
    parser.add_argument("--output", metavar="FILE", help="the JSON lines to write (default: standard output)")
    parser.add_argument("--metrics", action="store_true", help="FILE has labels: print how right the predictions are")
    parser.add_argument("--batch-size", type=integer(1), default=32, metavar="N")
    parser.add_argument("--precision", choices=PRECISIONS, default="float32", help="bfloat16 is autocast")


def run(args: argparse.Namespace) -> int:
    if args.metrics and args.output is None:
        raise UsageError("--metrics prints where the predictions go without --output: name a file for them")
    task = load_task(args.model)
    quiet_transformers()
    for module in task.packages if args.metrics or task.labels_of == "token" else ():
        need(module, "this prediction")
    rows = task.read(args.file, labelled=args.metrics)
    model, new = load_model(args.model, task, 0)
    if new:
        raise UsageError(f"{args.model} lacks {', '.join(new)}: it was not fine-tuned for {task.name}")
    tokenizer = load_tokenizer(args.model, task)
    runner = Runner(model, task.labels_of, tokenizer.pad_token_id or 0, args.precision)
    if runner.padded:
        print_note(f"batches are padded: {runner.padded}")
    changes: Counter[str] = Counter()
    destination = replacing(args.output) if args.output else nullcontext(sys.stdout)
    with destination as file, progress_bar(len(rows), "predicting", unit="row") as bar:
        predictions = predict(runner, task, rows, tokenizer, args.batch_size, changes, bar.update)
        predictions = _write(predictions, file, keep=args.metrics)
    for change, count in changes.items():
        print_note(f"{count} {change}")
    if args.output:
        print(f"{args.output}: {len(rows)} predictions")
    if args.metrics:
        print_table([(name, f"{value:.4f}") for name, value in task.measure(rows, predictions).items()], indent="  ")
    return 0


def _write(predictions: Iterable[dict[str, Any]], file: Any, keep: bool) -> Sequence[dict[str, Any]]:
    """Write a line a prediction, and return those that are to be kept."""
    kept = []
    for prediction in predictions:
        line = json.dumps(prediction, ensure_ascii=False) + "\n"
        file.write(line if file is sys.stdout else line.encode())
        if keep:
            kept.append(prediction)
    return kept

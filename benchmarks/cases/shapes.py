"""The shapes of the op benches: BERT's models by the batches that they are run on."""

from typing import NamedTuple

from benchmarks.workloads import ragged_lengths

HIDDEN_AND_HEADS = {"base": (768, 12), "large": (1024, 16), "minilm": (384, 12)}
# Few tokens, full batches, and ragged ones, whose lengths are log-normal.
BATCHES = {
    "1x16": (16,),
    "1x128": (128,),
    "8x128": (128,) * 8,
    "32x128": (128,) * 32,
    "32x512": (512,) * 32,
    "8x128 ragged": ragged_lengths(8, 128, 0.42),
    "32x128 ragged": ragged_lengths(32, 128, 0.42),
    "64x512 ragged": ragged_lengths(64, 512, 0.4),
}


class Shape(NamedTuple):
    """A batch of a model."""

    batch: str
    hidden: int
    heads: int
    lengths: tuple[int, ...]

    @property
    def tokens(self) -> int:
        """Valid tokens."""
        return sum(self.lengths)

    @property
    def head_size(self) -> int:
        return self.hidden // self.heads

    @property
    def intermediate(self) -> int:
        """Columns between the two projections of the feed-forward block."""
        return 4 * self.hidden


def _shapes(*pairs: tuple[str, str]) -> list[Shape]:
    return [Shape(batch, *HIDDEN_AND_HEADS[model], BATCHES[batch]) for model, batch in pairs]


# By device and set.
SHAPES = {
    "cpu": {
        "quick": _shapes(("base", "1x16"), ("minilm", "8x128 ragged")),
        "full": _shapes(
            ("base", "1x16"),
            ("base", "1x128"),
            ("base", "8x128"),
            ("base", "32x128 ragged"),
            ("large", "1x16"),
            ("large", "8x128"),
            ("minilm", "1x16"),
            ("minilm", "32x128 ragged"),
        ),
    },
    "cuda": {
        "quick": _shapes(("base", "1x128"), ("base", "64x512 ragged")),
        "full": _shapes(
            ("base", "1x16"),
            ("base", "1x128"),
            ("base", "32x128"),
            ("base", "32x512"),
            ("base", "64x512 ragged"),
            ("large", "1x128"),
            ("large", "32x512"),
            ("minilm", "1x128"),
            ("minilm", "64x512 ragged"),
        ),
    },
}
DTYPES = {"cpu": ("float32", "bfloat16"), "cuda": ("bfloat16", "float16", "float32")}  # that its kernels compute

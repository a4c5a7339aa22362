"""What a release has to reach on a CPU: least speed-ups over Hugging Face with sdpa, least shares of the roofline."""

from typing import NamedTuple

PEER = "bertfast"
PRECISIONS = ("float32", "bfloat16", "int8")


class Goal(NamedTuple):
    """The least speed-up. over: the precision that Hugging Face computes in."""

    speedup: float
    over: str


Key = tuple[str, str, str]  # workload, model, precision

# In PRECISIONS, all of them over Hugging Face in float32: precision is a means, and what it buys is compared with
# nothing done at all.
INFERENCE: dict[tuple[str, str], tuple[float, float, float]] = {
    ("1x16", "base"): (3.0, 4.8, 7.5),
    ("1x128", "base"): (1.65, 3.2, 5.3),
    ("8x128", "base"): (1.35, 2.7, 4.8),
    ("32x128 ragged", "base"): (3.3, 6.8, 11.0),
    ("16x512 ragged", "base"): (3.4, 7.0, 10.0),
    ("64 sentences", "minilm"): (4.0, 8.5, 13.0),
}
# Over Hugging Face in the same precision, in which both keep float32 weights.
TRAINING: dict[Key, float] = {
    ("pretrain 8x128", "base", "float32"): 1.3,
    ("pretrain 8x128", "base", "bfloat16"): 1.3,
    ("pretrain 32x128 ragged", "base", "float32"): 2.8,
    ("pretrain 32x128 ragged", "base", "bfloat16"): 2.8,
}
GOALS: dict[Key, Goal] = {
    **{
        (*case, precision): Goal(least, "float32")
        for case, all_three in INFERENCE.items()
        for precision, least in zip(PRECISIONS, all_three, strict=True)
    },
    **{key: Goal(least, key[2]) for key, least in TRAINING.items()},
}
# Of the floor of `benchmarks.roofline`, which is that of the valid tokens.
ROOFLINE: dict[Key, float] = {
    ("8x128", "base", "float32"): 0.85,
    ("8x128", "base", "bfloat16"): 0.85,
    ("8x128", "base", "int8"): 0.6,
}

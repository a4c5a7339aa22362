"""The cases of the GPU pass: all that it times, and the few small ones that show whether everything runs."""

from collections.abc import Iterator

from benchmarks.cases.attention import varlen_attention
from benchmarks.cases.case import BACKWARD, BOTH, FORWARD, Case
from benchmarks.cases.embedding import embed_layer_norm
from benchmarks.cases.feed_forward import feed_forward
from benchmarks.cases.gelu import bias_gelu
from benchmarks.cases.linear import projection, qkv
from benchmarks.cases.loss import masked_lm_loss
from benchmarks.cases.masked_attention import masked_attention
from benchmarks.cases.norm import residual_layer_norm
from benchmarks.workloads import ragged_lengths

MANY = 16384  # tokens, which fill any card


def small(device: str) -> list[Case]:
    """Each op once, in both directions, as small as it shows something."""
    short = (33, 1, 0, 64, 7)
    made = [
        bias_gelu(37, 96, "float32", BOTH, device),
        residual_layer_norm(37, 96, "float32", BOTH, device, dropout=True),
        embed_layer_norm(37, 96, "float32", BOTH, device),
        projection(37, 72, 96, "gelu", "float32", device),
        qkv(37, 48, "float32", device),
        varlen_attention(short, 2, 32, "float32", BOTH, device, "ragged", dropout=True),
        masked_attention((33, 1, 64, 7), 2, 32, "float32", BOTH, device, "ragged"),
        feed_forward(37, 48, 96, "float32", BOTH, device),
        masked_lm_loss(37, 48, "float32", BOTH, device, vocabulary=97),
    ]
    if device == "cpu":
        return made
    half = [
        bias_gelu(37, 96, "bfloat16", BOTH, device),
        residual_layer_norm(37, 96, "float16", BOTH, device),
        projection(130, 136, 96, "gelu", "bfloat16", device),
        varlen_attention(short, 2, 64, "bfloat16", BOTH, device, "ragged", dropout=True),
        varlen_attention((300, 17), 2, 64, "float16", BOTH, device, "long"),
        masked_attention((33, 1, 64, 7), 2, 64, "bfloat16", BOTH, device, "ragged"),
    ]
    return made + half


def all_cases(device: str, quick: bool) -> Iterator[Case]:
    """The most telling first: headlines, attention by length, then other dtypes, sizes and models."""
    if quick:
        yield from small(device)
        yield bias_gelu(40, 96, "bfloat16", FORWARD, device, headline=True)
        return
    half = "bfloat16"
    for direction in (FORWARD, BACKWARD):
        yield residual_layer_norm(MANY, 768, half, direction, device, headline=True)
        yield bias_gelu(MANY, 3072, half, direction, device, headline=True)
    ragged = ragged_lengths(64, 512, 0.4)
    for length in (128, 512, 64, 256, 384, 32):
        yield _full(length, half, FORWARD, device)
    yield varlen_attention(ragged, 12, 64, half, FORWARD, device, "64x512 40% filled")
    yield projection(MANY, 3072, 768, "gelu", half, device, headline=True)
    yield residual_layer_norm(MANY, 768, half, BACKWARD, device, dropout=True, headline=True)
    for length in (128, 512, 256):
        yield _full(length, half, BOTH, device, dropout=True)
    yield varlen_attention(ragged, 12, 64, half, BOTH, device, "64x512 40% filled", dropout=True)
    for direction in (FORWARD, BACKWARD):
        yield embed_layer_norm(MANY, 768, half, direction, device, headline=True)
    for direction in (FORWARD, BACKWARD):
        yield feed_forward(MANY, 768, 3072, half, direction, device, headline=True)
        yield masked_lm_loss(MANY, 768, half, direction, device, headline=True)
    yield qkv(MANY, 768, half, device)
    yield from _other_linears(half, device)
    yield residual_layer_norm(MANY, 768, half, FORWARD, device, dropout=True)
    for length in (64, 128):
        yield _full(length, half, FORWARD, device, size=32)
    yield _full(384, half, FORWARD, device, heads=16)
    for direction in (FORWARD, BACKWARD):
        yield masked_attention(ragged, 12, 64, half, direction, device, "64x512 40% filled")
    for dtype in ("float16", "float32"):
        for length in (128, 512):
            yield _full(length, dtype, FORWARD, device)
        for direction in (FORWARD, BACKWARD):
            yield residual_layer_norm(MANY, 768, dtype, direction, device)
            yield bias_gelu(MANY, 3072, dtype, direction, device)
            yield embed_layer_norm(MANY, 768, dtype, direction, device)
    for length in (512, 128):
        yield _full(length, half, BACKWARD, device)
    for tokens, hidden in ((128, 768), (1024, 768), (65536, 768), (MANY, 1024), (MANY, 384)):
        for direction in (FORWARD, BACKWARD):
            yield residual_layer_norm(tokens, hidden, half, direction, device)
            yield bias_gelu(tokens, 4 * hidden, half, direction, device)
        yield embed_layer_norm(tokens, hidden, half, FORWARD, device)


def _full(
    length: int, dtype: str, direction: str, device: str, heads: int = 12, size: int = 64, dropout: bool = False
) -> Case:
    """varlen_attention of MANY tokens in sequences of one length."""
    count = MANY // length
    return varlen_attention((length,) * count, heads, size, dtype, direction, device, f"{count}x{length}", dropout)


def _other_linears(dtype: str, device: str) -> Iterator[Case]:
    """Up-projections by tokens and model, where the epilogue could pay, and the other GEMMs, where it hardly can."""
    for tokens in (128, 1024, 4096, 65536):
        yield projection(tokens, 3072, 768, "gelu", dtype, device)
    yield projection(MANY, 4096, 1024, "gelu", dtype, device)
    yield projection(MANY, 1536, 384, "gelu", dtype, device)
    for columns, depth in ((2304, 768), (768, 3072)):
        yield projection(MANY, columns, depth, "none", dtype, device)
    for tokens in (128, 1024):
        yield qkv(tokens, 768, dtype, device)

"""How many bytes the Triton kernels ask for: little more than each tensor once, counted by the interpreter."""

import pytest
import torch

pytest.importorskip("interpreter", reason="needs triton, interpreting", exc_type=ImportError)
import interpreter

from bertfast.kernels import embedding, gelu, hardware, norm

MOST = 1.2  # of the fewest
ROWS, EPS, P = 256, 1e-12, 0.1
DTYPES = [torch.bfloat16, torch.float32]


@pytest.fixture(autouse=True)
def small_gpu():
    """Of few multiprocessors, so that a program has as many rows to go through as on a large one with a real batch."""
    with hardware.pretend(90, 2):
        yield


def moved(call) -> tuple[int, list[interpreter.Launch]]:
    """The bytes that all kernels of the call ask for and write."""
    with interpreter.launches() as seen:
        call()
    assert seen and not any(launch.atomic for launch in seen)
    return sum(sum(launch.loaded.values()) + sum(launch.stored.values()) for launch in seen), seen


def check(call, *tensors) -> None:
    """The call moves little more than these tensors, once each."""
    total, seen = moved(call)
    fewest = sum(t.nbytes for t in tensors)
    assert fewest <= total <= MOST * fewest, "\n".join(map(str, seen))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [1536, 3072])
def test_bias_gelu(columns, dtype):
    x, bias = torch.randn(ROWS, columns).to(dtype), torch.randn(columns).to(dtype)
    check(lambda: gelu.bias_gelu_fwd(x, bias, "none"), x, bias, x)
    check(lambda: gelu.bias_gelu_bwd(x, x, bias, "none"), x, x, bias, x, bias)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hidden", [384, 768, 1024])
def test_residual_layer_norm(hidden, dtype):
    x, vector = torch.randn(ROWS, hidden).to(dtype), torch.randn(hidden).to(dtype)
    row, seed = torch.ones(ROWS), torch.tensor([3])
    vectors = (vector,) * 3
    check(lambda: norm.residual_layer_norm_fwd(x, x, *vectors, EPS, 0.0, None, False), x, x, *vectors, x)
    check(lambda: norm.residual_layer_norm_fwd(x, x, *vectors, EPS, P, seed, True), x, x, *vectors, x, row, row)
    inputs, outputs = (x, x, x, vector, vector, row, row), (x, x, *vectors)
    check(lambda: norm.residual_layer_norm_bwd(*inputs, EPS, P, seed), *inputs, *outputs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hidden", [384, 768])
def test_embed_layer_norm(hidden, dtype):
    tables = [torch.randn(rows, hidden).to(dtype) for rows in (500, 64, 2)]
    vectors = [torch.randn(hidden).to(dtype) for _ in range(2)]
    ids = [torch.randint(0, len(table), (ROWS,)) for table in tables]
    rows = [table[i] for table, i in zip(tables, ids, strict=True)]
    out = rows[0]
    check(lambda: embedding.embed_layer_norm_fwd(ids, [*tables, *vectors], EPS, 0.0, None, False), *ids, *rows, out)


def test_bytes_that_are_too_many_are_found():
    x, bias = torch.randn(8, 256), torch.randn(256)
    with pytest.raises(AssertionError, match="_bias_gelu_fwd_kernel"):
        check(lambda: [gelu.bias_gelu_fwd(x, bias, "none") for _ in range(2)], x, bias, x)

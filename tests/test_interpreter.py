"""Triton's interpreter as it is repaired and watched here: bfloat16 as PyTorch computes it, and every kind of mistake
that it is to find, made once."""

import pytest
import torch

pytest.importorskip("interpreter", reason="needs triton, interpreting", exc_type=ImportError)
import interpreter
import triton
import triton.language as tl
from triton.runtime.errors import InterpreterError

HALVES = [torch.bfloat16, torch.float16]


@triton.jit
def _arithmetic_kernel(x, y, out, N: tl.constexpr):
    i = tl.arange(0, N)
    a, b = tl.load(x + i), tl.load(y + i)
    tl.store(out + i, a + b)
    tl.store(out + N + i, a - b)
    tl.store(out + 2 * N + i, a * b)
    tl.store(out + 3 * N + i, -a)
    tl.store(out + 4 * N + i, tl.where(a < b, a, b))
    tl.store(out + 5 * N + i, tl.maximum(a, b))
    tl.store(out + 6 * N + i, tl.abs(a))
    tl.store(out + 7 * N + i, tl.where((a == b) | (a != a) | (a >= b), b, a))
    tl.store(out + 8 * N + i, tl.clamp(a, -1.0, 1.0))


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_arithmetic(dtype):
    x, y = 100 * torch.randn(2, 256).to(dtype)
    y[:64] = x[:64]
    x[0], y[1] = float("nan"), float("nan")
    out = torch.empty(9, 256, dtype=dtype)
    _arithmetic_kernel[(1,)](x, y, out, 256)
    expected = torch.stack((x + y, x - y, x * y, -x, torch.where(x < y, x, y), torch.fmax(x, y), x.abs()))
    torch.testing.assert_close(out[:7], expected, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(out[7], torch.where((x >= y) | x.isnan(), y, x), rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(out[8][2:], x.clamp(-1, 1)[2:], rtol=0, atol=0)


@triton.jit
def _cast_kernel(x, out, back, N: tl.constexpr):
    i = tl.arange(0, N)
    narrow = tl.load(x + i).to(out.dtype.element_ty)
    tl.store(out + i, narrow)
    tl.store(back + i, narrow.to(tl.float32))


@pytest.mark.parametrize("dtype", HALVES)
def test_casts_round_to_the_nearest_even(dtype):
    # Every upper half of a float32, with the halfway point and what lies beside it.
    words = torch.arange(2**16, dtype=torch.int32)[:, None] << 16
    offsets = torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0x1000, 0xFFF, 0x1001], dtype=torch.int32)
    numbers = (words + offsets).flatten().view(torch.float32)
    out, back = torch.empty(numbers.shape, dtype=dtype), torch.empty(numbers.shape)
    _cast_kernel[(1,)](numbers, out, back, numbers.numel())
    torch.testing.assert_close(out, numbers.to(dtype), rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(back, numbers.to(dtype).float(), rtol=0, atol=0, equal_nan=True)


@triton.jit
def _constant_kernel(x, out, n, N: tl.constexpr):
    i = tl.arange(0, N)
    y = tl.load(x + i, mask=i < n, other=0.3)
    tl.store(out + i, y * 1.7)
    tl.store(out + N + i, tl.full((N,), 0.3, out.dtype.element_ty))


@pytest.mark.parametrize("dtype", HALVES)
def test_constants_are_numbers_of_the_dtype(dtype):
    x, out = torch.randn(16).to(dtype), torch.empty(2, 16, dtype=dtype)
    _constant_kernel[(1,)](x, out, 9, 16)
    filled = torch.cat((x[:9], torch.full((7,), 0.3, dtype=dtype)))
    torch.testing.assert_close(out[0], filled * torch.tensor(1.7, dtype=dtype), rtol=0, atol=0)
    assert (out[1] == torch.tensor(0.3, dtype=dtype)).all()


@triton.jit
def _dot_kernel(a, b, c, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, PRECISION: tl.constexpr):
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    x, y = tl.load(a + m[:, None] * K + k[None, :]), tl.load(b + k[:, None] * N + n[None, :])
    tl.store(c + m[:, None] * N + n[None, :], tl.dot(x, y, input_precision=PRECISION))


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_dot(dtype):
    a, b, c = torch.randn(16, 64).to(dtype), torch.randn(64, 32).to(dtype), torch.empty(16, 32)
    _dot_kernel[(1,)](a, b, c, 16, 32, 64, "ieee")
    torch.testing.assert_close(c.double(), a.double() @ b.double(), rtol=1e-5, atol=1e-5)


def test_tf32_is_less_exact_than_ieee_and_no_worse_than_it_has_to_be():
    a, b, c = torch.randn(16, 64), torch.randn(64, 32), torch.empty(16, 32)
    _dot_kernel[(1,)](a, b, c, 16, 32, 64, "tf32")
    error = (c.double() - a.double() @ b.double()).abs() / (a.double().abs() @ b.double().abs())
    assert 1e-6 < error.max() < 2**-10


@triton.jit
def _reduce_kernel(x, sums, largest, where, M: tl.constexpr, N: tl.constexpr):
    i, j = tl.arange(0, M), tl.arange(0, N)
    a = tl.load(x + i[:, None] * N + j[None, :])
    tl.store(sums + i, tl.sum(a, axis=1))
    m, w = tl.max(a, axis=1, return_indices=True)
    tl.store(largest + i, m)
    tl.store(where + i, w)
    tl.store(sums + M, tl.sum(tl.sum(a, axis=1), axis=0))
    tl.store(largest + M, tl.max(a))


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_reductions(dtype):
    x = torch.randn(8, 128).to(dtype)
    sums, largest = torch.empty(2, 9, dtype=dtype)
    where = torch.empty(8, dtype=torch.int32)
    _reduce_kernel[(1,)](x, sums, largest, where, 8, 128)
    # numpy adds float16 up in float16.
    loose = {"rtol": 0.01, "atol": 0.05} if dtype == torch.float16 else {"rtol": 1.3e-6, "atol": 1e-5}
    torch.testing.assert_close(sums[:8], x.sum(1), **(loose if dtype != torch.bfloat16 else {"rtol": 0, "atol": 0}))
    torch.testing.assert_close(sums[8], sums[:8].float().sum().to(dtype), **loose)
    assert torch.equal(largest[:8], x.amax(1)) and largest[8] == x.max()
    assert torch.equal(x.gather(1, where[:, None].long())[:, 0], x.amax(1))


@triton.jit
def _scan_kernel(x, out, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out + i, tl.cumsum(tl.load(x + i), axis=0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scans(dtype):
    x = torch.randint(-3, 4, (64,)).to(dtype)  # exact in either
    out = torch.empty_like(x)
    _scan_kernel[(1,)](x, out, 64)
    assert torch.equal(out, x.float().cumsum(0).to(dtype))


@triton.jit
def _fma_kernel(x, y, z, out, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out + i, tl.fma(tl.load(x + i), tl.load(y + i), tl.load(z + i)))


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_fma_rounds_once(dtype):
    x, y, z = torch.randn(3, 4096).to(dtype)
    z = -(x * y)  # what is left is the rounding of the product
    out = torch.empty_like(x)
    _fma_kernel[(1,)](x, y, z, out, 4096)
    exact = x.double() * y.double() + z.double()
    torch.testing.assert_close(out, exact.to(dtype), rtol=0, atol=0)
    assert out.abs().max() > 0


@triton.jit
def _atomic_kernel(x, out, n):
    i = tl.arange(0, 8)
    tl.atomic_add(out + i % 2, tl.load(x + tl.program_id(0) * 8 + i), mask=i < n)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_atomics_add_and_are_no_race(dtype):
    x, out = torch.arange(24).to(dtype), torch.zeros(2, dtype=dtype)
    with interpreter.launches() as seen:
        _atomic_kernel[(3,)](x, out, 6)
    assert torch.equal(out, x.view(3, 4, 2)[:, :3].sum((0, 1)))
    assert seen[0].atomic == {"out": 18 * dtype.itemsize}


@triton.jit
def _loop_kernel(length, out):
    total = 0
    for i in range(0, tl.load(length + tl.program_id(0)), 3):
        total += i
    n = tl.load(length + tl.program_id(0))
    while n > 1:
        n = n // 2
        total += 1000
    if tl.load(length) > 5:
        total += 100000
    tl.store(out + tl.program_id(0), total)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_loops_and_branches_on_what_is_in_memory(dtype):
    lengths, out = torch.tensor([8, 0, 1, 16], dtype=dtype), torch.empty(4, dtype=torch.int32)
    _loop_kernel[(4,)](lengths, out)
    assert out.tolist() == [103009, 100000, 100000, 104045]


@triton.jit
def _copy_kernel(x, out, n, shift, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + i, tl.load(x + i + shift, mask=i < n), mask=i < n)


def test_a_copy_is_counted():
    x, out = torch.randn(100).bfloat16(), torch.empty(100, dtype=torch.bfloat16)
    with interpreter.launches() as seen:
        _copy_kernel[(7,)](x, out, 100, 0, BLOCK=16)
        _copy_kernel[(1,)](x, out, 3, 0, BLOCK=16)
    assert torch.equal(x, out)
    assert [(s.kernel, s.grid) for s in seen] == [("_copy_kernel", (7, 1, 1)), ("_copy_kernel", (1, 1, 1))]
    assert [(s.loaded, s.stored) for s in seen] == [({"x": 200}, {"out": 200}), ({"x": 6}, {"out": 6})]


@pytest.mark.parametrize(
    ("n", "shift", "words"),
    [
        (17, 0, "loaded 4 bytes outside of x"),
        (8, -1, "loaded 4 bytes outside of x"),
        (8, 9, "loaded 4 bytes outside of x"),
        (17, -1, "loaded|stored"),
    ],
)
def test_no_reading_outside_of_a_tensor(n, shift, words):
    # All three in one storage: what lies outside of one is inside of its neighbour.
    _, x, out = torch.randn(48).split(16)
    with pytest.raises(InterpreterError, match=words):
        _copy_kernel[(2,)](x, out, n, shift, BLOCK=16)
    _copy_kernel[(2,)](x, out, 16, 0, BLOCK=16)
    assert torch.equal(x, out)


def test_no_writing_outside_of_a_tensor():
    out = torch.zeros(16)[:9]
    with pytest.raises(InterpreterError, match="stored 28 bytes outside of out"):
        _copy_kernel[(1,)](torch.randn(16), out, 16, 0, BLOCK=16)


@triton.jit
def _wrong_tensor_kernel(x, y, out, distance):
    tl.store(out, tl.load(x + distance))


def test_no_reading_of_one_tensor_through_the_pointer_to_another():
    x, y = torch.randn(2, 8)
    with pytest.raises(InterpreterError, match="of x"):
        _wrong_tensor_kernel[(1,)](x, y, torch.empty(1), 8)


@triton.jit
def _race_kernel(x, out, STRIDE: tl.constexpr, SHIFT: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * STRIDE + tl.arange(0, BLOCK)
    tl.store(out + i, tl.load(x + i + SHIFT) + 1.0)


@pytest.mark.parametrize("in_place", [False, True])
def test_programs_apart_do_not_race(in_place):
    x = torch.zeros(64)
    _race_kernel[(4,)](x, x if in_place else torch.empty(64), STRIDE=16, SHIFT=0, BLOCK=16)


def test_two_programs_that_write_one_element_race():
    with pytest.raises(InterpreterError, match=r"a race on out: stored by program \(1, 0, 0\), touched by program nu"):
        _race_kernel[(4,)](torch.zeros(64), torch.empty(64), STRIDE=15, SHIFT=0, BLOCK=16)


@pytest.mark.parametrize(("read_first", "kind"), [(False, "loaded"), (True, "stored")])
def test_programs_that_read_what_another_writes_race(read_first, kind):
    memory = torch.zeros(65)  # two arguments, one storage
    x, out = (memory[1:], memory) if read_first else (memory, memory[1:])
    with pytest.raises(InterpreterError, match=f"a race on .*: {kind} by program"):
        _race_kernel[(4,)](x, out, STRIDE=16, SHIFT=0, BLOCK=16)
    with interpreter.racing():
        _race_kernel[(4,)](x, out, STRIDE=16, SHIFT=0, BLOCK=16)


@triton.jit
def _same_place_kernel(out, VALUE: tl.constexpr):
    i = tl.arange(0, 16)
    tl.store(out + i // 2, (i // 2 if VALUE else i).to(tl.float32))


def test_one_store_that_writes_one_place_twice():
    out = torch.empty(8)
    _same_place_kernel[(1,)](out, VALUE=True)
    assert out.tolist() == list(range(8))
    with pytest.raises(InterpreterError, match="different values into one place"):
        _same_place_kernel[(1,)](out, VALUE=False)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_what_is_not_written_is_nan(dtype):
    with interpreter.poisoned():
        x = torch.randn(8).to(dtype)
        for out in (torch.empty(8, dtype=dtype), torch.empty_like(x), x.new_empty(8), x.new_empty(2, 4).view(8)):
            _copy_kernel[(1,)](x, out, 5, 0, BLOCK=8)
            assert torch.equal(out[:5], x[:5]) and out[5:].isnan().all()
    assert not torch.are_deterministic_algorithms_enabled()


@triton.jit
def _descriptor_kernel(x, out, M: tl.constexpr, N: tl.constexpr):
    tile = x.load([tl.program_id(0) * M, 0])
    out.store([tl.program_id(0) * M, 0], tile * 2.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_descriptors(dtype):
    from triton.tools.tensor_descriptor import TensorDescriptor

    x, out = torch.randn(20, 32).to(dtype), torch.empty(20, 32, dtype=dtype)
    with interpreter.launches() as seen:
        _descriptor_kernel[(3,)](*(TensorDescriptor(t, t.shape, t.stride(), [8, 32]) for t in (x, out)), M=8, N=32)
    assert torch.equal(out, x * 2)
    assert seen[0].loaded == {"x": x.nbytes} and seen[0].stored == {"out": out.nbytes}


@triton.jit
def _inline_kernel(x, y, out, CODE: tl.constexpr, PACK: tl.constexpr, N: tl.constexpr):
    i = tl.arange(0, N)
    a, b = tl.load(x + i), tl.load(y + i)
    operands: tl.constexpr = "=r,r,r" if PACK == 1 or x.dtype.element_ty.primitive_bitwidth == 16 else "=r,r,r,r,r"
    tl.store(out + i, tl.inline_asm_elementwise(CODE, operands, [a, b], x.dtype.element_ty, is_pure=True, pack=PACK))


def inline(code, x, y, pack=1):
    out = torch.empty_like(x)
    _inline_kernel[(1,)](x, y, out, code, pack, x.numel())
    return out


@pytest.mark.parametrize(
    ("selector", "result"),
    [(0x3210, 0x84038281), (0x7654, 0x18171615), (0x0123, 0x81820384), (0xB98F, 0xFFFFFF00)],
)
def test_inline_permutation_of_bytes(selector, result):
    x, y = torch.full((8,), 0x84038281, dtype=torch.uint32), torch.full((8,), 0x18171615, dtype=torch.uint32)
    assert inline(f"prmt.b32 $0, $1, $2, {selector:#x};", x, y).tolist() == [result] * 8


def test_inline_code_on_pairs():
    x, y = torch.randint(-(2**15), 2**15, (2, 16), dtype=torch.int16)
    assert torch.equal(inline("{ .reg .b32 m; and.b32 m, $1, $2; and.b32 $0, m, 0xffffffff; }", x, y, pack=2), x & y)


def test_inline_code_must_not_rely_on_which_elements_stand_side_by_side():
    # The upper half of each register becomes the lower one: the neighbour's.
    x = torch.arange(64, dtype=torch.int16)
    swapped = inline("prmt.b32 $0, $1, $2, 0x1032;", x, x, pack=2)
    assert not torch.equal(swapped, x.view(-1, 2).flip(1).flatten())
    assert swapped.sort().values.equal(x)


def test_inline_code_that_is_not_known():
    x = torch.zeros(4, dtype=torch.int32)
    with pytest.raises(InterpreterError, match=r"does not know the instruction add\.u32"):
        inline("add.u32 $0, $1, $2;", x, x)

"""The emulated GPU: what it promises, and that it finds what kernels must not do (cuda_host/probes.cu)."""

import ctypes
import re

import cuda_host
import pytest
import torch

# Of probes.cu, in its order.
PROBES = [
    "reverse",
    "no_barrier",
    "barrier_for_some",
    "shuffle_for_some",
    "different_calls",
    "behind_the_tensor",
    "misaligned_vector",
    "before_the_wait",
    "outside_an_array",
    "behind_shared_memory",
    "uninitialised_shared_memory",
    "warp_barrier_across_warps",
    "left_before_the_barrier",
]
RACE = r"(reads|writes) shared memory .* which thread \d+ has .* without a barrier since"


def call(function, tensors, *arguments):
    """Launch with these tensors as the only memory that the kernel may touch; what CUDA says of it."""
    controls = cuda_host.controls()
    for t in tensors:
        controls.cuda_host_allow(t.data_ptr(), t.numel() * t.element_size())
    try:
        getattr(controls, function).restype = ctypes.c_char_p
        return getattr(controls, function)(*arguments).decode()
    finally:
        controls.cuda_host_forget()


def probe(name, threads=64, shared_bytes=0, elements=64):
    out = torch.full((elements,), -1, dtype=torch.int32)
    pointer = ctypes.c_void_p(out.data_ptr())
    return call("cuda_host_probe", [out], PROBES.index(name), pointer, elements, threads, shared_bytes), out.tolist()


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("no_barrier", RACE),
        ("warp_barrier_across_warps", RACE),
        ("barrier_for_some", r"hangs: of 64 threads .* wait at __shfl_xor_sync.* wait at __syncthreads"),
        ("shuffle_for_some", r"hangs: .* 32 \(the first: 1\) wait at __shfl_xor_sync"),
        ("different_calls", r"thread .* of block \(0, 0, 0\) calls __\w+ where others of its warp wait at __"),
        ("behind_the_tensor", r"writes 4 bytes outside of every tensor: the nearest, of 256 bytes, begins -\d+ bytes"),
        ("misaligned_vector", r"misaligned or null pointer .*probes.cu"),
        ("before_the_wait", "writes global memory before griddepcontrol.wait"),
        ("outside_an_array", r"index \d+ is outside of its array"),
        ("behind_shared_memory", r"writes 4 bytes behind the 0 of dynamic shared memory"),
    ],
)
def test_what_kernels_must_not_do(name, words, seed):
    with cuda_host.shuffled(seed):
        shared = 256 if name == "warp_barrier_across_warps" else 0
        error, _ = probe(name, shared_bytes=shared)
        assert re.search(words, error), error
        assert probe("reverse")[0] == "no error"  # and the next kernel is none the worse


@pytest.mark.parametrize("seed", range(3))
def test_what_kernels_may_do(seed):
    with cuda_host.shuffled(seed):
        assert probe("reverse") == ("no error", list(range(63, -1, -1)))
        assert probe("uninitialised_shared_memory") == ("no error", [0] * 32 + [1] * 32)  # NaN
        assert probe("left_before_the_barrier") == ("no error", [-1] * 32 + list(range(32, 64)))


@pytest.mark.parametrize(
    ("threads", "shared_bytes", "words"),
    [(1025, 0, "configuration"), (0, 0, "configuration"), (32, 49153, "invalid argument"), (32, 49152, "no error")],
)
def test_limits_of_a_launch(threads, shared_bytes, words):
    assert words in probe("left_before_the_barrier", threads, shared_bytes)[0]


def test_conversions_round_as_pytorch_does():
    # Every half and its neighbours' midpoints, and every upper half of a float with the ties and beside them.
    halves = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.float16).float()
    words = torch.arange(2**16, dtype=torch.int32) << 16
    near = [(words + offset).view(torch.float32) for offset in (0, 1, 0x7FFF, 0x8000, 0x8001, 0x1000, 0xFFF, 0x1001)]
    middle = (halves + torch.roll(halves, -1)) / 2
    numbers = torch.cat((halves, middle, middle * (1 + 2**-20), *near))
    half, bfloat16, back = (torch.empty(numbers.shape, dtype=t) for t in (torch.float16, torch.bfloat16, torch.float32))
    tensors = [numbers, half, bfloat16, back]
    pointers = [ctypes.c_void_p(t.data_ptr()) for t in tensors]
    assert call("cuda_host_convert", tensors, *pointers, numbers.numel()) == "no error"
    for actual, expected in ((half, numbers.half()), (bfloat16, numbers.bfloat16()), (back, numbers.half().float())):
        torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)

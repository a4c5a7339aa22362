"""The native CUDA module as it was built: it loads anywhere, and its machine code is what the sources meant.

No kernel runs here. What the compiler made of them is read back with the toolkit's cuobjdump.
"""

import os
import re
import shutil
import subprocess
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bertfast import backend, native
from bertfast.errors import BackendError
from bertfast.ops import bias_gelu, cuda

CHUNK, MOST_CHUNKS = 32, 256  # csrc/cuda/launch.h

built = pytest.mark.skipif(native.cuda is None, reason=native.cuda_reason or "built")
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")


def find_cuobjdump() -> str | None:
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    folders = [f"{home}/bin" for home in homes if home] + os.environ.get("PATH", "").split(os.pathsep)
    return shutil.which("cuobjdump", path=os.pathsep.join(folders))


def cuobjdump(*arguments: str) -> str:
    tool = find_cuobjdump()
    if tool is None:
        pytest.skip("needs cuobjdump (and nvdisasm) of the CUDA toolkit, on the PATH or in $CUDA_HOME/bin")
    path = os.pathsep.join((str(Path(tool).parent), os.environ.get("PATH", "")))  # nvdisasm stands beside it
    command = [tool, *arguments, native.cuda.__file__]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env={**os.environ, "PATH": path})
    if done.returncode:
        pytest.skip(f"cuobjdump cannot read this build: {(done.stderr or done.stdout).strip()[:200]}")
    return done.stdout


@pytest.fixture(scope="module")
def kernels() -> dict[tuple[str, str], list[str]]:
    """The memory instructions of each kernel: {("sm_90a", mangled name): ["LDG.E.128", ...]}."""
    found: dict[tuple[str, str], list[str]] = {}
    architecture, instructions = "", []
    for line in cuobjdump("-sass").splitlines():
        if match := re.match(r"\s*arch = (\w+)|code for (\w+)", line.strip()):
            architecture = match[1] or match[2]
        elif match := re.match(r"\s*Function : (\w+)", line):
            instructions = found.setdefault((architecture, match[1]), [])
        elif match := re.match(r"\s*/\*[0-9a-f]+\*/\s+(?:@!?\w+\s+)?((?:LD|ST)[GL][A-Z0-9_.]*)", line):
            instructions.append(match[1])
    assert found
    return found


def machine_code() -> set[str]:
    return {f"sm_{name.rstrip('a')}" for name in native.cuda.architectures() if not name.endswith("+PTX")}


@built
@no_gpu
def test_loads_without_a_driver():
    assert native.cuda.device_count() == 0
    assert native.cuda.runtime_version() >= 11000


@built
def test_names_what_it_was_built_for():
    *code, ptx = native.cuda.architectures()
    assert code and ptx.endswith("+PTX") and max(int(a.rstrip("af")) for a in code) == int(ptx.removesuffix("+PTX"))


# How many forms of each kernel there are: dtypes, GELU's two forms or the two rows that are normalised, with dropout or
# without, aligned or not. The sums of the chunks are in every file that needs them.
FORMS = {
    "forward_kernel": 3 * 2 * 2,
    "backward_kernel": 3 * 2 * 2,
    "norm_forward_kernel": 3 * 2 * 2 * 2,
    "norm_backward_kernel": 3 * 2 * 2 * 2,
    "wide_norm_forward_kernel": 3 * 2 * 2,
    "wide_norm_backward_kernel": 3 * 2 * 2,
    "add_runs_kernel": 3 * 2,
    "join_runs_kernel": 3 * 2,
    "add_chunks_kernel": 3 * 3,
}


def is_kernel(mangled: str, name: str) -> bool:
    """Whether a mangled name, in which each part follows its length, is that of the kernel `name`."""
    return f"{len(name)}{name}" in mangled


@built
def test_every_kernel_is_there_for_every_architecture(kernels):
    names = {name for _, name in kernels}
    assert {kernel: sum(is_kernel(name, kernel) for name in names) for kernel in FORMS} == FORMS
    assert {architecture.rstrip("a") for architecture, _ in kernels} == machine_code()
    assert len(kernels) == len(names) * len(machine_code())


@built
def test_nothing_is_spilled(kernels):
    usage = cuobjdump("-res-usage")
    assert set(re.findall(r"STACK:(\d+)", usage)) == set(re.findall(r"LOCAL:(\d+)", usage)) == {"0"}
    for kernel, instructions in kernels.items():
        assert not [i for i in instructions if i.startswith(("LDL", "STL"))], kernel


@built
def test_aligned_kernels_move_16_bytes_at_a_time(kernels):
    wanted = {name: {k: i for k, i in kernels.items() if is_kernel(k[1], name)} for name in FORMS}
    for name, rows in (("forward_kernel", 4), ("backward_kernel", 2)):
        aligned = {k: i for k, i in wanted[name].items() if "ELb1EE" in k[1]}
        assert len(aligned) == 6 * len(machine_code())
        for kernel, instructions in aligned.items():
            loads = [i for i in instructions if i.startswith("LDG")]
            stores = [i for i in instructions if i.startswith("STG")]
            assert loads == ["LDG.E.128"] * 5, kernel  # the bias, and four rows of x or two of x and dout
            assert stores.count("STG.E.128") == rows, kernel
            assert len(stores) - rows == (name == "backward_kernel"), kernel  # a sum to the workspace
    # A thread holds 32 bytes of a row of float32, 16 of half precision. All else is a statistic, a sum, an id, a seed.
    is_aligned = re.compile("kernelI(f|6__half|13__nv_bfloat16)Lb1E")
    for name, single in (("norm_forward_kernel", 2), ("norm_backward_kernel", 8)):
        aligned = {k: i for k, i in wanted[name].items() if is_aligned.search(k[1])}
        assert len(aligned) == 12 * len(machine_code())
        for kernel, instructions in aligned.items():
            assert not [i for i in instructions if re.search("U?(8|16)$", i)], kernel
            assert instructions.count("LDG.E.128") >= 5, kernel
            assert instructions.count("STG.E.128") >= 1, kernel
            assert instructions.count("STG.E") <= single, kernel


@built
@pytest.mark.parametrize("rows", [0, 1, 31, 32, 33, CHUNK * MOST_CHUNKS, CHUNK * MOST_CHUNKS + 1, 10**6, 2**40])
def test_chunks_depend_on_the_rows_alone_and_are_few(rows):
    chunks = native.cuda.row_chunks(rows)
    assert chunks <= MOST_CHUNKS and (chunks == 0) == (rows == 0)
    if rows <= CHUNK * MOST_CHUNKS:
        assert chunks == -(-rows // CHUNK)


@built
@no_gpu
def test_a_failed_launch_names_the_op_the_shape_and_the_reason():
    with pytest.raises(RuntimeError, match=r"bias_gelu_fwd of \(3, 8\) float16 failed on .*driver.*built for"):
        native.cuda.bias_gelu_fwd(2, 4096, 0, 4096, 3, 8, False, 0)


@built
def test_nothing_is_launched_for_nothing():
    native.cuda.bias_gelu_fwd(0, 0, 0, 0, 0, 8, False, 0)
    native.cuda.bias_gelu_bwd(0, 0, 0, 0, 0, 0, 0, 0, 8, False, 0)


@built
def test_bad_arguments():
    with pytest.raises(ValueError, match="dtype must be 0"):
        native.cuda.bias_gelu_fwd(3, 0, 0, 0, 0, 8, False, 0)
    with pytest.raises(ValueError, match="dbias needs a workspace"):
        native.cuda.bias_gelu_bwd(0, 16, 16, 16, 16, 16, 0, 3, 8, False, 0)


SHIPPED = ["80", "86", "89", "90a", "100", "100+PTX"]


@pytest.mark.parametrize(
    ("capability", "architectures", "fits"),
    [
        ((7, 5), SHIPPED, False),
        *((capability, SHIPPED, True) for capability in [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (10, 3), (12, 0)]),
        ((8, 0), ["86", "86+PTX"], False),  # machine code does not go back
        ((9, 0), ["86"], False),  # nor to another major version
        ((9, 0), ["86", "86+PTX"], True),
        ((10, 0), ["90a"], False),  # and that of 90a runs on nothing else
    ],
)
def test_which_gpus_a_build_runs_on(capability, architectures, fits):
    assert backend.has_code_for(capability, architectures) == fits


def pretend(monkeypatch, capability=(9, 0), devices=1, driver=13000):
    """A machine with the module and such a GPU, as far as the choice of a backend looks."""
    module = SimpleNamespace(
        device_count=lambda: devices,
        driver_version=lambda: driver,
        runtime_version=lambda: 13000,
        architectures=lambda: SHIPPED,
    )
    monkeypatch.setattr(native, "cuda", module)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)


@pytest.mark.parametrize(
    ("machine", "device", "dtype", "words"),
    [
        ({}, "cuda", torch.float16, None),
        ({}, "cpu", torch.float32, "runs on CUDA tensors, not on cpu"),
        ({}, "cuda", torch.float64, "float64"),
        ({"capability": (7, 5)}, "cuda", torch.float32, "was built for sm_80, 86, .*not for sm_75"),
        ({"devices": 0, "driver": 12040}, "cuda", torch.float32, "built with CUDA 13.0, and the driver supports 12.4"),
        ({"devices": 0, "driver": 0}, "cuda", torch.float32, "there is no driver"),
    ],
)
def test_refusals(monkeypatch, machine, device, dtype, words):
    pretend(monkeypatch, **machine)
    reason = backend.refusal("cuda", "bias_gelu", torch.device(device), dtype)
    assert reason is None if words is None else re.search(words, reason)


def test_refused_where_it_was_not_built(monkeypatch):
    monkeypatch.setattr(native, "cuda", None)
    monkeypatch.setattr(native, "cuda_reason", "bertfast._cuda was not built: no nvcc")
    assert backend.refusal("cuda", "bias_gelu", torch.device("cuda"), torch.float32) == native.cuda_reason


def test_asking_for_it_on_cpu_tensors_raises():
    with backend.use("cuda"), pytest.raises(BackendError, match="runs on CUDA tensors, not on cpu"):
        bias_gelu(torch.zeros(2, 4))


def test_a_launch_passes_addresses_and_the_stream(monkeypatch):
    calls = []
    monkeypatch.setattr(native, "cuda", SimpleNamespace(bias_gelu_fwd=lambda *a: calls.append(a)))
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=77))
    x = torch.zeros(3, 8, dtype=torch.float16)
    cuda.launch("bias_gelu_fwd", x, x, None, x, *x.shape, True)
    assert calls == [(2, x.data_ptr(), 0, x.data_ptr(), 3, 8, True, 77)]

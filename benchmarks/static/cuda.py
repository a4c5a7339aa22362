"""The CUDA kernels' machine code, read from the objects that setup.py makes of csrc/cuda: what users get."""

import functools
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from benchmarks.static import machine, sass
from benchmarks.static.baseline import Key, Row
from benchmarks.static.compilation import SERIALISED

ROOT = Path(__file__).parents[2]
SOURCES = ROOT / "csrc" / "cuda"
WARPS = 4  # of a block, to tell how many fit: launchers may choose others, and shared memory besides
HOPPER = 90  # whose machine code is of sm_90a, with wgmma


class Unavailable(Exception):
    """Why there is no machine code here."""


@functools.cache
def nvcc() -> str:
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    for path in [*(f"{home}/bin" for home in homes), None]:
        if found := shutil.which("nvcc", path=path):
            return found
    raise Unavailable("no nvcc was found")


@functools.cache
def version() -> str:
    """nvcc's. Raises Unavailable where there is none."""
    listed = subprocess.run([nvcc(), "--version"], check=True, capture_output=True, text=True).stdout
    return f"nvcc {re.search(r'V([0-9.]+)', listed)[1]}"


def rows(architectures: list[int]) -> list[Row]:
    """Every kernel for each of these GPUs. Raises Unavailable where there is no nvcc."""
    nvcc()
    found = []
    for path in _objects():
        serialised = _serialised(path.stem) if HOPPER in architectures else set()
        for architecture in architectures:
            for name, made in _read(path, architecture).items():
                made.serialised = architecture == HOPPER and name in serialised
                found.append(Row(Key(version(), name, "", architecture), made, half="float" not in name))
    return found


def _objects() -> list[Path]:
    """Up to date, which costs nothing where `pip install` has just made them."""
    environment = {**os.environ, "BERTFAST_CUDA": "1", "BERTFAST_CPU": "0"}
    command = [sys.executable, "setup.py", "-q", "build_ext"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"csrc/cuda does not build: {(done.stdout + done.stderr)[-2000:]}")
    folder = ROOT / "build" / f"bertfast._cuda-{sysconfig.get_config_var('SOABI')}"
    return [folder / f"{source.stem}.o" for source in sorted(SOURCES.glob("*.cu"))]


def _read(path: Path, architecture: int) -> dict[str, machine.Machine]:
    """The kernels of one object for one GPU, by name."""
    target = f"sm_{architecture}{'a' if architecture == HOPPER else ''}"
    key = machine.key(path.read_bytes(), target, Path(__file__).read_bytes())
    found = machine.recall(key)
    if found is None:
        usage = machine.resources(sass.disassemble(path, "-res-usage", "-arch", target))
        texts = dict(sass.functions(sass.disassemble(path, "-sass", "-arch", target)))
        found = {}
        for mangled, name in zip(texts, _demangled(texts), strict=True):
            registers, stack, shared = usage[mangled]
            made = machine.read(texts[mangled], (registers, stack), shared, WARPS, architecture, False)
            found[f"{path.stem}.cu {name}"] = made
        machine.remember(key, found.items())
    return found


def _serialised(stem: str) -> set[str]:
    """The kernels whose wgmma the compiler serialises: it says so in a log, which only a compilation of its own has."""
    source = SOURCES / f"{stem}.cu"
    if "wgmma" not in source.read_text():
        return set()
    everything = b"".join(path.read_bytes() for path in sorted(SOURCES.iterdir()))
    key = machine.key("serialised", stem, version(), everything)
    kept = machine.recall(key)
    if kept is None:
        with tempfile.TemporaryDirectory() as folder:
            command = [nvcc(), "-O3", "-std=c++17", "-DNDEBUG", "-arch=sm_90a", "-cubin", "-Xptxas=-v"]
            command += ["-o", f"{folder}/object", str(source)]
            log = subprocess.run(command, check=True, capture_output=True, text=True).stderr
        names = re.findall(rf"{SERIALISED}.*?'(\w+)'", log)
        kept = {f"{stem}.cu {name}": machine.Machine() for name in _demangled(names)}
        machine.remember(key, kept.items())
    return set(kept)


def _demangled(names: list[str] | dict[str, str]) -> list[str]:
    """Readable, without arguments and namespaces: attention_kernel<__half, 64, true>."""
    if not names:
        return []
    done = subprocess.run(["c++filt"], input="\n".join(names), check=True, capture_output=True, text=True).stdout
    plain = done.replace("bertfast::", "").replace("(anonymous namespace)::", "").replace(" >", ">")
    return [line.removeprefix("void ").partition("(")[0] for line in plain.splitlines()]

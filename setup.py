"""Builds the native modules `bertfast._cpu` and `bertfast._cuda`; everything else is in pyproject.toml.

Neither needs PyTorch to build. Both are optional: where the compiler is missing or fails, bertfast installs
without them, says so, and runs in PyTorch. BERTFAST_CPU / BERTFAST_CUDA = 1 makes such a failure an error, and
= 0 skips the build. CXX, CXXFLAGS, LDFLAGS and MAX_JOBS have their usual meanings; CUDA_HOME or CUDA_PATH says where
nvcc is, NVCC_PREPEND_FLAGS and NVCC_APPEND_FLAGS are nvcc's own, and BERTFAST_CUDA_ARCHS="80;90a" chooses GPUs.
"""

import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import NamedTuple

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).parent.resolve()
CSRC = ROOT / "csrc"

# One object of each kernel file per instruction set: see csrc/cpu/isa.h.
X86_ISAS = {
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mprefer-vector-width=512"],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
}
KERNELS = ("embedding", "gelu", "norm", "operand")
# What gains from instructions for bfloat16 and int8 has objects for processors with those, too.
X86_PRODUCT_ISAS = {
    "avx512_vnni": [*X86_ISAS["avx512"], "-mavx512vnni"],
    "avx512_bf16": [*X86_ISAS["avx512"], "-mavx512vnni", "-mavx512bf16"],
}
PRODUCTS = ("attention", "gemm")
PLAIN = ("dispatch", "encoder", "parallel", "weights")  # compiled once, for any processor
# No -ffast-math: NaN, infinities and the order of sums are part of the results.
CXX_FLAGS = ["-O3", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math", "-DNDEBUG"]

# Ampere, Ada, Hopper and Blackwell: machine code for these, and PTX of the last for what comes after them.
CUDA_ARCHITECTURES = ("80", "86", "89", "90a", "100")
CUDA_KERNELS = ("attention", "embedding", "gelu", "norm")


class Object(NamedTuple):
    """One file to compile: `command` lacks only the source, the output and the dependency file."""

    name: str
    source: Path
    command: list[str]


class Unavailable(Exception):
    """Why a module cannot be built here."""


def cxx() -> list[str]:
    """The C++ compiler: $CXX, or the first of the usual names that exists."""
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    for command in map(shlex.split, names):
        if shutil.which(command[0]):
            return command
    raise Unavailable(f"no C++ compiler ({', '.join(names)}) was found")


def link_command() -> list[str]:
    shared = ["-bundle", "-undefined", "dynamic_lookup"] if sys.platform == "darwin" else ["-shared"]
    return [*cxx(), *shared, *shlex.split(os.environ.get("LDFLAGS", ""))]


def python_includes() -> list[str]:
    import pybind11

    return [f"-I{sysconfig.get_path('include')}", f"-I{pybind11.get_include()}"]


def cpu() -> tuple[list[Object], list[str]]:
    """The objects of `_cpu` and the command that links them."""
    if sys.platform == "win32":
        raise Unavailable("the CPU kernels are written for GCC and Clang")
    compile_ = [*cxx(), *CXX_FLAGS, *shlex.split(os.environ.get("CXXFLAGS", ""))]
    x86 = platform.machine() in ("x86_64", "AMD64")
    isas = {**(X86_ISAS if x86 else {}), "baseline": []}
    product_isas = {**isas, **(X86_PRODUCT_ISAS if x86 else {})}
    objects = [
        Object(f"{kernel}.{isa}", CSRC / "cpu" / f"{kernel}.cpp", [*compile_, *flags, f"-DBERTFAST_ISA={isa}"])
        for kernels, theirs in ((KERNELS, isas), (PRODUCTS, product_isas))
        for kernel in kernels
        for isa, flags in theirs.items()
    ]
    objects += [Object(name, CSRC / "cpu" / f"{name}.cpp", compile_) for name in PLAIN]
    objects.append(Object("cpu_bindings", CSRC / "cpu_bindings.cpp", [*compile_, *python_includes()]))
    return objects, link_command()


def nvcc() -> str:
    """nvcc of $CUDA_HOME, of $CUDA_PATH, or the first on the PATH."""
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    for path in [*(os.path.join(home, "bin") for home in homes), None]:
        found = shutil.which("nvcc", path=path)
        if found:
            return found
    raise Unavailable(f"no nvcc was found in {', '.join([*homes, 'the PATH'])}")


def cuda_architectures(compiler: str) -> list[str]:
    """$BERTFAST_CUDA_ARCHS, or those of CUDA_ARCHITECTURES that this nvcc knows ("90a" where it knows sm_90)."""
    wanted = os.environ.get("BERTFAST_CUDA_ARCHS", "").replace(";", " ").split()
    listed = subprocess.run([compiler, "--list-gpu-code"], check=True, capture_output=True, text=True).stdout.split()
    known = wanted or [a for a in CUDA_ARCHITECTURES if f"sm_{a.rstrip('a')}" in listed]
    if not known:
        raise Unavailable(f"{compiler} knows none of sm_{', sm_'.join(CUDA_ARCHITECTURES)}")
    return known


def cuda() -> tuple[list[Object], list[str]]:
    """The objects of `_cuda` and the command that links them. nvcc finds the toolkit's headers and libraries."""
    compiler = nvcc()
    architectures = cuda_architectures(compiler)
    newest = str(max(int(a.rstrip("af")) for a in architectures))  # PTX of sm_90a would run on sm_90 alone
    host = f"-ccbin={next(w for w in reversed(cxx()) if not w.startswith('-'))}"  # of "ccache g++ -m64", g++
    names = " ".join([*architectures, f"{newest}+PTX"])
    compile_ = [compiler, host, "-O3", "-std=c++17", "-DNDEBUG", "-Xcompiler=-fPIC,-fvisibility=hidden"]
    targets = [(a, f"sm_{a}") for a in architectures] + [(newest, f"compute_{newest}")]
    gencode = [f"-gencode=arch=compute_{virtual},code={real}" for virtual, real in targets]
    jobs = int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)
    gencode.append(f"--threads={max(1, jobs // len(CUDA_KERNELS))}")  # architectures at once, of each file
    objects = [Object(kernel, CSRC / "cuda" / f"{kernel}.cu", [*compile_, *gencode]) for kernel in CUDA_KERNELS]
    objects.append(Object("device", CSRC / "cuda" / "device.cpp", [*compile_, f'-DBERTFAST_ARCHITECTURES="{names}"']))
    bindings = [*cxx(), *CXX_FLAGS, *shlex.split(os.environ.get("CXXFLAGS", "")), *python_includes()]
    objects.append(Object("cuda_bindings", CSRC / "cuda_bindings.cpp", bindings))
    # The static runtime loads where there is no driver, and does not care which one PyTorch brings.
    link = [compiler, host, "-shared", "-cudart=static", "-nodlink", "-forward-unknown-to-host-compiler"]
    return objects, [*link, *shlex.split(os.environ.get("LDFLAGS", ""))]


MODULES = {"bertfast._cpu": (cpu, "BERTFAST_CPU"), "bertfast._cuda": (cuda, "BERTFAST_CUDA")}


def ninja(directory: Path, objects: list[Object], link: list[str], target: Path) -> None:
    """Compiles and links with ninja, which rebuilds only what changed and runs MAX_JOBS compilers at once."""
    quote = str.maketrans({"$": "$$", " ": "$ ", ":": "$:"})
    path = lambda p: str(p).translate(quote)  # noqa: E731
    command = lambda words: shlex.join(words).replace("$", "$$")  # noqa: E731
    lines = [
        "rule compile\n  command = $run -MMD -MF $out.d -c $in -o $out\n  deps = gcc\n  depfile = $out.d",
        "rule link\n  command = $run $in -o $out",
    ]
    lines += [f"build {o.name}.o: compile {path(o.source)}\n  run = {command(o.command)}" for o in objects]
    inputs = " ".join(f"{o.name}.o" for o in objects)
    lines.append(f"build {path(target)}: link {inputs}\n  run = {command(link)}")
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "build.ninja").write_text("\n".join(lines) + "\n")
    target.parent.mkdir(parents=True, exist_ok=True)
    jobs = ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
    subprocess.run([sys.executable, "-m", "ninja", "-C", str(directory), *jobs], check=True)


class BuildNative(build_ext):
    def run(self) -> None:
        for name, (_, variable) in MODULES.items():
            if os.environ.get(variable) == "0":
                self.forget(name)
        super().run()

    def forget(self, name: str) -> None:
        """Removes what an earlier build has left, or it would be installed in place of the module that is not built."""
        for folder in (self.build_lib, *([ROOT] if self.inplace else [])):
            (Path(folder) / self.get_ext_filename(name)).unlink(missing_ok=True)

    def build_extension(self, extension: Extension) -> None:
        describe, variable = MODULES[extension.name]
        # Beside the sources rather than in pip's temporary directory, so that a second install compiles nothing.
        directory = ROOT / "build" / f"{extension.name}-{sysconfig.get_config_var('SOABI')}"
        try:
            ninja(directory, *describe(), Path(self.get_ext_fullpath(extension.name)).resolve())
        except (Unavailable, OSError, subprocess.CalledProcessError) as error:
            self.forget(extension.name)
            if os.environ.get(variable) == "1":
                raise SystemExit(f"{variable}=1, but {extension.name} was not built: {error}") from error
            # An optional extension's CompileError is a warning to setuptools, which goes on without the module.
            raise CompileError(f"{error}. NOTICE: bertfast will run without {extension.name}, in PyTorch.") from error


setup(
    ext_modules=[
        Extension(name, sources=[], optional=True)
        for name, (_, variable) in MODULES.items()
        if os.environ.get(variable) != "0"
    ],
    cmdclass={"build_ext": BuildNative},
)

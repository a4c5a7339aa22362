"""What a user gets from `pip install`: with a compiler, without one, and where one is demanded."""

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
pytest.importorskip("build")


def run(*command: str, folder: Path = ROOT, **environment: str) -> subprocess.CompletedProcess:
    everything = {**os.environ, "BERTFAST_CUDA": "0", **environment}
    return subprocess.run(command, cwd=folder, env=everything, capture_output=True, text=True, timeout=900)


def build(kind: str, source: Path, target: Path, **environment: str) -> subprocess.CompletedProcess:
    command = (sys.executable, "-m", "build", "--no-isolation", f"--{kind}", "--outdir", str(target), str(source))
    return run(*command, **environment)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source distribution, unpacked: whatever it lacks, the builds below lack too."""
    folder = tmp_path_factory.mktemp("source")
    done = build("sdist", ROOT, folder)
    assert done.returncode == 0, done.stderr
    (archive,) = folder.glob("bertfast-*.tar.gz")
    with tarfile.open(archive) as tar:
        names = {name.split("/", 1)[-1] for name in tar.getnames()}
        tar.extractall(folder, filter="data")
    tracked = run(
        "git", "ls-files", "csrc", "bertfast", "setup.py", "pyproject.toml", "LICENSE", "README.md"
    ).stdout.split()
    assert set(tracked) <= names
    return folder / archive.name.removesuffix(".tar.gz")


def installed(wheel: Path, target: Path) -> Path:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(target)
    return target


# An editable install of this checkout would hand out its own native modules.
ALONE = "import sys; sys.meta_path = [f for f in sys.meta_path if '__editable__' not in str(f)]\n"


def imported(site: Path, code: str) -> str:
    """What a fresh interpreter that sees only this copy of bertfast prints."""
    done = run(sys.executable, "-c", ALONE + code, folder=site, PYTHONPATH=str(site))
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_a_wheel_from_the_source_distribution(source, tmp_path):
    done = build("wheel", source, tmp_path, BERTFAST_CPU="1")
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    site = installed(wheel, tmp_path / "site")
    assert list((site / "bertfast").glob("_cpu*.so"))
    code = (
        "from bertfast import native, backend, ops\n"
        "print(native.cpu.isa(), backend.explain('linear').backend, native.openmp)"
    )
    isa, chosen, openmp = imported(site, code).split(maxsplit=2)
    assert isa in ("avx512_bf16", "avx512_vnni", "avx512", "avx2", "baseline")
    assert chosen == "cpu" and "share PyTorch's OpenMP" in openmp


def test_without_a_compiler_everything_runs_on_the_reference(source, tmp_path):
    done = build("wheel", source, tmp_path, CXX="/nowhere/c++")
    assert done.returncode == 0, done.stderr
    assert "no C++ compiler (/nowhere/c++)" in done.stdout + done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    site = installed(wheel, tmp_path / "site")
    assert not list((site / "bertfast").glob("_c*.so"))
    code = (
        "import torch; from bertfast import native, ops, backend\n"
        "ops.bias_gelu(torch.randn(2, 3)); print(backend.explain('bias_gelu').backend, native.cpu_reason)"
    )
    chosen, reason = imported(site, code).split(maxsplit=1)
    assert chosen == "reference" and "was not built" in reason


def test_a_demanded_module_that_cannot_be_built_fails_the_install(source, tmp_path):
    done = build("wheel", source, tmp_path, CXX="/nowhere/c++", BERTFAST_CPU="1")
    assert done.returncode != 0 and "BERTFAST_CPU=1, but bertfast._cpu was not built" in done.stdout + done.stderr

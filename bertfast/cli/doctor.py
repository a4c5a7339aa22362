"""Say what is installed here, what bertfast runs on, and what is missing.

Exit status: 0 where everything essential is well, 1 where something is there but broken.
"""

import argparse
import importlib
import importlib.util
import os
import platform
from typing import Any

import torch

from bertfast import backend, machine, native, ops
from bertfast.cli.output import print_json, print_table
from bertfast.errors import BackendError

HELP = "what is installed, what runs, and what is missing"

_OPS = ("embed_layer_norm", "linear", "varlen_attention", "bias_gelu", "residual_layer_norm")
_DTYPES = {"cpu": (torch.float32, torch.bfloat16), "cuda": (torch.float32, torch.bfloat16, torch.float16)}
_EXTRAS = {
    "transformers": "bertfast.patch, check and bench work on its models: pip install 'bertfast[transformers]'",
    "tokenizers": "fill-mask and embed cut text into tokens with it: pip install 'bertfast[transformers]'",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="one JSON object instead of words")


def run(args: argparse.Namespace) -> int:
    report = examine()
    if args.json:
        print_json(report)
    else:
        _print(report)
    return 1 if report["broken"] else 0


def examine() -> dict[str, Any]:
    """Everything that the doctor knows."""
    versions = machine.versions()
    devices = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
    report: dict[str, Any] = {
        "versions": versions,
        "platform": platform.platform(),
        "cpu": {
            "model": machine.cpu_model(),
            "features": machine.cpu_features(),
            "cores": machine.cores(),
            "threads": torch.get_num_threads(),
        },
        "gpus": machine.gpus(),
        "native": _native(),
        "backend": _setting(),
        "ops": [_choice(op, device, dtype) for device in devices for dtype in _DTYPES[device] for op in _OPS],
    }
    report["broken"] = _broken(report)
    report["advice"] = _advice(report)
    return report


def _native() -> dict[str, Any]:
    """The state of the two native modules. `present` says whether there is a file, whatever it is worth."""

    def there(name: str) -> bool:
        return importlib.util.find_spec(f"bertfast.{name}") is not None

    cpu: dict[str, Any] = {"present": there("_cpu"), "loaded": native.cpu is not None, "reason": native.cpu_reason}
    if native.cpu is not None:
        cpu |= {"isa": native.cpu.isa(), "available_isas": native.cpu.available_isas(), "openmp": native.openmp}
    cuda = {"present": there("_cuda"), "loaded": native.cuda is not None, "reason": native.cuda_reason}
    return {"cpu": cpu, "cuda": cuda}


def _setting() -> dict[str, str | None]:
    """The backend that was asked for, and what is wrong with the request."""
    try:
        return {"setting": backend.current(), "error": None}
    except BackendError as error:
        return {"setting": os.environ.get("BERTFAST_BACKEND"), "error": str(error)}


def _choice(op: str, device: str, dtype: torch.dtype) -> dict[str, Any]:
    """What runs an op, and whether it really does: kernels that load can still fail."""
    record: dict[str, Any] = {"op": op, "device": device, "dtype": str(dtype).removeprefix("torch.")}
    record |= {"backend": None, "refused": {}}
    try:
        choice = backend.explain(op, device, dtype)
        record |= {"backend": choice.backend, "refused": choice.refused}
        _try(op, device, dtype)
        record["error"] = None
    except Exception as error:
        record["error"] = f"{type(error).__name__}: {error}"
    return record


def _try(op: str, device: str, dtype: torch.dtype) -> None:
    """Run the op once, small. Raises whatever it raises, and ArithmeticError where the reference says otherwise."""
    draw = torch.Generator().manual_seed(0)
    ids, borders = torch.tensor([1, 2, 0], device=device), torch.tensor([0, 1, 3], dtype=torch.int32, device=device)
    x, vector, qkv = (torch.randn(s, generator=draw).to(device, dtype) for s in ((3, 64), (64,), (3, 3, 2, 32)))
    calls = {
        "embed_layer_norm": lambda: ops.embed_layer_norm(ids, ids, None, x, x, x, vector, vector),
        "linear": lambda: ops.linear(x, torch.eye(64, dtype=dtype, device=device), vector),
        "varlen_attention": lambda: ops.varlen_attention(qkv, borders),
        "bias_gelu": lambda: ops.bias_gelu(x, vector),
        "residual_layer_norm": lambda: ops.residual_layer_norm(x, x, vector, vector),
    }
    with torch.no_grad():
        out = calls[op]()
        with backend.use("reference"):
            expected = calls[op]()
    tolerance = 32 * torch.finfo(dtype).eps * expected.abs().max()  # wrong kernels are wrong by far more
    error = (out - expected).abs().max()
    if not error <= tolerance:
        raise ArithmeticError(f"off by {error:.3g} from the reference")


def _broken(report: dict[str, Any]) -> list[str]:
    """What is there but does not work, in words."""
    broken = [
        f"{state['reason']}: reinstall bertfast for this Python"
        for state in report["native"].values()
        if state["present"] and not state["loaded"]
    ]
    if report["backend"]["error"]:
        return [*broken, report["backend"]["error"]]
    broken += [f"{o['op']} in {o['dtype']} on {o['device']} fails: {o['error']}" for o in report["ops"] if o["error"]]
    for package in ("transformers", "tokenizers"):
        if report["versions"][package]:
            try:
                importlib.import_module(package)
            except Exception as error:
                broken.append(f"{package} is installed but cannot be imported: {error}")
    return broken


def _advice(report: dict[str, Any]) -> list[str]:
    """What is missing, what it costs, and how to get it."""
    advice = [f"{name} is not installed; {why}" for name, why in _EXTRAS.items() if not report["versions"][name]]
    cpu = report["native"]["cpu"]
    if not cpu["present"]:
        advice.append(
            "bertfast runs in plain PyTorch, correct but slower: it was installed without its CPU kernels; install a "
            "C++17 compiler (Debian: apt install g++) and reinstall with BERTFAST_CPU=1 to see what the compiler says"
        )
    elif cpu["loaded"] and "one thread" in cpu["openmp"]:
        advice.append(cpu["openmp"])
    elif cpu["loaded"] and cpu["isa"] == "baseline":
        advice.append("the CPU kernels run without AVX2: " + ", ".join(cpu["available_isas"]) + " is all there is here")
    slow = {o["op"] for o in report["ops"] if (o["device"], o["backend"]) == ("cuda", "reference")} - {"linear"}
    if slow:
        names = ", ".join(sorted(slow))
        advice.append(f"on the GPU {names} run in plain PyTorch: pip install triton, or install bertfast where nvcc is")
    threads, cores = report["cpu"]["threads"], report["cpu"]["cores"]
    if threads > cores:
        advice.append(f"PyTorch uses {threads} threads on {cores} cores: set OMP_NUM_THREADS={cores}")
    return advice


def _print(report: dict[str, Any]) -> None:
    cpu, cpu_module = report["cpu"], report["native"]["cpu"]
    features = cpu["features"]
    rows = [(name, version or "not installed") for name, version in report["versions"].items()]
    rows += [("platform", report["platform"]), ("cpu", cpu["model"])]
    if features is not None:
        rows.append(("has", " ".join(n for n, there in features.items() if there) or "none of " + " ".join(features)))
        rows.append(("lacks", " ".join(n for n, there in features.items() if not there) or "nothing"))
    rows.append(("threads", f"{cpu['threads']} of PyTorch on {cpu['cores']} cores"))
    rows += [("gpu", f"{g['name']}, {g['capability']}, {g['memory_bytes'] / 2**30:.0f} GiB") for g in report["gpus"]]
    rows += [] if report["gpus"] else [("gpu", "none that PyTorch sees")]
    if cpu_module["loaded"]:
        isas = ", ".join(cpu_module["available_isas"])
        rows += [("cpu kernels", f"{cpu_module['isa']} (of {isas})"), ("openmp", cpu_module["openmp"])]
    else:
        rows.append(("cpu kernels", cpu_module["reason"]))
    cuda = report["native"]["cuda"]
    rows.append(("cuda kernels", "loaded" if cuda["loaded"] else cuda["reason"]))
    rows.append(("backend", str(report["backend"]["setting"])))
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        print(f"{name.ljust(width)}  {value}")
    print()
    print_table(
        [
            ("op", "device", "dtype", "runs on"),
            *((o["op"], o["device"], o["dtype"], o["backend"] or "nothing") for o in report["ops"]),
        ]
    )
    for reason in dict.fromkeys(f"{b}: {why}" for o in report["ops"] for b, why in o["refused"].items()):
        print(f"refused {reason}")
    print()
    for line in report["advice"]:
        print(f"advice: {line}")
    for line in report["broken"]:
        print(f"broken: {line}")
    if not report["broken"]:
        print("all essential things are well")

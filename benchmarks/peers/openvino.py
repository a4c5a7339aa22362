"""OpenVINO: the exported graph in float32, in bfloat16, and quantised to int8 with ranges read from one batch."""

import itertools
import sys
from typing import Any

import torch
from torch import Tensor

from benchmarks.peers.derived import INPUTS, onnx_file, quiet
from benchmarks.peers.peer import Batch, Peer, Run, Setting, Unavailable, imported

_CALIBRATION = 8  # sequences: enough for ranges, and they take longer than everything else
_HINTS = {"float32": "f32", "bfloat16": "bf16", "int8": "f32"}  # in int8, of what is not quantised


def _quantised(graph: Any, setting: Setting) -> Any:
    """The graph with weights and activations in int8, calibrated on valid tokens alone."""
    nncf = imported("nncf")
    lengths = setting.batch["attention_mask"].sum(1).tolist()
    rows = [
        {name: setting.batch[name][row : row + 1, :length].numpy() for name in INPUTS}
        for row, length in itertools.islice(enumerate(lengths), _CALIBRATION)
    ]
    with quiet():
        return nncf.quantize(graph, nncf.Dataset(rows), model_type=nncf.ModelType.TRANSFORMER, subset_size=len(rows))


def _prepare(setting: Setting) -> Run:
    # Importing it reports to its makers, from a process that would run beside what is timed: it does not where this
    # package is missing.
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    core = imported("openvino").Core()
    if setting.precision == "bfloat16" and "BF16" not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        raise Unavailable("OpenVINO does not compute in bfloat16 on this processor")
    graph = core.read_model(str(onnx_file(setting.model, setting.head)))
    if setting.precision == "int8":
        graph = _quantised(graph, setting)
    compiled = core.compile_model(
        graph,
        "CPU",
        {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": setting.threads,
            "INFERENCE_PRECISION_HINT": _HINTS[setting.precision],
        },
    )

    def run(batch: Batch) -> Tensor:
        return torch.from_numpy(compiled({name: batch[name].numpy() for name in INPUTS}, share_inputs=True)[0])

    return run


PEERS = (Peer("openvino", ("float32", "bfloat16", "int8"), ("cpu",), _prepare),)

"""OpenVINO: the exported graph in float32, in bfloat16, and quantised to int8."""

import sys
from typing import Any

import torch
from torch import Tensor

from benchmarks.peers.derived import INPUTS, onnx_file, quiet
from benchmarks.peers.peer import Batch, Peer, Run, Setting, Unavailable, imported

_SEQUENCES = 16  # of the batch that ranges are read from; it takes longer than everything else
_DRAWN = (4, 8, 16, 32, 64)  # tokens of sequences made up besides
_HINTS = {"float32": "f32", "bfloat16": "bf16", "int8": "f32"}  # in int8, of what is not quantised


def _calibration(setting: Setting) -> list[Batch]:
    """Sequences without padding: of the batch, and some of random tokens, single ones and pairs of several lengths.

    Ranges read from one short query alone are wrong for all other lengths, words and token types.
    """
    batch, config, generator = setting.batch, setting.model.config, torch.Generator().manual_seed(0)
    lengths = batch["attention_mask"][:_SEQUENCES].sum(1).tolist()
    rows = [{name: batch[name][row : row + 1, :length] for name in INPUTS} for row, length in enumerate(lengths)]
    for length in (n for n in _DRAWN if n <= config.max_position_embeddings):
        ids = torch.randint(config.vocab_size, (1, length), generator=generator)
        second = (torch.arange(length) >= length // 2).long().clamp(max=config.type_vocab_size - 1)[None]
        for types in (torch.zeros_like(ids), second):
            rows.append({"input_ids": ids, "token_type_ids": types, "attention_mask": torch.ones_like(ids)})
    return rows


def _quantised(graph: Any, setting: Setting) -> Any:
    """The graph with weights and activations in int8."""
    nncf = imported("nncf")
    rows = [{name: tensor.numpy() for name, tensor in row.items()} for row in _calibration(setting)]
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

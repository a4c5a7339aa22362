"""ONNX Runtime: the exported graph as it is, optimised for BERT, and quantised from that to int8 when it runs.

The fused attention reads the attention mask as a number of tokens: it assumes padding at the right.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.peers.derived import INPUTS, once_per_model, onnx_file, quiet
from benchmarks.peers.peer import Batch, Peer, Run, Setting, imported, only_type


@once_per_model
def _optimised(model: nn.Module, head: str) -> Path:
    """ONNX Runtime's fusions for BERT: attention, embedding, residual with norm, bias with GELU."""
    optimizer = imported("onnxruntime.transformers.optimizer")
    source, config = onnx_file(model, head), model.config
    with quiet():
        optimised = optimizer.optimize_model(
            str(source),
            model_type="bert",
            num_heads=config.num_attention_heads,
            hidden_size=config.hidden_size,
            opt_level=0,  # the runtime's own fusions come when the session is made
        )
    path = source.with_stem("optimised")
    optimised.save_model_to_file(str(path))
    return path


@once_per_model
def _quantised(model: nn.Module, head: str) -> Path:
    """Weights in int8, activations quantised as they come."""
    onnx, quantization = imported("onnx"), imported("onnxruntime.quantization")
    source = _optimised(model, head)
    path = source.with_stem("int8")
    with quiet():
        quantization.quantize_dynamic(
            source,
            path,
            weight_type=quantization.QuantType.QInt8,
            extra_options={"DefaultTensorType": onnx.TensorProto.FLOAT},  # of what the fused operators put out
        )
    return path


def _prepare(file: Callable[[nn.Module, str], Path], optimise: bool, setting: Setting) -> Run:
    if optimise:
        only_type(setting, "ONNX Runtime's optimiser")
    onnxruntime = imported("onnxruntime")
    levels = onnxruntime.GraphOptimizationLevel
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = setting.threads
    options.graph_optimization_level = levels.ORT_ENABLE_ALL if optimise else levels.ORT_DISABLE_ALL
    options.log_severity_level = 3  # errors
    # Its threads spin for their next task. Told to stop with the end of a run, they leave the processors to the peer
    # that is timed next.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    path = file(setting.model, setting.head)
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def run(batch: Batch) -> Tensor:
        (output,) = session.run(None, {name: batch[name].numpy() for name in INPUTS})
        return torch.from_numpy(output)

    return run


PEERS = (
    Peer("onnxruntime", ("float32",), ("cpu",), partial(_prepare, onnx_file, False)),
    Peer("onnxruntime-optimised", ("float32",), ("cpu",), partial(_prepare, _optimised, True)),
    Peer("onnxruntime-int8", ("int8",), ("cpu",), partial(_prepare, _quantised, True)),
)

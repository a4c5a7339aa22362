"""bertfast itself: the stock model, patched. On a CPU its weights stay float32, and the GEMMs are in the precision."""

from functools import partial

from torch import nn

import bertfast
from benchmarks.accuracy import LIMITS
from benchmarks.peers.derived import inference, trainable_copy, transformers_copy
from benchmarks.peers.peer import Peer, Run, Setting, Unavailable
from bertfast import machine


def _patched(model: nn.Module, pack_weights: bool, output_logits: bool = True, compute: str | None = None) -> nn.Module:
    try:
        return bertfast.patch(model, pack_weights=pack_weights, output_logits=output_logits, compute=compute)
    except bertfast.UnsupportedModelError as error:
        raise Unavailable(str(error)) from error


def _computing(setting: Setting) -> nn.Module:
    """The patched model, with packed weights."""
    if setting.device != "cpu" or setting.precision not in ("bfloat16", "int8"):
        if setting.precision == "int8":
            raise Unavailable("int8 is for CPUs")
        return _patched(transformers_copy(setting), pack_weights=True)
    if setting.precision == "bfloat16" and not machine.has_bfloat16():
        raise Unavailable("this processor has no instructions for bfloat16")
    model = transformers_copy(setting._replace(precision="float32"))
    if setting.precision == "bfloat16":
        return _patched(model, pack_weights=True, compute="bf16")
    return _quantised(_patched(model, pack_weights=True), setting)


def _quantised(model: nn.Module, setting: Setting) -> nn.Module:
    """The model in int8, if its answers to the batch stay as near as the suite asks of every engine's int8.

    Of a head's choices the suite asks nothing: the direction of its logits is measured afterwards, as everybody's is.
    """
    least = LIMITS["int8"].cosine
    try:
        bertfast.quantize(model, [setting.batch], min_cosine=least, min_worst_cosine=least, min_agreement=0.0)
    except (bertfast.QuantizationError, bertfast.UnsupportedModelError, bertfast.BackendError) as error:
        raise Unavailable(str(error)) from error
    return model


def _prepare(setting: Setting) -> Run:
    return _warm(_computing(setting), setting)


def _prepare_unpacked(setting: Setting) -> Run:
    return _warm(_patched(transformers_copy(setting), pack_weights=False), setting)


def _warm(model: nn.Module, setting: Setting) -> Run:
    run = inference(model, setting.head)
    run({name: tensor.to(setting.device) for name, tensor in setting.batch.items()})  # packs the weights
    return run


def _trainable(pack_weights: bool, setting: Setting) -> nn.Module:
    return _patched(trainable_copy(setting), pack_weights, output_logits=setting.head != "pretraining")


_FLOATS = ("float32", "bfloat16", "float16")
_DEVICES = ("cpu", "cuda")
PEERS = (
    Peer("bertfast", (*_FLOATS, "int8"), _DEVICES, _prepare, partial(_trainable, True)),
    Peer("bertfast-unpacked-weights", _FLOATS, _DEVICES, _prepare_unpacked, partial(_trainable, False)),
)

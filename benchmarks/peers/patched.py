"""bertfast itself: the stock model, patched."""

from functools import partial

from torch import nn

import bertfast
from benchmarks.peers.derived import inference, trainable_copy, transformers_copy
from benchmarks.peers.peer import Peer, Run, Setting, Unavailable


def _patched(model: nn.Module, pack_weights: bool, output_logits: bool = True) -> nn.Module:
    try:
        return bertfast.patch(model, pack_weights=pack_weights, output_logits=output_logits)
    except bertfast.UnsupportedModelError as error:
        raise Unavailable(str(error)) from error


def _prepare(pack_weights: bool, setting: Setting) -> Run:
    run = inference(_patched(transformers_copy(setting), pack_weights), setting.head)
    run({name: tensor.to(setting.device) for name, tensor in setting.batch.items()})  # packs the weights
    return run


def _trainable(pack_weights: bool, setting: Setting) -> nn.Module:
    return _patched(trainable_copy(setting), pack_weights, output_logits=setting.head != "pretraining")


def _peer(name: str, pack_weights: bool) -> Peer:
    return Peer(
        name,
        ("float32", "bfloat16", "float16"),
        ("cpu", "cuda"),
        partial(_prepare, pack_weights),
        partial(_trainable, pack_weights),
    )


PEERS = (_peer("bertfast", True), _peer("bertfast-unpacked-weights", False))

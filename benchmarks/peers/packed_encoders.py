"""packed-encoders, which patches ModernBERT on NVIDIA's GPUs."""

import torch
from torch import Tensor

from benchmarks.peers.derived import transformers_copy
from benchmarks.peers.peer import Batch, Peer, Run, Setting, Unavailable, imported, only_type, wanted


def _prepare(setting: Setting) -> Run:
    only_type(setting, "packed-encoders", "modernbert")
    packed_encoders = imported("packed_encoders", "packed-encoders")
    model = transformers_copy(setting)
    try:
        packed_encoders.pack(model)
    except packed_encoders.PackedEncodersError as error:
        raise Unavailable(str(error)) from error

    @torch.inference_mode()
    def run(batch: Batch) -> Tensor:
        # ModernBERT has no token types.
        return wanted(model(batch["input_ids"], attention_mask=batch["attention_mask"]), setting.head)

    return run


PEERS = (Peer("packed-encoders", ("bfloat16",), ("cuda",), _prepare),)

"""CTranslate2, which drops the padding itself. It runs the encoder; no classification head."""

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.peers.derived import checkpoint, folder, once_per_model, quiet
from benchmarks.peers.peer import Batch, Peer, Run, Setting, Unavailable, imported, only_encoder, only_type


@once_per_model
def _converted(model: nn.Module) -> str:
    """The directory of the model as CTranslate2 keeps it, in float32; loading it makes other precisions of that."""
    converters = imported("ctranslate2.converters")
    with quiet():
        return converters.TransformersConverter(str(checkpoint(model))).convert(str(folder(model) / "ctranslate2"))


def _prepare(setting: Setting) -> Run:
    only_type(setting, "CTranslate2")
    only_encoder(setting, "CTranslate2")
    ctranslate2 = imported("ctranslate2")
    if setting.precision not in ctranslate2.get_supported_compute_types("cpu"):
        raise Unavailable(f"CTranslate2 does not compute in {setting.precision} on this processor")
    encoder = ctranslate2.Encoder(
        _converted(setting.model), compute_type=setting.precision, intra_threads=setting.threads
    )

    def run(batch: Batch) -> Tensor:
        ids, lengths = (
            ctranslate2.StorageView.from_array(t.int().numpy())
            for t in (batch["input_ids"], batch["attention_mask"].sum(1))
        )
        hidden = encoder.forward_batch(ids, lengths, batch["token_type_ids"].tolist()).last_hidden_state
        return torch.from_numpy(np.asarray(hidden.to(ctranslate2.DataType.float32)))

    return run


PEERS = (Peer("ctranslate2", ("float32", "bfloat16", "int8"), ("cpu",), _prepare),)

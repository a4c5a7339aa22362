"""sentence-transformers with its own unpadding, which is FlashAttention's: the layers run on one long sequence."""

from typing import Any

import torch
from torch import Tensor

from benchmarks.peers.derived import DTYPES, checkpoint, quiet
from benchmarks.peers.peer import Batch, Peer, Run, Setting, Unavailable, imported, only_encoder


def _prepare(setting: Setting) -> Run:
    only_encoder(setting, "sentence-transformers without padding")
    imported("flash_attn", "flash-attn")
    modules = imported("sentence_transformers.sentence_transformer.modules", "sentence-transformers")
    tensors = imported("sentence_transformers.util.tensor", "sentence-transformers")
    options = {"attn_implementation": "flash_attention_2", "dtype": DTYPES[setting.precision]}
    with quiet():
        transformer = modules.Transformer(str(checkpoint(setting.model)), model_kwargs=options)
    transformer.to(setting.device).eval()
    if not transformer.can_flatten_inputs:
        raise Unavailable(f"sentence-transformers does not drop the padding of {type(setting.model).__name__} here")

    @torch.inference_mode()
    def run(batch: Batch) -> Tensor:
        lengths = batch["attention_mask"].sum(1).tolist()
        # Its collator takes lists, as a tokenizer gives them, and knows no token types.
        rows = [{"input_ids": ids[:length]} for ids, length in zip(batch["input_ids"].tolist(), lengths, strict=True)]
        features: dict[str, Any] = {
            name: value.to(setting.device) if isinstance(value, Tensor) else value
            for name, value in transformer.data_collator(rows).items()
        }
        return tensors.repad_flattened_features(transformer(features))["token_embeddings"]

    return run


PEERS = (Peer("sentence-transformers", ("bfloat16", "float16"), ("cuda",), _prepare),)

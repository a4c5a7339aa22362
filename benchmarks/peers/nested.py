"""PyTorch's own padding-free path: `nn.TransformerEncoder`, which turns a padded batch into a nested tensor.

The embedding is the stock model's. Padding at the left is not packed but computed, as PyTorch does.
"""

import torch
from torch import Tensor, nn

from benchmarks.peers.derived import quiet, transformers_copy
from benchmarks.peers.peer import Batch, Peer, Run, Setting, Unavailable, only_encoder, only_type


def _encoder(model: nn.Module) -> nn.TransformerEncoder:
    """The model's layers as PyTorch has them, around the same parameters but for query, key and value, here one."""
    config = model.config
    if config.hidden_act != "gelu":
        raise Unavailable(f"nn.TransformerEncoder's fast path has gelu and relu, not {config.hidden_act}")
    with torch.device("meta"):
        layer = nn.TransformerEncoderLayer(
            config.hidden_size,
            config.num_attention_heads,
            config.intermediate_size,
            activation="gelu",
            layer_norm_eps=config.layer_norm_eps,
            batch_first=True,
        )
        encoder = nn.TransformerEncoder(layer, config.num_hidden_layers, enable_nested_tensor=True)
    for own, stock in zip(encoder.layers, model.encoder.layer, strict=True):
        attention = stock.attention
        projections = (attention.self.query, attention.self.key, attention.self.value)
        parameters = {
            f"self_attn.in_proj_{kind}": torch.cat([getattr(p, kind) for p in projections])
            for kind in ("weight", "bias")
        }
        modules = {
            "self_attn.out_proj": attention.output.dense,
            "norm1": attention.output.LayerNorm,
            "linear1": stock.intermediate.dense,
            "linear2": stock.output.dense,
            "norm2": stock.output.LayerNorm,
        }
        for name, module in modules.items():
            parameters |= {f"{name}.{kind}": parameter for kind, parameter in module.named_parameters()}
        own.load_state_dict(parameters, assign=True)
    return encoder.requires_grad_(False).eval()


def _prepare(setting: Setting) -> Run:
    only_type(setting, "nn.TransformerEncoder")
    only_encoder(setting, "nn.TransformerEncoder")
    model = transformers_copy(setting)
    encoder = _encoder(model)

    @torch.inference_mode()
    def run(batch: Batch) -> Tensor:
        embedded = model.embeddings(input_ids=batch["input_ids"], token_type_ids=batch["token_type_ids"])
        return encoder(embedded, src_key_padding_mask=batch["attention_mask"] == 0)

    with quiet():  # that nested tensors are a prototype
        run({name: tensor.to(setting.device) for name, tensor in setting.batch.items()})
    return run


PEERS = (Peer("nested", ("float32", "bfloat16", "float16"), ("cpu", "cuda"), _prepare),)

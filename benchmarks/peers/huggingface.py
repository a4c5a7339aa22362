"""Hugging Face transformers as it stands, with each of its attention implementations."""

from functools import partial

from benchmarks.peers.derived import inference, trainable_copy, transformers_copy
from benchmarks.peers.peer import Peer, Run, Setting, imported


def _prepare(attention: str, setting: Setting) -> Run:
    if attention == "flash_attention_2":
        imported("flash_attn", "flash-attn")
    return inference(transformers_copy(setting, attention), setting.head)


def _peer(name: str, attention: str) -> Peer:
    return Peer(
        name,
        ("float32", "bfloat16", "float16"),
        ("cpu", "cuda"),
        partial(_prepare, attention),
        partial(trainable_copy, attention=attention),
    )


PEERS = (
    _peer("hf-eager", "eager"),
    _peer("hf-sdpa", "sdpa"),
    # Its kernels know neither the CPU nor float32.
    Peer("hf-flash-attention-2", ("bfloat16", "float16"), ("cuda",), partial(_prepare, "flash_attention_2")),
)

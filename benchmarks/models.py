"""The stock models that everybody computes: BERT's sizes with random weights, one real checkpoint, or a user's own."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.workloads import minilm_folder

CONFIGS: dict[str, dict[str, int]] = {
    "base": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072},
    "large": {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096},
    "minilm": {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536},
    "tiny": {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128},
}
MODELS = tuple(CONFIGS)
_LABELS = {"sequence": 1, "token": 9, "topic": 8}
_CLASSES = {
    "": "Model",
    "sequence": "ForSequenceClassification",
    "token": "ForTokenClassification",
    "topic": "ForSequenceClassification",
    "pretraining": "ForPreTraining",
}


def check(name: str) -> str:
    """The name, if it is one of MODELS or the folder of a checkpoint. ValueError where it is not."""
    if name not in MODELS and not (Path(name) / "config.json").is_file():
        raise ValueError(f"unknown model {name!r}: choose from {', '.join(MODELS)}, or give the folder of a checkpoint")
    return name


def random(name: str, head: str = "") -> nn.Module:
    """The stock model of one of CONFIGS with random weights, the same ones every time."""
    kind = getattr(_transformers(), f"Bert{_CLASSES[head]}")
    return _drawn(lambda: kind(kind.config_class(**CONFIGS[name], **_options(head))))


def build(name: str, head: str = "") -> nn.Module:
    """The stock model of transformers with sdpa, in float32 and evaluation mode.

    name: one of MODELS, of which "minilm" has real weights and the others random ones, which time and parity do not
    mind; or the folder of a checkpoint. head: as in `Workload`, "topic" or "pretraining"; one that the
    checkpoint does not have gets random weights. ValueError where there is no such model.
    """
    check(name)
    if name in MODELS and name != "minilm":
        return random(name, head)
    kind = getattr(_transformers(), f"Auto{_CLASSES[head].replace('For', 'ModelFor')}")
    folder = minilm_folder() if name == "minilm" else name
    return _drawn(lambda: kind.from_pretrained(folder, ignore_mismatched_sizes=True, **_options(head)).float())


def _transformers() -> Any:
    """The library, told to keep its bars and notes to itself."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return transformers


def _options(head: str) -> dict[str, Any]:
    return {"attn_implementation": "sdpa"} | ({"num_labels": _LABELS[head]} if head in _LABELS else {})


def _drawn(make: Callable[[], nn.Module]) -> nn.Module:
    """make(), with whatever it draws drawn from seed 0."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make().eval()

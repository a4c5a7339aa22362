"""How a checkpoint turns token vectors into one vector a text, as sentence-transformers' files beside it say."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bertfast.cli.files import read_json
from bertfast.cli.output import UsageError
from bertfast.packing import Packing

_OLD_KEYS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}


@dataclass(frozen=True)
class Recipe:
    """From text to vector. pooling: "mean" or "cls". folder: where the encoder lies below the directory, often ""."""

    folder: str = ""
    pooling: str = "mean"
    normalize: bool = False
    max_length: int | None = None
    lowercase: bool = False


def read_recipe(model: str, pooling: str, normalize: bool | None) -> Recipe:
    """What the model's modules.json and the files it names ask for, with the caller's own wishes in place of theirs.

    Without modules.json it is the mean of the tokens, as in sentence-transformers. `pooling` "auto" and `normalize`
    None leave the choice to the files; a choice that the files make and that is not built here is a UsageError.
    """
    modules = read_json(model, "modules.json")
    if modules is None:
        return Recipe(pooling="mean" if pooling == "auto" else pooling, normalize=bool(normalize))
    try:
        kinds = {module["type"].rpartition(".")[2]: module["path"] for module in modules}
    except (TypeError, KeyError, AttributeError) as error:
        raise UsageError(f"{model}: modules.json is not a list of modules with type and path") from error
    if "Transformer" not in kinds:
        raise UsageError(f"{model}: modules.json names no Transformer, only {', '.join(kinds)}")
    if pooling == "auto":
        if strange := kinds.keys() - {"Transformer", "Pooling", "Normalize"}:
            raise UsageError(
                f"{model} has a {', '.join(sorted(strange))} module, which only sentence-transformers runs: use "
                "bertfast.patch on its SentenceTransformer, or give --pooling to have the encoder's vectors without it"
            )
        pooling = _pooling(model, kinds)
    folder = kinds["Transformer"]
    settings = read_json(model, _join(folder, "sentence_bert_config.json")) or {}
    return Recipe(
        folder,
        pooling,
        "Normalize" in kinds if normalize is None else normalize,
        settings.get("max_seq_length"),
        bool(settings.get("do_lower_case")),
    )


def _pooling(model: str, kinds: dict[str, str]) -> str:
    """The one pooling that the files ask for. UsageError for several, and for one that is not built here."""
    settings: dict[str, Any] = read_json(model, _join(kinds.get("Pooling", ""), "config.json")) or {}
    if "Pooling" not in kinds:
        return "mean"
    modes = settings.get("pooling_mode") or [mode for key, mode in _OLD_KEYS.items() if settings.get(key)] or "mean"
    modes = [modes] if isinstance(modes, str) else list(modes)
    prompt = (read_json(model, "config_sentence_transformers.json") or {}).get("default_prompt_name")
    if modes not in (["mean"], ["cls"]) or prompt:
        what = f"puts the prompt {prompt!r} before every text" if prompt else f"pools by {' and '.join(modes)}"
        raise UsageError(
            f"{model} {what}, which only sentence-transformers does: use bertfast.patch on its SentenceTransformer, "
            "or give --pooling mean or cls"
        )
    return modes[0]


def _join(folder: str, name: str) -> str:
    return f"{folder}/{name}" if folder else name


def pool(hidden: Tensor, packing: Packing, pooling: str, normalize: bool) -> Tensor:
    """(tokens, hidden) to (sequences, hidden) float32: the mean of each sequence's tokens, or its first.

    Sums are float32. A sequence without tokens gives zeros. `normalize` scales to length 1.
    """
    reduce: Callable[[Tensor, Packing], Tensor] = {"mean": _mean, "cls": _first}[pooling]
    vectors = reduce(hidden, packing)
    return torch.nn.functional.normalize(vectors, dim=-1) if normalize else vectors


def _mean(hidden: Tensor, packing: Packing) -> Tensor:
    lengths = torch.tensor(packing.lengths)
    owners = torch.repeat_interleave(torch.arange(packing.batch), lengths)
    sums = torch.zeros(packing.batch, hidden.shape[1]).index_add_(0, owners, hidden.float())
    return sums / lengths.clamp(min=1)[:, None]


def _first(hidden: Tensor, packing: Packing) -> Tensor:
    lengths = torch.tensor(packing.lengths)
    vectors = torch.zeros(packing.batch, hidden.shape[1])
    vectors[lengths > 0] = hidden[packing.cu_seqlens[:-1][lengths > 0].long()].float()
    return vectors

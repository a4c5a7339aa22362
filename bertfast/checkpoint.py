"""Loading and saving: Hugging Face's directories and hub repositories, read and written without transformers.

Nothing half-loaded leaves this module: a weight of the encoder that is missing, unknown or of another shape is a
CheckpointError, and only a head (or pooler) that the checkpoint does not have starts anew, with a warning.
"""

import inspect
import json
import logging
import os
import re
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from bertfast.config import BertConfig
from bertfast.errors import CheckpointError

_LOGGER = logging.getLogger(__name__)
# What a checkpoint is looked for as, in this order; each may be split up, with "<name>.index.json" saying how.
_WEIGHT_NAMES = ("model.safetensors", "pytorch_model.bin")
_OLD_NORM = re.compile(r"LayerNorm\.(gamma|beta)$")
_NEW_NORM = {"gamma": "LayerNorm.weight", "beta": "LayerNorm.bias"}
# Buffers that old versions of transformers stored. Their contents are constants.
_BUFFERS = ("embeddings.position_ids", "embeddings.token_type_ids")
_BODY = ("embeddings.", "encoder.")

Model = TypeVar("Model", bound="PretrainedModel")


class PretrainedModel(nn.Module):
    """A model with a config that loads and saves itself as transformers does."""

    body_prefix: ClassVar[str] = "bert."  # of the encoder's weights in the state_dict
    ties: ClassVar[dict[str, str]] = {}  # keys that are another key's parameter where the config ties weights

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.config = config

    def tied_keys(self) -> dict[str, str]:
        """The keys of the state_dict that are another key's parameter, and which one's."""
        return self.ties if self.config.tie_word_embeddings else {}

    def tie_weights(self) -> None:
        """Make each tied key the very parameter it is tied to."""
        for key, source in self.tied_keys().items():
            owner, _, name = key.rpartition(".")
            setattr(self.get_submodule(owner), name, self.get_parameter(source))

    def initialize(self, *modules: nn.Module) -> None:
        """BERT's initialisation: weights ~ N(0, initializer_range), biases 0, norms 1 and 0, the padding token 0.

        Source: Devlin et al. 2019 and their code. Works on the modules given, and below them.
        """
        for module in modules:
            for submodule in module.modules():
                _initialize_own(submodule, self.config.initializer_range)

    @classmethod
    def from_pretrained(
        cls: type[Model],
        path_or_id: str | os.PathLike,
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
        cache_dir: str | os.PathLike | None = None,
        dtype: torch.dtype | None = None,
        **changes: Any,
    ) -> Model:
        """The model that a directory or a repository of the Hugging Face hub holds, on the CPU, in evaluation mode.

        Args:
            path_or_id: a directory with config.json and model.safetensors or pytorch_model.bin, whole or in shards,
                of any BERT architecture; or the id of a hub repository with these.
            revision, token, local_files_only, cache_dir: as in huggingface_hub, for an id.
            dtype: of the parameters; None keeps that of the stored word embeddings.
            changes: fields of the config (num_labels=3) and options of the class (add_pooling_layer=False).

        A head or pooler that the checkpoint does not have is initialised anew, with a warning that lists its weights;
        weights of heads that this class does not have are left out, which the log says. Raises CheckpointError where
        anything else is missing, unknown, corrupt or of another shape; ValueError for a change that does not fit the
        config; TypeError for an unknown keyword, and for a dtype that is not floating-point.
        """
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise TypeError(f"dtype must be a floating-point torch.dtype or None, not {dtype!r}")
        find = _finder(path_or_id, revision, token, local_files_only, cache_dir)
        options = inspect.signature(cls).parameters.keys() - {"config"}
        config = _read_config(find, path_or_id).with_changes(**{k: v for k, v in changes.items() if k not in options})
        with torch.device("meta"):
            model = cls(config, **{k: v for k, v in changes.items() if k in options})
        weights = _fit(model, _read_weights(find, path_or_id), str(path_or_id))
        if dtype is None:
            dtype = weights[f"{cls.body_prefix}embeddings.word_embeddings.weight"].dtype
        model.to(dtype).to_empty(device="cpu").tie_weights()
        _fill(model, weights, str(path_or_id))
        return model.eval()

    def save_pretrained(self, directory: str | os.PathLike) -> None:
        """Write config.json and model.safetensors, each at once (temporary file, then rename), for transformers too.

        Tied weights are stored once, as transformers does. The config keeps all that it was loaded with.
        """
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        tied = {k for k, v in self.tied_keys().items() if self.get_parameter(k) is self.get_parameter(v)}
        weights = {k: t.detach().cpu().contiguous() for k, t in self.state_dict().items() if k not in tied}
        settings = self.config.to_dict() | {"architectures": [type(self).__name__]}
        # transformers 5 loads into the dtype that the config names, under the new name or the old one.
        dtype = weights[f"{self.body_prefix}embeddings.word_embeddings.weight"].dtype
        settings["torch_dtype" if "torch_dtype" in settings else "dtype"] = str(dtype).removeprefix("torch.")
        config = BertConfig.from_dict(settings).to_json()
        _replace(directory / "model.safetensors", lambda path: save_file(weights, path, metadata={"format": "pt"}))
        _replace(directory / "config.json", lambda path: path.write_text(config, encoding="utf-8"))


def _initialize_own(module: nn.Module, std: float) -> None:
    """Initialise the parameters that belong to this very module, not to one below it."""
    for name, parameter in module.named_parameters(recurse=False):
        if name == "bias":
            nn.init.zeros_(parameter)
        elif isinstance(module, nn.LayerNorm):
            nn.init.ones_(parameter)
        else:
            nn.init.normal_(parameter, std=std)
    if isinstance(module, nn.Embedding) and module.padding_idx is not None:
        with torch.no_grad():
            module.weight[module.padding_idx].zero_()


def _replace(path: Path, write: Callable[[Path], Any]) -> None:
    """Write a file so that whoever looks sees the old one or the new one, never a part."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


# ---- finding files ----

Finder = Callable[[str], Path | None]


def _finder(
    path_or_id: str | os.PathLike,
    revision: str | None,
    token: str | bool | None,
    local_files_only: bool,
    cache_dir: str | os.PathLike | None,
) -> Finder:
    """A function from a file's name to where it lies on this machine, or to None where there is no such file."""
    try:
        directory = Path(path_or_id).expanduser()
        there = directory.is_dir()
    except (RuntimeError, OSError) as error:  # ~ of somebody who is not known here; a name that is too long
        raise CheckpointError(f"{path_or_id} is not a directory: {error}") from error
    if there:
        return lambda name: directory / name if (directory / name).is_file() else None
    if isinstance(path_or_id, os.PathLike) or not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", path_or_id):
        raise CheckpointError(
            f"{path_or_id} is not a directory: give one that holds config.json and model.safetensors, or a hub id"
        )
    return lambda name: _download(path_or_id, name, revision, token, local_files_only, cache_dir)


def _download(
    repository: str,
    name: str,
    revision: str | None,
    token: str | bool | None,
    local_files_only: bool,
    cache_dir: str | os.PathLike | None,
) -> Path | None:
    """The file in the cache, downloaded if need be; None where the repository (offline: the cache) has no such file."""
    from huggingface_hub import errors, hf_hub_download  # here, because a directory does not need it and it is slow

    try:
        path = hf_hub_download(
            repository,
            name,
            revision=revision,
            token=token,
            local_files_only=local_files_only,
            cache_dir=cache_dir,
        )
    except (errors.EntryNotFoundError, errors.HfHubHTTPError, errors.HFValidationError, OSError) as error:
        # None where the hub says that there is no such file, or the cache has none and nothing else may be asked.
        offline = local_files_only or isinstance(error.__cause__, errors.OfflineModeIsEnabled)
        absent = isinstance(error, errors.EntryNotFoundError)
        if absent and (offline or not isinstance(error, errors.LocalEntryNotFoundError)):
            return None
        raise CheckpointError(f"{repository}: {name} cannot be downloaded: {error}") from error
    return Path(path)


def _need(find: Finder, name: str, source: str | os.PathLike, reason: str) -> Path:
    path = find(name)
    if path is None:
        raise CheckpointError(f"{source} has no {name}, {reason} (offline, a hub id has what its cache has)")
    return path


# ---- reading files ----


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a JSON {type(content).__name__}, not an object")
    return content


def _read_config(find: Finder, source: str | os.PathLike) -> BertConfig:
    path = _need(find, "config.json", source, "which says what the model is")
    try:
        return BertConfig.from_dict(_read_json(path))
    except CheckpointError:
        raise
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{path}: {error}") from error


def _read_weights(find: Finder, source: str | os.PathLike) -> dict[str, Tensor]:
    """All tensors of the checkpoint, by the names they are stored under."""
    for name in _WEIGHT_NAMES:
        if whole := find(name):
            return _read_tensors(whole)
        if index := find(f"{name}.index.json"):
            return _read_shards(find, index, source)
    raise CheckpointError(
        f"{source} holds no weights: expected {' or '.join(_WEIGHT_NAMES)}, whole or with an index of shards"
    )


def _read_shards(find: Finder, index: Path, source: str | os.PathLike) -> dict[str, Tensor]:
    places = _read_json(index).get("weight_map")
    if not isinstance(places, dict) or not all(Path(str(p)).name == p for p in places.values()):
        raise CheckpointError(f"{index} has no weight_map from weights to the names of files beside it")
    weights: dict[str, Tensor] = {}
    for shard in sorted(set(places.values())):
        weights |= _read_tensors(_need(find, shard, source, f"a shard that {index.name} names"))
    if absent := places.keys() - weights.keys():
        raise CheckpointError(f"{index} names weights that its shards do not hold: {_some(absent)}")
    return weights


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            weights = load_file(path)
        else:
            weights = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle raises whatever its instructions happen to run into
        raise CheckpointError(
            f"{path} cannot be read, it is corrupt, cut short or a Git LFS pointer (download it again): {error}"
        ) from error
    if not isinstance(weights, dict) or not all(isinstance(t, Tensor) for t in weights.values()):
        raise CheckpointError(f"{path} is not a state_dict: it holds something other than named tensors")
    return weights


# ---- fitting what was read to the model ----


def _fit(model: PretrainedModel, stored: dict[str, Tensor], source: str) -> dict[str, Tensor]:
    """The stored tensors under the model's keys, those that it has no place for left out.

    Raises CheckpointError unless every weight of the encoder is there, fits, and has a place.
    """
    weights = _untie(model, _rename(stored, model.body_prefix), source)
    expected = model.state_dict()
    body = tuple(model.body_prefix + part for part in _BODY)
    name = type(model).__name__
    missing = expected.keys() - weights.keys() - model.tied_keys().keys()
    if lost := [k for k in missing if k.startswith(body)]:
        raise CheckpointError(
            f"{source} lacks {len(lost)} weights of the encoder: {_some(lost)}; it holds {_some(stored)}; "
            "is it a BERT, whole, and the one that its config.json describes?"
        )
    unknown = weights.keys() - expected.keys()
    if strange := [k for k in unknown if k.startswith(body)]:
        raise CheckpointError(
            f"{source} holds {len(strange)} weights that the encoder of its config.json has no place for: "
            f"{_some(strange)}; is config.json that of another model?"
        )
    if unknown:
        _LOGGER.warning("%s: %s has no place for %s and left them out", source, name, _some(unknown))
    weights = {k: t for k, t in weights.items() if k in expected}
    for key, tensor in weights.items():
        if tensor.shape != expected[key].shape:
            raise CheckpointError(
                f"{source}: {key} has shape {tuple(tensor.shape)} where {name} with this config has "
                f"{tuple(expected[key].shape)}: give the config that the checkpoint was made with"
            )
        if not tensor.is_floating_point():
            raise CheckpointError(f"{source}: {key} is {tensor.dtype}: only floating-point checkpoints can be loaded")
    return weights


def _rename(stored: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors under today's names, with the encoder's under `prefix`."""
    weights = {_OLD_NORM.sub(lambda m: _NEW_NORM[m[1]], k): t for k, t in stored.items() if not k.endswith(_BUFFERS)}
    prefixed = any(k.startswith("bert.") for k in weights)
    if prefixed and not prefix:
        return {k.removeprefix("bert."): t for k, t in weights.items()}
    if prefix and not prefixed:
        return {prefix + k if k.startswith((*_BODY, "pooler.")) else k: t for k, t in weights.items()}
    return weights


def _untie(model: PretrainedModel, weights: dict[str, Tensor], source: str) -> dict[str, Tensor]:
    """The weights with each tied one under the key that it is tied to, and nowhere else."""
    for key, origin in model.ties.items() - model.tied_keys().items():
        # transformers 4 ties a decoder's bias whatever the config says, and stores it under one name.
        if key.endswith(".bias") and (key in weights) != (origin in weights):
            weights[key] = weights[origin] = weights.get(key, weights.get(origin))
    for key, origin in model.tied_keys().items():
        if key not in weights:
            continue
        tensor = weights.pop(key)
        if origin in weights and not torch.equal(weights[origin], tensor):
            raise CheckpointError(
                f"{source}: {key} and {origin} differ, but the config ties them: "
                "load it with tie_word_embeddings=False to keep both"
            )
        weights[origin] = tensor
    return weights


def _fill(model: PretrainedModel, weights: dict[str, Tensor], source: str) -> None:
    """Give every parameter of the model its value: the stored one, or that of a new head."""
    new = sorted(model.state_dict().keys() - weights.keys() - model.tied_keys().keys())
    for owner in sorted({k.rpartition(".")[0] for k in new}):
        _initialize_own(model.get_submodule(owner), model.config.initializer_range)
    with torch.no_grad():
        for key, tensor in weights.items():
            model.get_parameter(key).copy_(tensor)
    if new:
        warnings.warn(
            f"{source} has no {', '.join(new)}: {type(model).__name__} starts with new ones, train it before use",
            stacklevel=3,
        )


def _some(keys: Iterable[str], shown: int = 5) -> str:
    """The first of the keys, and how many more there are."""
    ordered = sorted(keys)
    more = f" and {len(ordered) - shown} more" if len(ordered) > shown else ""
    return (", ".join(ordered[:shown]) or "nothing") + more

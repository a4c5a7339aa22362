"""Text to token ids and back, with transformers' tokenizers or, where that is not installed, with tokenizers alone."""

from collections.abc import Sequence
from typing import Any, Protocol

import torch

from bertfast.cli.files import find, read_json
from bertfast.cli.output import UsageError

Features = dict[str, list[int]]
_COLUMNS = ("input_ids", "token_type_ids")
# Tokenizers without a limit of their own say so with a huge number.
_NO_LIMIT = 1_000_000


class Tokenizer(Protocol):
    """What the commands ask of a tokenizer."""

    max_length: int | None
    pad_id: int
    mask_id: int | None
    mask_token: str | None

    def encode(self, texts: Sequence[str], pairs: Sequence[str] | None, max_length: int) -> list[Features]:
        """input_ids and token_type_ids of each text (or pair of texts), cut to max_length, not padded."""
        ...

    def token(self, index: int) -> str:
        """The token of this id as the vocabulary spells it."""
        ...


class _FromTransformers:
    def __init__(self, model: str) -> None:
        self._tokenizer = load(lambda t: t.AutoTokenizer.from_pretrained(model), model)
        limit = self._tokenizer.model_max_length
        self.max_length = limit if limit < _NO_LIMIT else None
        self.pad_id = self._tokenizer.pad_token_id or 0
        self.mask_id, self.mask_token = self._tokenizer.mask_token_id, self._tokenizer.mask_token

    def encode(self, texts: Sequence[str], pairs: Sequence[str] | None, max_length: int) -> list[Features]:
        options: dict[str, Any] = {"truncation": True, "max_length": max_length, "padding": False}
        columns = self._tokenizer(list(texts), None if pairs is None else list(pairs), **options)
        return [{k: list(columns[k][i]) for k in _COLUMNS if k in columns} for i in range(len(texts))]

    def token(self, index: int) -> str:
        return self._tokenizer.convert_ids_to_tokens(index)


class _FromTokenizers:
    def __init__(self, model: str) -> None:
        try:
            import tokenizers
        except ImportError:
            raise UsageError(
                "cutting text into tokens takes a tokenizer library: pip install 'bertfast[transformers]'"
            ) from None
        path = find(model, "tokenizer.json")
        if path is None:
            raise UsageError(
                f"{model} has no tokenizer.json, and without it the tokenizer is transformers' business: "
                "pip install 'bertfast[transformers]'"
            )
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # tokenizers raises bare Exception
            raise UsageError(f"{path} is not a tokenizer: {error}") from error
        self._tokenizer.no_padding()  # the file may ask for padding
        settings = read_json(model, "tokenizer_config.json") or {}
        limit = settings.get("model_max_length") or _NO_LIMIT
        self.max_length = int(limit) if limit < _NO_LIMIT else None
        self.pad_id = self._tokenizer.token_to_id(_spelling(settings.get("pad_token", "[PAD]"))) or 0
        self.mask_token: str | None = _spelling(settings.get("mask_token", "[MASK]"))
        self.mask_id = self._tokenizer.token_to_id(self.mask_token)

    def encode(self, texts: Sequence[str], pairs: Sequence[str] | None, max_length: int) -> list[Features]:
        self._tokenizer.enable_truncation(max_length)
        inputs = list(texts) if pairs is None else list(zip(texts, pairs, strict=True))
        encodings = self._tokenizer.encode_batch(inputs)
        return [{"input_ids": e.ids, "token_type_ids": e.type_ids} for e in encodings]

    def token(self, index: int) -> str:
        return str(self._tokenizer.id_to_token(index))


def _spelling(token: str | dict[str, Any]) -> str:
    """A special token, which tokenizer_config.json writes as a string or as an object."""
    return token if isinstance(token, str) else str(token.get("content"))


def load_tokenizer(model: str) -> Tokenizer:
    """The model's own tokenizer. UsageError where it has none that can be loaded."""
    try:
        import transformers  # noqa: F401
    except ImportError:
        return _FromTokenizers(model)
    return _FromTransformers(model)


def load(function: Any, model: str) -> Any:
    """function(transformers), quietly; whatever a bad directory makes transformers raise becomes a UsageError."""
    transformers = quiet_transformers()
    try:
        return function(transformers)
    except Exception as error:  # OSError, ValueError, KeyError, RuntimeError, SafetensorError, bare Exception, ...
        what = str(error).strip().split("\n")[0] or type(error).__name__
        raise UsageError(f"transformers cannot load {model}: {what}") from error


def quiet_transformers() -> Any:
    """The transformers module, told to keep its bars and notes to itself. UsageError where it is not installed."""
    try:
        import transformers
    except ImportError:
        raise UsageError(
            "this command works on models of transformers, which is not installed: pip install 'bertfast[transformers]'"
        ) from None
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return transformers


def length_limit(tokenizer: Tokenizer, positions: int, wanted: int | None) -> int:
    """How many tokens a text may have: `wanted`, within the tokenizer's and the position table's limits.

    UsageError where more is wanted than the model has positions.
    """
    if wanted is None:
        return min(positions, tokenizer.max_length or positions)
    if not 3 <= wanted <= positions:
        raise UsageError(f"--max-length must lie between 3 and the model's {positions} positions, not be {wanted}")
    return wanted


def pad(features: Sequence[Features], pad_id: int) -> dict[str, torch.Tensor]:
    """The rectangle that stock models take: input_ids, attention_mask and what else there is, padded on the right."""
    longest = max(len(f["input_ids"]) for f in features)
    batch = {
        k: torch.tensor([f[k] + [pad_id if k == "input_ids" else 0] * (longest - len(f[k])) for f in features])
        for k in features[0]
    }
    lengths = torch.tensor([len(f["input_ids"]) for f in features])
    return batch | {"attention_mask": (torch.arange(longest) < lengths[:, None]).long()}

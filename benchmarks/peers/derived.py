"""What several peers derive from one stock model, each thing made once and kept as long as the model lives."""

import contextlib
import copy
import functools
import io
import itertools
import logging
import tempfile
import warnings
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from benchmarks.peers.peer import Batch, Run, Setting, Unavailable, imported, wanted

T = TypeVar("T")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
INPUTS = ("input_ids", "token_type_ids", "attention_mask")


def once_per_model(function: Callable[..., T]) -> Callable[..., T]:
    """function(model, *arguments) remembers what it returned for these arguments, until the model is gone."""
    results: weakref.WeakKeyDictionary[nn.Module, dict[tuple, T]] = weakref.WeakKeyDictionary()

    @functools.wraps(function)
    def call(model: nn.Module, *arguments: Any) -> T:
        known = results.setdefault(model, {})
        if arguments not in known:
            known[arguments] = function(model, *arguments)
        return known[arguments]

    return call


@once_per_model
def _converted(model: nn.Module, dtype: torch.dtype, device: str) -> dict[int, Tensor]:
    """Every parameter and buffer by the id of the model's own, which it is itself where there is nothing to convert."""
    tensors = itertools.chain(model.parameters(), model.buffers())
    return {id(t): t.detach().to(device, dtype if t.is_floating_point() else None) for t in tensors}


def transformers_copy(setting: Setting, attention: str = "sdpa") -> nn.Module:
    """The model as a module tree of its own, with this attention, around the same memory for its parameters.

    Memory is converted once for each precision and device, so that ten such copies take the space of one. A parameter
    is an object of its own all the same: what is done to it (a conversion, merging it with others) ends in the copy.
    """
    if setting.precision == "float16" and setting.device == "cpu":
        raise Unavailable("float16 is for GPUs: PyTorch has no fast kernels for it on the CPU")
    _check_transformers(setting.model)
    converted = _converted(setting.model, DTYPES[setting.precision], setting.device)
    memo: dict[int, Any] = dict(converted)
    for parameter in setting.model.parameters():
        memo[id(parameter)] = nn.Parameter(converted[id(parameter)], requires_grad=False)
    model = copy.deepcopy(setting.model, memo)
    model.set_attn_implementation(attention)
    return model


def trainable_copy(setting: Setting, attention: str = "sdpa") -> nn.Module:
    """The model in training mode with this attention and parameters of its own."""
    _check_transformers(setting.model)
    model = copy.deepcopy(setting.model).to(setting.device)
    model.set_attn_implementation(attention)
    return model.train()


def _check_transformers(model: nn.Module) -> None:
    if not hasattr(model, "set_attn_implementation"):
        raise Unavailable(f"takes models of transformers, not {type(model).__name__}")


def inference(model: Callable[..., Any], head: str) -> Run:
    """Runs a module of transformers, without autograd."""

    @torch.inference_mode()
    def run(batch: Batch) -> Tensor:
        return wanted(model(**batch), head)

    return run


@once_per_model
def folder(model: nn.Module) -> Path:
    """A directory for files made of this model. It goes when the model or the process does."""
    directory = tempfile.TemporaryDirectory(prefix="bertfast-peers-")
    weakref.finalize(model, directory.cleanup)
    return Path(directory.name)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps to itself what converters and compilers have to say to whoever calls them by hand."""
    said, level = io.StringIO(), logging.root.manager.disable
    with warnings.catch_warnings(), contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(level)


@once_per_model
def checkpoint(model: nn.Module) -> Path:
    """The model in a directory as transformers saves it, float32, with a tokenizer of as many words as it knows."""
    import tokenizers
    import transformers

    path = folder(model) / "checkpoint"
    words = ["[PAD]", "[UNK]", *(f"[{number}]" for number in range(2, model.config.vocab_size))]
    level = tokenizers.models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="[UNK]")
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(level), pad_token="[PAD]", unk_token="[UNK]"
    )
    stock = transformers_copy(Setting(model, "", "float32", "cpu", {}, 0))
    stock.config.position_embedding_type = "absolute"  # transformers 5 no longer says so; CTranslate2 wants to read it
    with quiet():
        stock.save_pretrained(path)
        tokenizer.save_pretrained(path)
    return path


class _Exported(nn.Module):
    """Takes the batch's tensors in the order of INPUTS and returns only what is wanted."""

    def __init__(self, model: nn.Module, head: str) -> None:
        super().__init__()
        self.model, self.head = model, head

    def forward(self, *inputs: Tensor) -> Tensor:
        return wanted(self.model(**dict(zip(INPUTS, inputs, strict=True))), self.head)


@once_per_model
def onnx_file(model: nn.Module, head: str) -> Path:
    """The model as ONNX, float32, for any number of sequences and any length.

    PyTorch's older exporter makes it, with eager attention: of what it writes, ONNX Runtime's optimiser recognises
    attention and the embedding; of what the newer one writes, neither.
    """
    imported("onnx")
    eager = transformers_copy(Setting(model, head, "float32", "cpu", {}, 0), "eager")
    ragged = torch.tensor([[1, 1, 1], [1, 1, 0]])  # a full mask might be traced away
    path = folder(model) / "model.onnx"
    with quiet(), torch.no_grad():
        torch.onnx.export(
            _Exported(eager, head).eval(),
            (torch.zeros_like(ragged), torch.zeros_like(ragged), ragged),
            path,
            input_names=list(INPUTS),
            output_names=["output"],
            dynamic_axes={name: {0: "sequences", 1: "longest"} for name in INPUTS},
            opset_version=17,
            dynamo=False,
        )
    return path

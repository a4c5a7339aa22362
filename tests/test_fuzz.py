"""Bad arguments to every public function: a documented exception, or right numbers; and no trace of it afterwards.

Every example begins with valid arguments and spoils one or two of them at random. What may come out is what the
docstring says: anything else, AttributeError or RuntimeError say, fails, and a crash ends the whole run.
"""

import copy
import functools
import io
import json
import shutil
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, event, given
from hypothesis import strategies as st
from small_models import CLASSES as NATIVE
from small_models import SETTINGS
from torch import Tensor, nn

import bertfast
from bertfast import calls as state
from bertfast import ops
from bertfast.cli import main
from bertfast.patching import explain, patch, unpatch

transformers = pytest.importorskip("transformers")

from agreement import ran  # noqa: E402
from random_calls import (  # noqa: E402
    Call,
    Subject,
    assert_same_bits,
    calls,
    examples,
    promised,
    same_bits,
    subjects,
)
from stock_models import build  # noqa: E402

USUAL = (ValueError, TypeError)


pytestmark = pytest.mark.usefixtures("one_thread")


# ---- what is done to arguments


class Subclass(Tensor):
    """A tensor of one's own."""


class Spoil:
    """A way to spoil a value; its name is what a failure shows."""

    def __init__(self, name: str, function: Callable[[Any], Any]) -> None:
        self.name, self.function = name, function

    def __call__(self, value: Any) -> Any:
        return self.function(value)

    def __repr__(self) -> str:
        return self.name


def _spoils(**functions: Callable[[Any], Any]) -> tuple[Spoil, ...]:
    return tuple(Spoil(name, function) for name, function in functions.items())


def _strided(t: Tensor) -> Tensor:
    """The same values, no two of them beside one another."""
    return torch.stack((t, t), -1)[..., 0]


def _fill_one(t: Tensor, number: float) -> Tensor:
    """The tensor with this number in its last place."""
    t = t.detach().clone(memory_format=torch.contiguous_format)
    t.view(-1)[-1:] = number
    return t


WRONG_KINDS = _spoils(
    nothing=lambda v: None,
    string=lambda v: "x",
    number=lambda v: 3.5,
    integer=lambda v: 2,
    empty_list=lambda v: [],
    nested_list=lambda v: [[1, 2], [3]],
    mapping=lambda v: {"a": 1},
    thing=lambda v: object(),
    array=lambda v: np.zeros((2, 3)),
    kind=lambda v: torch.Tensor,
)
WRONG_TENSORS = _spoils(
    scalar=lambda t: torch.zeros((), dtype=t.dtype),
    one_axis_more=lambda t: t[None],
    one_axis_more_behind=lambda t: t[..., None],
    flat=lambda t: t.flatten(),
    cut=lambda t: t[..., :-1] if t.dim() else t,
    longer=lambda t: torch.cat((t, t)) if t.dim() else t,
    transposed=lambda t: t.transpose(0, -1) if t.dim() else t,
    strided=_strided,
    expanded=lambda t: t[:1].expand(t.shape) if t.dim() else t,
    subclass=lambda t: t.detach().as_subclass(Subclass),
    sparse=lambda t: t.detach().to_sparse(),
    boolean=lambda t: t.bool(),
    int32=lambda t: t.int(),
    int64=lambda t: t.long(),
    float16=lambda t: t.half(),
    float64=lambda t: t.double(),
    complex64=lambda t: t.to(torch.complex64),
    all_nan=lambda t: torch.full_like(t, torch.nan) if t.is_floating_point() else t,
    all_huge=lambda t: torch.full_like(t, 1e4 if t.is_floating_point() else 100),
    all_negative=lambda t: torch.full_like(t, -1),
    learning=lambda t: t.detach().clone().requires_grad_() if t.is_floating_point() else t,
)
# In one place, which may be padding, where nothing looks; and tensors without values, for which stock code makes some
# up, or without elements, which it refuses for no reason.
WRONG_PLACES = _spoils(
    none_at_all=lambda t: t[:0] if t.dim() else t,
    meta=lambda t: t.detach().to("meta"),
    nan=lambda t: _fill_one(t, torch.nan) if t.is_floating_point() else t,
    infinite=lambda t: _fill_one(t, torch.inf) if t.is_floating_point() else t,
    huge=lambda t: _fill_one(t, 1e4 if t.is_floating_point() else 100),
    negative=lambda t: _fill_one(t, -1),
)
WRONG_NUMBERS = _spoils(
    negative=lambda v: -1,
    one=lambda v: 1,
    half=lambda v: 0.5,
    nan=lambda v: float("nan"),
    infinite=lambda v: float("inf"),
    huge=lambda v: 10**30,
    truth=lambda v: True,
    scalar=lambda v: torch.tensor(1.0),
    vector=lambda v: torch.ones(3),
)
WRONG_LISTS = _spoils(
    shorter=lambda v: v[:-1],
    longer=lambda v: [*v, *v],
    reversed=lambda v: v[::-1],
    of_nothing=lambda v: [None for _ in v],
    of_strings=lambda v: ["x" for _ in v],
    of_numbers=lambda v: [1.5 for _ in v],
    of_lists=lambda v: [[i] for i in v],
)


def wrongs(value: Any, places: bool = True) -> tuple[Spoil, ...]:
    """The ways to spoil a value of this kind. places: also single places of a tensor."""
    if isinstance(value, Tensor):
        return WRONG_TENSORS + WRONG_KINDS + (WRONG_PLACES if places else ())
    if isinstance(value, list | tuple):
        return WRONG_LISTS + WRONG_KINDS
    return WRONG_NUMBERS + WRONG_KINDS


@st.composite
def spoiled(draw: st.DrawFn, arguments: Mapping[str, Any], places: bool = True) -> dict[str, Any]:
    """The arguments with one or two of them spoiled."""
    names = draw(st.lists(st.sampled_from(list(arguments)), min_size=1, max_size=2, unique=True))
    how = {name: draw(st.sampled_from(wrongs(arguments[name], places))) for name in names}
    event(" ".join(f"{name}: {way}" for name, way in how.items()))
    return {name: how[name](value) if name in how else value for name, value in arguments.items()}


def attempt(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """What the function returns, or the exception that it raises."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return function(*args, **kwargs)
    except Exception as error:
        return error


def refused(function: Callable[..., Any], documented: tuple[type[Exception], ...], *args: Any, **kwargs: Any) -> Any:
    """What the function returns, or the documented exception that it raises, which has to say something."""
    result = attempt(function, *args, **kwargs)
    if isinstance(result, Exception):
        if not isinstance(result, documented):
            raise result
        assert str(result), type(result)
    return result


# ---- ops

TOKENS, HIDDEN, HEADS = 6, 16, 2


def op_arguments(name: str, dtype: torch.dtype) -> dict[str, Any]:
    """Valid arguments of an op, all that it takes."""
    torch.manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape).to(dtype)

    ids, seed = torch.tensor([1, 2, 0, 3, 1, 2]), torch.tensor([7])
    rows, vector = draw(TOKENS, HIDDEN), draw(HIDDEN)
    head_size = HIDDEN // HEADS
    dropped = {"dropout_p": 0.25, "seed": seed}
    return {
        "embed_layer_norm": {
            **{"input_ids": ids, "position_ids": ids.flip(0), "token_type_ids": ids % 2},
            **{"word": rows, "position": draw(TOKENS, HIDDEN), "token_type": draw(2, HIDDEN)},
            **{"weight": vector, "bias": draw(HIDDEN), "eps": 1e-5, "padding_idx": 0, "position_padding_idx": None},
            **dropped,
        },
        "varlen_attention": {
            **{"qkv": draw(TOKENS, 3, HEADS, head_size), "cu_seqlens": torch.tensor([0, 2, 2, 6], dtype=torch.int32)},
            **{"max_seqlen": 4, "order": torch.tensor([2, 0, 1], dtype=torch.int32), "scale": 0.5},
            **dropped,
        },
        "masked_attention": {
            **{letter: draw(2, HEADS, 3, head_size) for letter in "qkv"},
            **{"mask": torch.ones(2, 1, 1, 3, dtype=torch.bool), "scale": 0.5},
            **dropped,
        },
        "bias_gelu": {"x": rows, "bias": vector, "approximate": "tanh"},
        "residual_layer_norm": {
            **{"x": rows, "residual": draw(TOKENS, HIDDEN), "weight": vector, "bias": draw(HIDDEN), "eps": 1e-5},
            **{"x_bias": draw(HIDDEN), **dropped},
        },
        "linear": {
            **{"x": rows, "weight": [draw(4, HIDDEN), draw(5, HIDDEN)], "bias": [draw(4), draw(5)]},
            **{"activation": "gelu", "packed": ops.PackedWeights()},
        },
        "feed_forward": {
            **{"x": rows, "up_weight": draw(4, HIDDEN), "up_bias": draw(4), "down_weight": draw(HIDDEN, 4)},
            **{"activation": "gelu", "up_packed": ops.PackedWeights(), "down_packed": ops.PackedWeights()},
        },
        "masked_lm_loss": {
            **{
                "x": rows,
                "labels": (torch.arange(TOKENS) % 4).masked_fill(torch.arange(TOKENS) == 1, -100),
                "weight": draw(4, HIDDEN),
                "bias": draw(4),
            },
            "reduction": "sum",
        },
    }[name]


OPS = tuple(name for name in ops.__all__ if not isinstance(getattr(ops, name), type))
OP_ERRORS = {name: USUAL for name in OPS} | {"embed_layer_norm": (*USUAL, IndexError)}


def _learn(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments with gradients wanted of every floating-point tensor that can have one."""

    def learn(value: Any) -> Any:
        if isinstance(value, list):
            return [learn(v) for v in value]
        real = isinstance(value, Tensor) and value.is_floating_point()
        return value.detach().requires_grad_() if real else value

    return {name: learn(value) for name, value in arguments.items()}


def run_op(name: str, arguments: Mapping[str, Any], grad: bool) -> Any:
    """The op's output, after a backward where gradients are wanted."""
    with torch.set_grad_enabled(grad):
        out = getattr(ops, name)(**(_learn(arguments) if grad else arguments))
    out = out.loss if isinstance(out, ops.MaskedLMLoss) else out
    if out.requires_grad:
        out.sum().backward()
    return out.detach()


@examples(400)
@given(st.sampled_from(OPS), st.sampled_from((torch.float32, torch.bfloat16, torch.float64)), st.booleans(), st.data())
def test_ops(name: str, dtype: torch.dtype, grad: bool, data: st.DataObject) -> None:
    arguments = op_arguments(name, dtype)
    before = run_op(name, arguments, grad)
    refused(run_op, OP_ERRORS[name], name, data.draw(spoiled(arguments), label="arguments"), grad)
    assert same_bits(run_op(name, arguments, grad), before)


@pytest.mark.parametrize("name", OPS)
def test_required_tensors_are_required(name: str) -> None:
    """A kernel that is handed no address crashes."""
    arguments = op_arguments(name, torch.float32)
    optional = {
        "token_type_ids",
        "order",
        "mask",
        "bias" if name in ("linear", "bias_gelu", "masked_lm_loss") else "",
        "x_bias",
        "seed",
    }
    for argument, value in arguments.items():
        if isinstance(value, Tensor) and argument not in optional:
            with pytest.raises(TypeError, match=argument):
                getattr(ops, name)(**(arguments | {argument: None}))


@pytest.mark.parametrize("name", OPS)
def test_ops_without_values(name: str) -> None:
    """Tensors on the device "meta" have shapes only, and so has what comes of them."""

    def on_meta(value: Any) -> Any:
        if isinstance(value, list):
            return [on_meta(v) for v in value]
        return value.to("meta") if isinstance(value, Tensor) else value

    arguments = op_arguments(name, torch.bfloat16)
    expected = run_op(name, arguments, grad=False)
    out = run_op(name, {key: on_meta(value) for key, value in arguments.items()}, grad=False)
    assert (out.device.type, out.shape, out.dtype) == ("meta", expected.shape, expected.dtype)


# ---- packed batches


def _lists() -> dict[str, Any]:
    return {
        "input_ids": [[1, 2, 3], [4]],
        "token_type_ids": [[0, 0, 1], [0]],
        "labels": [[5, 6, -100], [7]],
    }


def _feature(**changes: Any) -> dict[str, Any]:
    return {"input_ids": [1, 2], "token_type_ids": [0, 1], "attention_mask": [1, 1], "labels": 1} | changes


RIGHT = torch.tensor([[1, 1, 1], [1, 0, 0]])
PACKING: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "from_mask": (bertfast.Packing.from_mask, {"mask": RIGHT}),
    "full": (bertfast.Packing.full, {"batch": 2, "seq_len": 3}),
    "from_lengths": (bertfast.Packing.from_lengths, {"lengths": [3, 1]}),
    "pack": (bertfast.Packing.from_mask(RIGHT).pack, {"rectangle": torch.randn(2, 3, 4)}),
    "pad": (bertfast.Packing.from_mask(RIGHT).pad, {"packed": torch.randn(4, 4)}),
    "from_lists": (functools.partial(bertfast.PackedBatch.from_lists, token_labels=True), _lists()),
    "collator": (bertfast.PackingCollator(), {"features": [_feature(), _feature()]}),
    "flattening collator": (bertfast.FlatteningCollator(), {"features": [_feature(), _feature()]}),
    **{
        f"collator's {name}": (
            lambda value, name=name: bertfast.PackingCollator()([_feature(), _feature(**{name: value})]),
            {"value": value},
        )
        for name, value in _feature().items()
    },
}


@examples(150)
@given(st.sampled_from(tuple(PACKING)), st.data())
def test_packing(name: str, data: st.DataObject) -> None:
    function, arguments = PACKING[name]
    refused(function, USUAL, **data.draw(spoiled(arguments), label="arguments"))


# ---- configurations, native models, checkpoints


@examples(100)
@given(st.sampled_from([name for name in bertfast.BertConfig.__dataclass_fields__ if name != "extra"]), st.data())
def test_configurations(name: str, data: st.DataObject) -> None:
    valid = bertfast.BertConfig(**SETTINGS, classifier_dropout=0.1, problem_type="regression").to_dict()
    valid["num_labels"] = 2
    spoil = data.draw(st.sampled_from(wrongs(valid[name])), label="how")
    assume(not (name == "num_labels" and spoil.name == "huge"))  # each of them would get a name
    for make in (lambda s: bertfast.BertConfig(**s), bertfast.BertConfig.from_dict):
        given_ = {k: v for k, v in SETTINGS.items() if k != name} | {name: spoil(valid[name])}
        config = refused(make, (ValueError,), given_)
        # What is accepted can be built, and stored, if it is not too large.
        if isinstance(config, bertfast.BertConfig) and spoil.name != "huge":
            with torch.device("meta"):
                bertfast.BertForSequenceClassification(config)
            assert bertfast.BertConfig.from_dict(json.loads(config.to_json())).hidden_size == config.hidden_size


def native_arguments(name: str) -> dict[str, Any]:
    """A valid call of one of bertfast's own models, with labels."""
    shape = (2, 2, 5) if name == "BertForMultipleChoice" else (4, 5)
    torch.manual_seed(0)
    mask = torch.ones(shape, dtype=torch.int64)
    mask[..., -1, 3:] = 0
    call: dict[str, Any] = {
        "input_ids": torch.randint(0, 53, shape),
        "attention_mask": mask,
        "token_type_ids": torch.randint(0, 2, shape),
        "position_ids": torch.randint(0, 9, shape),
    }
    by_token, by_sequence = torch.randint(0, 2, shape), torch.randint(0, 2, shape[:1])
    return call | {
        "BertModel": {},
        "BertForMaskedLM": {"labels": by_token},
        "BertForPreTraining": {"labels": by_token, "next_sentence_label": by_sequence},
        "BertForTokenClassification": {"labels": by_token},
        "BertForQuestionAnswering": {"start_positions": by_sequence, "end_positions": by_sequence},
    }.get(name, {"labels": by_sequence})


@examples(150)
@given(st.sampled_from(NATIVE), st.booleans(), st.data())
def test_native_models(name: str, grad: bool, data: st.DataObject) -> None:
    torch.manual_seed(0)
    model = getattr(bertfast, name)(bertfast.BertConfig(**SETTINGS | {"num_hidden_layers": 1})).eval()
    arguments = native_arguments(name)
    with torch.set_grad_enabled(grad):
        before = model(**arguments)
        refused(model, (*USUAL, IndexError), **data.draw(spoiled(arguments), label="arguments"))
        after = model(**arguments)
    assert all(same_bits(a, b) for a, b in zip(after, before, strict=True))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole checkpoint, of which each file has a twin in the other form: model.safetensors, pytorch_model.bin."""
    directory = tmp_path_factory.mktemp("checkpoint")
    torch.manual_seed(0)
    model = bertfast.BertForMaskedLM(bertfast.BertConfig(**SETTINGS | {"num_hidden_layers": 1}))
    model.save_pretrained(directory)
    torch.save(model.state_dict(), directory / "pytorch_model.bin")
    names = dict.fromkeys(model.state_dict(), "model.safetensors")
    (directory / "index").write_text(json.dumps({"weight_map": names}))
    return directory


def _rewrite(path: Path, change: Callable[[Any], Any]) -> None:
    path.write_text(json.dumps(change(json.loads(path.read_text()))))


def _damage_bytes(path: Path, draw: st.DrawFn) -> None:
    content = bytearray(path.read_bytes())
    where = draw(st.integers(0, min(len(content), 3000) - 1), label="where")
    if draw(st.booleans(), label="cut"):
        path.write_bytes(content[:where])
    else:
        content[where] ^= 1 << draw(st.integers(0, 7), label="bit")
        path.write_bytes(content)


@examples(100)
@given(st.sampled_from(("model.safetensors", "pytorch_model.bin", "index", "config.json")), st.data())
def test_broken_checkpoints(
    checkpoint: Path, tmp_path_factory: pytest.TempPathFactory, file: str, data: st.DataObject
) -> None:
    directory = tmp_path_factory.mktemp("broken") / "model"
    shutil.copytree(checkpoint, directory)
    path = directory / file
    if file == "pytorch_model.bin":
        (directory / "model.safetensors").unlink()
    elif file == "index":  # the shards are one file, which is found by this name alone
        path = path.rename(directory / "model.safetensors.index.json")
        (directory / "pytorch_model.bin").unlink()
        (directory / "model.safetensors").rename(directory / "shard.safetensors")
        _rewrite(path, lambda index: {"weight_map": dict.fromkeys(index["weight_map"], "shard.safetensors")})
    way = data.draw(st.sampled_from(("missing", "bytes", "directory", "json")), label="way")
    if way == "missing":
        path.unlink()
    elif way == "directory":
        path.unlink()
        path.mkdir()
    elif way == "bytes" or path.suffix != ".json":
        _damage_bytes(path, data.draw)
    else:
        content = json.loads(path.read_text())
        name = data.draw(st.sampled_from(sorted(content)), label="key")
        value = data.draw(st.sampled_from((None, -1, 7, 1.5, "x", [], {}, [[1]], {"a": 1}, True)), label="value")
        _rewrite(path, lambda settings: settings | {name: value})
    found = refused(bertfast.BertForMaskedLM.from_pretrained, (bertfast.CheckpointError,), directory)
    if isinstance(found, nn.Module):
        assert found(torch.tensor([[1, 2]])).logits.shape[:2] == (1, 2)
    shutil.rmtree(directory)


@pytest.mark.parametrize("dtype", ["float32", torch.int64, torch.complex64, 3])
def test_no_dtypes(checkpoint: Path, dtype: Any) -> None:
    with pytest.raises(TypeError, match="dtype must be a floating-point"):
        bertfast.BertForMaskedLM.from_pretrained(checkpoint, dtype=dtype)


@pytest.mark.parametrize("place", ["~nobody-at-all/model", "a/b/c", "", "/nowhere", "x" * 5000])
def test_no_directories(place: str) -> None:
    with pytest.raises(bertfast.CheckpointError, match=r"\w"):
        bertfast.BertForMaskedLM.from_pretrained(place, local_files_only=True)


# ---- patching


JUNK = (None, 3, "x", [], {}, object(), nn.Linear(2, 2), nn.ModuleList(), transformers.BertModel, torch.ones(2))


@pytest.mark.parametrize("junk", JUNK, ids=lambda junk: type(junk).__name__)
def test_patching_of_anything(junk: Any) -> None:
    for function in (patch, explain):
        with pytest.raises(bertfast.UnsupportedModelError, match=r"\w"):
            function(junk)
    if isinstance(junk, nn.Module):
        assert unpatch(junk) is junk
    else:
        with pytest.raises(bertfast.UnsupportedModelError, match=r"\w"):
            unpatch(junk)
    model = build(num_hidden_layers=1)
    with pytest.raises(ValueError, match="padding"):
        patch(model, padding=junk)
    assert not explain(model).backbones[0].patched


@examples(150)
@given(subjects(), calls(), st.sampled_from((torch.float64, torch.float32)), st.booleans(), st.data())
def test_patched_calls(subject: Subject, call: Call, dtype: torch.dtype, grad: bool, data: st.DataObject) -> None:
    stock = subject.build(dtype)
    patched = patch(copy.deepcopy(stock))
    arguments = call.arguments(subject, dtype)
    with torch.set_grad_enabled(grad):
        before = dict(patched(**arguments))
        stock(**arguments)  # which writes the kind of labels into its configuration, as the patched one has
        given_ = data.draw(spoiled(arguments, places=False), label="arguments")
        patch(unpatch(patched))  # counts from here
        ours, theirs = (attempt(model, **given_) for model in (patched, stock))
        assert not state.calls.frames and not state.calls.heads
        if isinstance(theirs, Exception):
            kind = RuntimeError if isinstance(theirs, RuntimeError) else type(theirs)
            # Of no tokens at all stock fails to guess a shape; ours gives no tokens.
            empty = any(isinstance(v, torch.Tensor) and not v.numel() for v in given_.values())
            fine = empty and not isinstance(ours, Exception)
            assert fine or isinstance(ours, (kind, *USUAL, IndexError)), (ours, theirs)
        else:
            assert not isinstance(ours, Exception), (ours, theirs)
            _compare(
                subject, call, given_.get("attention_mask") is arguments.get("attention_mask"), patched, ours, theirs
            )
        assert_same_bits(dict(patched(**arguments)), before)


def _compare(subject: Subject, call: Call, same_mask: bool, patched: nn.Module, ours: Any, theirs: Any) -> None:
    """The same output, where stock's is finite, and where the mask still says what is padding."""
    assert type(ours) is type(theirs)
    (path,) = ran(patched)
    if path == "packed" and not same_mask:
        return
    found = [promised(subject, call, "exact", output, path) for output in (ours, theirs)]
    assert list(found[0]) == list(found[1])
    for a, b in zip(found[0].values(), found[1].values(), strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        a, b = a.detach(), b.detach()
        finite = b.isfinite()
        if b.device.type == "cpu" and finite.any():
            a, b = a[finite], b[finite]
            tolerance = 1e-9 if b.dtype == torch.float64 else 1e-3
            assert float((a - b).abs().max()) <= tolerance * max(1.0, float(b.abs().max()))


# ---- the command line

WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz", *"0123456789.,")
NO_NUMBERS = ("0", "-1", "x", "", "nan")
BAD: dict[str, tuple[str, ...]] = {
    "MODEL": (
        *("/nowhere/model", "~nobody-at-all/model", "a/b/c", "x" * 5000),
        *("{file}", "{empty}", "{no config}", "{list}", "{cut}"),
    ),
    "SENTENCE": ("", "no mask", "[MASK] " * 60),
    "--texts": ("/nowhere/texts", "{empty}", "{binary}", "{nothing}", "~nobody-at-all/texts", "x" * 5000),
    "--input": ("/nowhere/texts", "{empty}", "{binary}"),
    "--output": ("/nowhere/x.npy", "{empty}", "{file}/x.npy", "", "x" * 5000),
    "--dtype": ("float8", "", "float64"),
    "--pooling": ("max", ""),
    "--batch-size": (*NO_NUMBERS, "1.5"),
    "--max-length": (*NO_NUMBERS, "2", "1000000"),
    "--threads": (*NO_NUMBERS, "1.5"),
    "--rounds": (*NO_NUMBERS, "1.5"),
    "--seconds": (*NO_NUMBERS, "inf"),
    "--precision": (*NO_NUMBERS, "inf"),
    "--top": (*NO_NUMBERS, "1000000000000"),
    "--surprise": ("", "x"),
}
COMMANDS = {
    "check": ("MODEL", "--texts", "--dtype", "--surprise"),
    "bench": (
        *("MODEL", "--texts", "--dtype", "--batch-size", "--max-length", "--threads", "--rounds"),
        *("--seconds", "--precision", "--surprise"),
    ),
    "fill-mask": ("MODEL", "SENTENCE", "--top", "--surprise"),
    "embed": ("MODEL", "--input", "--output", "--batch-size", "--pooling", "--dtype", "--surprise"),
    "doctor": ("--surprise",),
}


@pytest.fixture(scope="module")
def places(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The things on disk that a command line may name."""
    tokenizers = pytest.importorskip("tokenizers")
    root = tmp_path_factory.mktemp("places")
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.WordPiece({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]")
    )
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    names = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}
    whole = root / "model"
    shutil.copytree(checkpoint, whole)
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=40, **names).save_pretrained(
        whole
    )
    for name in ("no config", "list", "cut"):
        shutil.copytree(whole, root / name)
        (root / name / "pytorch_model.bin").unlink()
    (root / "empty").mkdir()
    (root / "no config" / "config.json").unlink()
    (root / "list" / "config.json").write_text("[1]")
    (root / "cut" / "model.safetensors").write_bytes((whole / "model.safetensors").read_bytes()[:1000])
    (root / "file").write_text("a b c\nd e\n")
    (root / "binary").write_bytes(b"\xff\xfe\x00\x80")
    (root / "nothing").write_text("")
    return {path.name: str(path) for path in root.iterdir()}


def command_line(command: str, bad: Mapping[str, str], places: Mapping[str, str]) -> list[str]:
    """The arguments of a command with those that are bad in place of its own."""
    own = {"MODEL": places["model"], "SENTENCE": "a [MASK].", "--output": places["file"] + ".npy"}
    words = [command]
    for name in COMMANDS[command]:
        value = bad.get(name, own.get(name))
        if value is None:
            continue
        if "{" in value:
            value = value.format_map(places)
        words += [value] if name.isupper() else [f"{name}={value}"]
    return words


def run_command(words: Sequence[str]) -> tuple[int, str, str]:
    """The status of a command, and what it wrote to stdout and stderr."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        status = main(words)
    return status, out.getvalue(), err.getvalue()


@pytest.mark.parametrize("command", COMMANDS)
def test_single_mistakes(places: dict[str, str], command: str) -> None:
    for name in COMMANDS[command]:
        for value in BAD[name]:
            _assert_one_line(run_command(command_line(command, {name: value}, places)))


@examples(40)
@given(st.sampled_from(tuple(COMMANDS)), st.data())
def test_command_lines(places: dict[str, str], command: str, data: st.DataObject) -> None:
    names = data.draw(st.lists(st.sampled_from(COMMANDS[command]), min_size=1, max_size=2, unique=True), label="which")
    bad = {name: data.draw(st.sampled_from(BAD[name]), label=name) for name in names}
    _assert_one_line(run_command(command_line(command, bad, places)))


@pytest.mark.parametrize("words", [[], ["dance"], ["embed"], ["--surprise"], ["check", "--texts"]], ids=" ".join)
def test_no_commands(words: list[str]) -> None:
    _assert_one_line(run_command(words))


def _assert_one_line(result: tuple[int, str, str]) -> None:
    status, out, err = result
    assert status == 2 and not out, result
    assert err.startswith("bertfast: error: ") and err.count("\n") == 1 and err.endswith("\n"), err
    assert "Traceback" not in err and "--debug" not in err

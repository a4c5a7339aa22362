"""Patched models in one native call, in float32, with compute="bf16" and in int8: every family and head."""

import copy
import warnings

import pytest
import torch
import transformers
from agreement import exact_path, ran, reasons, visible
from stock_models import CLASSES, build, call_of, config_of, family_of, mask_of
from torch import Tensor, nn

from bertfast import explain, machine, native, patch, unpatch
from bertfast.calls import STATE, LayerState
from bertfast.layer import LayerPacks
from bertfast.ops.packed import OneDnnPacked

pytestmark = pytest.mark.skipif(native.cpu is None, reason=native.cpu_reason)

# Largest error of outputs, as a share of the largest, with weights ten times as large as usual.
LIMITS = {"float32": 2e-5, "bfloat16": 0.06, "int8": 0.25}


def with_operand(model: nn.Module, operand: str) -> nn.Module:
    """Patched so that its GEMMs multiply this, whatever the processor is good at."""
    patch(model)
    for module in model.modules():
        state = module.__dict__.get(STATE)
        if isinstance(state, LayerState):
            state.packs = LayerPacks.empty(operand)
    return model


def error(ours: dict[str, Tensor], gold: dict[str, Tensor]) -> float:
    assert ours.keys() == gold.keys()
    return max(((ours[k].double() - gold[k]).abs().max() / gold[k].abs().max()).item() for k in gold)


@pytest.mark.parametrize("operand", LIMITS)
@pytest.mark.parametrize("name", CLASSES)
def test_every_family_and_head(name: str, operand: str) -> None:
    stock = build(name)
    patched = with_operand(copy.deepcopy(stock).float(), operand)
    native_calls = 0
    for form in ("none", "right", "left", "holes"):
        mask = mask_of(form)
        call = call_of(name, mask)
        with torch.inference_mode():
            ours, gold = patched(**call), stock(**call)
        assert error(visible(ours, mask), visible(gold, mask)) <= LIMITS[operand]
        native_calls += exact_path(name, form) == "packed"
    report = explain(patched).backbones[0]
    if family_of(name).prefix == "MPNet":
        assert report.encoder.startswith("op by op: relative positions") and not report.native_calls
    else:
        assert report.encoder.startswith(f"one native call ({native.cpu.isa()}), multiplying {operand}")
        assert report.native_calls == native_calls


@pytest.fixture
def bfloat16_units(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "has_bfloat16", lambda: True)


@pytest.mark.usefixtures("bfloat16_units")
def test_bf16_is_more_accurate_than_a_model_in_bfloat16() -> None:
    torch.manual_seed(0)
    stock = transformers.BertModel(config_of("BertModel", num_hidden_layers=12, hidden_size=192)).eval().double()
    call = call_of("BertModel", mask_of("right"))
    ours = patch(copy.deepcopy(stock).float(), compute="bf16")
    with torch.inference_mode():
        gold, found, half = (m(**call).last_hidden_state for m in (stock, ours, copy.deepcopy(stock).bfloat16()))
    valid = call["attention_mask"].bool()
    assert found.dtype == torch.float32
    ours, theirs = (found - gold)[valid].abs(), (half - gold)[valid].abs()
    assert ours.max() <= 0.03 and ours.mean() < 0.5 * theirs.mean()


@pytest.mark.usefixtures("bfloat16_units")
def test_options_and_their_undoing() -> None:
    model, call = build(dtype=torch.float32), call_of("BertModel", mask_of("right"))
    with torch.inference_mode():
        stock = model(**call).last_hidden_state
        plain = patch(model)(**call).last_hidden_state
        packed = explain(model).backbones[0].packed_bytes
        half = patch(model, compute="bf16")(**call).last_hidden_state
        report = explain(model).backbones[0]
        assert report.options["compute"] == "bfloat16" and report.packed_bytes < 0.6 * packed
        assert "multiplying bfloat16" in str(report) and ran(model) == {"packed": 2} and report.native_calls == 2
        assert torch.equal(patch(model, compute="bfloat16")(**call).last_hidden_state, half)
        assert torch.equal(patch(model)(**call).last_hidden_state, plain) and not torch.equal(plain, half)
        assert torch.equal(unpatch(model)(**call).last_hidden_state, stock)


@pytest.mark.usefixtures("bfloat16_units")
def test_bf16_op_by_op_and_in_training() -> None:
    """Where layers are called one by one the GEMMs still multiply bfloat16; gradients stay float32's, bit for bit."""
    model, call = build(dtype=torch.float32), call_of("BertModel", mask_of("right"))
    valid = call["attention_mask"].bool()
    half, plain = patch(copy.deepcopy(model), compute="bf16"), patch(copy.deepcopy(model))
    with torch.inference_mode():
        whole = half(**call).last_hidden_state[valid]
        one_by_one = half(**call, output_hidden_states=True)
        assert reasons(half) == "hidden states wanted"
        assert error({"": one_by_one.last_hidden_state[valid]}, {"": whole.double()}) < LIMITS["bfloat16"]
        assert not torch.equal(one_by_one.last_hidden_state, plain(**call, output_hidden_states=True).last_hidden_state)
    gradients = []
    for patched in (half, plain):
        patched(**call).last_hidden_state[valid].square().sum().backward()
        gradients.append([p.grad for p in patched.parameters()])
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_a_processor_without_bfloat16_says_so_and_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "has_bfloat16", lambda: False)
    model, call = build(dtype=torch.float32), call_of("BertModel", None)
    with pytest.warns(UserWarning, match=r"compute='bf16'.*no instructions for bfloat16.*stays in the weights'"):
        patch(model, compute="bf16")
    with torch.inference_mode(), warnings.catch_warnings(action="error"):
        model(**call)
    assert explain(model).backbones[0].options["compute"] is None
    assert "multiplying float32" in explain(model).backbones[0].encoder


def test_bfloat16_is_left_to_onednn_on_processors_with_amx(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "has_amx", lambda: True)
    stock, call = build(), call_of("BertModel", mask_of("right"))
    valid = call["attention_mask"].bool()
    half = patch(copy.deepcopy(stock).float(), compute="bf16")
    with torch.inference_mode():
        ours, gold = half(**call).last_hidden_state[valid], stock(**call).last_hidden_state[valid]
    assert ours.dtype == torch.float32 and error({"": ours}, {"": gold}) <= LIMITS["bfloat16"]
    report = explain(half).backbones[0]
    assert report.encoder.startswith("op by op: bfloat16 is left to oneDNN") and report.packed_bytes > 0
    assert isinstance(half.encoder.layer[0].__dict__[STATE].packs.up._copy.packed, OneDnnPacked)


def test_wrong_options() -> None:
    model = build(dtype=torch.float32)
    for wrong in ("fp8", "int8", 16):
        with pytest.raises(ValueError, match="compute must be None"):
            patch(model, compute=wrong)
    with pytest.raises(ValueError, match="compute is of packed weights"):
        patch(model, compute="bf16", pack_weights=False)
    assert STATE not in model.__dict__


def test_explain_before_a_call_and_without_packed_weights() -> None:
    model, call = patch(build(dtype=torch.float32)), call_of("BertModel", None)
    assert explain(model).backbones[0].encoder.startswith("op by op, until a call")
    patch(model, pack_weights=False)
    with torch.inference_mode():
        model(**call)
    assert explain(model).backbones[0].encoder.startswith("op by op: weights are not packed (pack_weights=False)")
    assert explain(model).backbones[0].native_calls == 0

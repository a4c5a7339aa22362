"""PEFT's adapters on patched models, put in before patching and after: outputs and gradients of stock models with them.

A layer with an adapter inside runs stock code, as its adapter has to be called; the other layers stay fused.
"""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bertfast.patching import explain, patch, unpatch

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

from agreement import assert_same, ran, reasons, visible  # noqa: E402
from compatibility import note  # noqa: E402
from live_models import GRADIENT_TOLERANCE, path_of  # noqa: E402
from stock_models import FAMILIES, build, call_of, mask_of  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")

QUERIES_AND_VALUES = {"distilbert": ["q_lin", "v_lin"], "mpnet": ["attn.q", "attn.v"]}
ADAPTED = ["bert", "roberta", "distilbert"]


def adapt(model: nn.Module, family: str, **settings: Any) -> Any:
    """The model with LoRA in the queries and values of its layers, which changes what it computes."""
    targets = QUERIES_AND_VALUES.get(family, ["query", "value"])
    torch.manual_seed(3)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=targets, init_lora_weights=False, **settings)
    return peft.get_peft_model(model, config).double()


def adapted_pair(name: str, family: str, order: str, **settings: Any) -> tuple[Any, Any]:
    """A stock model with an adapter, and one that was patched before or after it got the same."""
    base = build(name)
    stock = adapt(copy.deepcopy(base), family, **settings)
    patched = adapt(patch(base), family, **settings) if order == "before" else patch(adapt(base, family, **settings))
    return stock, patched


def outputs_and_gradients(model: nn.Module, call: dict[str, Tensor], mask: Tensor) -> dict[str, Tensor]:
    """What is visible of a call, and the gradients of its loss for all that an adapter trains."""
    output = model(**call)
    output.loss.backward()
    trained = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert trained and all(grad is not None for grad in trained.values())
    return {k: v.detach() for k, v in visible(output, mask).items()} | trained


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("head", ["ForSequenceClassification", "ForMaskedLM"])
@pytest.mark.parametrize("family", FAMILIES)
def test_lora_in_every_layer(family: str, head: str, order: str) -> None:
    name = FAMILIES[family].prefix + head
    stock, patched = adapted_pair(name, family, order)
    mask = mask_of("right")
    call = call_of(name, mask)
    ours, theirs = (outputs_and_gradients(model, call, mask) for model in (patched, stock))
    assert_same(ours, theirs, GRADIENT_TOLERANCE)
    note(f"PEFT LoRA {order} patching", name, path_of(patched))
    assert path_of(patched) == "stock" and "peft" in reasons(patched)


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("family", ADAPTED)
def test_layers_without_an_adapter_stay_fused(family: str, order: str) -> None:
    name = FAMILIES[family].prefix + "ForSequenceClassification"
    stock, patched = adapted_pair(name, family, order, layers_to_transform=[1])
    mask = mask_of("right")
    call = call_of(name, mask)
    ours, theirs = (outputs_and_gradients(model, call, mask) for model in (patched, stock))
    assert_same(ours, theirs, GRADIENT_TOLERANCE)
    assert ran(patched) == {"rectangle": 1} and "layer 1" in reasons(patched)
    note("PEFT LoRA in some layers", name, "rectangle")


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("family", FAMILIES)
def test_merged_adapters_run_packed(family: str, order: str) -> None:
    name = FAMILIES[family].prefix + "ForSequenceClassification"
    stock, patched = adapted_pair(name, family, order)
    mask = mask_of("right")
    call = call_of(name, mask)
    with torch.no_grad():
        patched(**call)
        before = ran(patched)
        merged, stock_merged = patched.merge_and_unload(), stock.merge_and_unload()
        assert_same(visible(merged(**call), mask), visible(stock_merged(**call), mask))
        plain = build(name)(**call).logits
        assert not torch.allclose(merged(**call).logits, plain, atol=0.01)  # the adapter is in there
    assert ran(merged) == before | {"packed": 2}
    note("PEFT LoRA, merged", name, "packed")
    unpatch(merged)
    assert not explain(merged).backbones[0].patched


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("family", ADAPTED)
def test_disabled_adapters(family: str, order: str) -> None:
    name = FAMILIES[family].prefix + "ForSequenceClassification"
    stock, patched = adapted_pair(name, family, order)
    mask = mask_of("right")
    call = call_of(name, mask)
    with torch.no_grad():
        with patched.disable_adapter(), stock.disable_adapter():
            off = visible(patched(**call), mask)
            assert_same(off, visible(stock(**call), mask))
            assert_same(off, visible(build(name)(**call), mask))
        on = visible(patched(**call), mask)
        assert_same(on, visible(stock(**call), mask))
        assert not torch.allclose(on["logits"], off["logits"], atol=0.01)
        unloaded = patched.unload()
        assert_same(visible(unloaded(**call), mask), off)
    assert ran(unloaded) == {"stock": 2, "packed": 1}


def test_trained_adapters_are_saved_and_loaded(tmp_path: Path) -> None:
    name = "BertForSequenceClassification"
    stock, patched = adapted_pair(name, "bert", "before", task_type="SEQ_CLS")
    mask = mask_of("right")
    call = call_of(name, mask)
    for model in (stock, patched):
        model(**call).loss.backward()
        torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1).step()
    patched.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(patch(build(name)), tmp_path).double()
    with torch.no_grad():
        assert_same(visible(loaded(**call), mask), visible(stock(**call), mask))


def test_other_adapters_with_layers_of_their_own() -> None:
    name = "BertForSequenceClassification"
    configs: list[Callable[[], Any]] = [
        lambda: peft.IA3Config(target_modules=["key", "value"], feedforward_modules=[], init_ia3_weights=False),
        lambda: peft.LoraConfig(r=4, target_modules=["query"], use_dora=True, init_lora_weights=False),
    ]
    mask = mask_of("right")
    call = call_of(name, mask)
    for config in configs:
        found = []
        for base in (patch(build(name)), build(name)):
            torch.manual_seed(3)
            model = peft.get_peft_model(base, config()).double()
            found.append(outputs_and_gradients(model, call, mask))
        assert_same(*found, GRADIENT_TOLERANCE)


def test_prompt_tuning_hands_in_embeddings() -> None:
    name = "BertForSequenceClassification"
    mask = mask_of("right")
    call = call_of(name, mask)
    models, found = [], []
    for base in (patch(build(name)), build(name)):
        torch.manual_seed(3)
        config = peft.PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=3)
        models.append(peft.get_peft_model(base, config).double().eval())
        found.append(outputs_and_gradients(models[-1], call, mask))
    assert_same(*found, GRADIENT_TOLERANCE)
    assert path_of(models[0]) == "packed"
    note("PEFT prompt tuning", name, "packed")

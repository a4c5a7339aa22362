"""The fused layers of a patched model as stock's modules: dropout, hooks, checkpointing, gradients, autocast."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from small_models import draw_weights
from torch import Tensor, nn

from bertfast import seams
from bertfast.patching import explain, patch

pytest.importorskip("transformers")

from agreement import assert_agree, assert_same, exact_path, gradients, pair, ran, reasons, visible
from stock_models import build, call_of, mask_of

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_every_activation(attention: str) -> None:
    for activation in ("gelu", "gelu_python", "gelu_new", "gelu_fast", "gelu_pytorch_tanh", "relu"):
        stock, patched = pair(hidden_act=activation, attention=attention)
        mask = mask_of("right")
        assert_agree(patched, stock, call_of("BertModel", mask), mask)
        assert ran(patched) == {"stock" if activation == "relu" else "packed": 1}


def test_hooks_see_rectangles_and_the_mask_as_it_was_given() -> None:
    patched = patch(build())
    mask = mask_of("right")
    call = call_of("BertModel", mask)
    seen: dict[str, Any] = {}

    def note(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple, output: Any) -> None:
            seen[name] = (output[0] if isinstance(output, tuple) or hasattr(output, "keys") else output).detach()

        return hook

    handles = [
        patched.embeddings.register_forward_hook(note("embeddings")),
        patched.encoder.register_forward_hook(note("encoder")),
        patched.register_forward_hook(lambda module, args, kwargs, output: seen.update(kwargs), with_kwargs=True),
    ]
    patched(**call)
    assert seen["embeddings"].shape == seen["encoder"].shape == (3, 11, 64)
    assert seen["embeddings"].isfinite().all() and seen["attention_mask"] is mask
    assert ran(patched) == {"packed": 1}
    handles.append(patched.encoder.layer[1].register_forward_hook(note("layer")))
    patched(**call)
    assert seen["layer"].shape == (3, 11, 64)
    assert ran(patched) == {"packed": 1, "rectangle": 1}
    for handle in handles:
        handle.remove()
    with nn.modules.module.register_module_forward_hook(note("any")):
        patched(**call)
    assert "hooks on all modules" in reasons(patched)


def test_dropout_in_training() -> None:
    rates = {"hidden_dropout_prob": 0.2, "attention_probs_dropout_prob": 0.3}
    model = patch(build("BertForMaskedLM", dtype=torch.float32, **rates)).train()
    mask = mask_of("right")
    call = call_of("BertForMaskedLM", mask)

    def run(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return model(**call).logits[mask.bool()]

    assert torch.equal(run(1), run(1)) and not torch.allclose(run(1), run(2))
    # Two layers after one another, so the means agree roughly only: a dropout that forgot to rescale is off by a
    # fifth of every hidden state.
    embeddings = model.bert.embeddings
    ids = call["input_ids"]
    with torch.no_grad():
        torch.manual_seed(0)
        mean = torch.stack([embeddings(ids) for _ in range(600)]).mean(0)
        expected = embeddings.eval()(ids)
        embeddings.train()
    assert (mean - expected).abs().max() < 6 * expected.abs().max() * (0.25 / 600) ** 0.5
    run(1).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert set(ran(model)) == {"packed"}
    model.bert.encoder.layer[0].output.dropout.eval()
    run(1)
    assert "training mode" in reasons(model)


@pytest.mark.parametrize("form", ["right", "left"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant: bool, form: str) -> None:
    rates = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
    plain = patch(build("BertForSequenceClassification", **rates)).train()
    plain.enable_input_require_grads()  # as checkpointing does in transformers 5: a hook on the word embeddings
    checkpointed = copy.deepcopy(plain)
    checkpointed.gradient_checkpointing_enable({"use_reentrant": reentrant})
    runs = []
    forward = seams.encoder_layer

    def counted(*args: Any) -> Tensor:
        runs.append(1)
        return forward(*args)

    mask = mask_of(form)
    call = call_of("BertForSequenceClassification", mask)
    found = []
    for model in (plain, checkpointed):
        runs.clear()
        torch.manual_seed(5)
        with pytest.MonkeyPatch.context() as m:
            m.setattr(seams, "encoder_layer", counted)
            output = model(**call)
            inside = len(runs)
            grads = gradients(model, output, None)
        assert inside == 2 and len(runs) == (4 if model is checkpointed else 2)  # once more for each layer
        found.append(grads)
    assert_same(*found)
    assert ran(checkpointed) == {exact_path("BertForSequenceClassification", form): 1}


def test_frozen_weights_get_no_gradient() -> None:
    stock, patched = pair()
    mask = mask_of("right")
    for model in (stock, patched):
        for p in (*model.embeddings.parameters(), *model.encoder.layer[0].parameters()):
            p.requires_grad_(False)
    found = [gradients(m, m(**call_of("BertModel", mask)), mask) for m in (patched, stock)]
    assert_same(*found)
    assert not any("embeddings" in name or "layer.0" in name for name in found[0])


def test_inference_mode_and_no_grad() -> None:
    stock, patched = pair()
    mask = mask_of("right")
    call = call_of("BertModel", mask)
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            assert_same(visible(patched(**call), mask), visible(stock(**call), mask))
    assert ran(patched) == {"packed": 2}


def test_autocast_keeps_the_dtypes_of_stock_code() -> None:
    stock, patched = pair("BertForSequenceClassification", dtype=torch.float32)
    mask = mask_of("right")
    call = call_of("BertForSequenceClassification", mask)
    gold = copy.deepcopy(stock).double()(**call).logits
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
            ours, theirs = patched(**call), stock(**call)
            assert ours.logits.dtype == theirs.logits.dtype
            hidden = [m.bert(call["input_ids"], mask).last_hidden_state.dtype for m in (patched, stock)]
            assert hidden[0] == hidden[1]
        assert (ours.logits - gold).abs().max() <= 2 * (theirs.logits - gold).abs().max() + 0.02
        # The casts of the next call may lie at the same addresses as this one's.
        for model in (stock, patched):
            torch.manual_seed(4)
            draw_weights(model)
        gold = copy.deepcopy(stock).double()(**call).logits
    assert explain(patched).backbones[0].packed_bytes == 0
    half = patch(build(dtype=torch.bfloat16))
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        half(**call_of("BertModel", mask))
    assert "autocast" in reasons(half)

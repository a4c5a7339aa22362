"""attn_implementation="bertfast" against transformers' sdpa, with large weights; and that the packed op ran."""

import copy
import gc
from collections.abc import Callable
from typing import Any

import parity
import pytest
import torch
from small_models import make_mask
from torch import Tensor, nn

import bertfast
from bertfast import attention_interface
from bertfast.attention_interface import attend, counts, register_attention
from bertfast.attention_interface import make_mask as interface_mask
from bertfast.errors import UnsupportedModelError
from bertfast.packing import Packing

# The interface works from 5.0 on, where some of the models named here have none, or not yet one of their own.
transformers = pytest.importorskip("transformers", minversion="5.23")

from interface_models import (  # noqa: E402, F401 (fixtures too)
    BATCH,
    CLOSE,
    FAMILIES,
    FORMS,
    MORE_THAN_PADDING,
    NAME,
    SEQ_LEN,
    Plain,
    build,
    call_of,
    check_agreement,
    check_row,
    fresh_counts,
    heads,
    layers_of,
    made,
    mask_of,
    pair,
    reference,
    valid_of,
)

SLIDING = {"ModernBert": 2}

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.usefixtures("reference")
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", FAMILIES)
def test_outputs_and_gradients(name: str, form: str) -> None:
    ours, stock = pair(name + "Model")
    check_agreement(ours, stock, call_of(mask_of(form)))
    sliding = SLIDING.get(name, 0)
    assert counts["packed"] == len(list(layers_of(ours))) - sliding
    assert counts[MORE_THAN_PADDING] == sliding
    assert counts.total() == counts["packed"] + sliding


def _break_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    right = attention_interface.varlen_attention
    monkeypatch.setattr(
        attention_interface, "varlen_attention", lambda *a, scale, **k: right(*a, scale=1.05 * scale, **k)
    )


def _break_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    full = Packing.full
    monkeypatch.setattr(attention_interface, "_noted", lambda mask: full(mask.shape[0], mask.shape[3]))


def _break_borders(monkeypatch: pytest.MonkeyPatch) -> None:
    right = attention_interface.varlen_attention

    def leaking(qkv: Tensor, cu_seqlens: Tensor, **rest: Any) -> Tensor:
        return right(qkv, cu_seqlens[[0, -1]], **rest | {"max_seqlen": len(qkv), "order": None})

    monkeypatch.setattr(attention_interface, "varlen_attention", leaking)


@pytest.mark.usefixtures("reference")
@pytest.mark.parametrize("break_it", [_break_scale, _break_mask, _break_borders])
def test_wrong_variants_are_caught(break_it: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    break_it(monkeypatch)
    with pytest.raises(AssertionError, match="not close"):
        check_agreement(*pair("BertModel"), call_of(mask_of("right")))
    if break_it is not _break_mask:
        with pytest.raises(AssertionError, match="not close"):
            check_row(*pair("BertModel"))


@pytest.mark.usefixtures("reference")
def test_the_op_runs_once_a_layer_on_one_packing(monkeypatch: pytest.MonkeyPatch) -> None:
    calls, packings = [], []
    op, pack = attention_interface.varlen_attention, Packing.from_mask
    monkeypatch.setattr(
        attention_interface, "varlen_attention", lambda *a, **k: calls.append(a[0].shape) or op(*a, **k)
    )
    monkeypatch.setattr(Packing, "from_mask", lambda mask: packings.append(mask) or pack(mask))
    model, call = build("BertModel"), call_of(mask_of("right"))
    model(**call)
    tokens = int(call["attention_mask"].sum())
    assert calls == [(tokens, 3, 4, 16)] * 2 and len(packings) == 1


@pytest.mark.usefixtures("reference")
def test_short_inputs_see_no_window() -> None:
    """Where the window spans the whole input, the sliding layers are packed too."""
    ours, stock = pair("ModernBertModel", local_attention=2 * SEQ_LEN + 2)
    check_agreement(ours, stock, call_of(mask_of("left")))
    assert counts == {"packed": 4}


def test_padding_gives_zeros() -> None:
    valid = make_mask("empty row").bool()
    valid[1, 2:7] = False
    mask, q = made(valid), heads()
    out, weights = attend(Plain(), q, q, q, mask)
    assert weights is None and out.shape == (BATCH, SEQ_LEN, 4, 16) and out.is_contiguous()
    assert (out[~valid] == 0).all() and (out[valid] != 0).all()
    (nothing, _) = attend(Plain(), q, q, q, made(torch.zeros_like(valid)))
    assert (nothing == 0).all() and counts == {"packed": 2}


@pytest.mark.parametrize("scaling", [None, 0.7])
@pytest.mark.parametrize("size", [16, 24, 64, 128])
def test_scales_and_head_sizes(size: int, scaling: float | None) -> None:
    mask = made(make_mask("holes"))
    q, k, v = heads(size=size), heads(size=size), heads(size=size)
    actual, _ = attend(Plain(), q, k, v, mask, scaling=scaling)
    expected = nn.functional.scaled_dot_product_attention(
        q.double(), k.double(), v.double(), mask, scale=scaling
    ).transpose(1, 2)
    valid = make_mask("holes").bool()
    parity.check(actual[valid], expected[valid])
    assert counts == {"packed": 1}


def test_half_precision() -> None:
    call = call_of(mask_of("right"))
    gold = build("BertModel", "sdpa")
    ours, stock = pair("BertModel", dtype=torch.bfloat16)
    gold.load_state_dict(stock.state_dict())
    valid = valid_of(call)
    with torch.no_grad():
        gold, actual, baseline = (m(**call).last_hidden_state[valid] for m in (gold, ours, stock))
    parity.check(actual, gold, baseline, factor=3.0)
    assert counts == {"packed": 2}


def test_autocast_and_inference_mode() -> None:
    ours, stock = pair("ModernBertModel", dtype=torch.float32, local_attention=64)
    call = call_of(mask_of("right"))
    with torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
        actual, expected = ours(**call).last_hidden_state, stock(**call).last_hidden_state
    assert actual.dtype == expected.dtype and counts == {"packed": 4}
    valid = valid_of(call)
    error = (actual - expected)[valid].abs().mean() / expected[valid].abs().mean()
    assert error < 0.02  # two roundings to bfloat16


def test_dropout() -> None:
    """Dropped probabilities are zeros, 26 / 256 of them for 0.1; the others are divided by what is kept."""
    tokens, valid = 64, torch.ones(8, 64, dtype=torch.int64)
    valid[:, 48:] = 0
    q, identity = torch.zeros(8, 4, tokens, tokens), torch.eye(tokens).expand(8, 4, tokens, tokens)
    out, _ = attend(Plain(), q, q, identity, made(valid), dropout=0.1)
    probabilities = out[:, :48].transpose(1, 2)
    assert (probabilities[..., 48:] == 0).all()
    dropped = probabilities[..., :48] == 0
    n, p = dropped.numel(), 26 / 256
    assert abs(dropped.float().mean() - p) < 5 * (p * (1 - p) / n) ** 0.5
    torch.testing.assert_close(
        probabilities[..., :48][~dropped].mean(), torch.tensor(1 / 48 / (1 - p)), rtol=1e-5, atol=0
    )


@pytest.mark.parametrize("name", ["BertModel", "ModernBertModel"])
def test_training_with_dropout_follows_the_seed(name: str) -> None:
    """And its mean is what evaluation gives."""
    p = {"attention_probs_dropout_prob" if name == "BertModel" else "attention_dropout": 0.1}
    model, call = build(name, dtype=torch.float32, num_hidden_layers=1, **p), call_of(mask_of("right"))
    # ModernBERT drops elements of the output too.
    for m in model.modules():
        if isinstance(m, nn.Dropout) and name == "ModernBertModel":
            m.p = 0.0
    valid = valid_of(call)
    context: list[Tensor] = []
    attention = next(layers_of(model))
    projection = attention.Wo if name == "ModernBertModel" else model.encoder.layer[0].attention.output.dense
    projection.register_forward_pre_hook(lambda m, args: context.append(args[0][valid].detach()))
    model(**call)
    model.train()
    for seed in (3, 3, *range(400)):
        torch.manual_seed(seed)
        with torch.no_grad():
            model(**call)
    evaluated, first, second, *drawn = context
    assert torch.equal(first, second) and not torch.equal(first, drawn[0])
    draws = torch.stack(drawn)
    deviation = (draws.mean(0) - evaluated) / (draws.std(0) / len(drawn) ** 0.5).clamp(min=1e-6)
    assert 0.8 < deviation.square().mean().sqrt() < 1.2  # standard deviations of a mean


@pytest.mark.parametrize("form", FORMS)
def test_masks_of_padding_are_those_of_sdpa(form: str) -> None:
    """Same values, shape and dtype; none where there is no padding."""
    config = transformers.BertConfig(attn_implementation="sdpa")
    valid = torch.ones(BATCH, SEQ_LEN) if form == "none" else mask_of(form)
    stock = transformers.masking_utils.create_bidirectional_mask(config, torch.empty(BATCH, SEQ_LEN, 1), valid)
    ours = made(valid)
    assert (ours is None) is (stock is None) is (form in ("none", "ones"))
    assert ours is None or (torch.equal(ours, stock) and ours.is_contiguous())


def test_what_becomes_of_a_mask_on_its_way() -> None:
    """It is known again as the same view of the same memory, and as nothing else."""
    valid = make_mask("right").bool()
    mask = made(valid)
    packing = attention_interface._noted(mask)
    assert packing is not None and packing.lengths == (11, 1, 5)
    for same in (mask, mask.detach(), mask.to(torch.bool), mask[:]):
        assert attention_interface._noted(same) is packing
    others = (mask.clone(), mask[..., :-1], mask[:2], mask.flip(0), mask.transpose(2, 3), ~mask, mask.float(), valid)
    assert all(attention_interface._noted(other) is None for other in others)
    address = mask.data_ptr()
    detached = mask.detach()
    del mask, same, others
    gc.collect()
    assert detached.data_ptr() == address and attention_interface._noted(detached) is packing
    detached[0, 0, 0, 0] = False
    assert attention_interface._noted(detached) is None


def test_old_transformers_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    # Not of this file's `transformers`: it puts another object in its place while it loads its parts.
    monkeypatch.setattr("transformers.__version__", "4.57.6")
    with pytest.raises(UnsupportedModelError, match=r"4\.57\.6.*patch"):
        register_attention()


def test_registering_again_changes_nothing() -> None:
    assert register_attention() == NAME == "bertfast"
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    assert ALL_ATTENTION_FUNCTIONS[NAME] is attend and ALL_MASK_ATTENTION_FUNCTIONS[NAME] is interface_mask


def test_live_models_files_and_copies(tmp_path: Any) -> None:
    call = call_of(mask_of("left"))
    model = build("ModernBertModel", "sdpa", dtype=torch.float32)

    def ran(m: Any) -> tuple[Tensor, int]:
        counts.clear()
        with torch.no_grad():
            out = m(**call).last_hidden_state[valid_of(call)]
        return out, counts["packed"]

    stock, packed = ran(model)
    assert packed == 0
    model.set_attn_implementation(NAME)
    ours, packed = ran(model)
    assert packed == 2
    torch.testing.assert_close(ours, stock, rtol=1e-4, atol=1e-4)
    model.save_pretrained(tmp_path)
    assert NAME not in (tmp_path / "config.json").read_text()
    loaded = transformers.AutoModel.from_pretrained(tmp_path, attn_implementation=NAME)
    for other in (loaded, copy.deepcopy(model)):
        again, packed = ran(other)
        assert torch.equal(again, ours) and packed == 2
    model.set_attn_implementation("sdpa")
    again, packed = ran(model)
    assert torch.equal(again, stock) and packed == 0
    assert ran(transformers.AutoModel.from_pretrained(tmp_path))[1] == 0


@pytest.mark.usefixtures("reference")
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["BertModel", "ModernBertModel"])
def test_gradient_checkpointing(name: str, reentrant: bool) -> None:
    """The layers run again as they ran first, with the same dropout: the mask is known again."""
    p = "attention_probs_dropout_prob" if name == "BertModel" else "attention_dropout"
    model, call = build(name, **{p: 0.3}).train(), call_of(mask_of("right"))
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        model.zero_grad()
        torch.manual_seed(5)
        counts.clear()
        model(**call).last_hidden_state[valid_of(call)].square().sum().backward()
        gradients.append([q.grad.clone() for q in model.parameters() if q.grad is not None])
        assert counts["packed"] == (4 if checkpointing else 2)
    for with_it, without in zip(*gradients, strict=True):
        torch.testing.assert_close(with_it, without, **CLOSE)


@pytest.mark.usefixtures("reference")
@pytest.mark.parametrize("form", ["none", "right", "holes"])
def test_patched_models_keep_working(form: str) -> None:
    ours, stock = pair("BertModel")
    bertfast.patch(ours)
    check_agreement(ours, stock, call_of(mask_of(form)))
    assert bertfast.explain(ours).backbones[0].calls == {"packed": 1, "rectangle": 0, "stock": 0} and not counts
    bertfast.unpatch(ours)
    check_agreement(ours, stock, call_of(mask_of(form)))
    assert counts == {"packed": 2}

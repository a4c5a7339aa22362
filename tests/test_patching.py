"""Patched models of transformers against stock ones, in float64 with large weights, and that the fused path ran."""

import copy
import io
import json
import pickle
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from agreement import TOLERANCE, assert_agree, assert_same, exact_path, gradients, pair, ran, reasons, visible
from small_models import SETTINGS, draw_weights, make_mask
from torch import Tensor, nn

import bertfast
from bertfast import backend, seams
from bertfast.patching import explain, patch, unpatch

transformers = pytest.importorskip("transformers")

from stock_models import LEGACY, build, call_of, mask_of  # noqa: E402

NEW_ONLY = pytest.mark.skipif(LEGACY, reason="transformers 4 has no such thing")
OLD_ONLY = pytest.mark.skipif(not LEGACY, reason="transformers 5 has no such thing any more")


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("name", ["BertForMaskedLM", "BertForPreTraining", "BertForTokenClassification"])
def test_labels_on_padding_keep_the_rectangle(name: str) -> None:
    mask = mask_of("right")
    stock, patched = pair(name)
    call = call_of(name, mask) | {"labels": torch.randint(0, 2, (3, 11))}
    assert_agree(patched, stock, call, mask, everything=True)
    positional = [call["input_ids"], call["attention_mask"], call["token_type_ids"]]
    patched(*positional, labels=call["labels"])
    assert ran(patched) == {"rectangle": 2}
    assert "labels at padding" in reasons(patched)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_every_activation(attention: str) -> None:
    for activation in ("gelu", "gelu_python", "gelu_new", "gelu_fast", "gelu_pytorch_tanh", "relu"):
        stock, patched = pair(hidden_act=activation, attention=attention)
        mask = mask_of("right")
        assert_agree(patched, stock, call_of("BertModel", mask), mask)
        assert ran(patched) == {"stock" if activation == "relu" else "packed": 1}


def test_positional_arguments_positions_types_and_embeddings() -> None:
    stock, patched = pair()
    mask = mask_of("right")
    ids = call_of("BertModel", mask)["input_ids"]
    positions = torch.randint(0, 40, (3, 11))
    for args, kwargs in (
        ((ids, mask), {}),
        ((ids, mask, torch.ones_like(ids), positions), {}),
        ((ids, mask), {"position_ids": positions[:1]}),
        ((ids.int(), mask.bool()), {"return_dict": False}),
        ((), {"inputs_embeds": torch.randn(3, 11, 64, dtype=torch.float64), "attention_mask": mask.float()}),
    ):
        ours, theirs = patched(*args, **kwargs), stock(*args, **kwargs)
        assert type(ours) is type(theirs) and len(ours) == len(theirs)
        assert_same({"h": ours[0][mask.bool()]}, {"h": theirs[0][mask.bool()]})
        assert_same({"p": ours[1]}, {"p": theirs[1]})
    assert ran(patched) == {"packed": 5}
    for model in (stock, patched):
        model.embeddings.token_type_ids.fill_(1)
        model.embeddings.position_ids.copy_(torch.arange(40).flip(0))
    assert_same(visible(patched(ids, mask), mask), visible(stock(ids, mask), mask))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_masks_of_other_forms(attention: str) -> None:
    stock, patched = pair(attention=attention)
    ids = call_of("BertModel", None)["input_ids"]
    pairs = torch.rand(3, 11, 11) < 0.7
    pairs |= torch.eye(11, dtype=torch.bool)
    if LEGACY:
        given = pairs.long()
    else:
        given = pairs[:, None]
        if attention == "eager":
            given = torch.zeros(given.shape, dtype=torch.float64).masked_fill(~given, -1e300)
    assert_same(visible(patched(ids, given), None), visible(stock(ids, given), None))
    assert ran(patched) == {"rectangle": 1}
    if not LEGACY and attention == "sdpa":  # stock takes any value but 0 as valid in 5
        weights = torch.where(make_mask("right") == 1, 0.5, 0.0)
        assert_same(visible(patched(ids, weights), None), visible(stock(ids, weights), None))
        assert ran(patched) == {"rectangle": 2}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_hidden_states_and_attentions(attention: str) -> None:
    stock, patched = pair(attention=attention)
    mask = mask_of("right")
    call = call_of("BertModel", mask)
    for model in (stock, patched):
        model(**call)
    ours, theirs = (m(**call, output_hidden_states=True) for m in (patched, stock))
    assert len(ours.hidden_states) == len(theirs.hidden_states) == 3
    assert_same(dict(enumerate(ours.hidden_states)), dict(enumerate(theirs.hidden_states)))
    ours, theirs = (m(**call, output_attentions=True) for m in (patched, stock))
    assert len(ours.attentions) == len(theirs.attentions)
    assert_same(dict(enumerate(ours.attentions)), dict(enumerate(theirs.attentions)))
    # The hooks that transformers 5 leaves behind do not keep later calls from the packed path.
    assert_same(visible(patched(**call), mask), visible(stock(**call), mask))
    assert ran(patched) == {"packed": 2, "rectangle": 1, "stock": 1}
    patched.config.output_hidden_states = True
    assert len(patched(**call).hidden_states) == 3


@pytest.mark.parametrize(
    ("settings", "call", "word"),
    [
        ({"is_decoder": True, "dtype": torch.float32}, {}, "decoder"),  # float64 overflows in stock code of 4.57
        ({"chunk_size_feed_forward": 1}, {}, "chunked"),
        ({}, {"encoder_hidden_states": torch.zeros(3, 2, 64, dtype=torch.float64)}, "encoder_hidden_states"),
        pytest.param({}, {"is_causal": True}, "is_causal", marks=NEW_ONLY),
        pytest.param({}, {"head_mask": torch.tensor([1.0, 0, 1, 1]).double()}, "head", marks=OLD_ONLY),
        pytest.param({"position_embedding_type": "relative_key"}, {}, "relative", marks=OLD_ONLY),
    ],
)
def test_what_only_stock_code_does(settings: dict, call: dict, word: str) -> None:
    stock, patched = pair(**settings)
    mask = mask_of("right")
    call = call_of("BertModel", mask) | call
    tolerance = 1e-4 if "dtype" in settings else TOLERANCE
    assert_same(visible(patched(**call), None), visible(stock(**call), None), tolerance)
    assert ran(patched) == {"stock": 1}
    assert word in reasons(patched)


@OLD_ONLY
def test_pruned_heads() -> None:
    stock, patched = pair()
    mask = mask_of("right")
    for model in (stock, patched):
        model.prune_heads({1: [0, 2]})
        model.double()  # the pruned layers are made anew, in float32
    assert_same(
        visible(patched(**call_of("BertModel", mask)), mask), visible(stock(**call_of("BertModel", mask)), mask)
    )
    assert ran(patched) == {"rectangle": 1} and "pruned" in reasons(patched)


class Adapter(nn.Module):
    """Like LoRA's: a linear layer with a term of low rank beside it."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.in_features, 2, bias=False, dtype=base.weight.dtype)
        self.up = nn.Linear(2, base.out_features, bias=False, dtype=base.weight.dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


def _adapter(model: nn.Module) -> None:
    torch.manual_seed(3)
    model.encoder.layer[1].attention.self.query = Adapter(model.encoder.layer[1].attention.self.query)


def _hook_inside(model: nn.Module) -> None:
    model.encoder.layer[0].output.dense.register_forward_hook(lambda module, args, output: output * 1.5)


def _hook_on_layer(model: nn.Module) -> None:
    model.encoder.layer[0].register_forward_pre_hook(lambda module, args: (args[0].flip(1).flip(1) * 1.1, *args[1:]))


def _own_forward(model: nn.Module) -> None:
    dense = model.encoder.layer[1].intermediate.dense
    dense.forward = lambda x: F.linear(x, dense.weight, dense.bias) * 0.5


def _parametrization(model: nn.Module) -> None:
    nn.utils.parametrizations.weight_norm(model.encoder.layer[1].output.dense)


def _no_bias(model: nn.Module) -> None:
    model.encoder.layer[0].attention.self.query.bias = None


def _unequal_eps(model: nn.Module) -> None:
    model.encoder.layer[0].output.LayerNorm.eps = 0.5


def _other_activation(model: nn.Module) -> None:
    model.encoder.layer[0].intermediate.intermediate_act_fn = nn.SiLU()


def _embedding_hook(model: nn.Module) -> None:
    model.embeddings.word_embeddings.register_forward_hook(lambda module, args, output: output * 2)


def _subclassed_weight(model: nn.Module) -> None:
    class Scaled(nn.Parameter):
        pass

    dense = model.encoder.layer[1].output.dense
    dense._parameters["weight"] = Scaled(dense.weight.data)


def _equal_eps(model: nn.Module) -> None:
    for norm in (model.encoder.layer[0].attention.output.LayerNorm, model.encoder.layer[0].output.LayerNorm):
        norm.eps = 0.5


def _another_scale(model: nn.Module) -> None:
    attention = model.encoder.layer[1].attention.self
    if LEGACY:  # where the head size is all that there is
        attention.query.weight.data.mul_(0.5)
    else:
        attention.scaling = 0.3


def _fewer_heads(model: nn.Module) -> None:
    attention = model.encoder.layer[0].attention.self
    attention.num_attention_heads, attention.attention_head_size = 2, 32
    if not LEGACY:
        attention.scaling = 32**-0.5


def _a_layer_less(model: nn.Module) -> None:
    del model.encoder.layer[1]


def _layers_change_places(model: nn.Module) -> None:
    first, second = model.encoder.layer
    model.encoder.layer[0], model.encoder.layer[1] = second, first


def _one_layer_twice(model: nn.Module) -> None:
    model.encoder.layer.append(model.encoder.layer[0])
    model.config.num_hidden_layers += 1


def _other_embeddings(model: nn.Module) -> None:
    model.embeddings = copy.deepcopy(model.embeddings)
    with torch.no_grad():
        model.embeddings.position_embeddings.weight.mul_(2)


def _another_parameter(model: nn.Module) -> None:
    dense = model.encoder.layer[1].output.dense
    dense.weight = nn.Parameter(dense.weight.detach() * 0.5)


def _written_through_data(model: nn.Module) -> None:
    model.encoder.layer[1].attention.output.dense.weight.data = (
        model.encoder.layer[1].attention.output.dense.weight.data * 0.5
    )


def _another_table(model: nn.Module) -> None:
    torch.manual_seed(6)
    model.set_input_embeddings(nn.Embedding(53, 64, dtype=torch.float64))


def _another_norm(model: nn.Module) -> None:
    model.embeddings.LayerNorm.eps = 0.5


SURGERY = {
    _equal_eps: "packed",
    _another_scale: "packed",
    _fewer_heads: "packed",
    _a_layer_less: "packed",
    _layers_change_places: "packed",
    _one_layer_twice: "packed",
    _another_parameter: "packed",
    _written_through_data: "packed",
    _another_table: "packed",
    _another_norm: "packed",
    _other_embeddings: "packed",
    _adapter: "rectangle",
    _hook_inside: "rectangle",
    _hook_on_layer: "rectangle",
    _own_forward: "rectangle",
    _parametrization: "rectangle",
    _no_bias: "packed",  # found out at the layer, in the middle of a packed call
    _unequal_eps: "rectangle",
    _other_activation: "rectangle",
    _embedding_hook: "packed",
    _subclassed_weight: "packed",
}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("change", SURGERY, ids=lambda change: change.__name__.strip("_"))
def test_changes_after_patching_are_honoured(change: Callable[[nn.Module], None], attention: str) -> None:
    stock, patched = pair(attention=attention)
    mask = mask_of("holes")
    call = call_of("BertModel", mask)
    before = [patched(**call) for _ in range(3)][-1].last_hidden_state
    assert patched._bertfast.snapshot is not None  # what the change has to break
    for model in (stock, patched):
        change(model)
    for _ in range(3):  # the first of them takes another snapshot
        assert_agree(patched, stock, call, mask)
    if change is not _subclassed_weight:
        assert not torch.allclose(patched(**call).last_hidden_state, before)
    assert ran(patched)["packed"] >= 1 and SURGERY[change] in ran(patched)
    assert reasons(patched) or SURGERY[change] == "packed"


def test_a_snapshot_is_of_the_present() -> None:
    """Settings that outputs show in training, or in another dtype, only."""
    rates = {"hidden_dropout_prob": 0.2, "attention_probs_dropout_prob": 0.2}
    stock, patched = pair(**rates)
    mask = mask_of("right")
    call = call_of("BertModel", mask)

    def settle(model: nn.Module) -> Tensor:
        with torch.no_grad():
            return [model(**call) for _ in range(3)][-1].last_hidden_state

    settle(patched)
    assert patched._bertfast.snapshot.guard.holds()
    before = settle(patched.train())
    assert not torch.equal(before, settle(patched))
    for dropout in (m for m in patched.modules() if isinstance(m, nn.Dropout)):
        dropout.p = 0.0
    if LEGACY:
        for layer in patched.encoder.layer:
            layer.attention.self.dropout_prob = 0.0
    quiet = settle(patched)
    assert torch.equal(quiet, settle(patched)) and torch.equal(quiet, settle(patched.eval()))
    assert_agree(patched, stock, call, mask)
    for model in (stock, patched):
        model.float()
    error = (settle(patched) - settle(stock))[mask.bool()].abs().max()
    assert settle(patched).dtype == torch.float32 and error < 1e-4
    assert set(ran(patched)) == {"packed"}


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_weights_are_never_stale(dtype: torch.dtype) -> None:
    stock, patched = pair(dtype=dtype)
    mask = mask_of("right")
    call = call_of("BertModel", mask)
    tolerance = 1e-4 if dtype == torch.float32 else 0.1

    def check() -> Tensor:
        with torch.no_grad():
            ours, theirs = patched(**call), stock(**call)
        assert_same(visible(ours, mask), visible(theirs, mask), tolerance)
        return ours.last_hidden_state

    first = check()
    if bertfast.backend.explain("linear", "cpu", dtype).backend == "cpu":
        assert explain(patched).backbones[0].packed_bytes > 0
    for model in (stock, patched):
        torch.manual_seed(0)
        model(**call).last_hidden_state[mask.bool()].sum().backward()
        torch.optim.SGD(model.parameters(), lr=0.1).step()
    if dtype == torch.bfloat16:  # two trainings in half precision drift apart: compare with the same weights
        stock.load_state_dict(patched.state_dict())
    second = check()
    other = {k: v + 0.1 if v.is_floating_point() else v for k, v in stock.state_dict().items()}
    for model in (stock, patched):
        model.load_state_dict(other)
    third = check()
    assert not torch.allclose(first, second, atol=0.01) and not torch.allclose(second, third, atol=0.01)
    patch(patched, pack_weights=False)
    assert explain(patched).backbones[0].packed_bytes == 0
    check()


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


def test_dtypes_without_kernels_run_stock_code() -> None:
    stock, patched = pair(dtype=torch.float16)
    mask = mask_of("right")
    call = call_of("BertModel", mask)
    with torch.no_grad():
        assert torch.equal(patched(**call).last_hidden_state, stock(**call).last_hidden_state)
    assert ran(patched) == {"stock": 1} and "float16 has no kernels" in reasons(patched)


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save"])
def test_copies_are_patched_models_of_their_own(way: str) -> None:
    stock, patched = pair("BertForQuestionAnswering")
    mask = mask_of("right")
    call = call_of("BertForQuestionAnswering", mask)
    patched(**call)
    if way == "deepcopy":
        other = copy.deepcopy(patched)
    elif way == "pickle":
        other = pickle.loads(pickle.dumps(patched))
    else:
        file = io.BytesIO()
        torch.save(patched, file)
        other = torch.load(io.BytesIO(file.getvalue()), weights_only=False)
    assert ran(other) == {}
    assert_agree(other, stock, call, mask, everything=True)
    assert ran(other) == {"rectangle": 1} and ran(patched) == {"rectangle": 1}
    with torch.no_grad():
        other.bert.encoder.layer[0].output.dense.weight.zero_()
    assert_agree(patched, stock, call, mask, everything=True)
    unpatch(other)
    assert not other.bert._forward_pre_hooks and not other._forward_hooks
    assert patched.bert._forward_pre_hooks


def test_save_pretrained_and_names(tmp_path: Any) -> None:
    stock, patched = pair("BertForSequenceClassification")
    assert list(patched.state_dict()) == list(stock.state_dict())
    assert [n for n, _ in patched.named_modules()] == [n for n, _ in stock.named_modules()]
    assert repr(patched) == repr(stock)
    assert {type(m).__name__ for m in patched.modules()} == {type(m).__name__ for m in stock.modules()}
    assert all(isinstance(p, type(s)) for p, s in zip(patched.modules(), stock.modules(), strict=True))
    patched.save_pretrained(tmp_path)
    loaded = transformers.BertForSequenceClassification.from_pretrained(tmp_path, dtype=torch.float64).eval()
    call = call_of("BertForSequenceClassification", mask_of("right"))
    assert_same(visible(loaded(**call), None), visible(patched(**call), None))


def test_unpatch_restores_everything() -> None:
    model = build("BertForTokenClassification")
    call = call_of("BertForTokenClassification", mask_of("right"))
    model(**call)

    def snapshot() -> dict:
        return {
            name: (id(m), type(m), {k: dict(v) if isinstance(v, dict) else v for k, v in m.__dict__.items()})
            for name, m in model.named_modules()
        }

    before = snapshot()
    parameters = [(id(p), p.data_ptr()) for p in model.parameters()]
    assert patch(model) is model and patch(model, padding="drop") is model
    assert len(model.bert._forward_pre_hooks) == len(model._forward_hooks) == 1
    assert explain(model).backbones[0].options["padding"] == "drop"
    model(**call)
    assert parameters == [(id(p), p.data_ptr()) for p in model.parameters()]
    assert unpatch(model) is model
    after = snapshot()
    for name, (identity, kind, attributes) in before.items():
        assert after[name][:2] == (identity, kind), name
        assert list(after[name][2]) == list(attributes), name
        for key, value in attributes.items():
            same = after[name][2][key] is value or after[name][2][key] == value
            assert same, (name, key)
    unpatch(model)
    assert "not patched" in str(explain(model))


def test_errors_leave_no_trace_of_the_call() -> None:
    stock, patched = pair("BertForMaskedLM")
    mask = mask_of("right")
    call = call_of("BertForMaskedLM", mask)
    with pytest.raises(Exception, match=r"outside|range|must match"):
        patched(**{**call, "input_ids": call["input_ids"] + 1000})
    with pytest.raises(Exception):  # noqa: B017 (whatever stock says)
        patched(**{**call, "labels": torch.zeros(2, 2)})
    assert not seams.calls.frames and not seams.calls.heads
    assert_agree(patched, stock, call, mask)


def test_two_threads_share_a_model() -> None:
    stock, patched = pair("BertForTokenClassification", dtype=torch.float32)
    wrong: list[str] = []

    def work(form: str) -> None:
        mask = mask_of(form)
        call = call_of("BertForTokenClassification", mask)
        with torch.no_grad():
            expected = visible(stock(**call), mask)
            for _ in range(25):
                try:
                    assert_same(visible(patched(**call), mask), expected, 1e-4)
                except AssertionError as error:
                    wrong.append(f"{form}: {error}")

    threads = [threading.Thread(target=work, args=(form,)) for form in ("right", "holes", "empty row")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert sum(ran(patched).values()) == 75


@pytest.mark.parametrize("way", ["DDP", "FSDP2"])
def test_distributed_wrappers(way: str) -> None:
    dist = pytest.importorskip("torch.distributed")
    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("needs gloo")
    stock, patched = pair("BertForMaskedLM")
    mask = mask_of("right")
    call = call_of("BertForMaskedLM", mask)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        if way == "DDP":
            wrapped = nn.parallel.DistributedDataParallel(patched)
        else:
            fsdp = pytest.importorskip("torch.distributed.fsdp")
            mesh = dist.init_device_mesh("cpu", (1,))
            for layer in patched.bert.encoder.layer:
                fsdp.fully_shard(layer, mesh=mesh)
            wrapped = fsdp.fully_shard(patched, mesh=mesh)
        ours, theirs = wrapped(**call), stock(**call)
        assert_same(visible(ours, mask), visible(theirs, mask))
        for output in (ours, theirs):
            output.loss.backward()
        theirs = {name: p.grad for name, p in stock.named_parameters()}
        found = {name: p.grad for name, p in patched.named_parameters()}
        assert_same({k: g.full_tensor() if hasattr(g, "full_tensor") else g for k, g in found.items()}, theirs)
        assert ran(patched) == {"packed": 1}
        if way == "FSDP2":
            with pytest.raises(bertfast.UnsupportedModelError, match="FSDP"):
                unpatch(patched)
    finally:
        dist.destroy_process_group()


def test_replicas_of_data_parallel_use_their_own_weights() -> None:
    stock, patched = pair()
    mask = mask_of("right")
    call = call_of("BertModel", mask)
    with torch.no_grad():
        patched(**call)
        # What torch.nn.parallel.replicate does, for one device, with other weights.
        modules = list(patched.modules())
        copies = {module: module._replicate_for_data_parallel() for module in modules}
        for module, other in copies.items():
            for name, child in module._modules.items():
                other._modules[name] = None if child is None else copies[child]
            for name, p in module._parameters.items():
                setattr(other, name, p.detach() * 0.5)
        for p in stock.parameters():
            p.mul_(0.5)
        assert_same(visible(copies[patched](**call), mask), visible(stock(**call), mask))


def test_torch_compile_runs_stock_code() -> None:
    stock, patched = pair()
    mask = mask_of("right")
    call = call_of("BertModel", mask)
    with torch.no_grad():
        compiled = torch.compile(patched, backend="eager")
        assert_same(visible(compiled(**call), None), visible(stock(**call), None))
        assert ran(patched) == {}
        patched(**call)
        assert ran(patched) == {"packed": 1}
        patched.encoder.layer[0].compile(backend="eager")
        assert_same(visible(patched(**call), None), visible(stock(**call), None))
    assert "compiled" in reasons(patched)
    torch._dynamo.reset()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("form", ["none", "ones", "right", "left", "holes", "empty row"])
def test_calls_past_the_hooks(form: str, attention: str) -> None:
    """sentence-transformers calls model.forward: the encoder finds the mask in what stock code made of it."""
    mask = mask_of(form)
    for name in ("BertModel", "BertForQuestionAnswering", "BertForTokenClassification"):
        stock, patched = pair(name, attention=attention)
        call = call_of(name, mask)
        path = exact_path(name, form)
        if name == "BertForTokenClassification" and path == "packed" and form not in ("none", "ones"):
            path = "rectangle"  # nothing has told it whether labels stand on padding
        ours, theirs = patched.forward(**call), stock.forward(**call)
        assert_same(
            visible(ours, mask, everything=path == "rectangle"), visible(theirs, mask, everything=path == "rectangle")
        )
        assert ran(patched) == {path: 1}


def test_the_encoder_alone_and_direct_layer_calls() -> None:
    stock, patched = pair()
    x = torch.randn(3, 11, 64, dtype=torch.float64)
    ours, theirs = (m.encoder(x)[0] for m in (patched, stock))
    assert_same({"h": ours}, {"h": theirs})
    ours, theirs = (m.encoder.layer[0](x) for m in (patched, stock))
    assert isinstance(ours, tuple) is isinstance(theirs, tuple)
    if isinstance(ours, tuple):
        assert len(ours) == len(theirs) and ours[1] is None
        ours, theirs = ours[0], theirs[0]
    assert_same({"h": ours}, {"h": theirs})
    assert ran(patched) == {"packed": 1}
    mask = torch.rand(3, 1, 1, 11, dtype=torch.float64)  # neither 0 nor the smallest number
    ours, theirs = (m.encoder(x, mask)[0] for m in (patched, stock))
    assert_same({"h": ours}, {"h": theirs})
    assert ran(patched) == {"packed": 1, "rectangle": 1}


def test_models_without_a_bert_are_refused() -> None:
    with pytest.raises(bertfast.UnsupportedModelError, match="Linear"):
        patch(nn.Linear(2, 2))
    with pytest.raises(bertfast.UnsupportedModelError, match="dict"):
        patch({})
    config = transformers.AlbertConfig(vocab_size=9, hidden_size=8, num_attention_heads=1, intermediate_size=8)
    with pytest.raises(bertfast.UnsupportedModelError, match="AlbertModel"):
        patch(nn.Sequential(transformers.AlbertModel(config)))

    class Derived(transformers.BertModel):
        pass

    with pytest.raises(bertfast.UnsupportedModelError, match="exact class"):
        patch(Derived(transformers.BertConfig(**SETTINGS)))
    with pytest.raises(ValueError, match="padding"):
        patch(build(), padding="some")


def test_the_report_is_json() -> None:
    model = patch(nn.ModuleDict({"a": build(), "b": build("BertForMaskedLM")}))
    model["a"](**call_of("BertModel", mask_of("left")))
    report = explain(model)
    assert [b.name for b in report.backbones] == ["a", "b.bert"]
    data = json.loads(json.dumps(report.to_dict()))
    assert data["backbones"][0]["calls"] == {"packed": 0, "rectangle": 1, "stock": 0}
    assert "position 0" in str(report) and data["backbones"][0]["ops"]["linear"]["backend"] == "reference"


def test_explain_tells_a_kernel_for_short_sequences_from_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    _, patched = pair(dtype=torch.float64)
    assert "varlen_attention" in explain(patched).backbones[0].ops
    monkeypatch.setattr(backend, "_implementations", dict(backend._implementations))
    monkeypatch.setitem(backend._REFUSALS, "cpu", lambda *kind: None)
    short = lambda dtype, shape: None if shape[1] <= 128 else f"is for 128 tokens, not {shape[1]}"  # noqa: E731
    backend.register("varlen_attention", "cpu", None, short)
    del backend._implementations["varlen_attention_backward", "cpu"]
    with backend.use("auto"):
        ops = explain(patched).backbones[0].ops
    assert ops["varlen_attention"]["backend"] == "cpu"
    long = ops["varlen_attention, more than 128 tokens"]
    assert long == {"backend": "reference", "refused": {"cpu": "is for 128 tokens, not 256"}}
    assert ops["varlen_attention, backward"]["backend"] == "reference"


# --- sentence-transformers


def test_real_sentences(minilm_path: Any) -> None:
    st = pytest.importorskip("sentence_transformers")
    sentences = ["A short one.", "A sentence that is a good deal longer than the first one was.", "Three", ""]
    gold = st.SentenceTransformer(str(minilm_path), device="cpu").double().encode(sentences)
    model = st.SentenceTransformer(str(minilm_path), device="cpu")
    assert patch(model) is model
    for _ in range(2):
        assert abs(model.encode(sentences) - gold).max() <= 2e-5
    assert ran(model) == {"packed": 2}


def test_cross_encoder(tmp_path: Any, minilm_path: Any) -> None:
    st = pytest.importorskip("sentence_transformers")
    build("BertForSequenceClassification", dtype=torch.float32, vocab_size=30522, num_labels=1).save_pretrained(
        tmp_path
    )
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "special_tokens_map.json"):
        if (minilm_path / name).exists():
            (tmp_path / name).write_bytes((minilm_path / name).read_bytes())
    model = st.CrossEncoder(str(tmp_path), device="cpu", max_length=32)
    pairs = [("what is it", "a test"), ("who", "nobody that I have heard of, at any rate")]
    expected = model.predict(pairs)
    patch(model)
    assert abs(model.predict(pairs) - expected).max() <= 1e-4
    assert ran(model) == {"packed": 1}

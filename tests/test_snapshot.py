"""Whatever is changed in a model after patching counts in its next call, with stock's numbers."""

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bertfast
from bertfast.patching import explain, patch

pytest.importorskip("transformers")

from agreement import assert_agree, assert_same, pair, ran, reasons, visible
from stock_models import LEGACY, call_of, mask_of

OLD_ONLY = pytest.mark.skipif(not LEGACY, reason="transformers 5 has no such thing any more")

pytestmark = pytest.mark.usefixtures("one_thread")


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

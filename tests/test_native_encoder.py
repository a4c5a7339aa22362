"""The encoder as one native call, on every instruction set, against its layers in float64; and when it steps aside."""

import copy
import gc
import pickle
import random
import resource
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from bertfast import BertConfig, BertModel, backend, native
from bertfast.layer import LayerPacks
from bertfast.model import BertEncoder
from bertfast.packing import Packing

pytestmark = pytest.mark.skipif(native.cpu is None, reason=native.cpu_reason)

ISAS = native.cpu.available_isas() if native.cpu is not None else []
# Largest error, of values of about 1: float32's rounding, bfloat16's and int8's of operands over three layers.
LIMITS = {"float32": 2e-5, "bfloat16": 0.05, "int8": 0.2}


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    before = native.cpu.isa()
    native.cpu.set_isa(request.param)
    yield request.param
    native.cpu.set_isa(before)


def config(**changes: object) -> BertConfig:
    sizes = {"hidden_size": 96, "num_attention_heads": 3, "intermediate_size": 130, "num_hidden_layers": 3}
    return BertConfig(**{**sizes, "vocab_size": 50, "max_position_embeddings": 64, **changes})


def make(
    operand: str | None = None, dtype: torch.dtype = torch.float32, seed: int = 0, **changes: object
) -> BertEncoder:
    torch.manual_seed(0)
    encoder = BertEncoder(config(**changes), operand=operand)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return encoder.to(dtype).eval()


def packing_of(lengths: Sequence[int]) -> Packing:
    width = max([*lengths, 1])
    return Packing.from_mask(torch.arange(width)[None] < torch.tensor(lengths)[:, None])


def one_by_one(encoder: BertEncoder, x: Tensor, packing: Packing) -> Tensor:
    """The layers called as modules."""
    for layer in encoder.layer:
        x = layer(x, packing)
    return x


def right(encoder: BertEncoder, x: Tensor, packing: Packing) -> Tensor:
    with torch.inference_mode():
        return one_by_one(copy.deepcopy(encoder).double(), x.double(), packing)


@torch.inference_mode()
def run(encoder: BertEncoder, x: Tensor, packing: Packing) -> Tensor:
    """What the encoder computes, all in one call."""
    out = encoder.native.run(encoder.layer, x, packing)
    assert out is not None
    assert torch.equal(out, encoder(x, packing)) or out.isnan().any()
    return out


def assert_close(out: Tensor, gold: Tensor, operand: str) -> None:
    assert (out.double() - gold).abs().max() <= LIMITS[operand]


LENGTHS = {"one": [1], "short": [3, 1, 2], "edges": [16, 15, 17, 1, 32], "empty": [0, 5, 0, 0, 7, 0], "long": [64, 2]}


@pytest.mark.parametrize("operand", LIMITS)
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_matches_the_layers_in_float64(isa: str, operand: str, lengths: list[int]) -> None:
    encoder, packing = make(operand), packing_of(lengths)
    x = torch.randn(sum(lengths), 96)
    assert_close(run(encoder, x, packing), right(encoder, x, packing), operand)


@pytest.mark.parametrize("operand", LIMITS)
@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_size": 21, "num_attention_heads": 3, "intermediate_size": 35},
        {"hidden_size": 64, "num_attention_heads": 1, "intermediate_size": 33, "hidden_act": "gelu_new"},
        {"hidden_size": 10, "num_attention_heads": 10, "intermediate_size": 1, "num_hidden_layers": 1},
    ],
    ids=("odd", "tanh", "heads of one"),
)
def test_sizes_that_are_multiples_of_nothing(isa: str, operand: str, changes: dict) -> None:
    encoder, packing = make(operand, **changes), packing_of([5, 20, 1])
    x = torch.randn(26, changes["hidden_size"])
    assert_close(run(encoder, x, packing), right(encoder, x, packing), operand)


def test_bfloat16_weights_keep_a_float32_residual_stream(isa: str) -> None:
    encoder, packing = make(dtype=torch.bfloat16), packing_of([9, 40])
    x = torch.randn(49, 96).bfloat16()
    gold = right(encoder, x, packing)
    with torch.inference_mode():
        stock = one_by_one(encoder, x, packing)
    out = run(encoder, x, packing)
    assert out.dtype == torch.bfloat16
    ours, theirs = ((t.double() - gold).abs() for t in (out, stock))
    assert ours.mean() < theirs.mean() and ours.max() <= 1.5 * theirs.max()


def test_each_gemm_may_have_an_operand_of_its_own() -> None:
    mixed, packing, x = make(), packing_of([30, 11]), torch.randn(41, 96)
    gold = right(mixed, x, packing)
    kinds = ("int8", "float32", "bfloat16")
    for i, layer in enumerate(mixed.layer):
        layer.packs = LayerPacks(*(type(place)(kinds[(i + j) % 3]) for j, place in enumerate(layer.packs)))
    assert_close(run(mixed, x, packing), gold, "int8")
    assert not torch.equal(run(mixed, x, packing), run(make(), x, packing))


@pytest.mark.parametrize("operand", LIMITS)
def test_the_same_bits_in_any_batch_and_on_any_number_of_threads(operand: str) -> None:
    """Batches of more tokens than one group has, too, which are cut where a sequence ends."""
    lengths = [int(n) for n in torch.randint(0, 60, (150,))] + [0, 63]
    encoder, x = make(operand), torch.randn(sum(lengths), 96)
    threads = torch.get_num_threads()
    together = run(encoder, x, packing_of(lengths))
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            assert torch.equal(run(encoder, x, packing_of(lengths)), together)
    finally:
        torch.set_num_threads(threads)
    begin = 0
    for i, length in enumerate(lengths):
        if length and i % 7 == 0:
            alone = run(encoder, x[begin : begin + length].clone(), packing_of([length]))
            assert torch.equal(alone, together[begin : begin + length])
        begin += length


def test_sequences_do_not_see_each_other() -> None:
    encoder, packing, x = make(), packing_of([10, 20, 5]), torch.randn(35, 96)
    before = run(encoder, x, packing)
    x[10:30] = torch.randn(20, 96)
    after = run(encoder, x, packing)
    assert torch.equal(before[:10], after[:10]) and torch.equal(before[30:], after[30:])
    assert not torch.equal(before[10:30], after[10:30])


@pytest.mark.parametrize("operand", LIMITS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_in_its_sequence_and_is_seen(isa: str, operand: str, value: float) -> None:
    encoder, packing, x = make(operand), packing_of([10, 20]), torch.randn(30, 96)
    whole = run(encoder, x, packing)
    x[3, 7] = value
    out = run(encoder, x, packing)
    assert out[:10].isnan().any() and torch.equal(out[10:], whole[10:])


CHANGES = {
    "in place": lambda layer: layer.output.dense.weight.mul_(0.5),
    "data": lambda layer: setattr(layer.output.dense.weight, "data", torch.randn_like(layer.output.dense.weight)),
    "behind autograd": lambda layer: layer.output.dense.weight.data.mul_(0.5),
    "another parameter": lambda layer: setattr(
        layer.output.dense, "weight", torch.nn.Parameter(torch.randn_like(layer.output.dense.weight))
    ),
    "another module": lambda layer: layer.output.__setitem__("dense", torch.nn.Linear(130, 96)),
    "bias": lambda layer: layer.output.dense.bias.add_(1),
    "norm": lambda layer: layer.attention.output.LayerNorm.weight.add_(1),
    "settings": lambda layer: setattr(layer, "heads", 1),
    "packs": lambda layer: setattr(layer, "packs", LayerPacks.empty("bfloat16")),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_changes_is_seen(change: object) -> None:
    encoder, packing, x = make(), packing_of([10, 20]), torch.randn(30, 96)
    before = run(encoder, x, packing)
    with torch.no_grad():
        for layer in encoder.layer:
            change(layer)
    after = run(encoder, x, packing)
    assert not torch.equal(before, after)
    assert_close(after, right(encoder, x, packing), "bfloat16" if encoder.layer[0].packs.up.operand else "float32")


def aside(encoder: BertEncoder, x: Tensor, packing: Packing) -> bool:
    return encoder.native.run(encoder.layer, x, packing) is None


def test_steps_aside_where_something_else_has_to_see_the_layers() -> None:
    encoder, packing, x = make(), packing_of([4, 3]), torch.randn(7, 96)
    assert aside(encoder, x, packing)  # the weights want gradients
    with torch.no_grad():
        assert not aside(encoder, x, packing)
        assert not aside(encoder, x.clone().requires_grad_(), packing)
        assert aside(encoder, x.double(), packing) and aside(encoder, x[:, :95], packing)
        with torch.autocast("cpu", torch.bfloat16):
            assert aside(encoder, x, packing)
        with backend.use("reference"):
            assert aside(encoder, x, packing)
        with torch.utils._python_dispatch.TorchDispatchMode():
            assert aside(encoder, x, packing)
        seen = []
        handle = encoder.layer[1].register_forward_hook(lambda *given: seen.append(given))
        encoder(x, packing)
        assert len(seen) == 1
        handle.remove()
        handle = torch.nn.modules.module.register_module_forward_hook(lambda *given: seen.append(given))
        encoder(x, packing)
        assert len(seen) > 1
        handle.remove()
        assert not aside(encoder, x, packing)
        encoder.train()
        assert aside(encoder, x, packing)  # dropout
        encoder.eval()
        encoder.layer[0].forward = lambda hidden, packing: hidden
        assert aside(encoder, x, packing)
        del encoder.layer[0].forward
        encoder.layer[2] = torch.nn.Identity()
        assert aside(encoder, x, packing)
    for parameter in (frozen := make()).parameters():
        parameter.requires_grad_(False)
    assert not aside(frozen, x, packing)


def test_refusals() -> None:
    def why(encoder: BertEncoder) -> str | None:
        with torch.no_grad():
            x = torch.randn(3, 96, dtype=next(encoder.parameters(), torch.empty(0)).dtype)
            assert encoder.native.run(encoder.layer, x, packing_of([3])) is None
        return encoder.native._found[1].refusal

    assert why(BertEncoder(config(), pack_weights=False).eval()) == "weights are not packed (pack_weights=False)"
    assert why(make(dtype=torch.float64)) == "float64 weights"
    assert why(make().train()) == "dropout"
    assert why(make(num_hidden_layers=0)) == "no layers"
    other = make()
    other.layer[1].eps = 1.0
    assert why(other) == "layers with different settings"
    other = make()
    other.layer[1] = make(intermediate_size=17).layer[1]
    assert why(other) == "layers of different shapes"


def test_wrong_borders_are_an_error_and_not_a_wrong_read() -> None:
    encoder, x = make(), torch.randn(7, 96)
    packing = packing_of([4, 3])
    run(encoder, x, packing)
    for borders in ([0, 4, 6], [0, 8, 7], [1, 4, 7], [0, -1, 7]):
        packing.cu_seqlens.copy_(torch.tensor(borders))
        with torch.no_grad(), pytest.raises(ValueError, match="cu_seqlens must rise from 0"):
            encoder(x, packing)


def test_no_tokens() -> None:
    assert run(make(), torch.empty(0, 96), packing_of([0, 0])).shape == (0, 96)


def test_threads_share_an_encoder() -> None:
    encoder = make()
    jobs = [(torch.randn(sum(n), 96), packing_of(n)) for n in ([3, 4], [60], [1], [20, 20, 20])]
    expected, wrong = [run(encoder, *job) for job in jobs], []

    def work(i: int) -> None:
        torch.set_num_threads(1)
        for _ in range(20):
            if not torch.equal(run(encoder, *jobs[i]), expected[i]):
                wrong.append(i)

    encoder.native = type(encoder.native)()  # so that it is built by all of them at once
    threads = [threading.Thread(target=work, args=(i % 4,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert 0 < encoder.native._found[1].workspace_bytes < 8 * 60 * 96 * 200


def test_workspaces_do_not_grow_with_calls_or_with_batches() -> None:
    encoder = make()
    sizes = []
    for sequences in (4, 40, 400, 4):
        lengths = [50] * sequences
        run(encoder, torch.randn(sum(lengths), 96), packing_of(lengths))
        sizes.append(encoder.native._found[1].workspace_bytes)
    assert sizes[0] < sizes[1] == sizes[2] == sizes[3]


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the system does not tell a process's memory so")
def test_memory_does_not_grow_over_ten_thousand_calls_of_any_shape() -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

    model = BertModel(config(hidden_size=32, num_attention_heads=2, intermediate_size=64), compute="bf16").eval()
    draw = random.Random(0)
    with torch.inference_mode():
        for call in range(10_000):
            if call == 1_000:
                before = resident()
            model(torch.zeros(draw.randint(1, 4), draw.randint(1, 30), dtype=torch.int64))
    assert resident() - before < 2**22


def test_the_workspace_of_bert_base_is_what_the_readme_says() -> None:
    encoder = make(hidden_size=768, num_attention_heads=12, intermediate_size=3072, num_hidden_layers=1)
    for sequences in (16, 33):
        run(encoder, torch.randn(128 * sequences, 768), packing_of([128] * sequences))
    megabytes = f"{encoder.native._found[1].workspace_bytes / 1e6:.0f} MB for BERT-base in float32"
    assert megabytes in (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")


def test_copies_and_pickles_are_encoders_of_their_own() -> None:
    encoder, packing, x = make("bfloat16"), packing_of([10, 20]), torch.randn(30, 96)
    out = run(encoder, x, packing)
    for other in (copy.deepcopy(encoder), pickle.loads(pickle.dumps(encoder))):
        assert torch.equal(run(other, x, packing), out)
        with torch.no_grad():
            other.layer[0].output.dense.weight.zero_()
        assert not torch.equal(run(other, x, packing), out)
    assert torch.equal(run(encoder, x, packing), out)


def test_training_does_not_keep_packed_weights() -> None:
    encoder, packing, x = make(), packing_of([3]), torch.randn(3, 96)
    for hidden in (x, x.clone().requires_grad_()):
        run(encoder, x, packing)
        storage = torch.multiprocessing.reductions.StorageWeakRef(
            encoder.layer[0].packs.up._copy.packed.weight.untyped_storage()
        )
        encoder(hidden, packing).sum().backward()
        assert storage.expired()


def test_a_model_that_is_gone_takes_its_packed_weights_along() -> None:
    encoder, packing, x = make(), packing_of([3]), torch.randn(3, 96)
    run(encoder, x, packing)
    kept = [copy_ for copy_ in encoder.native._found[1]._built.keep if isinstance(copy_, Tensor)]
    storages = [torch.multiprocessing.reductions.StorageWeakRef(t.untyped_storage()) for t in kept]
    del encoder, kept
    gc.collect()
    assert all(storage.expired() for storage in storages)


def test_compute_of_native_models() -> None:
    with pytest.raises(ValueError, match=r'compute must be None.*"bf16".*bertfast.quantize'):
        BertModel(config(), compute="int8")
    with pytest.raises(ValueError, match="compute is of packed weights"):
        BertModel(config(), compute="bf16", pack_weights=False)
    before = native.cpu.isa()
    try:
        native.cpu.set_isa("baseline")
        with pytest.warns(UserWarning, match="no instructions for bfloat16"):
            model = BertModel(config(), compute="bf16")
    finally:
        native.cpu.set_isa(before)
    assert model.encoder.layer[0].packs.up.operand is None

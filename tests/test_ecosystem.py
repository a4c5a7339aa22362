"""What people do with a model of transformers besides calling it: on patched models it does what it does on stock ones.

Whatever looks at the operations themselves (torch.compile, export, tracing, torch.func) has to find stock code.
"""

import copy
import io
import pickle
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import SETTINGS
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.utils.flop_counter import FlopCounterMode

from bertfast.errors import UnsupportedModelError
from bertfast.patching import explain, patch, unpatch

transformers = pytest.importorskip("transformers")

from agreement import assert_same, pair, ran, reasons, visible  # noqa: E402
from compatibility import note  # noqa: E402
from live_models import GRADIENT_TOLERANCE, TOLERANCE32, loss_gradients, path_of  # noqa: E402
from stock_models import FAMILIES, build, call_of, mask_of  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")

BASES = tuple(family.prefix + "Model" for family in FAMILIES.values())
MASKED_LMS = tuple(family.prefix + "ForMaskedLM" for family in FAMILIES.values())
CLASSIFIERS = tuple(family.prefix + "ForSequenceClassification" for family in FAMILIES.values())
MASK = mask_of("right")


def compare(patched: nn.Module, stock: nn.Module, call: dict[str, Any], mask: Tensor | None = MASK) -> None:
    """Outputs agree."""
    with torch.no_grad():
        assert_same(visible(patched(**call), mask), visible(stock(**call), mask))


# --- what a call may ask for


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_hidden_states_attentions_and_tuples(family: str, attention: str) -> None:
    if attention not in FAMILIES[family].attentions:
        pytest.skip(f"{family} has no {attention} attention in this version of transformers")
    name = FAMILIES[family].prefix + "Model"
    stock, patched = pair(name, attention=attention)
    call = call_of(name, MASK)
    for argument, seam in (("output_hidden_states", "hidden states"), ("output_attentions", "attention maps")):
        before = ran(patched)
        ours, theirs = (model(**call, **{argument: True}) for model in (patched, stock))
        assert list(ours) == list(theirs)
        key = argument.removeprefix("output_")
        # Whole tensors: where someone looks at padding, it is stock's.
        everything = {"last": theirs[0]} | dict(enumerate(theirs[key]))
        assert len(theirs[key]) == {"hidden_states": 3, "attentions": 2}[key] or attention == "sdpa"
        assert_same({"last": ours[0]} | dict(enumerate(ours[key])), everything)
        (path,) = {path for path, n in ran(patched).items() if n != before.get(path)}
        assert path == {"output_hidden_states": "rectangle", "output_attentions": "stock"}[argument]
        note(seam, name, path)
    ours, theirs = (model(**call, return_dict=False) for model in (patched, stock))
    assert type(ours) is type(theirs) is tuple and len(ours) == len(theirs)
    assert_same({"h": ours[0][MASK.bool()]}, {"h": theirs[0][MASK.bool()]})
    for mine, other in zip(ours[1:], theirs[1:], strict=True):
        assert_same({"pooled": mine}, {"pooled": other})
    assert ran(patched)["packed"] == 1
    note("return_dict=False", name, "packed")


@pytest.mark.parametrize("name", BASES)
def test_inference_mode(name: str) -> None:
    stock, patched = pair(name)
    call = call_of(name, MASK)
    with torch.inference_mode():
        assert_same(visible(patched(**call), MASK), visible(stock(**call), MASK))
        assert patched(**call)[0].is_inference()
    assert path_of(patched) == "packed"
    note("torch.inference_mode", name, "packed")


@pytest.mark.parametrize("name", BASES)
def test_forward_hooks(name: str) -> None:
    """Hooks on the model and on the parts that patching has its own classes for see stock's arguments and results."""
    stock, patched = pair(name)
    call = call_of(name, MASK)
    seen: list[dict[str, Tensor]] = [{}, {}]
    place = "transformer" if name == "DistilBertModel" else "encoder"

    def keep(key: str, found: dict[str, Tensor]) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple, output: Any) -> None:
            hidden_states = output if isinstance(output, Tensor) else output[0]
            found[key] = hidden_states.detach()[MASK.bool()]

        return hook

    for model, found in zip((patched, stock), seen, strict=True):
        for key in ("", "embeddings", place):
            model.get_submodule(key).register_forward_hook(keep(key, found))
    compare(patched, stock, call)
    assert_same(*seen)
    assert path_of(patched) == "packed"
    note("hooks on the model", name, "packed")
    for model, found in zip((patched, stock), seen, strict=True):
        layers = model.get_submodule(place).layer
        layers[0].register_forward_hook(keep("layer", found))
        layers[1].register_forward_pre_hook(lambda module, args: (args[0] * 1.5, *args[1:]))
    compare(patched, stock, call)
    assert_same(*seen)
    assert ran(patched) == {"packed": 1, "rectangle": 1} and "hooks" in reasons(patched)
    note("hooks on layers", name, "rectangle")


@pytest.mark.parametrize("family", [key for key, f in FAMILIES.items() if {"LMHeadModel", "ForCausalLM"} & {*f.heads}])
def test_generation_with_a_decoder(family: str) -> None:
    name = FAMILIES[family].prefix + ("LMHeadModel" if family == "bert" else "ForCausalLM")
    stock, patched = pair(name, dtype=torch.float32, is_decoder=True)
    ids = call_of(name, None)["input_ids"][:, :5].clamp(min=2)
    ours, theirs = (model.generate(ids, max_new_tokens=6, do_sample=False) for model in (patched, stock))
    assert theirs.shape[1] > 5 and torch.equal(ours, theirs)
    assert path_of(patched) == "stock" and "decoder" in reasons(patched)
    note("generate, as a decoder", name, "stock")


def test_the_encoder_of_an_encoder_decoder_model() -> None:
    encoder = build("BertModel", dtype=torch.float32)
    decoder = build("BertLMHeadModel", dtype=torch.float32, is_decoder=True, add_cross_attention=True)
    stock = transformers.EncoderDecoderModel(encoder=encoder, decoder=decoder).eval()
    patched = patch(copy.deepcopy(stock))
    call = call_of("BertModel", MASK)
    call = {"input_ids": call["input_ids"], "attention_mask": MASK, "decoder_input_ids": call["input_ids"][:, :4]}
    with torch.no_grad():
        assert_same({"logits": patched(**call).logits}, {"logits": stock(**call).logits}, TOLERANCE32)
    paths = [{path for path, n in backbone.calls.items() if n} for backbone in explain(patched).backbones]
    assert paths == [{"packed"}, {"stock"}]
    note("EncoderDecoderModel, its encoder", "BertModel", "packed")


# --- what looks at the operations: stock code


def test_torch_compile() -> None:
    torch._dynamo.reset()
    name = "BertForSequenceClassification"
    stock, patched = pair(name)
    call = call_of(name, MASK)
    compiled = torch.compile(patched, backend="aot_eager")
    ours, theirs = loss_gradients(compiled, call), loss_gradients(stock, call)
    assert_same({key.removeprefix("_orig_mod."): grad for key, grad in ours.items()}, theirs, GRADIENT_TOLERANCE)
    assert ran(patched) == {}  # nothing of ours was called
    note("torch.compile", name, "stock")
    compare(patched, stock, call)
    assert path_of(patched) == "packed"  # calls that are not compiled still are
    torch._dynamo.reset()


@pytest.mark.parametrize("name", ["BertModel", "RobertaModel", "DistilBertModel"])
def test_torch_export(name: str) -> None:
    stock, patched = pair(name)
    call = call_of(name, MASK)
    try:
        expected = torch.export.export(stock, (), call).module()
    except Exception as error:
        pytest.skip(f"the stock model cannot be exported: {type(error).__name__}")
    exported = torch.export.export(patched, (), call)
    other = call | {"input_ids": call["input_ids"].flip(0)}
    with torch.no_grad():
        assert_same(visible(exported.module()(**other), MASK), visible(expected(**other), MASK))
    operations = {str(node.target) for node in exported.graph.nodes}
    assert not any("bertfast" in operation for operation in operations)
    assert ran(patched) == {}
    note("torch.export", name, "stock")


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*deprecated:DeprecationWarning")
@pytest.mark.parametrize("name", ["BertModel", "RobertaModel", "DistilBertModel"])
def test_torch_jit_trace(name: str) -> None:
    stock, patched = pair(name, attention="eager")
    call = call_of(name, MASK)
    example = call["input_ids"], call["attention_mask"]
    for model in (stock, patched):
        model.config.return_dict = False
    try:
        expected = torch.jit.trace(stock, example, strict=False)
    except Exception as error:
        pytest.skip(f"the stock model cannot be traced: {type(error).__name__}")
    # Its check would call the model without tracing, which is ours to run.
    traced = torch.jit.trace(patched, example, strict=False, check_trace=False)
    other = example[0].flip(0), example[1].flip(0)
    with torch.no_grad():
        ours, theirs = (dict(enumerate(module(*other))) for module in (traced, expected))
    assert_same(ours, theirs)
    assert ran(patched) == {}
    note("torch.jit.trace", name, "stock")


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_torch_func(name: str) -> None:
    """grad of a function of the parameters, and per-sample gradients by vmap, where stock code can be mapped."""
    stock, patched = pair(name, attention="eager")
    call = call_of(name, None)
    del call["labels"]

    def gradients_of(model: nn.Module) -> dict[str, Tensor]:
        parameters = {key: p.detach() for key, p in model.named_parameters()}

        def loss(parameters: dict[str, Tensor], call: dict[str, Tensor]) -> Tensor:
            return torch.func.functional_call(model, parameters, kwargs=call).logits.square().sum()

        found = torch.func.grad(loss)(parameters, call)
        try:
            one_by_one = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(
                parameters, {key: value[:, None] for key, value in call.items()}
            )
        except Exception:
            return found  # a stock model that cannot be mapped; a patched one then has to raise as well
        return found | {f"{key}, by sample": value for key, value in one_by_one.items()}

    assert_same(gradients_of(patched), gradients_of(stock), GRADIENT_TOLERANCE)
    assert ran(patched) == {}
    note("torch.func.grad", name, "stock")
    parameters = {key: p.detach() * 0.5 for key, p in stock.named_parameters()}
    ours, theirs = (torch.func.functional_call(m, parameters, kwargs=call).logits for m in (patched, stock))
    assert_same({"logits": ours}, {"logits": theirs})
    assert path_of(patched) == "packed"
    note("torch.func.functional_call", name, "packed")


def test_forward_mode_differentiation() -> None:
    stock, patched = pair("BertModel", attention="eager")
    x = torch.randn(2, 5, SETTINGS["hidden_size"], dtype=torch.float64)

    def jvp(model: nn.Module) -> dict[str, Tensor]:
        out = torch.func.jvp(lambda x: model(inputs_embeds=x).last_hidden_state, (x,), (torch.ones_like(x),))
        return dict(enumerate(out))

    assert_same(jvp(patched), jvp(stock))
    assert ran(patched) == {}


def test_modes_that_count_operations() -> None:
    stock, patched = pair("BertModel")
    call = call_of("BertModel", MASK)
    counts = []
    for model in (patched, stock):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(**call)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0
    assert ran(patched) == {}


def test_meta_tensors_have_shapes() -> None:
    stock, patched = pair("BertModel")
    stock, patched = stock.to("meta"), patched.to("meta")
    ids = torch.zeros(2, 5, dtype=torch.int64, device="meta")
    calls = {"input_ids": ids}, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    shapes = [_shape_of(stock, call) for call in calls]
    if not any(shapes):
        pytest.skip("this version of transformers reads the values of masks")
    assert [_shape_of(patched, call) for call in calls] == shapes
    assert path_of(patched) == "stock"


def _shape_of(model: nn.Module, call: dict[str, Tensor]) -> tuple[int, ...] | None:
    """The shape of the hidden states, or None where the model needs values."""
    try:
        hidden_states = model(**call).last_hidden_state
    except Exception:
        return None
    assert hidden_states.is_meta
    return tuple(hidden_states.shape)


# --- what changes a model after patching


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save"])
@pytest.mark.parametrize("name", MASKED_LMS)
def test_copies(name: str, way: str) -> None:
    stock, patched = pair(name)
    call = call_of(name, MASK)
    compare(patched, stock, call)
    if way == "deepcopy":
        other = copy.deepcopy(patched)
    elif way == "pickle":
        other = pickle.loads(pickle.dumps(patched))
    else:
        file = io.BytesIO()
        torch.save(patched, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    assert ran(other) == {}  # counted anew
    assert_same(loss_gradients(other, call), loss_gradients(stock, call), GRADIENT_TOLERANCE)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    compare(patched, stock, call)  # whose weights are its own
    assert path_of(other) == path_of(patched) == "packed"
    unpatch(other)
    assert not explain(other).backbones[0].patched and explain(patched).backbones[0].patched
    note("deepcopy, pickle, torch.save", name, "packed")


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_other_dtypes_after_patching(name: str) -> None:
    call = call_of(name, MASK)
    gold = build(name)(**call).logits
    scale = gold.abs().max().item()
    # Beyond twice what stock code loses in the same dtype, relative to the largest value.
    allowed = {
        "double": GRADIENT_TOLERANCE,
        "float": TOLERANCE32,
        "bfloat16": torch.finfo(torch.bfloat16).eps,
        "half": 0,
    }
    for way, limit in allowed.items():
        stock, patched = pair(name, dtype=torch.float32)
        with torch.no_grad():
            patched(**call)  # packs its weights
            before = ran(patched)
            ours, theirs = (getattr(model, way)()(**call).logits for model in (patched, stock))
        assert ours.dtype == theirs.dtype == next(patched.parameters()).dtype
        errors = [(logits - gold).abs().max().item() for logits in (ours, theirs)]
        assert errors[0] <= 2 * errors[1] + limit * scale, (way, errors)
        path = "stock" if way == "half" else "packed"  # no kernels on the CPU
        assert ran(patched) == {"packed": 2} if path == "packed" else before | {"stock": 1}
        note(f".{way}() after patching", name, path)


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_loaded_weights(name: str) -> None:
    """In float32, where packed copies of the weights would be stale."""
    stock, patched = pair(name, dtype=torch.float32)
    call = call_of(name, MASK)
    torch.manual_seed(4)
    other = {key: value + 0.1 * torch.randn_like(value) for key, value in stock.state_dict().items()}
    with torch.no_grad():
        first = patched(**call).logits
        stock.load_state_dict(other)
        expected = {"logits": stock(**call).logits}
        assert not torch.allclose(first, expected["logits"], atol=0.1)
        for assign in (False, True):
            patched = patch(build(name, dtype=torch.float32))
            patched(**call)
            patched.load_state_dict(other, assign=assign)
            assert_same({"logits": patched(**call).logits}, expected, TOLERANCE32)
            assert path_of(patched) == "packed"
    note("load_state_dict", name, "packed")


@pytest.mark.parametrize("name", MASKED_LMS)
def test_tied_weights(name: str) -> None:
    stock, patched = pair(name)
    patched.tie_weights()
    decoder, words = patched.get_output_embeddings(), patched.get_input_embeddings()
    assert decoder.weight is words.weight
    call = call_of(name, MASK)
    assert_same(loss_gradients(patched, call), loss_gradients(stock, call), GRADIENT_TOLERANCE)
    for model in (patched, stock):
        torch.optim.SGD(model.parameters(), lr=0.01).step()
    compare(patched, stock, call)
    assert decoder.weight is words.weight
    assert path_of(patched) == "packed"
    note("tied weights", name, "packed")


@pytest.mark.parametrize("name", MASKED_LMS)
def test_resized_embeddings(name: str) -> None:
    stock, patched = pair(name)
    size = SETTINGS["vocab_size"] + 7
    for model in (stock, patched):
        torch.manual_seed(5)
        model.resize_token_embeddings(size, mean_resizing=False)
    patched.load_state_dict(stock.state_dict())
    call = call_of(name, MASK)
    call["input_ids"][0, 2] = size - 1
    assert patched.get_output_embeddings().weight is patched.get_input_embeddings().weight
    compare(patched, stock, call)
    assert patched(**call).logits.shape[-1] == size and path_of(patched) == "packed"
    note("resize_token_embeddings", name, "packed")


@pytest.mark.parametrize("name", MASKED_LMS)
def test_saved_and_loaded(name: str, tmp_path: Path) -> None:
    stock, patched = pair(name)
    compare(patched, stock, call_of(name, MASK))
    patched.save_pretrained(tmp_path)
    loaded, loading = type(stock).from_pretrained(tmp_path, dtype=torch.float64, output_loading_info=True)
    assert not any(loading[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert not explain(loaded).backbones[0].patched
    assert_same(loaded.state_dict(), stock.state_dict(), 0.0)
    compare(patch(loaded.eval()), stock, call_of(name, MASK))
    note("save_pretrained, from_pretrained", name, path_of(loaded))
    assert path_of(loaded) == "packed"


def test_averaged_models() -> None:
    name = "BertForSequenceClassification"
    stock, patched = pair(name, dtype=torch.float32)
    call = call_of(name, MASK)
    averages = [torch.optim.swa_utils.AveragedModel(model) for model in (patched, stock)]
    with torch.no_grad():
        for _ in range(3):
            ours, theirs = ({"logits": average(**call).logits} for average in averages)
            assert_same(ours, theirs, TOLERANCE32)
            for model, average in zip((patched, stock), averages, strict=True):
                for parameter in model.parameters():
                    parameter.mul_(0.8)
                average.update_parameters(model)  # writes over weights that were packed
    assert ran(averages[0]) == {"packed": 3}
    note("AveragedModel", name, "packed")


def test_pruned_weights() -> None:
    name = "BertModel"
    stock, patched = pair(name)
    call = call_of(name, MASK)
    dense = [model.encoder.layer[1].output.dense for model in (stock, patched)]
    for module in dense:
        prune.l1_unstructured(module, "weight", amount=0.5)
    compare(patched, stock, call)
    assert path_of(patched) == "rectangle"
    for module in dense:
        prune.remove(module, "weight")
    compare(patched, stock, call)
    assert ran(patched) == {"rectangle": 1, "packed": 1}
    note("torch.nn.utils.prune", name, "rectangle")


@pytest.mark.filterwarnings("ignore:.*deprecated:DeprecationWarning")
@pytest.mark.parametrize("name", BASES)
def test_quantized_layers(name: str) -> None:
    stock, patched = pair(name, dtype=torch.float32)
    call = call_of(name, MASK)
    ours, theirs = (torch.ao.quantization.quantize_dynamic(model, {nn.Linear}) for model in (patched, stock))
    with torch.no_grad():
        assert_same(visible(ours(**call), MASK), visible(theirs(**call), MASK), TOLERANCE32)
    assert path_of(ours) == "stock" and "quantized" in reasons(ours)
    note("quantize_dynamic", name, "stock")


def test_accelerate_prepares_and_offloads() -> None:
    accelerate = pytest.importorskip("accelerate")
    name = "BertModel"
    stock, patched = pair(name, dtype=torch.float32)
    call = call_of(name, MASK)
    expected = {"h": stock(**call).last_hidden_state[MASK.bool()].detach()}
    offloaded = accelerate.cpu_offload(copy.deepcopy(patched), execution_device=torch.device("cpu"))
    with torch.no_grad():
        assert_same({"h": offloaded(**call).last_hidden_state[MASK.bool()]}, expected, TOLERANCE32)
    assert path_of(offloaded) == "stock"  # each submodule has a forward of its own, which fetches its weights
    note("accelerate.cpu_offload", name, "stock")
    prepared = accelerate.Accelerator(cpu=True).prepare(patched)
    with torch.no_grad():
        assert_same({"h": prepared(**call).last_hidden_state[MASK.bool()]}, expected, TOLERANCE32)
    assert path_of(patched) == "packed"
    note("Accelerator.prepare", name, "packed")


# --- threads


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_threads_share_a_model(name: str) -> None:
    stock, patched = pair(name, dtype=torch.float32)
    wrong: list[str] = []
    start = threading.Barrier(3, timeout=60)

    def work(form: str) -> None:
        mask = mask_of(form)
        call = call_of(name, mask)
        with torch.no_grad():
            expected = visible(stock(**call), mask)
            start.wait()
            for _ in range(10):
                try:
                    assert_same(visible(patched(**call), mask), expected, TOLERANCE32)
                except Exception as error:
                    wrong.append(f"{form}: {error!r}")

    _in_threads([lambda form=form: work(form) for form in ("right", "left", "none")])
    assert not wrong, wrong[0]
    assert sum(ran(patched).values()) == 30 and ran(patched)["packed"] >= 20
    note("threads", name, "packed")


def test_threads_call_models_of_several_families() -> None:
    pairs = {name: pair(name, dtype=torch.float32) for name in BASES}
    wrong: list[str] = []

    def work(name: str) -> None:
        stock, patched = pairs[name]
        call = call_of(name, MASK)
        with torch.no_grad():
            expected = visible(stock(**call), MASK)
            for _ in range(10):
                try:
                    assert_same(visible(patched(**call), MASK), expected, TOLERANCE32)
                except Exception as error:
                    wrong.append(f"{name}: {error!r}")

    _in_threads([lambda name=name: work(name) for name in BASES])
    assert not wrong, wrong[0]
    assert [ran(patched) for _, patched in pairs.values()] == [{"packed": 10}] * len(BASES)


def _in_threads(tasks: list[Callable[[], None]]) -> None:
    threads = [threading.Thread(target=task) for task in tasks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def test_other_architectures_are_refused() -> None:
    config = transformers.AlbertConfig(
        vocab_size=9, embedding_size=8, hidden_size=8, num_attention_heads=1, intermediate_size=8
    )
    with pytest.raises(UnsupportedModelError, match="AlbertModel"):
        patch(transformers.AlbertModel(config))

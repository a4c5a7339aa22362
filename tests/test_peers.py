"""Peers: each engine that is installed computes what the stock model does, and says in a line why where it cannot."""

import copy
import gc
import importlib.util
import subprocess
import sys
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from conftest import SEED
from small_models import SETTINGS, draw_weights
from torch import Tensor, nn

pytest.importorskip("transformers")
import transformers

import bertfast
import bertfast.machine
from benchmarks import accuracy
from benchmarks.peers import PEERS, Setting, Unavailable, chosen, derived
from benchmarks.peers.peer import imported

HEADS = {"": "BertModel", "sequence": "BertForSequenceClassification", "token": "BertForTokenClassification"}
# What each engine's package is imported as: hidden, its peers refuse; missing, they are skipped.
PACKAGES = {
    "hf-flash-attention-2": "flash_attn",
    "onnxruntime": "onnxruntime",
    "onnxruntime-optimised": "onnxruntime",
    "onnxruntime-int8": "onnxruntime",
    "openvino": "openvino",
    "ctranslate2": "ctranslate2",
    "sentence-transformers": "flash_attn",
    "packed-encoders": "packed_encoders",
}
COMPILED = [name for name in PEERS if name.startswith("compile")]
# Quantised models are calibrated, which takes seconds; their heads are the float ones'.
ON_CPU = [
    (name, precision, head)
    for name, peer in PEERS.items()
    for precision in peer.precisions
    for head in (HEADS if precision != "int8" else [""])
    if "cpu" in peer.devices and precision != "float16" and name not in COMPILED
]
# Rounding of two layers with large weights is 5e-6, 0.1 and 0.6; a wrong mask, position or type moves by 1 to 3.
LIMITS = {"float32": 5e-5, "bfloat16": 0.4, "int8": 1.5}
COSINES = {"float32": 0.999999, "bfloat16": 0.999, "int8": 0.95}


def make_model(head: str = "") -> nn.Module:
    model = getattr(transformers, HEADS[head])(transformers.BertConfig(**SETTINGS, num_labels=3))
    draw_weights(model)
    return model.eval()


@pytest.fixture(scope="module")
def models() -> dict[str, nn.Module]:
    """A small stock model for each head, one for all tests, so that engines convert it once."""
    torch.manual_seed(SEED)
    return {head: make_model(head) for head in HEADS}


def make_batch(*lengths: int) -> dict[str, Tensor]:
    """Random tokens of both types, with padding at the right."""
    mask = (torch.arange(max(lengths))[None] < torch.tensor(lengths)[:, None]).long()
    ids = torch.randint(0, SETTINGS["vocab_size"], mask.shape)
    types = torch.randint(0, 2, mask.shape)
    return {"input_ids": ids * mask, "token_type_ids": types * mask, "attention_mask": mask}


def part(batch: dict[str, Tensor], rows: slice, longest: int) -> dict[str, Tensor]:
    return {name: tensor[rows, :longest].contiguous() for name, tensor in batch.items()}


def setting(model: nn.Module, head: str = "", precision: str = "float32", batch: dict | None = None) -> Setting:
    return Setting(model, head, precision, "cpu", batch or make_batch(5, 2), 1)


def state(model: nn.Module) -> dict:
    """Everything about a model that a peer might have changed."""
    return {
        "classes": [type(module) for module in model.modules()],
        "parameters": [(id(p), p.data_ptr(), p.dtype, p.requires_grad, p.detach().clone()) for p in model.parameters()],
        "training": model.training,
        "attention": model.config._attn_implementation,
        "own": [sorted(module.__dict__) for module in model.modules()],
        "hooks": [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()],
    }


def check_unchanged(model: nn.Module, before: dict) -> None:
    after = state(model)
    for old, new in zip(before.pop("parameters"), after.pop("parameters"), strict=True):
        assert old[:-1] == new[:-1] and torch.equal(old[-1], new[-1])
    assert before == after


def check_agrees(output: Tensor, gold: nn.Module, head: str, batch: dict[str, Tensor], precision: str) -> None:
    with torch.no_grad():
        right = gold(**batch)
    right = right.logits if head else right.last_hidden_state
    assert output.shape == right.shape
    if head != "sequence":
        valid = batch["attention_mask"].bool()
        output, right = output[valid], right[valid]
    output = output.double()
    assert (output - right).abs().max() < LIMITS[precision]
    if right.numel() > 64:  # of a few numbers, the largest error is all that can be said
        assert torch.cosine_similarity(output.flatten(), right.flatten(), dim=0) > COSINES[precision]


def skip_without(name: str) -> None:
    """Skips where the engine is not installed. Imports it not: the adapter does, with what has to be done before."""
    if name in PACKAGES and importlib.util.find_spec(PACKAGES[name]) is None:
        pytest.skip(f"needs {PACKAGES[name]}")


def prepared(name: str, asked: Setting) -> Callable[[dict], Tensor]:
    """The peer made ready; skips, with the reason, where its engine is not there or this processor is not for it."""
    skip_without(name)
    try:
        return PEERS[name].prepare(asked)
    except Unavailable as error:
        pytest.skip(str(error))


@pytest.mark.parametrize(("name", "precision", "head"), ON_CPU)
def test_a_peer_computes_what_stock_does_whatever_the_batch(models, name, precision, head):
    if head and name in ("nested", "ctranslate2"):
        with pytest.raises(Unavailable, match=f"encoder only, not a {head} head"):
            PEERS[name].prepare(setting(models[head], head, precision))
        return
    batch = make_batch(23, 7, 1, 40, 12, 3)
    before = state(models[head])
    run = prepared(name, setting(models[head], head, precision, batch))
    gold = copy.deepcopy(models[head]).double()
    for some in (batch, part(batch, slice(1, 3), 7), part(batch, slice(2, 3), 1), part(batch, slice(3, 4), 40), batch):
        check_agrees(run(some), gold, head, some, precision)
    check_unchanged(models[head], before)


def test_peers_prepared_together_do_not_disturb_each_other(models):
    batch = make_batch(9, 4)
    runs = [
        PEERS[name].prepare(setting(models[""], batch=batch)) for name in ("hf-eager", "bertfast", "hf-sdpa", "nested")
    ]
    alone = [run(batch) for run in runs]
    for run, output in zip(reversed(runs), reversed(alone), strict=True):
        assert torch.equal(run(batch), output)


class Compilations:
    """What torch.compile was asked, and with every graph whether weights were to be constants. Inductor takes a minute:
    here the traced graphs run as they stand."""

    def __init__(self, compile_: Callable) -> None:
        self.compile, self.asked, self.frozen = compile_, [], []

    def __call__(self, model, **asked):
        def backend(graph, inputs):
            self.frozen.append(torch._inductor.config.freezing)
            return graph.forward

        self.asked.append(asked)
        return self.compile(model, backend=backend, **{k: v for k, v in asked.items() if k != "options"})


@pytest.fixture
def compilations(monkeypatch) -> Compilations:
    recorder = Compilations(torch.compile)
    monkeypatch.setattr(torch, "compile", recorder)
    return recorder


@pytest.mark.parametrize("name", COMPILED)
def test_a_compiled_model_computes_what_stock_does_and_is_compiled_as_its_name_says(models, compilations, name):
    batch, before = make_batch(9, 4, 16), state(models[""])
    run = prepared(name, setting(models[""], batch=batch))
    assert len(compilations.frozen) == 1
    gold = copy.deepcopy(models[""]).double()
    for some in (batch, part(batch, slice(0, 2), 9)):
        check_agrees(run(some), gold, "", some, "float32")
    check_unchanged(models[""], before)
    (asked,), dynamic = compilations.asked, name.endswith("dynamic")
    assert bool(asked["options"].get("max_autotune")) == ("max-autotune" in name)
    # The second shape is another compilation where the first was taken as it came, whatever others have met before.
    assert compilations.frozen == ["max-autotune" in name] * (1 if dynamic else 2)


def test_a_model_compiled_too_often_fails_and_counts_for_no_other(models, compilations):
    with torch._dynamo.config.patch(recompile_limit=1):
        for lengths in ((5, 2), (6, 4, 4), (7, 3, 3, 1)):
            run = prepared("compile", setting(models[""], batch=make_batch(*lengths)))
        with pytest.raises(Exception, match="fullgraph=True"):
            run(make_batch(9, 8))


@pytest.mark.parametrize("name", COMPILED)
def test_compiling_needs_a_compiler(models, name):
    import torch._inductor.config as config

    with config.patch({"cpp.cxx": ("no-such-compiler",)}), pytest.raises(Unavailable, match=r"C\+\+ compiler"):
        PEERS[name].prepare(setting(models[""]))


@pytest.mark.parametrize("name", [name for name, peer in PEERS.items() if peer.training])
def test_a_trainable_model_is_a_fresh_one_that_trains(models, compilations, name):
    stock, batch = models["token"], make_batch(6, 3)
    before = state(stock)
    model = PEERS[name].trainable(setting(stock, "token", "bfloat16"))
    assert model.training and all(p.dtype == torch.float32 for p in model.parameters())
    assert not {p.data_ptr() for p in model.parameters()} & {p.data_ptr() for p in stock.parameters()}
    assert model.config._attn_implementation == ("eager" if name == "hf-eager" else "sdpa")
    labels = torch.where(batch["attention_mask"].bool(), 1, -100)
    loss = model(**batch, labels=labels).loss
    loss.backward()
    with torch.no_grad():
        assert torch.allclose(loss, stock(**batch, labels=labels).loss, rtol=1e-4)
    assert all(p.grad is not None for p in model.parameters())
    assert len(compilations.frozen) == name.startswith("compile") and not any(compilations.frozen)
    assert all(not asked["options"].get("triton.cudagraphs") for asked in compilations.asked)
    check_unchanged(stock, before)


def test_bertfast_runs_fused_without_padding_and_with_the_weights_that_its_name_says(models, monkeypatch):
    patched = []
    patch = bertfast.patch
    monkeypatch.setattr(bertfast, "patch", lambda *a, **k: patched.append(patch(*a, **k)) or patched[-1])
    for name in ("bertfast", "bertfast-unpacked-weights"):
        PEERS[name].prepare(setting(models[""]))
    ours, unpacked = (bertfast.explain(model).backbones[0] for model in patched)
    for report in (ours, unpacked):
        assert report.calls == {"packed": 1, "rectangle": 0, "stock": 0}, str(report)
    assert ours.options["pack_weights"] and not unpacked.options["pack_weights"] and not unpacked.packed_bytes


@pytest.mark.parametrize(("precision", "operand"), [("float32", "float32"), ("bfloat16", "bfloat16"), ("int8", "int8")])
def test_bertfast_computes_in_the_precision_on_float32_weights(models, monkeypatch, precision, operand):
    patched = []
    patch = bertfast.patch
    monkeypatch.setattr(bertfast, "patch", lambda *a, **k: patched.append(patch(*a, **k)) or patched[-1])
    output = prepared("bertfast", setting(models[""], precision=precision))(make_batch(5, 2))
    assert output.dtype == torch.float32 and {p.dtype for p in patched[0].parameters()} == {torch.float32}
    encoder = bertfast.explain(patched[0]).backbones[0].encoder
    assert operand in encoder, encoder


def test_bertfast_says_why_it_does_not_quantise(models, monkeypatch):
    monkeypatch.setitem(accuracy.LIMITS, "int8", accuracy.Limit(float("inf"), 1.0))
    with pytest.raises(Unavailable, match="in int8 the model's answers differ by more than the limits"):
        PEERS["bertfast"].prepare(setting(models[""], precision="int8"))
    with pytest.raises(Unavailable, match="int8 is for CPUs"):
        PEERS["bertfast"].prepare(setting(models[""], precision="int8")._replace(device="cuda"))


def test_bertfast_without_instructions_for_bfloat16_does_not_pass_off_float32_as_it(models, monkeypatch):
    monkeypatch.setattr(bertfast.machine, "has_bfloat16", lambda: False)
    with pytest.raises(Unavailable, match="no instructions for bfloat16"):
        PEERS["bertfast"].prepare(setting(models[""], precision="bfloat16"))


def test_hugging_face_runs_the_attention_that_the_name_says(models, monkeypatch):
    calls = []
    original = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        torch.nn.functional, "scaled_dot_product_attention", lambda *a, **k: calls.append(1) or original(*a, **k)
    )
    for name, expected in (("hf-eager", 0), ("hf-sdpa", SETTINGS["num_hidden_layers"])):
        calls.clear()
        PEERS[name].prepare(setting(models[""]))(make_batch(5, 2))
        assert len(calls) == expected


def test_what_engines_say_while_they_convert_is_not_passed_on(models, capfd, caplog):
    for name, precision in (("nested", "float32"), ("onnxruntime-int8", "int8"), ("openvino", "int8")):
        if importlib.util.find_spec(PACKAGES.get(name, "torch")):
            PEERS[name].prepare(setting(make_model(), precision=precision))
    assert capfd.readouterr() == ("", "") and not caplog.records


def test_nested_takes_the_fast_path(models, monkeypatch):
    made = []
    original = torch._nested_tensor_from_mask
    monkeypatch.setattr(torch, "_nested_tensor_from_mask", lambda *a, **k: made.append(1) or original(*a, **k))
    run = PEERS["nested"].prepare(setting(models[""]))
    made.clear()
    run(make_batch(5, 2))
    assert made


def test_copies_share_the_memory_of_parameters_also_of_converted_ones(models):
    stock = models[""]
    for precision, shared_with_stock in (("float32", True), ("bfloat16", False)):
        a, b = (derived.transformers_copy(setting(stock, precision=precision)) for _ in range(2))
        for own, first, second in zip(stock.parameters(), a.parameters(), b.parameters(), strict=True):
            assert first is not second and first is not own and first.data_ptr() == second.data_ptr()
            assert (first.data_ptr() == own.data_ptr()) == shared_with_stock
            assert first.dtype == derived.DTYPES[precision]


def test_a_model_is_exported_once_for_all_and_its_files_go_with_it(monkeypatch):
    pytest.importorskip("onnx")
    exports = []
    export = torch.onnx.export
    monkeypatch.setattr(torch.onnx, "export", lambda *a, **k: exports.append(1) or export(*a, **k))
    model, other = make_model(), make_model()
    path = derived.onnx_file(model, "")
    assert path.is_file() and derived.onnx_file(model, "") == path and len(exports) == 1
    assert derived.onnx_file(other, "") != path and len(exports) == 2
    folder = derived.folder(model)
    del model
    gc.collect()
    assert not folder.exists() and derived.folder(other).exists()


def test_onnx_runtime_fuses_bert_and_quantises_it(models):
    onnx = pytest.importorskip("onnx")
    prepared("onnxruntime-int8", setting(models[""]))
    folder = derived.folder(models[""])
    operators = {
        name: [node.op_type for node in onnx.load(folder / f"{name}.onnx").graph.node] for name in ("optimised", "int8")
    }
    layers = SETTINGS["num_hidden_layers"]
    assert operators["optimised"].count("Attention") == layers
    assert operators["optimised"].count("EmbedLayerNormalization") == 1
    assert operators["int8"].count("QAttention") == layers


@pytest.mark.parametrize("name", ["onnxruntime", "onnxruntime-optimised"])
def test_onnx_runtime_has_its_threads_and_stops_them(models, monkeypatch, name):
    onnxruntime = pytest.importorskip("onnxruntime")
    made = []
    session = onnxruntime.InferenceSession
    monkeypatch.setattr(
        onnxruntime, "InferenceSession", lambda path, options, **k: made.append(options) or session(path, options, **k)
    )
    prepared(name, setting(models[""])._replace(threads=2))
    assert made[0].intra_op_num_threads == 2
    assert made[0].get_session_config_entry("session.force_spinning_stop") == "1"


def test_openvino_reports_to_nobody(models):
    prepared("openvino", setting(models[""]))
    assert sys.modules["openvino_telemetry"] is None


@pytest.mark.parametrize("name", PACKAGES)
def test_a_peer_whose_package_is_absent_says_so(monkeypatch, name):
    monkeypatch.setitem(sys.modules, PACKAGES[name], None)
    model = make_model()
    if name == "packed-encoders":
        model.config = SimpleNamespace(model_type="modernbert")
    with pytest.raises(Unavailable, match=f"{PACKAGES[name].replace('_', '-')} is not installed"):
        PEERS[name].prepare(setting(model, precision=PEERS[name].precisions[-1]))


@pytest.mark.parametrize(
    ("name", "precision", "package"), [("onnxruntime", "float32", "onnx"), ("openvino", "int8", "nncf")]
)
def test_a_peer_whose_second_package_is_absent_says_so(monkeypatch, name, precision, package):
    skip_without(name)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(Unavailable, match=f"{package} is not installed"):
        PEERS[name].prepare(setting(make_model(), precision=precision))


def test_a_package_that_is_broken_is_not_called_absent(monkeypatch, tmp_path):
    (tmp_path / "broken_engine.py").write_text("import a_library_that_it_needs")
    (tmp_path / "linked_engine.py").write_text("raise OSError('libengine.so: cannot open shared object file')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(Unavailable, match=r"^broken_engine cannot be loaded: No module named 'a_library"):
        imported("broken_engine")
    with pytest.raises(Unavailable, match=r"^linked-engine cannot be loaded: libengine.so: cannot open"):
        imported("linked_engine", "linked-engine")


@pytest.mark.parametrize("name", ["nested", "onnxruntime-optimised", "onnxruntime-int8", "ctranslate2"])
def test_what_is_made_for_bert_takes_no_other_model(name):
    model = transformers.RobertaModel(transformers.RobertaConfig(**SETTINGS)).eval()
    with pytest.raises(Unavailable, match="takes models of type 'bert' here, not 'roberta'"):
        PEERS[name].prepare(setting(model, precision=PEERS[name].precisions[0]))


@pytest.mark.parametrize("name", [name for name in PEERS if name not in PACKAGES and name != "nested"])
def test_a_model_of_another_library_is_refused(name):
    asked = setting(nn.Linear(3, 3))
    with pytest.raises(Unavailable, match="takes models of transformers, not Linear"):
        PEERS[name].prepare(asked)
    with pytest.raises(Unavailable, match="takes models of transformers, not Linear"):
        PEERS[name].trainable(asked)


def test_models_that_single_engines_do_not_know_are_refused(models):
    config = transformers.AlbertConfig(hidden_size=16, intermediate_size=32, num_attention_heads=2)
    other = transformers.AlbertModel(config)
    with pytest.raises(Unavailable, match="no supported model in this"):
        PEERS["bertfast"].prepare(setting(other))
    with pytest.raises(Unavailable, match="packed-encoders takes models of type 'modernbert' here, not 'bert'"):
        PEERS["packed-encoders"].prepare(setting(models[""], precision="bfloat16"))
    tanh = make_model()
    tanh.config.hidden_act = "gelu_new"
    with pytest.raises(Unavailable, match="gelu and relu, not gelu_new"):
        PEERS["nested"].prepare(setting(tanh))
    with pytest.raises(Unavailable, match="encoder only, not a sequence head"):
        PEERS["sentence-transformers"].prepare(setting(models["sequence"], "sequence", "bfloat16"))


@pytest.mark.parametrize(
    "name", [name for name, peer in PEERS.items() if "float16" in peer.precisions and peer.training]
)
def test_float16_is_refused_on_the_cpu(models, name):
    with pytest.raises(Unavailable, match="float16 is for GPUs"):
        PEERS[name].prepare(setting(models[""], precision="float16"))


def test_peers_are_chosen_by_name():
    assert [peer.name for peer in chosen(None)] == list(PEERS) and all(
        name == peer.name for name, peer in PEERS.items()
    )
    assert [peer.name for peer in chosen(["nested", "hf-sdpa", "nested"])] == ["nested", "hf-sdpa"]
    with pytest.raises(
        ValueError, match=r"unknown peer 'onnx-runtime' \(did you mean 'onnxruntime'\?\): choose from hf-"
    ):
        chosen(["hf-sdpa", "onnx-runtime"])
    with pytest.raises(ValueError, match="unknown peer 'zzz': choose from"):
        chosen(["zzz"])


def test_engines_are_imported_when_they_are_needed_and_not_before():
    heavy = {*PACKAGES.values(), "nncf", "onnx", "sentence_transformers", "transformers", "torch._inductor.compile_fx"}
    code = f"import sys, benchmarks.peers; print(sorted({heavy!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.strip() == "[]"

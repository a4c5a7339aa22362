"""bertfast.quantize: int8 on every kind of model, the gate before it, and the way back."""

import copy
import json
import pickle
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from small_models import SETTINGS, make_mask
from torch import Tensor, nn

import bertfast
from bertfast import native, reference
from bertfast.calls import STATE
from bertfast.runtime import quantization
from bertfast.runtime.answers import Agreement, Answer
from bertfast.runtime.questions import Questions

transformers = pytest.importorskip("transformers")
import stock_models  # noqa: E402
import task_checkpoints  # noqa: E402

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(native.cpu is None, reason="int8 takes the CPU kernels"),
]
# Small models of large random weights multiply what rounding does to them; what is tested is not how good int8 is.
LENIENT = {"min_cosine": 0.9, "min_worst_cosine": 0.5, "min_agreement": 0.5}
TEXTS = [row["text"] for row in task_checkpoints.texts(24)]
PAIRS = [(row["sentence1"], row["sentence2"]) for row in task_checkpoints.pairs(24)]
GEMMS = 4 * SETTINGS["num_hidden_layers"]


def stock(name: str = "BertModel", **settings: Any) -> Any:
    """A model of transformers as it is drawn by its constructor, in eval mode."""
    torch.manual_seed(0)
    return getattr(transformers, name)(stock_models.config_of(name, **settings)).eval()


def batch(name: str = "BertModel", **changes: Tensor) -> dict[str, Tensor]:
    """Three padded texts, with labels where the head takes some."""
    return stock_models.call_of(name, make_mask("right")) | changes


def operands(model: Any) -> list[str | None]:
    """What every GEMM of a patched or native model multiplies."""
    packs = [m.__dict__[STATE].packs for m in model.modules() if hasattr(m.__dict__.get(STATE), "packs")]
    packs += [m.packs for m in model.modules() if isinstance(m, bertfast.model.BertLayer)]
    return [place.operand for p in packs for place in p if place is not None]


def hidden(model: Any, **call: Tensor) -> Tensor:
    call = call or {k: v for k, v in batch().items() if k != "labels"}
    with torch.no_grad():
        return model(**call).last_hidden_state


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("tokenizer")
    task_checkpoints.save_tokenizer(folder)
    return transformers.AutoTokenizer.from_pretrained(folder)


@pytest.fixture
def text_model(tokenizer: Any) -> Any:
    return stock(vocab_size=len(tokenizer))


def spoil(*, weights: Tensor, inputs: Tensor) -> None:
    """Large weights for an input that hardly ever differs from 0: they leave no int8 steps for all others."""
    with torch.no_grad():
        weights[:, 0] = 40 * torch.randn(len(weights)).sign()
        inputs[0] *= 0.01


@pytest.fixture
def wild() -> Any:
    """A model that int8 ruins in every GEMM."""
    model = stock()
    norm = model.embeddings.LayerNorm
    for layer in model.encoder.layer:
        attention = layer.attention
        for linear in (attention.self.query, attention.self.key, attention.self.value):
            spoil(weights=linear.weight, inputs=norm.weight)
        spoil(weights=attention.output.dense.weight, inputs=attention.self.value.weight)
        spoil(weights=layer.intermediate.dense.weight, inputs=attention.output.LayerNorm.weight)
        spoil(weights=layer.output.dense.weight, inputs=layer.intermediate.dense.weight)
        norm = layer.output.LayerNorm
    return model


@pytest.mark.parametrize("name", stock_models.CLASSES)
def test_every_model_of_transformers(name: str) -> None:
    model = stock(name)
    call = batch(name)
    with torch.no_grad():
        before = model(**call)
    report = bertfast.quantize(model, [call, call], **LENIENT)
    assert report.passed and report.kept == () and report.places == GEMMS
    assert report.bytes_after < 0.45 * report.bytes_before
    assert set(operands(model)) == {"int8"}
    with torch.no_grad():
        after = model(**call)
    changed = [not torch.equal(before[k], after[k]) for k, v in before.items() if isinstance(v, Tensor) and v.dim()]
    assert any(changed)
    bertfast.unpatch(model)
    with torch.no_grad():
        again = model(**call)
    for key, value in before.items():
        if isinstance(value, Tensor):
            assert torch.equal(again[key], value), key


KINDS = {
    "BertModel": {"mean of tokens": "embedding", "pooler": "embedding"},
    "BertForMaskedLM": {"logits": "choice"},
    "BertForSequenceClassification": {"logits": "choice"},
    "BertForQuestionAnswering": {"start_logits": "choice", "end_logits": "choice"},
    "BertForPreTraining": {"prediction_logits": "choice", "seq_relationship_logits": "choice"},
    "ElectraForPreTraining": {"logits": "choice"},
}


@pytest.mark.parametrize("name", KINDS)
def test_what_is_compared(name: str) -> None:
    report = bertfast.quantize(stock(name), [batch(name)], **LENIENT)
    assert {output.output: output.kind for output in report.outputs} == KINDS[name]
    assert report.texts == 3


@pytest.mark.parametrize(
    "name",
    ["BertModel", "BertForMaskedLM", "BertForSequenceClassification", "BertForTokenClassification",
     "BertForQuestionAnswering"],
)  # fmt: skip
def test_native_models(name: str, build: Any) -> None:
    torch.manual_seed(0)
    model = getattr(bertfast, name)(bertfast.BertConfig(**SETTINGS)).eval()
    call = batch(name)
    call.pop("labels", None)
    with torch.no_grad():
        before = model(**call).to_tuple()
    report = bertfast.quantize(model, [batch(name)], **LENIENT)
    assert set(operands(model)) == {"int8"} and report.bytes_after < 0.45 * report.bytes_before
    with torch.no_grad():
        after = model(**call).to_tuple()
        assert not torch.equal(after[0], before[0])
        copied, loaded = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
        for other in (copied, loaded):
            assert torch.equal(other(**call).to_tuple()[0], after[0])
        assert bertfast.unquantize(model) is model
        assert all(torch.equal(a, b) for a, b in zip(model(**call).to_tuple(), before, strict=True))
    assert set(operands(model)) == {None}


def test_a_native_model_computes_what_the_reference_does() -> None:
    torch.manual_seed(0)
    model = bertfast.BertModel(bertfast.BertConfig(**SETTINGS | {"num_hidden_layers": 1})).eval()
    call = batch()
    bertfast.quantize(model, [call], **LENIENT)
    with torch.no_grad():
        out = model(**call, pad_output=False, output_hidden_states=True)
        x, packing, layer = out.hidden_states[0].double(), out.packing, copy.deepcopy(model).double().encoder.layer[0]
        p, linear = layer._parameters_in_order(), reference.quantised_linear
        qkv = linear(x, torch.cat(p.qkv_weights), torch.cat(p.qkv_biases)).view(-1, 3, layer.heads, 16)
        context = reference.varlen_attention(qkv, packing.cu_seqlens).flatten(1)
        norm = torch.nn.functional.layer_norm
        y = x + linear(context, p.attention_weight, p.attention_bias)
        y = norm(y, y.shape[1:], p.attention_norm_weight, p.attention_norm_bias, layer.eps)
        up = torch.nn.functional.gelu(linear(y, p.up_weight, p.up_bias))
        z = y + linear(up, p.down_weight, p.down_bias)
        z = norm(z, z.shape[1:], p.output_norm_weight, p.output_norm_bias, layer.eps)
        exact = bertfast.unquantize(model)(**call, pad_output=False).last_hidden_state
    ours, int8 = (out.last_hidden_state - z).abs().mean(), (exact - z).abs().mean()
    assert ours < 0.05 * int8  # a number in the middle may be rounded to either of two steps


def test_sensitive_places_are_kept_higher(monkeypatch: pytest.MonkeyPatch) -> None:
    model = stock()
    layer = model.encoder.layer[1]
    spoil(weights=layer.output.dense.weight, inputs=layer.intermediate.dense.weight)
    report = bertfast.quantize(model, [batch()], min_cosine=0.9999, min_worst_cosine=0.999)
    assert "encoder.layer.1 down" in report.kept and 1 <= len(report.kept) <= GEMMS // 2
    assert f"in {report.kept_in}: " in str(report) and "encoder.layer.1 down" in str(report)
    assert operands(model).count(report.kept_in) == len(report.kept)
    told = bertfast.explain(model).backbones[0].encoder
    assert "multiplying int8" in told and f"{report.kept_in} in layer 1 down" in told
    assert report.damage["encoder.layer.1"] > report.damage["encoder.layer.0"]
    monkeypatch.setattr(quantization.machine, "has_bfloat16", lambda: False)
    again = bertfast.quantize(model, [batch()], min_cosine=0.9999, min_worst_cosine=0.999)
    assert again.kept_in == "float32" and "float32" in operands(model)


@pytest.mark.parametrize("patched", [False, True])
def test_a_model_that_fails_is_left_as_it_was(wild: Any, patched: bool) -> None:
    if patched:
        bertfast.patch(wild)
    before, kinds = hidden(wild), [type(m) for m in wild.modules()]
    with pytest.raises(bertfast.QuantizationError, match="left as it was") as raised:
        bertfast.quantize(wild, [batch()], min_cosine=0.9999)
    report = raised.value.report
    assert not report.passed and len(report.kept) == GEMMS // 2 and "FAILS" in str(raised.value)
    assert torch.equal(hidden(wild), before) and [type(m) for m in wild.modules()] == kinds
    assert bertfast.explain(wild).backbones[0].patched is patched
    assert str(pickle.loads(pickle.dumps(raised.value))) == str(raised.value)
    assert patched is bool(operands(wild)) and "int8" not in operands(wild)


def test_an_error_on_the_way_leaves_it_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model = bertfast.patch(stock()).train()
    asked: Iterator[int] = iter(range(9))

    def fail(self: Questions) -> None:
        if next(asked) == 3:
            raise MemoryError
        return ask(self)

    ask = Questions.ask
    monkeypatch.setattr(Questions, "ask", fail)
    with pytest.raises(MemoryError):
        bertfast.quantize(model, [batch()])
    assert set(operands(model)) == {None} and all(m.training for m in model.modules())


def test_texts_and_pairs(text_model: Any, tokenizer: Any) -> None:
    report = bertfast.quantize(text_model, TEXTS, tokenizer=tokenizer, batch_size=5, max_length=6, **LENIENT)
    lengths = [len(ids) for ids in tokenizer(TEXTS)["input_ids"]]
    assert report.texts == 24 and report.truncated == sum(n > 6 for n in lengths) > 0
    with torch.no_grad():
        cut, short = (
            Questions(text_model, t, tokenizer, n, 5).ask() for t, n in ((["a b c d e f"], 6), (["a b c d"], 6))
        )
    torch.testing.assert_close(cut["pooler"].values[0], short["pooler"].values[0])
    assert f"24 texts, {report.truncated} of them cut" in str(report)
    assert json.loads(json.dumps(report.to_dict())) == report.to_dict()
    assert bertfast.quantize(text_model, PAIRS, tokenizer=tokenizer, **LENIENT).truncated == 0
    with pytest.raises(ValueError, match="between 1 and the 40 tokens"):
        bertfast.quantize(text_model, TEXTS, tokenizer=tokenizer, max_length=41)
    long = [" ".join(["good"] * 60)] * 2
    assert bertfast.quantize(text_model, long, tokenizer=tokenizer, **LENIENT).truncated == 2


def test_texts_in_order_of_length_are_answered_in_theirs(text_model: Any, tokenizer: Any) -> None:
    few, one = (Questions(text_model, TEXTS, tokenizer, None, size) for size in (5, 1))
    with torch.no_grad():
        answers = few.ask()
        alone = [text_model(**tokenizer(text, return_tensors="pt")) for text in TEXTS]
    for name, expected in (
        ("pooler", [out.pooler_output[0] for out in alone]),
        ("mean of tokens", [out.last_hidden_state[0].mean(0) for out in alone]),
    ):
        found = torch.stack(list(answers[name].values))
        torch.testing.assert_close(found, torch.stack(expected), atol=1e-5, rtol=1e-4)
    assert len(few.first(8).ask()["pooler"].values) < len(one) == 24


def test_one_number_ranks_pairs(tokenizer: Any) -> None:
    model = stock("BertForSequenceClassification", num_labels=1, vocab_size=len(tokenizer))
    report = bertfast.quantize(model, PAIRS, tokenizer=tokenizer, min_agreement=0.6)
    (output,) = report.outputs
    assert output.kind == "score" and 0.6 <= output.agreement <= 1 and "pairs in the same order" in str(report)


def test_sentence_transformers(tmp_path: Path) -> None:
    st = pytest.importorskip("sentence_transformers")
    folder = task_checkpoints.save_checkpoint(tmp_path / "base", "BertModel")
    modules = st.models if hasattr(st, "models") else st.sentence_transformer.modules
    model = st.SentenceTransformer(modules=[modules.Transformer(str(folder)), modules.Pooling(32)], device="cpu")
    before = model.encode(TEXTS)
    report = bertfast.quantize(model, TEXTS, **LENIENT)
    assert [o.output for o in report.outputs] == ["embedding"] and report.texts == 24
    assert 0 < abs(model.encode(TEXTS) - before).max() < 0.5
    assert report.outputs[0].largest_difference == pytest.approx(abs(model.encode(TEXTS) - before).max(), rel=0.2)
    with pytest.raises(ValueError, match="has a tokenizer"):
        bertfast.quantize(model, TEXTS, tokenizer=model.tokenizer)
    with pytest.raises(ValueError, match="max_seq_length"):
        bertfast.quantize(model, TEXTS, max_length=4)
    with pytest.raises(ValueError, match="single texts"):
        bertfast.quantize(model, PAIRS)
    ready = model.tokenizer(TEXTS, padding=True, return_tensors="pt")
    assert [o.output for o in bertfast.quantize(model, [ready], **LENIENT).outputs] == ["embedding"]
    bertfast.unpatch(model)
    assert (model.encode(TEXTS) == before).all()
    cross = task_checkpoints.save_checkpoint(tmp_path / "cross", "BertForSequenceClassification", num_labels=1)
    ranker = st.CrossEncoder(str(cross), device="cpu")
    scores = ranker.predict(PAIRS)
    assert bertfast.quantize(ranker, PAIRS, **LENIENT).outputs[0].kind == "score"
    assert (ranker.predict(PAIRS) != scores).any()


def test_the_way_back_and_patch_again() -> None:
    model = stock()
    before = hidden(model)
    bertfast.patch(model)
    patched = hidden(model)
    bertfast.quantize(model, [batch()], **LENIENT)
    int8 = hidden(model)
    assert not torch.equal(int8, patched)
    bertfast.unquantize(model)
    assert torch.equal(hidden(model), patched) and "int8" not in str(bertfast.explain(model))
    bertfast.quantize(model, [batch()], **LENIENT)
    assert torch.equal(hidden(model), int8)
    bertfast.patch(model)
    assert torch.equal(hidden(model), patched) and set(operands(model)) == {None}
    assert "multiplying float32" in bertfast.explain(model).backbones[0].encoder
    bertfast.quantize(bertfast.patch(bertfast.unpatch(model)), [batch()], **LENIENT)
    assert torch.equal(hidden(bertfast.unpatch(model)), before)
    assert bertfast.unquantize(model) is model


@pytest.mark.parametrize("kind", ["patched", "native"])
def test_the_way_back_to_bfloat16(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bertfast.machine.has_bfloat16", lambda: True)
    if kind == "patched":
        model = bertfast.patch(stock(), compute="bf16")
    else:
        model = bertfast.BertModel(bertfast.BertConfig(**SETTINGS), compute="bf16").eval()
    bertfast.quantize(model, [batch()], **LENIENT)
    assert set(operands(model)) == {"int8"}
    bertfast.unquantize(model)
    assert set(operands(model)) == {"bfloat16"}


def test_labels_are_not_looked_at() -> None:
    model = bertfast.patch(stock("BertForMaskedLM"), output_logits=False)
    call = batch("BertForMaskedLM")
    assert "labels" in call and bertfast.quantize(model, [call], **LENIENT).outputs[0].output == "logits"


def test_rows_without_tokens() -> None:
    mask = make_mask("empty row")
    model = stock("BertForTokenClassification")
    assert bertfast.quantize(model, [batch(attention_mask=mask)], **LENIENT).texts == 3


def test_quantising_twice_compares_with_the_weights() -> None:
    model = stock()
    first = bertfast.quantize(model, [batch()], **LENIENT)
    assert bertfast.quantize(model, [batch()], **LENIENT).outputs == first.outputs
    assert first.outputs[0].cosine < 1


def test_copies_stay_int8(tmp_path: Path) -> None:
    model = stock()
    state = copy.deepcopy(model.state_dict())
    bertfast.quantize(model, [batch()], **LENIENT)
    int8 = hidden(model)
    assert torch.equal(hidden(copy.deepcopy(model)), int8)
    assert torch.equal(hidden(pickle.loads(pickle.dumps(model))), int8)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    model.save_pretrained(tmp_path)
    loaded = transformers.BertModel.from_pretrained(tmp_path)
    assert all(torch.equal(value, state[name]) for name, value in loaded.state_dict().items())


def test_weights_that_change_are_packed_anew_and_training_goes_on() -> None:
    model = stock()
    bertfast.quantize(model, [batch()], **LENIENT)
    before = hidden(model)
    loss = model(**batch()).last_hidden_state.square().sum()
    loss.backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if n.startswith("encoder.layer"))
    with torch.no_grad():
        model.encoder.layer[0].output.dense.weight.mul_(1.5)
    after = hidden(model)
    assert not torch.equal(before, after) and set(operands(model)) == {"int8"}
    plain = bertfast.patch(copy.deepcopy(bertfast.unpatch(model)))
    assert 0 < (hidden(plain) - after).abs().max() < (before - after).abs().max()


def test_training_mode_is_restored() -> None:
    model = stock(hidden_dropout_prob=0.5).train()
    model.encoder.layer[0].eval()
    flags = [m.training for m in model.modules()]
    report = bertfast.quantize(model, [batch()], **LENIENT)
    assert [m.training for m in model.modules()] == flags
    assert report.outputs[0].cosine > 0.99  # with dropout it would not be


def test_threads_share_a_quantised_model() -> None:
    model = stock()
    bertfast.quantize(model, [batch()], **LENIENT)
    call = {"input_ids": batch()["input_ids"]}
    expected, wrong = hidden(model, **call), []

    def work() -> None:
        for _ in range(20):
            if not torch.equal(hidden(model, **call), expected):
                wrong.append(1)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_bfloat16_weights_and_autocast_around() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        report = bertfast.quantize(stock().bfloat16(), [batch()], **LENIENT)
    assert report.bytes_after < 0.9 * report.bytes_before


def _with(model: Any, change: Any) -> Any:
    change(model)
    return model


def _poke(value: float) -> Any:
    def change(model: Any) -> None:
        with torch.no_grad():
            model.encoder.layer[1].output.dense.weight[3, 4] = value

    return change


class _Blind(nn.Module):
    pass


BAD = {
    "no texts": (lambda m: (m, []), ValueError, "texts is empty"),
    "a string": (lambda m: (m, "a text"), TypeError, "not a str"),
    "a number": (lambda m: (m, 3), TypeError, "not a int"),
    "numbers": (lambda m: (m, [1, 2]), TypeError, "number 0 is 1"),
    "mixed": (lambda m: (m, ["a", ("a", "b")]), TypeError, "number 1 is"),
    "triples": (lambda m: (m, [("a", "b", "c")]), TypeError, "number 0 is"),
    "no tokenizer": (lambda m: (m, ["a"]), ValueError, "need a tokenizer"),
    "mixed batches": (lambda m: (m, [batch(), "a"]), TypeError, "batch 1 is a str"),
    "no ids": (lambda m: (m, [{"attention_mask": torch.ones(1, 2)}]), ValueError, "no input_ids"),
    "flattened": (lambda m: (m, [batch() | {"cu_seq_lens_q": torch.tensor([0, 3])}]), ValueError, "flattened"),
    "no model": (lambda m: (_Blind(), [batch()]), bertfast.UnsupportedModelError, "no supported model|no layers"),
    "half": (lambda m: (m.half(), [batch()]), TypeError, "float16"),
    "double": (lambda m: (m.double(), [batch()]), TypeError, "float64"),
    "elsewhere": (lambda m: (m.to("meta"), [batch()]), ValueError, "is on meta"),
    "nan": (lambda m: (_with(m, _poke(float("nan"))), [batch()]), ValueError, r"layer\.1\.output\.dense\.weight"),
    "infinite": (lambda m: (_with(m, _poke(float("inf"))), [batch()]), ValueError, r"layer\.1\.output\.dense"),
    "nothing valid": (
        lambda m: (m, [batch(), batch() | {"attention_mask": torch.zeros(3, 11, dtype=torch.int64)}]),
        ValueError,
        "batch 1 has no token",
    ),
    "choices": (lambda m: (stock("BertForMultipleChoice"), ["a"]), ValueError, "multiple choice"),
    "not packed": (lambda m: (bertfast.patch(m, pack_weights=False), [batch()]), ValueError, "pack_weights"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case: str) -> None:
    arguments, kind, words = BAD[case]
    model, texts = arguments(stock())
    with pytest.raises(kind, match=words):
        bertfast.quantize(model, texts, tokenizer=(lambda *texts: {}) if case == "choices" else None)
    assert "int8" not in operands(model)


def test_bad_options(monkeypatch: pytest.MonkeyPatch) -> None:
    model = stock()
    with pytest.raises(ValueError, match="min_cosine must be between"):
        bertfast.quantize(model, [batch()], min_cosine=99)
    with pytest.raises(ValueError, match="batch_size"):
        bertfast.quantize(model, [batch()], batch_size=0)
    with pytest.raises(TypeError, match="tokenizer must be"):
        bertfast.quantize(model, ["a"], tokenizer="a name")
    with pytest.raises(ValueError, match="leave them out"):
        bertfast.quantize(model, [batch()], max_length=3)
    with bertfast.backend.use("reference"), pytest.raises(bertfast.BackendError, match="reference"):
        bertfast.quantize(model, [batch()])
    monkeypatch.setattr(quantization.native, "cpu", None)
    with pytest.raises(bertfast.BackendError, match="CPU kernels"):
        bertfast.quantize(model, [batch()])


def test_a_layer_that_runs_stock_code_is_refused() -> None:
    model = stock()
    model.encoder.layer[1].output.dense.register_forward_hook(lambda module, args, output: output + 0)
    with pytest.raises(bertfast.UnsupportedModelError, match=r"encoder\.layer\.1 did not run"):
        bertfast.quantize(model, [batch()])
    assert not bertfast.explain(model).backbones[0].patched


def test_a_note_where_int8_saves_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    assert quantization._notes() == () or "no instructions" in quantization._notes()[0]
    monkeypatch.setattr(quantization.native, "cpu", SimpleNamespace(isa=lambda: "avx2"))
    assert "avx2 has no instructions for int8" in quantization._notes()[0]


def test_figures() -> None:
    a, b = torch.tensor([3.0, 4.0]), torch.tensor([4.0, 3.0])
    same, other = Answer("embedding", [a, a]), Answer("embedding", [a, b])
    told = Agreement.of("x", same, other)
    assert (told.cosine, told.worst_cosine, told.worst_text) == (pytest.approx(0.98), pytest.approx(0.96), 1)
    assert told.largest_difference == 1 and same.errors(other).tolist() == [0, pytest.approx(2**0.5 / 5)]
    assert told.passes(0.97, 0.95, 1) and not told.passes(0.99, 0.95, 0) and not told.passes(0.97, 0.97, 0)
    choices = [torch.tensor([0, 1]), torch.tensor([1])], [torch.tensor([0, 2]), torch.tensor([1])]
    told = Agreement.of("x", *(Answer("choice", [a, a], c) for c in choices))
    assert told.agreement == pytest.approx(2 / 3) and told.changed_texts == (0,)
    assert told.passes(1, 1, 0.6) and not told.passes(0, 0, 0.7)
    scores = [[1.0, 2.0, 2.0, 5.0], [1.0, 3.0, 2.0, 2.5]]
    told = Agreement.of("x", *(Answer("score", [torch.tensor([v]) for v in s]) for s in scores))
    assert told.agreement == pytest.approx(4 / 5)  # the two that were equal have no order
    lost = Agreement.of("x", same, Answer("embedding", [a, a * float("nan")]))
    assert not lost.passes(0, 0, 0)
    assert Agreement.of("x", Answer("score", [a[:1]]), Answer("score", [b[:1]])).agreement == 1

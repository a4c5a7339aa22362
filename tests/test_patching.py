"""patch, unpatch and explain: what they leave in a model, its copies and its files, and what they refuse."""

import copy
import io
import json
import pickle
import threading
from typing import Any

import pytest
import torch
from small_models import SETTINGS
from torch import nn

import bertfast
from bertfast import backend, seams
from bertfast.patching import explain, patch, unpatch

transformers = pytest.importorskip("transformers")

from agreement import assert_agree, assert_same, pair, ran, visible  # noqa: E402
from stock_models import build, call_of, mask_of  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")


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

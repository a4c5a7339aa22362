"""Loading and saving, both ways with transformers, and every checkpoint that has to be refused."""

import json
import logging
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_models import CLASSES, SETTINGS
from torch import Tensor

import bertfast
from bertfast import BertForMaskedLM, BertForPreTraining, BertForSequenceClassification, BertModel, CheckpointError


def save(directory: Path, weights: dict[str, Tensor], form: str = "safetensors", **settings: Any) -> Path:
    """A checkpoint of these weights in one of the four forms that there are."""
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps({**SETTINGS, "model_type": "bert", **settings}))
    weights = {k: t.clone() for k, t in weights.items()}
    if form == "safetensors":
        save_file(weights, directory / "model.safetensors")
    elif form == "bin":
        torch.save(weights, directory / "pytorch_model.bin")
    else:
        stem, suffix, write = {
            "sharded safetensors": ("model", "safetensors", save_file),
            "sharded bin": ("pytorch_model", "bin", torch.save),
        }[form]
        places = {k: f"{stem}-0000{1 + i % 3}-of-00003.{suffix}" for i, k in enumerate(weights)}
        for file in set(places.values()):
            write({k: t for k, t in weights.items() if places[k] == file}, directory / file)
        (directory / f"{stem}.{suffix}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return directory


def assert_same_weights(a: torch.nn.Module, b: torch.nn.Module) -> None:
    left, right = a.state_dict(), b.state_dict()
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert tensor.dtype == right[name].dtype and torch.equal(tensor, right[name]), name


@pytest.fixture
def inputs() -> Callable[[str], Tensor]:
    """inputs(name): token ids in the shape that the class takes."""
    return lambda name: torch.randint(0, 53, (2, 3, 7) if name == "BertForMultipleChoice" else (2, 7))


@pytest.fixture
def strict_warnings():
    """Warnings are errors: a complete checkpoint gives none."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@pytest.mark.parametrize("name", CLASSES)
def test_transformers_loads_what_was_saved_bit_for_bit(build, tmp_path, inputs, name):
    transformers = pytest.importorskip("transformers")
    ours = build(name, dtype=torch.float32)
    ours.save_pretrained(tmp_path)
    stock, report = getattr(transformers, name).from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    assert_same_weights(stock, ours)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == [name]
    ids = inputs(name)
    with torch.no_grad():
        torch.testing.assert_close(ours(ids)[0], stock.eval()(ids)[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", CLASSES)
def test_what_transformers_saved_is_loaded_bit_for_bit(twins, tmp_path, inputs, name, strict_warnings):
    stock, _ = twins(name, dtype=torch.float32)
    stock.save_pretrained(tmp_path)
    ours = getattr(bertfast, name).from_pretrained(tmp_path)
    assert_same_weights(stock, ours)
    assert not ours.training and all(p.requires_grad for p in ours.parameters())
    ids = inputs(name)
    with torch.no_grad():
        torch.testing.assert_close(ours(ids)[0], stock(ids)[0], atol=1e-4, rtol=1e-4)


def test_shards_of_transformers_are_loaded(twins, tmp_path, strict_warnings):
    stock, _ = twins("BertForMaskedLM", dtype=torch.float32)
    stock.save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert_same_weights(stock, BertForMaskedLM.from_pretrained(tmp_path))


@pytest.mark.parametrize("form", ["safetensors", "bin", "sharded safetensors", "sharded bin"])
@pytest.mark.parametrize("name", ["BertModel", "BertForPreTraining"])
def test_every_form_of_checkpoint(build, tmp_path, form, name, strict_warnings):
    model = build(name, dtype=torch.float32)
    loaded = getattr(bertfast, name).from_pretrained(save(tmp_path, model.state_dict(), form))
    assert_same_weights(model, loaded)


@pytest.mark.parametrize("name", CLASSES)
def test_saved_and_loaded_again(build, tmp_path, name, strict_warnings):
    model = build(name, dtype=torch.bfloat16, id2label={0: "start", 1: "end"})
    model.save_pretrained(tmp_path / "new" / "directory")
    loaded = getattr(bertfast, name).from_pretrained(str(tmp_path / "new" / "directory"))
    assert_same_weights(model, loaded)
    assert loaded.config.id2label == {0: "start", 1: "end"} and loaded.config.extra["dtype"] == "bfloat16"


def test_a_real_checkpoint(minilm_path, tmp_path, strict_warnings):
    transformers = pytest.importorskip("transformers")
    ours, stock = BertModel.from_pretrained(minilm_path), transformers.BertModel.from_pretrained(minilm_path).eval()
    assert_same_weights(stock, ours)
    ids, mask = torch.randint(1000, 20000, (2, 20)), torch.ones(2, 20, dtype=torch.int64)
    mask[1, 12:] = 0
    with torch.no_grad():
        theirs, out = stock(ids, attention_mask=mask), ours(ids, mask)
    valid = mask.bool()
    torch.testing.assert_close(out[0][valid], theirs[0][valid], atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(out[1], theirs[1], atol=2e-5, rtol=1e-4)
    ours.save_pretrained(tmp_path)
    before, after = (json.loads((d / "config.json").read_text()) for d in (minilm_path, tmp_path))
    assert {k: after[k] for k in before} == before
    stored = load_file(minilm_path / "model.safetensors")
    stored.pop("embeddings.position_ids", None)
    written = load_file(tmp_path / "model.safetensors")
    assert stored.keys() == written.keys() and all(torch.equal(stored[k], written[k]) for k in stored)


def test_tied_weights_are_stored_once_and_come_back_tied(build, tmp_path):
    build("BertForMaskedLM", dtype=torch.float32).save_pretrained(tmp_path)
    assert not any("decoder" in k for k in load_file(tmp_path / "model.safetensors"))
    model = BertForMaskedLM.from_pretrained(tmp_path)
    assert model.cls.predictions.decoder.weight is model.bert.embeddings.word_embeddings.weight
    assert model.cls.predictions.decoder.bias is model.cls.predictions.bias


def test_untied_weights_are_kept_apart(build, tmp_path, strict_warnings):
    model = build("BertForMaskedLM", dtype=torch.float32, tie_word_embeddings=False)
    model.save_pretrained(tmp_path)
    assert_same_weights(model, BertForMaskedLM.from_pretrained(tmp_path))
    weights = model.state_dict()
    with pytest.raises(CheckpointError, match=r"decoder.* differ, but the config ties them.*tie_word_embeddings=False"):
        BertForMaskedLM.from_pretrained(save(tmp_path, weights))
    assert_same_weights(model, BertForMaskedLM.from_pretrained(tmp_path, tie_word_embeddings=False))
    # As transformers 4 stores an untied model: its decoder has the one bias whatever the config says.
    del weights["cls.predictions.decoder.bias"]
    loaded = BertForMaskedLM.from_pretrained(save(tmp_path, weights), tie_word_embeddings=False)
    assert torch.equal(loaded.cls.predictions.decoder.bias, weights["cls.predictions.bias"])


def test_a_tied_weight_may_be_stored_under_the_decoders_name_only(build, tmp_path):
    model = build("BertForMaskedLM", dtype=torch.float32)
    weights = model.state_dict()
    del weights["bert.embeddings.word_embeddings.weight"], weights["cls.predictions.bias"]
    assert_same_weights(model, BertForMaskedLM.from_pretrained(save(tmp_path, weights)))


def test_the_body_of_a_model_with_a_head(build, tmp_path, caplog, strict_warnings):
    whole = build("BertForPreTraining", dtype=torch.float32)
    with caplog.at_level(logging.WARNING, "bertfast"):
        body = BertModel.from_pretrained(save(tmp_path, whole.state_dict()))
    assert_same_weights(whole.bert, body)
    assert "no place for cls.predictions.bias" in caplog.text


def test_a_head_on_a_bare_body(build, tmp_path):
    body = build(dtype=torch.float32)
    save(tmp_path, body.state_dict(), initializer_range=0.5)
    with pytest.warns(UserWarning, match=r"classifier.bias, classifier.weight: BertForSequenceC.* train it") as caught:
        torch.manual_seed(5)
        model = BertForSequenceClassification.from_pretrained(tmp_path, num_labels=3)
    assert caught[0].filename == __file__
    assert_same_weights(body, model.bert)
    assert model.classifier.weight.shape == (3, 64) and (model.classifier.bias == 0).all()
    assert model.classifier.weight.std().item() == pytest.approx(0.5, rel=0.2)
    with pytest.warns(UserWarning):
        torch.manual_seed(5)
        again = BertForSequenceClassification.from_pretrained(tmp_path, num_labels=3)
    assert torch.equal(model.classifier.weight, again.classifier.weight)
    with pytest.warns(UserWarning, match="cls.predictions.transform.LayerNorm.weight"):
        words = BertForMaskedLM.from_pretrained(tmp_path)
    assert (words.cls.predictions.transform.LayerNorm.weight == 1).all()
    assert words.cls.predictions.decoder.weight is words.bert.embeddings.word_embeddings.weight


def test_a_pooler_is_optional_on_both_sides(build, tmp_path, caplog):
    words = build("BertForMaskedLM", dtype=torch.float32)  # has no pooler
    save(tmp_path, words.state_dict())
    with pytest.warns(UserWarning, match="pooler.dense.bias, pooler.dense.weight"):
        assert BertModel.from_pretrained(tmp_path).pooler is not None
    bare = BertModel.from_pretrained(tmp_path, add_pooling_layer=False, pack_weights=False)
    assert bare.pooler is None and bare.encoder.layer[0].packs.qkv is None
    both = build("BertForPreTraining", dtype=torch.float32)
    with caplog.at_level(logging.WARNING, "bertfast"):
        loaded = BertForMaskedLM.from_pretrained(save(tmp_path, both.state_dict()))
    assert_same_weights(both.cls.predictions, loaded.cls.predictions)
    assert "bert.pooler.dense.weight" in caplog.text


def test_old_names_and_stored_buffers(build, tmp_path, strict_warnings):
    model = build("BertForPreTraining", dtype=torch.float32)
    old = {
        k.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): t
        for k, t in model.state_dict().items()
    }
    old["bert.embeddings.position_ids"] = torch.arange(40)[None]
    assert_same_weights(model, BertForPreTraining.from_pretrained(save(tmp_path, old, "bin")))


def test_dtypes(build, tmp_path):
    model = build(dtype=torch.float16)
    save(tmp_path, model.state_dict(), torch_dtype="float16")
    assert next(BertModel.from_pretrained(tmp_path).parameters()).dtype == torch.float16
    wide = BertModel.from_pretrained(tmp_path, dtype=torch.float32)
    assert all(torch.equal(a, b.float()) for a, b in zip(wide.parameters(), model.parameters(), strict=True))
    wide.save_pretrained(tmp_path)  # transformers 5 would round to the stale dtype of the config
    assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == "float32"


def test_changes_of_the_config(build, tmp_path):
    save(tmp_path, build(dtype=torch.float32).state_dict(), mine=1)
    model = BertModel.from_pretrained(tmp_path, hidden_dropout_prob=0.3, layer_norm_eps=1e-6)
    assert model.config.hidden_dropout_prob == 0.3 and model.encoder.layer[0].eps == 1e-6
    assert model.config.extra["mine"] == 1
    with pytest.raises(TypeError, match="no field torch_dtype"):
        BertModel.from_pretrained(tmp_path, torch_dtype=torch.float16)


def test_loaded_weights_are_the_models_own(build, tmp_path):
    model = build(dtype=torch.float32)
    save(tmp_path, model.state_dict())
    loaded = BertModel.from_pretrained(tmp_path)
    shutil.rmtree(tmp_path)
    assert_same_weights(model, loaded)


def test_writing_is_all_or_nothing(build, tmp_path, monkeypatch):
    model = build(dtype=torch.float32)
    model.save_pretrained(tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    assert before.keys() == {"config.json", "model.safetensors"}

    def fail(weights, path, metadata):
        Path(path).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("bertfast.checkpoint.save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        model.save_pretrained(tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def _drop(key: str) -> Callable[[Path, dict], Any]:
    return lambda path, weights: save(path, {k: t for k, t in weights.items() if k != key})


def _with(key: str, tensor: Tensor) -> Callable[[Path, dict], Any]:
    return lambda path, weights: save(path, {**weights, key: tensor})


def _file(name: str, content: bytes, form: str = "safetensors") -> Callable[[Path, dict], Any]:
    def make(path: Path, weights: dict) -> None:
        save(path, weights, form)
        (path / name).write_bytes(content)

    return make


def _without(name: str, form: str = "safetensors") -> Callable[[Path, dict], Any]:
    return lambda path, weights: (save(path, weights, form) / name).unlink()


def _cut(name: str, form: str = "safetensors") -> Callable[[Path, dict], Any]:
    def make(path: Path, weights: dict) -> None:
        file = save(path, weights, form) / name
        file.write_bytes(file.read_bytes()[:-1000])

    return make


def _unsafe(path: Path, weights: dict) -> None:
    save(path, {}, "bin")
    torch.save({"weight": Path("anything that is not a tensor")}, path / "pytorch_model.bin")


def _lying_index(path: Path, weights: dict) -> None:
    index = save(path, weights, "sharded safetensors") / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["encoder.nowhere"] = next(iter(content["weight_map"].values()))
    index.write_text(json.dumps(content))


SHARD = "model-00002-of-00003.safetensors"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 90\n"
KEY = "encoder.layer.1.attention.self.query.weight"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (_without("config.json"), "has no config.json, which says what the model is"),
        (_file("config.json", b"{"), "config.json cannot be read as JSON"),
        (_file("config.json", b"[]"), "config.json holds a JSON list"),
        (_file("config.json", b'{"model_type": "gpt2"}'), "config.json: model_type is 'gpt2'"),
        (_file("config.json", b'{"hidden_size": 65}'), "config.json: hidden_size 65 must be a multiple"),
        (_without("model.safetensors"), r"no weights: expected model.safetensors or pytorch_model.bin"),
        (_file("model.safetensors", POINTER), "model.safetensors cannot be read.*Git LFS pointer"),
        (_file("model.safetensors", b""), "model.safetensors cannot be read"),
        (_cut("model.safetensors"), "model.safetensors cannot be read, it is corrupt, cut short"),
        (_cut("pytorch_model.bin", "bin"), "pytorch_model.bin cannot be read"),
        (_file("pytorch_model.bin", b"", "bin"), "pytorch_model.bin cannot be read"),
        (_file("pytorch_model.bin", POINTER, "bin"), "pytorch_model.bin cannot be read"),
        (_unsafe, "pytorch_model.bin cannot be read"),
        (_without(SHARD, "sharded safetensors"), f"has no {SHARD}, a shard that model.safetensors.index.json names"),
        (_cut(SHARD, "sharded safetensors"), f"{SHARD} cannot be read"),
        (_lying_index, "names weights that its shards do not hold: encoder.nowhere"),
        (_file("model.safetensors.index.json", b"{}", "sharded safetensors"), "has no weight_map"),
        (
            _file("model.safetensors.index.json", b'{"weight_map": {"a": "../b"}}', "sharded safetensors"),
            "has no weight_map from weights to the names of files beside it",
        ),
        (_drop(KEY), f"lacks 1 weights of the encoder: {KEY}"),
        (_drop("embeddings.LayerNorm.weight"), "lacks 1 weights of the encoder: embeddings.LayerNorm.weight"),
        (lambda path, weights: save(path, {"transformer.wte": torch.zeros(2)}), "holds transformer.wte; is it a BERT"),
        (lambda path, weights: save(path, weights, num_hidden_layers=3), "lacks 16 weights .* and 11 more; it holds"),
        (lambda path, weights: save(path, weights, num_hidden_layers=1), "holds 16 weights .* has no place for"),
        (_with("encoder.extra", torch.zeros(2)), "holds 1 weights .* encoder.extra"),
        (_with(KEY, torch.zeros(64, 60)), rf"{KEY} has shape \(64, 60\) where .* \(64, 64\)"),
        (lambda path, weights: save(path, weights, vocab_size=60), r"word_emb.* \(53, 64\) where .* \(60, 64\)"),
        (_with(KEY, torch.zeros(64, 64, dtype=torch.int8)), f"{KEY} is torch.int8"),
    ],
)
def test_checkpoints_that_are_refused(build, tmp_path, make, message):
    make(tmp_path, build(dtype=torch.float32).state_dict())
    with pytest.raises(CheckpointError, match=message):
        BertModel.from_pretrained(tmp_path)


def test_a_head_of_another_size_is_refused(build, tmp_path):
    build("BertForSequenceClassification", dtype=torch.float32).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"classifier.bias has shape \(2,\) where .* \(5,\)"):
        BertForSequenceClassification.from_pretrained(tmp_path, num_labels=5)


@pytest.mark.parametrize("place", ["./nowhere", "/nowhere/at/all", "a/b/c", "with space", Path("nowhere")])
def test_what_is_neither_a_directory_nor_an_id(place):
    with pytest.raises(CheckpointError, match=r"is not a directory: give one that holds config.json .*, or a hub id"):
        BertModel.from_pretrained(place)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub whose one repository lies in tmp_path / "remote"; hub.asked says which files were wanted, and how."""
    huggingface_hub = pytest.importorskip("huggingface_hub")

    absent = huggingface_hub.errors.EntryNotFoundError
    hub = SimpleNamespace(directory=tmp_path / "remote", asked=[], error=absent.__new__(absent))

    def download(repository, name, **how):
        hub.asked.append((repository, name, how))
        if not (hub.directory / name).is_file():
            raise hub.error
        return str(hub.directory / name)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    return hub


@pytest.mark.parametrize(
    ("form", "files"),
    [
        ("safetensors", ["config.json", "model.safetensors"]),
        (
            "sharded bin",
            [
                *("config.json", "model.safetensors", "model.safetensors.index.json"),
                *("pytorch_model.bin", "pytorch_model.bin.index.json"),
                *(f"pytorch_model-0000{i}-of-00003.bin" for i in (1, 2, 3)),
            ],
        ),
    ],
)
def test_a_hub_repository(build, hub, form, files):
    model = build(dtype=torch.float32)
    save(hub.directory, model.state_dict(), form)
    how = {"revision": "v2", "token": "secret", "local_files_only": True, "cache_dir": "/cache"}
    assert_same_weights(model, BertModel.from_pretrained("someone/some-bert", **how))
    assert [name for _, name, _ in hub.asked] == files
    assert all(repository == "someone/some-bert" and got == how for repository, _, got in hub.asked)


def test_a_hub_repository_without_a_model(hub):
    with pytest.raises(CheckpointError, match=r"someone/nothing has no config.json"):
        BertModel.from_pretrained("someone/nothing")


def test_a_hub_that_does_not_answer(hub):
    hub.error = ConnectionError("no route")
    with pytest.raises(CheckpointError, match=r"someone/bert: config.json cannot be downloaded: no route") as caught:
        BertModel.from_pretrained("someone/bert")
    assert caught.value.__cause__ is hub.error


def test_the_hub_offline(tmp_path):
    pytest.importorskip("huggingface_hub")
    with pytest.raises(CheckpointError, match=r"bert-base-uncased has no config.json"):
        BertModel.from_pretrained("bert-base-uncased", local_files_only=True, cache_dir=tmp_path)

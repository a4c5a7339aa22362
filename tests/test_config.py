"""BertConfig against transformers' own, and every setting that it has to refuse."""

import json

import pytest
from small_models import SETTINGS

from bertfast import BertConfig


def test_defaults_are_those_of_transformers():
    transformers = pytest.importorskip("transformers")
    stock, ours = transformers.BertConfig().to_dict(), BertConfig().to_dict()
    for name in ours.keys() - {"problem_type"}:
        assert ours[name] == stock[name], name
    assert ours["problem_type"] is None
    assert BertConfig.base() == BertConfig()


def test_large_is_the_papers():
    large = BertConfig.large(vocab_size=100)
    assert (large.num_hidden_layers, large.hidden_size, large.num_attention_heads) == (24, 1024, 16)
    assert (large.intermediate_size, large.vocab_size) == (4096, 100)


def test_nothing_of_a_config_json_is_lost(tmp_path):
    settings = {**SETTINGS, "model_type": "bert", "use_cache": True, "_name_or_path": "x", "mine": {"a": [1, None]}}
    settings |= {"id2label": {"0": "no", "1": "yes", "2": "maybe"}, "label2id": {"no": 0, "yes": 1, "maybe": 2}}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    config = BertConfig.from_json(tmp_path / "config.json")
    assert config.extra == {"use_cache": True, "_name_or_path": "x", "mine": {"a": [1, None]}}
    written = json.loads(config.to_json())
    assert {k: written[k] for k in settings} == settings
    assert BertConfig.from_dict(written) == config


def test_transformers_reads_what_was_written(tmp_path):
    transformers = pytest.importorskip("transformers")
    ours = BertConfig(**SETTINGS, num_labels=3, problem_type="regression", classifier_dropout=0.25)
    (tmp_path / "config.json").write_text(ours.to_json())
    stock = transformers.BertConfig.from_pretrained(tmp_path)
    for name, value in ours.to_dict().items():
        assert getattr(stock, name) == value, name
    assert stock.num_labels == 3


def test_number_and_names_of_labels_follow_each_other():
    assert BertConfig().num_labels == 2
    config = BertConfig(num_labels=3)
    assert config.id2label == {0: "LABEL_0", 1: "LABEL_1", 2: "LABEL_2"} and config.label2id["LABEL_2"] == 2
    config = BertConfig(id2label={"0": "a", "1": "b", "2": "c", "3": "d"})
    assert config.num_labels == 4 and config.label2id == {"a": 0, "b": 1, "c": 2, "d": 3}
    config.num_labels = 4
    assert config.id2label[0] == "a"
    config.num_labels = 1
    assert config.id2label == {0: "LABEL_0"} and config.label2id == {"LABEL_0": 0}
    with pytest.raises(ValueError, match="num_labels is 3, but id2label names 2"):
        BertConfig(num_labels=3, id2label={0: "a", 1: "b"})


def test_changes_make_a_copy():
    config = BertConfig(id2label={0: "a", 1: "b"})
    assert config.with_changes(num_labels=2, hidden_dropout_prob=0.0).id2label == {0: "a", 1: "b"}
    assert config.with_changes(num_labels=3).id2label[2] == "LABEL_2"
    assert config.with_changes(id2label={0: "x"}).label2id == {"x": 0}
    assert config.num_labels == 2 and config.hidden_dropout_prob == 0.1
    with pytest.raises(TypeError, match="no field num_lables"):
        config.with_changes(num_lables=3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model_type": "roberta"}, "model_type is 'roberta'"),
        ({"hidden_size": 100}, "hidden_size 100 must be a multiple of num_attention_heads 12"),
        ({"num_attention_heads": 0}, "num_attention_heads must be a positive integer, not 0"),
        ({"vocab_size": "many"}, "vocab_size must be a positive integer, not 'many'"),
        ({"hidden_act": "relu"}, "hidden_act must be one of gelu, .*not 'relu'"),
        ({"hidden_dropout_prob": 1.0}, r"hidden_dropout_prob must be in \[0, 1\), not 1.0"),
        ({"pad_token_id": 40000}, "pad_token_id 40000 is outside the vocabulary of 30522"),
        ({"problem_type": "guessing"}, "problem_type must be one of regression"),
        ({"is_decoder": True}, "is_decoder is True"),
        ({"add_cross_attention": True}, "add_cross_attention is True"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type is 'relative_key'"),
        ({"pruned_heads": {"0": [1]}}, "pruned_heads is"),
        ({"quantization_config": {"bits": 8}}, "quantization_config is"),
    ],
)
def test_settings_that_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        BertConfig.from_dict(settings)


def test_settings_that_change_nothing_are_accepted():
    config = BertConfig.from_dict({"is_decoder": False, "position_embedding_type": "absolute", "pruned_heads": {}})
    assert config.extra["is_decoder"] is False

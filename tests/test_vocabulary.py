"""Vocabularies: the same each time, what transformers makes of them, and those that will not do."""

import json
from pathlib import Path

import pretraining_texts
import pytest

from bertfast.errors import DataError
from bertfast.train.vocabulary import SPECIAL_TOKENS, Vocabulary

tokenizers = pytest.importorskip("tokenizers")

SENTENCE = "Unbelievably, Émile's 東京 tokenizers iterate; [MASK] 3.14!"


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    place, found = tmp_path_factory.mktemp("texts"), pretraining_texts.documents()
    half = len(found) // 2
    return [pretraining_texts.write(place / f"{i}.txt", part) for i, part in enumerate((found[:half], found[half:]))]


@pytest.fixture(scope="module")
def vocabulary(texts: list[Path]) -> Vocabulary:
    return Vocabulary.train(texts, 1200)


def words(vocabulary: Vocabulary) -> list[str]:
    ids = vocabulary.tokenizer.get_vocab()
    return sorted(ids, key=ids.__getitem__)


def test_a_trained_vocabulary(vocabulary):
    found = words(vocabulary)
    assert tuple(found[:5]) == SPECIAL_TOKENS and len(found) == vocabulary.size == 1200
    ids = (vocabulary.padding_id, vocabulary.unknown_id, vocabulary.start_id, vocabulary.separator_id)
    assert (*ids, vocabulary.mask_id) == (0, 1, 2, 3, 4)
    assert vocabulary.special.tolist() == [True] * 5 + [False] * 1195
    assert vocabulary.continues.tolist() == [word.startswith("##") for word in found]
    assert {"the", "function", "##s", "##tion"} < set(found) and "##." not in found
    assert vocabulary.lowercase and not any(c.isupper() for word in found[5:] for c in word)
    tokens = vocabulary.tokenizer.encode("The functions.").tokens
    assert tokens[0] == "[CLS]" and tokens[1] == "the" and tokens[-1] == "[SEP]"
    assert vocabulary.tokenizer.decode(vocabulary.tokenizer.encode("the functions").ids) == "the functions"


def test_the_same_texts_give_the_same_vocabulary(texts, vocabulary):
    """tokenizers itself gives another order, and with it other ties, each time."""
    for _ in range(2):
        assert Vocabulary.train(texts, 1200).fingerprint == vocabulary.fingerprint
    assert Vocabulary.train(texts, 1199).fingerprint != vocabulary.fingerprint


def test_case_can_be_kept(texts, vocabulary):
    cased = Vocabulary.train(texts, 1200, lowercase=False)
    assert not cased.lowercase and "The" in words(cased)
    assert cased.fingerprint != vocabulary.fingerprint


def test_rare_characters_are_unknown(tmp_path):
    path = tmp_path / "a.txt"
    common = "".join(chr(0x4E00 + i) for i in range(998))
    path.write_text(f"ab {common}\n" * 2 + "x é\n", encoding="utf-8")
    vocabulary = Vocabulary.train([path], 2000, lowercase=False)
    # a and b and 998 others come first; Chinese characters never continue a word.
    assert vocabulary.size == 5 + 1000 + 2 + 1 and "ab" in words(vocabulary)
    ids = vocabulary.tokenizer.encode("x 一 ab", add_special_tokens=False).ids
    assert ids[0] == vocabulary.unknown_id and vocabulary.unknown_id not in ids[1:]


@pytest.mark.parametrize("lowercase", [True, False])
def test_transformers_loads_what_is_saved(texts, tmp_path, lowercase):
    transformers = pytest.importorskip("transformers")
    vocabulary = Vocabulary.train(texts, 800, lowercase)
    vocabulary.save(tmp_path, longest=64)
    expected = vocabulary.tokenizer.encode(SENTENCE).ids
    for load in (transformers.AutoTokenizer, transformers.BertTokenizerFast):
        loaded = load.from_pretrained(tmp_path)
        assert loaded(SENTENCE)["input_ids"] == expected and len(loaded) == 800
        assert loaded.model_max_length == 64 and loaded.mask_token_id == 4 and loaded.do_lower_case is lowercase
        assert "Bert" in type(loaded).__name__
        assert loaded("a", "b")["token_type_ids"] == [0, 0, 0, 1, 1]
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).unlink()
    if lowercase:  # what transformers takes for granted of a vocab.txt alone
        assert transformers.BertTokenizer.from_pretrained(tmp_path)(SENTENCE)["input_ids"] == expected


@pytest.mark.parametrize("lowercase", [True, False])
def test_what_is_saved_is_loaded(texts, tmp_path, lowercase):
    vocabulary = Vocabulary.train(texts, 800, lowercase)
    vocabulary.save(tmp_path / "deep")
    for removed in (None, "tokenizer.json", "tokenizer_config.json"):
        if removed:
            (tmp_path / "deep" / removed).unlink()
        for path in (tmp_path / "deep", tmp_path / "deep/vocab.txt"):
            loaded = Vocabulary.load(path)
            assert loaded.fingerprint == vocabulary.fingerprint and loaded.lowercase is lowercase
            assert (loaded.continues == vocabulary.continues).all()
    assert Vocabulary.load(tmp_path / "deep", not lowercase).lowercase is not lowercase


def test_settings_beside_a_vocabulary_count(tmp_path):
    (tmp_path / "vocab.txt").write_text("\n".join([*SPECIAL_TOKENS, "a", "##b"]) + "\n")
    (tmp_path / "tokenizer_config.json").write_text('{"do_lower_case": false}')
    assert not Vocabulary.load(tmp_path).lowercase and Vocabulary.load(tmp_path, True).lowercase
    (tmp_path / "tokenizer_config.json").write_text("[]")
    with pytest.raises(DataError, match=r"tokenizer_config\.json cannot be read"):
        Vocabulary.load(tmp_path)


def test_a_real_checkpoints_vocabulary(minilm_path):
    vocabulary = Vocabulary.load(minilm_path)
    assert vocabulary.size == 30522 and vocabulary.lowercase
    assert (vocabulary.padding_id, vocabulary.start_id, vocabulary.separator_id, vocabulary.mask_id) == (
        0,
        101,
        102,
        103,
    )
    assert vocabulary.special.sum() == 5
    # The checkpoint's own settings cut and pad.
    assert len(vocabulary.tokenizer.encode("word " * 600).ids) == 602
    assert len({len(e.ids) for e in vocabulary.tokenizer.encode_batch(["a", "a b c"])}) == 2


@pytest.mark.parametrize(
    "lines, message",
    [
        (["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a"], r"vocab.txt lacks \[MASK\]"),
        (["a", "b"], r"lacks \[PAD\], \[UNK\], \[CLS\], \[SEP\], \[MASK\]"),
        ([*SPECIAL_TOKENS, "a", "b", "a"], r"vocab.txt:8: 'a' is in line 6 already"),
        ([*SPECIAL_TOKENS, "a", "", "b"], r"vocab.txt:7: a blank line"),
    ],
)
def test_vocabularies_that_will_not_do(tmp_path, lines, message):
    (tmp_path / "vocab.txt").write_text("\n".join(lines) + "\n")
    with pytest.raises(DataError, match=message):
        Vocabulary.load(tmp_path)


def test_tokenizers_that_will_not_do(tmp_path):
    with pytest.raises(DataError, match="there is no vocabulary at"):
        Vocabulary.load(tmp_path)
    with pytest.raises(DataError, match="there is no vocabulary at"):
        Vocabulary.load(tmp_path / "nowhere.txt")
    path = tmp_path / "tokenizer.json"
    path.write_text("{}")
    with pytest.raises(DataError, match=r"tokenizer\.json is no tokenizer"):
        Vocabulary.load(tmp_path)
    tokenizers.Tokenizer(tokenizers.models.BPE()).save(str(path))
    with pytest.raises(DataError, match=r"tokenizer\.json is a BPE vocabulary"):
        Vocabulary.load(tmp_path)
    ids = {token: i for i, token in enumerate((*SPECIAL_TOKENS, "a"))} | {"b": 9}
    tokenizers.Tokenizer(tokenizers.models.WordPiece(ids, unk_token="[UNK]")).save(str(path))
    with pytest.raises(DataError, match=r"the ids of .* are not 0 to 6"):
        Vocabulary.load(tmp_path)


def test_texts_that_will_not_do(texts, tmp_path):
    with pytest.raises(DataError, match=r"a vocabulary of 50 does not hold the texts' characters: give \d+ or more"):
        Vocabulary.train(texts, 50)
    path = tmp_path / "a.txt"
    path.write_text(" \n\n")
    with pytest.raises(DataError, match="no words"):
        Vocabulary.train([path], 100)
    path.write_bytes(b"good\n\xff\n")
    with pytest.raises(DataError, match=r"a\.txt:2: not UTF-8"):
        Vocabulary.train([path], 100)


def test_without_tokenizers_it_says_what_to_install(texts, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "tokenizers", None)
    with pytest.raises(Exception, match=r"tokenizers, which is not installed: pip install 'bertfast\[train\]'"):
        Vocabulary.train(texts, 100)


def test_the_settings_are_json_for_people(vocabulary, tmp_path):
    vocabulary.save(tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "BertTokenizer" and settings["do_lower_case"] is True
    assert (tmp_path / "vocab.txt").read_text(encoding="utf-8").split("\n") == [*words(vocabulary), ""]

"""Small checkpoints with tokenizers of a few words, and toy problems that they learn in seconds."""

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import stock_models
import tokenizers
import torch
import transformers

FILL = ("the", "cat", "sat", "film", "was", "it", "and")
WORDS = (*FILL, "good", "bad", "paris", "london", "anna", "bob", "lives", "in", "where", "does", "live", "?", ".")
LETTERS = "abcdefghijklmnopqrstuvwxyz"
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
POSITIONS = 40


def save_tokenizer(
    directory: Path,
    words: Sequence[str] = (*WORDS, *LETTERS),
    columns: Sequence[str] = ("input_ids", "token_type_ids", "attention_mask"),
) -> int:
    """A WordPiece tokenizer, lower-casing, of words and letters that go on. Returns the size of its vocabulary."""
    tokens = [*SPECIAL, *words, *(f"##{letter}" for letter in LETTERS)]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = tokenizers.normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        "[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1", [("[CLS]", 2), ("[SEP]", 3)]
    )
    names = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=POSITIONS, model_input_names=list(columns), **names
    ).save_pretrained(directory)
    return len(vocabulary)


def save_byte_tokenizer(directory: Path) -> int:
    """RoBERTa's kind: of bytes, which are merged to WORDS with the space before them. Returns the same."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    merges = dict.fromkeys((f"Ġ{word}"[:i], f"Ġ{word}"[i]) for word in WORDS for i in range(1, len(word) + 1))
    tokens = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", *alphabet, *(left + right for left, right in merges)]
    (directory / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (directory / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{left} {right}\n" for left, right in merges))
    kind = transformers.RobertaTokenizerFast
    kind.from_pretrained(directory, model_max_length=POSITIONS).save_pretrained(directory)
    return len(tokens)


def save_checkpoint(directory: Path, name: str = "BertForMaskedLM", **settings: Any) -> Path:
    """A small model of transformers as its constructor draws it, with a tokenizer that fits."""
    directory.mkdir(parents=True, exist_ok=True)
    vocabulary = (save_byte_tokenizer if name.startswith("Roberta") else save_tokenizer)(directory)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    sizes |= {"vocab_size": vocabulary, "max_position_embeddings": POSITIONS + 2 * name.startswith("Roberta")}
    torch.manual_seed(0)
    config = stock_models.config_of(name, **{**sizes, **settings})
    getattr(transformers, name)(config).save_pretrained(directory)
    return directory


def write_table(path: Path, rows: list[dict[str, Any]]) -> Path:
    """JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def _around(draw: random.Random, word: str) -> str:
    words = draw.choices(FILL, k=draw.randint(2, 7))
    return " ".join([*words[: len(words) // 2], word, *words[len(words) // 2 :]])


def texts(n: int, seed: int = 0) -> list[dict[str, Any]]:
    """A word decides the label."""
    draw = random.Random(seed)
    words = [draw.choice(("good", "bad")) for _ in range(n)]
    return [{"text": _around(draw, word), "label": {"good": "pos", "bad": "neg"}[word]} for word in words]


def pairs(n: int, seed: int = 0) -> list[dict[str, Any]]:
    """A word of the second text decides the label; the first is noise that holds one too."""
    draw = random.Random(seed)
    found = []
    for _ in range(n):
        first, second = draw.choice(("good", "bad")), draw.choice(("good", "bad"))
        row = {"sentence1": _around(draw, first), "sentence2": _around(draw, second)}
        found.append({**row, "label": int(second == "good")})
    return found


def scores(n: int, seed: int = 0) -> list[dict[str, Any]]:
    """The value is how often a word occurs."""
    draw = random.Random(seed)
    counts = [draw.randint(0, 4) for _ in range(n)]
    return [{"text": " ".join(["it", *["good"] * k, *["bad"] * (4 - k)]), "label": k / 2 - 1} for k in counts]


def sentences(n: int, seed: int = 0) -> str:
    """CoNLL: places and people are lists of words."""
    draw = random.Random(seed)
    tags = {"paris": "B-LOC", "london": "B-LOC", "anna": "B-PER", "bob": "I-PER"}
    lines = ["-DOCSTART- O", ""]
    for _ in range(n):
        words = " ".join(draw.choice((*FILL, "paris", "anna bob", "london")) for _ in range(draw.randint(2, 7)))
        lines += [*(f"{word} {tags.get(word, 'O')}" for word in words.split()), ""]
    return "\n".join(lines)


def questions(n: int, seed: int = 0, impossible: bool = False) -> dict[str, Any]:
    """SQuAD: the answer is the word after "in"; impossible: every third text has none."""
    draw = random.Random(seed)
    paragraphs = []
    for i in range(n):
        place = draw.choice(("paris", "bob london", "cat"))
        none = impossible and i % 3 == 0
        middle = "bob sat ." if none else f"anna lives in {place} ."
        text = " ".join([*draw.choices(FILL, k=draw.randint(1, 6)), middle, *draw.choices(FILL, k=2)])
        answers = [] if none else [{"text": place, "answer_start": text.index(f"in {place}") + 3}]
        question = {"id": f"q{i}", "question": "where does anna live ?", "answers": answers, "is_impossible": none}
        paragraphs.append({"context": text, "qas": [question]})
    return {"version": "2.0", "data": [{"title": "toy", "paragraphs": paragraphs}]}

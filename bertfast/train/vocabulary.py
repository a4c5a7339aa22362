"""WordPiece vocabularies: trained on texts, or taken from a checkpoint; saved as transformers loads them."""

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from bertfast.errors import DataError
from bertfast.train.extra import need
from bertfast.train.sources import read_batches, read_lines

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
_CONTINUES = "##"
_MOST_CHARACTERS = 1000  # rarer ones become [UNK], as in tokenizers' BertWordPieceTokenizer
_LEAST_COUNT = 2  # of a piece in the texts, as there


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """The pieces that texts are cut into.

    tokenizer: the tokenizers.Tokenizer. lowercase: whether it ignores case. size: the highest id + 1. The ids of the
    five special tokens; special: (size,) bool, which ids are theirs or those of other special tokens; continues:
    (size,) bool, which ids continue a word ("##").
    """

    tokenizer: Any
    lowercase: bool
    size: int
    padding_id: int
    unknown_id: int
    start_id: int
    separator_id: int
    mask_id: int
    special: np.ndarray
    continues: np.ndarray

    @classmethod
    def train(
        cls,
        files: Sequence[Path],
        size: int,
        lowercase: bool = True,
        advance: Callable[[int], Any] = lambda count: None,
    ) -> "Vocabulary":
        """A new vocabulary of the most useful pieces in the texts: the same texts give the same one.

        The texts are read twice, never held; in memory are their different words. Small texts may hold fewer pieces
        than `size`. Raises DataError where they cannot be read or hold none, ValueError for a size that does not even
        hold their characters.
        """
        tokenizers = need("tokenizers", "a vocabulary")
        draft = _tokenizer([], lowercase)
        alphabet = _alphabet(files, draft, advance)
        if not alphabet:
            raise DataError("the texts hold no words")
        # The ids of characters follow the order of a hash table, and ties between merges follow ids. Naming all
        # characters in advance is what makes the result the same each time.
        pieces = [*SPECIAL_TOKENS, *alphabet, *(_CONTINUES + c for c in alphabet if _can_continue(c, draft))]
        if len(pieces) > size:
            raise DataError(f"a vocabulary of {size} does not hold the texts' characters: give {len(pieces)} or more")
        trainer = tokenizers.trainers.WordPieceTrainer(
            vocab_size=size,
            min_frequency=_LEAST_COUNT,
            special_tokens=pieces,
            initial_alphabet=alphabet,
            limit_alphabet=len(alphabet),
            continuing_subword_prefix=_CONTINUES,
            show_progress=False,
        )
        draft.train_from_iterator((batch for path in files for batch in read_batches(path)), trainer)
        ids = draft.get_vocab()
        return cls._from_tokenizer(_tokenizer(sorted(ids, key=ids.__getitem__), lowercase), "the texts' vocabulary")

    @classmethod
    def load(cls, path: str | Path, lowercase: bool | None = None) -> "Vocabulary":
        """The vocabulary of a directory with tokenizer.json or vocab.txt, or of a file in the form of vocab.txt.

        lowercase: of a vocab.txt; None takes what tokenizer_config.json beside it says, or else whether no word in it
        has a capital letter. Raises DataError where there is no such file, where it is not a WordPiece vocabulary, and
        where one of the special tokens is not in it.
        """
        path = Path(path)
        whole = path / "tokenizer.json"
        if path.is_dir() and whole.is_file():
            try:
                tokenizer = need("tokenizers", "a vocabulary").Tokenizer.from_file(str(whole))
            except Exception as error:  # tokenizers raises nothing more particular
                raise DataError(f"{whole} is no tokenizer: {error}") from error
            return cls._from_tokenizer(tokenizer, str(whole))
        words = path / "vocab.txt" if path.is_dir() else path
        if not words.is_file():
            raise DataError(f"there is no vocabulary at {path}: name a vocab.txt, or a directory with one")
        tokens = list(read_lines(words))
        _check_lines(tokens, words)
        if lowercase is None:
            lowercase = _lowercase(words.with_name("tokenizer_config.json"), tokens)
        return cls._from_tokenizer(_tokenizer(tokens, lowercase), str(words))

    @classmethod
    def _from_tokenizer(cls, tokenizer: Any, source: str) -> "Vocabulary":
        kind = type(tokenizer.model).__name__
        if kind != "WordPiece":
            raise DataError(f"{source} is a {kind} vocabulary, and BERT's is WordPiece")
        ids = tokenizer.get_vocab()
        if missing := [token for token in SPECIAL_TOKENS if token not in ids]:
            raise DataError(f"{source} lacks {', '.join(missing)}, which pre-training takes: add a line for each")
        tokenizer.no_padding()
        tokenizer.no_truncation()
        size = len(ids)
        if sorted(ids.values()) != list(range(size)):
            raise DataError(f"the ids of {source} are not 0 to {size - 1}, each once")
        special, continues = np.zeros(size, dtype=bool), np.zeros(size, dtype=bool)
        special[[ids[token] for token in SPECIAL_TOKENS]] = True
        special[[i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special]] = True
        continues[[i for token, i in ids.items() if token.startswith(_CONTINUES) and token != _CONTINUES]] = True
        lowercase = bool(getattr(tokenizer.normalizer, "lowercase", False))
        return cls(tokenizer, lowercase, size, *(ids[token] for token in SPECIAL_TOKENS), special, continues)

    def save(self, directory: str | Path, longest: int = 512) -> None:
        """Write tokenizer.json, tokenizer_config.json and vocab.txt, for transformers and for `load`.

        longest: the tokens of the longest sequence that the model takes.
        """
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        ids = self.tokenizer.get_vocab()
        names = ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token")
        config = {
            "tokenizer_class": "BertTokenizer",
            "do_lower_case": self.lowercase,
            "model_max_length": longest,
            **dict(zip(names, SPECIAL_TOKENS, strict=True)),
        }
        self.tokenizer.save(str(directory / "tokenizer.json"))
        lines = "".join(f"{token}\n" for token in sorted(ids, key=ids.__getitem__))
        (directory / "vocab.txt").write_text(lines, encoding="utf-8", newline="\n")
        (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")

    @cached_property
    def fingerprint(self) -> str:
        """A hash of all that decides which tokens a text becomes."""
        return hashlib.sha256(self.tokenizer.to_str().encode()).hexdigest()


def _tokenizer(tokens: Sequence[str], lowercase: bool) -> Any:
    """BERT's tokenizer with these tokens, whose ids are their places."""
    tokenizers = need("tokenizers", "a vocabulary")
    ids = {token: i for i, token in enumerate(tokens)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordPiece(ids, unk_token="[UNK]"))
    tokenizer.normalizer = tokenizers.normalizers.BertNormalizer(lowercase=lowercase)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = tokenizers.decoders.WordPiece()
    known = [token for token in SPECIAL_TOKENS if token in ids]
    tokenizer.add_special_tokens(known)
    if len(known) == len(SPECIAL_TOKENS):
        ends = [(token, ids[token]) for token in ("[SEP]", "[CLS]")]
        tokenizer.post_processor = tokenizers.processors.BertProcessing(*ends)
    return tokenizer


def _alphabet(files: Iterable[Path], tokenizer: Any, advance: Callable[[int], Any]) -> list[str]:
    """The commonest characters of the texts' words, in the order of their code points."""
    counts = np.zeros(0x110000, dtype=np.int64)
    for path in files:
        for batch in read_batches(path, advance):
            text = tokenizer.normalizer.normalize_str("\n".join(batch))
            counts += np.bincount(np.frombuffer(text.encode("utf-32-le"), dtype="<u4"), minlength=len(counts))
    counts[[i for i in np.flatnonzero(counts) if chr(i).isspace()]] = 0
    commonest = np.argsort(-counts, kind="stable")[:_MOST_CHARACTERS]
    return [chr(i) for i in np.sort(commonest[counts[commonest] > 0])]


def _can_continue(character: str, tokenizer: Any) -> bool:
    """Whether a word may go on with it: punctuation and Chinese characters are words of their own."""
    text = tokenizer.normalizer.normalize_str("a" + character)
    return len(tokenizer.pre_tokenizer.pre_tokenize_str(text)) == 1


def _check_lines(tokens: Sequence[str], path: Path) -> None:
    lines: dict[str, int] = {}
    for number, token in enumerate(tokens, 1):
        if not token:
            raise DataError(f"{path}:{number}: a blank line: a vocabulary has a token in each")
        if token in lines:
            raise DataError(f"{path}:{number}: {token!r} is in line {lines[token]} already: a token has one id")
        lines[token] = number


def _lowercase(config: Path, tokens: Sequence[str]) -> bool:
    """Whether a vocab.txt ignores case."""
    if config.is_file():
        try:
            return bool(json.loads(config.read_text(encoding="utf-8")).get("do_lower_case", True))
        except (OSError, ValueError, AttributeError) as error:
            raise DataError(f"{config} cannot be read as a tokenizer's settings: {error}") from error
    return not any(token != token.lower() for token in tokens if not (token.startswith("[") and token.endswith("]")))

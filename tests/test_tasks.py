"""Tasks: features and windows of rows, what logits are decoded to, and that Trainer trains on them alike."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bertfast.errors import BertfastError, DataError
from bertfast.packing import FlatteningCollator
from bertfast.patching import patch

transformers = pytest.importorskip("transformers")
pytest.importorskip("tokenizers")

import task_checkpoints as toys  # noqa: E402

from bertfast.train.features import Feature  # noqa: E402
from bertfast.train.finetuning import Examples, Settings, finetune, hold_out  # noqa: E402
from bertfast.train.optimizers import linear_schedule, make_optimizer  # noqa: E402
from bertfast.train.rows import Answer, QuestionRow, TaggedRow, TextRow  # noqa: E402
from bertfast.train.runner import Runner  # noqa: E402
from bertfast.train.saving import write_together  # noqa: E402
from bertfast.train.tasks import Answers, Classification, Entities, Pairs, Regression, Task  # noqa: E402
from bertfast.train.tasks import task as base  # noqa: E402
from bertfast.train.tasks.answers import Places, best_spans, choose, find_answer  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    directory = tmp_path_factory.mktemp("tokenizer")
    toys.save_tokenizer(directory)
    return transformers.AutoTokenizer.from_pretrained(directory)


def text_row(text: str, label: Any = None, pair: str | None = None) -> TextRow:
    return TextRow(text, pair, label, "t.csv:2")


# ---- whole texts


def test_texts(tokenizer: Any) -> None:
    task = Classification(labels=("neg", "pos"), max_length=6)
    rows = [text_row("the cat sat", "pos"), text_row("the cat sat on it good", "neg")]
    features, changes = task.encode(rows, tokenizer)
    tokens = [tokenizer.convert_ids_to_tokens(feature.input_ids) for feature in features]
    assert tokens == [["[CLS]", "the", "cat", "sat", "[SEP]"], ["[CLS]", "the", "cat", "sat", "o", "[SEP]"]]
    assert [feature.labels for feature in features] == [1, 0] and [feature.row for feature in features] == [0, 1]
    assert changes == Counter({"rows were cut to 6 tokens": 1})


def test_pairs(tokenizer: Any) -> None:
    task = Pairs(labels=("0", "1"), max_length=8)
    features, changes = task.encode(
        [text_row("the cat", "1", "it sat"), text_row("cat " * 9, "0", "it sat")], tokenizer
    )
    tokens = [tokenizer.convert_ids_to_tokens(feature.input_ids) for feature in features]
    assert tokens[0] == ["[CLS]", "the", "cat", "[SEP]", "it", "sat", "[SEP]"]
    assert tokens[1] == ["[CLS]", "cat", "cat", "cat", "[SEP]", "it", "sat", "[SEP]"], "the longer one is cut"
    assert features[0].token_type_ids == [0, 0, 0, 0, 1, 1, 1] and changes.total() == 1


def test_portions_are_the_whole(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [text_row("the cat " * n, "a") for n in range(1, 8)]
    task = Classification(labels=("a",), max_length=12)
    whole = task.encode(rows, tokenizer)
    monkeypatch.setattr(base, "_PORTION", 3)
    assert task.encode(rows, tokenizer) == whole and whole.changes.total() == 2


def test_labels_in_order() -> None:
    rows = [text_row("a", label) for label in ("10", "2", "b", "2", "a")]
    assert Classification().fit(rows).labels == ("2", "10", "a", "b")
    with pytest.raises(DataError, match=r"t.csv:2: every row has the label '2'"):
        Classification().fit([text_row("a", "2")] * 2)
    with pytest.raises(DataError, match=r"t.csv:2: unknown label 'c': the model knows a, b"):
        Classification(labels=("a", "b")).check(text_row("x", "c"))


def test_classes_decoded() -> None:
    [found] = Classification(labels=("a", "b", "c")).decode([], [], [np.log([0.2, 0.7, 0.1]) + 5])
    assert found["label"] == "b" and found["score"] == pytest.approx(0.7)
    assert found["scores"] == pytest.approx({"a": 0.2, "b": 0.7, "c": 0.1})


@pytest.mark.parametrize("label", ["good", "nan", "inf", "-Infinity", "1,5"])
def test_values_that_are_none(label: str) -> None:
    with pytest.raises(DataError, match=r"t.csv:2: the label .* is not a number"):
        Regression().check(text_row("a", label))
    assert Regression().check(text_row("a", "-1.5e1")).label == -15.0


def test_a_constant_is_nothing_to_learn() -> None:
    with pytest.raises(DataError, match=r"every row has the value 1\.0"):
        Regression().fit([text_row("a", 1.0)] * 3)


# ---- a tenth held out


def test_every_class_is_held_out() -> None:
    rows = [text_row(str(i), "rare" if i % 10 == 0 else "common") for i in range(200)] + [text_row("x", "single")]
    training, held = hold_out(Classification(), rows, 0)
    assert Counter(row.label for row in held) == {"common": 18, "rare": 2}
    assert sorted(training + held, key=rows.index) == rows and training == [row for row in rows if row in training]
    assert hold_out(Classification(), rows, 0) == (training, held) != hold_out(Classification(), rows, 1)
    with pytest.raises(DataError, match="2 rows are too few"):
        hold_out(Classification(), rows[:2], 0)


def test_small_classes_share_the_tenth() -> None:
    rows = [text_row(str(i), str(i // 4)) for i in range(100)]
    assert len(hold_out(Classification(), rows, 0)[1]) == 10


# ---- words


def tagged(words: str, tags: str | None) -> TaggedRow:
    return TaggedRow(tuple(words.split()), None if tags is None else tuple(tags.split()), "t.conll:1")


def test_first_tokens_of_words_are_labelled(tokenizer: Any) -> None:
    task = Entities(labels=("O", "B-X", "I-X"), max_length=40)
    [feature], changes = task.encode([tagged("the abc film", "O B-X I-X")], tokenizer)
    assert tokenizer.convert_ids_to_tokens(feature.input_ids) == ["[CLS]", "the", "a", "##b", "##c", "film", "[SEP]"]
    assert feature.labels == [-100, 0, 1, -100, -100, 2, -100] and not changes
    assert task.encode([tagged("the abc film", None)], tokenizer).features[0].labels is None


def test_every_word_of_a_long_sentence_is_in_one_window(tokenizer: Any) -> None:
    words = "the cat abc sat film abcdefgh was it"
    task = Entities(labels=("O", "B-X", "I-X"), max_length=6)
    features, changes = task.encode([tagged("it", "O"), tagged(words, "O B-X O O O B-X O O")], tokenizer)
    assert max(len(feature.input_ids) for feature in features) == 6
    places = [word for feature in features if feature.row == 1 for word in feature.places if word is not None]
    assert places == list(range(8)), "those that a border cuts count where they begin"
    labels = [label for feature in features if feature.row == 1 for label in feature.labels if label != -100]
    assert labels == [0, 1, 0, 0, 0, 1, 0, 0]
    assert changes == Counter({"windows more, for sentences longer than 6 tokens": len(features) - 2})


def test_words_that_are_nothing(tokenizer: Any) -> None:
    row = TaggedRow(("the", "\u200b", "cat"), ("O", "B-X", "B-X"), "t.conll:1")
    task = Entities(labels=("O", "B-X", "I-X"), max_length=9)
    features, changes = task.encode([row], tokenizer)
    assert changes == Counter({"words are nothing to the tokenizer and count as tagged O": 1})
    logits = np.zeros((4, 3), dtype=np.float32)
    logits[:, 1] = 1
    [found] = task.decode([row], features, [logits])
    assert found["tags"] == ["B-X", "O", "B-X"]


def test_entities_decoded() -> None:
    row = tagged("a b c d e", None)
    task = Entities(labels=("O", "B-X", "I-X", "S-Y"))
    features = [Feature(0, [], places=[None, 0, None, 1, None]), Feature(0, [], places=[None, 2, 3, 4, None])]
    best = [[0, 1, 3, 2, 0], [0, 2, 0, 3, 0]]
    logits = [np.log(np.where(np.eye(4)[tags] == 1, 0.7, 0.1)) for tags in best]
    [found] = task.decode([row], features, logits)
    assert found["tags"] == ["B-X", "I-X", "I-X", "O", "S-Y"]
    assert [(e["type"], e["start"], e["end"], e["text"]) for e in found["entities"]] == [
        ("X", 0, 3, "a b c"),
        ("Y", 4, 5, "e"),
    ]
    assert found["entities"][0]["score"] == pytest.approx(0.7)


def test_tags(tmp_path: Path) -> None:
    rows = [tagged("a b c", "S-Y B-X O")]
    assert Entities().fit(rows).labels == ("O", "B-X", "I-X", "B-Y", "I-Y", "S-Y")
    with pytest.raises(DataError, match="every word has the tag O"):
        Entities().fit([tagged("a b", "O O")])
    path = tmp_path / "t.conll"
    for tag in ("PER", "L-PER", "B-", "o", "B_PER"):
        path.write_text(f"a O\n\nb {tag}\n")
        with pytest.raises(DataError, match=rf"t.conll:3: the tag '{tag}' is not O, nor one of"):
            Entities().read(path)
    path.write_text("a B-Z\n")
    with pytest.raises(DataError, match=r"t.conll:1: unknown tag 'B-Z': the model knows O, B-X"):
        Entities(labels=("O", "B-X")).read(path)


# ---- answers


def question(context: str, answer: str | None, start: int | None = None, text: str = "where ?") -> QuestionRow:
    found = () if answer is None else (Answer(answer, context.index(answer) if start is None else start),)
    return QuestionRow("q1", text, context, found, "t.json: data[0]")


def test_windows_overlap_and_an_answer_that_one_cuts_is_none_of_it(tokenizer: Any) -> None:
    context = "the cat sat and the film was good in paris"
    task = Answers(max_length=10, stride=2)  # [CLS] where ? [SEP] 5 tokens [SEP]
    row = question(context, "film was good")
    features, changes = task.encode([row], tokenizer)
    windows = [tokenizer.convert_ids_to_tokens(feature.input_ids)[4:-1] for feature in features]
    assert windows == [
        ["the", "cat", "sat", "and", "the"],
        ["and", "the", "film", "was", "good"],
        ["was", "good", "in", "paris"],
    ]
    assert [feature.labels for feature in features] == [(0, 0), (6, 8), (0, 0)]
    assert changes == Counter({"windows more, for contexts longer than 10 tokens": 2})
    assert features[0].token_type_ids == [0] * 4 + [1] * 6
    for feature in features:
        found = [context[a:b] for a, b in feature.places.spans.tolist() if b > a]
        assert found == tokenizer.convert_ids_to_tokens(feature.input_ids)[4:-1]
        assert not feature.places.inside[:4].any() and not feature.places.inside[-1]


def test_answers_in_the_middle_of_words_and_repeated(tokenizer: Any) -> None:
    task = Answers(max_length=40, stride=2)
    rows = [question("abcd it", "bc"), question("cat and cat", "cat", start=8), question("the cat", None)]
    features, _ = task.encode(rows, tokenizer)
    assert [feature.labels for feature in features] == [(5, 6), (6, 6), (0, 0)]
    with pytest.raises(DataError, match="the answer to question q1 is nothing to the tokenizer"):
        task.encode([question("the \u200b cat", "\u200b")], tokenizer)


def test_a_question_that_leaves_no_room(tokenizer: Any) -> None:
    with pytest.raises(DataError, match="question q1 has 20 tokens, which leaves no room"):
        Answers(max_length=24, stride=2).encode([question("the cat", None, text="the " * 20)], tokenizer)


def test_spans_decoded() -> None:
    """[CLS] q [SEP] and four tokens of context, then [SEP]."""
    spans = [(0, 0), (0, 0), (0, 0), (0, 2), (3, 5), (6, 8), (9, 11), (0, 0)]
    places = Places(np.array(spans, dtype=np.int32), 0)
    assert find_answer({(3, 5), (6, 8)}, places) == (4, 5) and find_answer({(9, 11), (12, 14)}, places) == (0, 0)
    logits = np.zeros((8, 2), dtype=np.float32)
    logits[1] = 99  # the question
    logits[7] = 99  # the end
    logits[6, 0] = 5  # a start behind every good end
    logits[4, 0], logits[5, 1], logits[3, 1] = 4, 3, 9
    [best, *_] = found = best_spans(logits, places, longest=2)
    assert best == (9.0, (0, 2)) and found[1] == (7.0, (3, 8))
    assert len(found) == 7 and all(
        span in {(0, 2), (0, 5), (3, 5), (3, 8), (6, 8), (6, 11), (9, 11)} for _, span in found
    )
    assert {span for _, span in best_spans(logits, places, longest=1)} == {(0, 2), (3, 5), (6, 8), (9, 11)}
    assert best_spans(logits, Places(np.zeros((8, 2), dtype=np.int32), 0), longest=3) == []


def test_the_best_of_all_windows() -> None:
    context = "in Köln, or Bonn"
    found = choose(context, [(1.0, (3, 7)), (4.0, (12, 16)), (3.0, (3, 7)), (2.0, (3, 7))], None)
    assert found == {"answer": "Bonn", "start": 12, "end": 16, "score": pytest.approx(1 / (1 + np.exp(-1)))}
    assert choose(context, [(1.0, (3, 7))], 0.9)["answer"] == "Köln"
    none = choose(context, [(1.0, (3, 7))], 1.0)
    assert none == {"answer": "", "start": None, "end": None, "score": pytest.approx(0.5)}
    assert choose(context, [], None) == {"answer": "", "start": None, "end": None, "score": 0.0}
    assert choose(context, [(1.0, (2, 8))], None) == {"answer": "Köln,", "start": 3, "end": 8, "score": 1.0}


def test_no_answer_has_to_win_in_every_window() -> None:
    row = question("ab cd", None)
    places = Places(np.array([(0, 0), (0, 2), (3, 5)], dtype=np.int32), 0)
    features = [Feature(0, [], places=places)] * 2
    sure = np.array([[9, 9], [0, 0], [0, 0]], dtype=np.float32)
    unsure = np.array([[0, 0], [0, 1], [2, 1]], dtype=np.float32)
    task = Answers(impossible=True)
    assert task.decode([row], features, [sure, sure])[0]["answer"] == ""
    assert task.decode([row], features, [sure, unsure])[0]["answer"] == "cd"
    assert Answers().decode([row], features, [sure, sure])[0]["answer"] != ""


def test_what_questions_say_of_the_task() -> None:
    answered, none = question("the cat", "cat"), question("the cat", None)
    assert Answers().fit([answered, none]).impossible and not Answers().fit([answered]).impossible
    with pytest.raises(DataError, match="no question has an answer"):
        Answers().fit([none])


# ---- training


def _examples(task: str, tokenizer: Any, tmp_path: Path) -> tuple[Task, Examples]:
    if task == "ner":
        path = tmp_path / "t.conll"
        path.write_text(toys.sentences(20))
        kind: Task = Entities(max_length=40)
    else:
        path = toys.write_table(tmp_path / "t.jsonl", toys.texts(20))
        kind = Classification(max_length=40)
    rows = kind.read(path)
    fitted = kind.fit(rows)
    return fitted, Examples(rows, fitted.encode(rows, tokenizer).features)


@pytest.mark.parametrize("name", ["classification", "ner"])
def test_trainer_gives_the_same_losses(tokenizer: Any, tmp_path: Path, name: str) -> None:
    """The same batches through transformers' Trainer on a patched model: the same loss at each step."""
    pytest.importorskip("accelerate")
    pytest.importorskip("seqeval")
    task, examples = _examples(name, tokenizer, tmp_path)
    settings = Settings(epochs=2, batch_size=4, learning_rate=1e-3)
    directory = toys.save_checkpoint(tmp_path / "bert")
    kind = getattr(transformers, task.head)

    def model() -> Any:
        torch.manual_seed(1)
        return kind.from_pretrained(directory, **task.settings())

    ours: list[float] = []
    runner = Runner(model(), task.labels_of, 0)
    assert runner.padded is None

    def advance(loss: float) -> None:
        assert runner.model.training
        ours.append(loss)

    assert [epoch.number for epoch in finetune(runner, task, examples, examples, settings, advance)] == [1, 2]
    torch.manual_seed(settings.seed)
    places = [i for _ in range(2) for i in torch.randperm(20).tolist()]
    features = [examples.features[i] for i in places]
    data = [{"input_ids": f.input_ids, "token_type_ids": f.token_type_ids, "labels": f.labels} for f in features]

    class Recorder(transformers.Trainer):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.losses: list[float] = []

        def _get_train_sampler(self, *_: Any) -> torch.utils.data.Sampler:
            return torch.utils.data.SequentialSampler(data)

        def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            self.losses.append(float(loss := super().training_step(*args, **kwargs)))
            return loss

    theirs = patch(model())
    optimizer = make_optimizer("adamw", theirs, settings.learning_rate, settings.weight_decay)
    options = {"num_train_epochs": 1, "per_device_train_batch_size": 4, "max_grad_norm": settings.max_grad_norm}
    quiet = {"report_to": [], "disable_tqdm": True, "logging_strategy": "no", "save_strategy": "no", "use_cpu": True}
    trainer = Recorder(
        theirs,
        transformers.TrainingArguments(str(tmp_path / "trainer"), **options, **quiet),
        FlatteningCollator(token_labels=name == "ner"),
        data,
        optimizers=(optimizer, linear_schedule(optimizer, 1, 10)),
    )
    trainer.train()
    assert len(ours) == 10 and len(set(ours)) == 10
    assert trainer.losses == pytest.approx(ours, rel=1e-5)


def test_files_take_their_places_together(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("old")

    def write(folder: Path) -> None:
        (folder / "a").write_text("new")
        (folder / "b").write_text("new")

    def fail(folder: Path) -> None:
        write(folder)
        raise OSError(28, "No space left on device")

    with pytest.raises(BertfastError, match="No space left on device"):
        write_together(tmp_path, fail)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"a": "old"}
    write_together(tmp_path, write)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"a": "new", "b": "new"}

"""bertfast finetune and predict, end to end: each task is learned, saved and predicted; and what is refused."""

import errno
import gzip
import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from bertfast.cli import main

transformers = pytest.importorskip("transformers")
pytest.importorskip("seqeval")
pytest.importorskip("matplotlib")

import task_checkpoints as toys  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

from bertfast.cli.task_models import load_tokenizer  # noqa: E402
from bertfast.train.runner import Runner  # noqa: E402
from bertfast.train.tasks import TASKS  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")

FAST = ("--epochs", "4", "--batch-size", "8", "--learning-rate", "3e-3")


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint without dropout, which these few steps would do without."""
    return toys.save_checkpoint(tmp_path_factory.mktemp("bert"))


def write(task: str, path: Path, n: int, seed: int = 0) -> Path:
    """A file of n examples of a toy problem, in one of the task's formats."""
    tables = {"classification": toys.texts, "pairs": toys.pairs, "regression": toys.scores}
    if task in tables:
        return toys.write_table(path.with_suffix(".jsonl"), tables[task](n, seed))
    path = path.with_suffix(".conll" if task == "ner" else ".json")
    path.write_text(toys.sentences(n, seed) if task == "ner" else json.dumps(toys.questions(n, seed, impossible=True)))
    return path


def run(capsys: pytest.CaptureFixture, *arguments: Any, status: int = 0) -> tuple[str, str]:
    capsys.readouterr()
    found = main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    assert found == status, err
    return out, err


def refuse(capsys: pytest.CaptureFixture, *arguments: Any, status: int = 2) -> str:
    """The error, which is one line and the last."""
    out, err = run(capsys, *arguments, status=status)
    *notes, error = err.splitlines()
    assert out == "" and error.startswith("bertfast: error: ") and not any("error" in note for note in notes), err
    return error


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize(
    ("task", "metric", "files"),
    [
        ("classification", "accuracy", {"confusion.png"}),
        ("pairs", "accuracy", {"confusion.png"}),
        ("regression", "correlation", set()),
        ("ner", "f1", {"confusion.png"}),
        ("qa", "f1", set()),
    ],
)
def test_every_task_is_learned(
    capsys: pytest.CaptureFixture, bert: Path, tmp_path: Path, task: str, metric: str, files: set[str]
) -> None:
    training, dev = write(task, tmp_path / "train", 320), write(task, tmp_path / "dev", 40, seed=1)
    output, predicted = tmp_path / "model", tmp_path / "predicted.jsonl"
    command = ("finetune", bert, training, "--task", task, "--eval", dev, "--output", output, *FAST)
    report = json.loads(run(capsys, *command, "--json")[0])
    assert report["metrics"][metric] >= 0.9 and report["padded"] is None
    assert report == json.loads((output / "metrics.json").read_text())
    best = report["epochs"][report["best_epoch"] - 1]
    assert (
        best[metric] == max(epoch[metric] for epoch in report["epochs"]) and best.items() >= report["metrics"].items()
    )
    wanted = {"config.json", "model.safetensors", "finetune.json", "metrics.json", "tokenizer.json"}
    assert {path.name for path in output.iterdir()} - {
        "tokenizer_config.json",
        "special_tokens_map.json",
        "vocab.txt",
    } == (wanted | files)
    if files:
        from PIL import Image

        with Image.open(output / "confusion.png") as image:
            image.verify()
    out, _ = run(capsys, "predict", output, dev, "--output", predicted, "--metrics")
    assert f"{metric} " in out and f"{report['metrics'][metric]:.4f}" in out
    out, _ = run(capsys, "predict", output, dev, "--batch-size", "3")
    again = [json.loads(line) for line in out.splitlines()]
    for prediction, other in zip(again, lines(predicted), strict=True):  # of another batch: another last bit
        assert strip(prediction) == strip(other)
    CHECKS[task](lines(predicted), dev)


def strip(prediction: dict[str, Any]) -> Any:
    """The prediction with numbers in three digits."""
    return json.loads(json.dumps(prediction), parse_float=lambda number: round(float(number), 3))


def check_labels(predictions: list[dict[str, Any]], dev: Path) -> None:
    for prediction, row in zip(predictions, lines(dev), strict=True):
        assert sum(prediction["scores"].values()) == pytest.approx(1)
        assert prediction["score"] == max(prediction["scores"].values()) == prediction["scores"][prediction["label"]]
        assert set(prediction["scores"]) == ({"0", "1"} if "sentence1" in row else {"neg", "pos"})
    right = [p["label"] == str(row["label"]) for p, row in zip(predictions, lines(dev), strict=True)]
    assert sum(right) >= 0.9 * len(right)


def check_values(predictions: list[dict[str, Any]], dev: Path) -> None:
    errors = [abs(p["value"] - row["label"]) for p, row in zip(predictions, lines(dev), strict=True)]
    assert sum(errors) / len(errors) < 0.3


def check_entities(predictions: list[dict[str, Any]], dev: Path) -> None:
    found = [entity for p in predictions for entity in p["entities"]]
    assert {entity["type"] for entity in found} == {"LOC", "PER"}
    for prediction in predictions:
        for entity in prediction["entities"]:
            assert " ".join(prediction["tokens"][entity["start"] : entity["end"]]) == entity["text"]
            assert 0 < entity["score"] <= 1
    assert sum(entity["text"] == "anna bob" for entity in found) >= 10


def check_answers(predictions: list[dict[str, Any]], dev: Path) -> None:
    paragraphs = json.loads(dev.read_text())["data"][0]["paragraphs"]
    right = 0
    for prediction, paragraph in zip(predictions, paragraphs, strict=True):
        [question] = paragraph["qas"]
        assert prediction["id"] == question["id"] and 0 <= prediction["score"] <= 1
        if prediction["answer"]:
            assert paragraph["context"][prediction["start"] : prediction["end"]] == prediction["answer"]
        else:
            assert prediction["start"] is None
        right += prediction["answer"] == "".join(answer["text"] for answer in question["answers"])
    assert right >= 0.9 * len(predictions)


CHECKS = {
    "classification": check_labels,
    "pairs": check_labels,
    "regression": check_values,
    "ner": check_entities,
    "qa": check_answers,
}


def test_the_saved_model_is_one_of_transformers(capsys: pytest.CaptureFixture, bert: Path, tmp_path: Path) -> None:
    training, output = write("classification", tmp_path / "train", 80), tmp_path / "model"
    out, err = run(capsys, "finetune", bert, training, "--task", "classification", "--output", output, *FAST)
    assert "8 of the 80 rows are held out" in err and "new, to be trained: bert.pooler" in err
    assert (
        err.count("epoch ") == 4 and "accuracy" in out and "matthews" in out and out.startswith(f"{output}: the best")
    )
    pipe = transformers.pipeline("text-classification", str(output), device="cpu")
    out, _ = run(capsys, "predict", output, training)
    for line, row in zip(out.splitlines()[:5], lines(training), strict=False):
        ours, [theirs] = json.loads(line), pipe(row["text"])
        assert ours["label"] == theirs["label"] and ours["score"] == pytest.approx(theirs["score"], abs=1e-5)


def test_two_runs_are_one(capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    """With dropout, to the bit; and another seed is another run."""
    checkpoint = toys.save_checkpoint(tmp_path / "bert", hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1)
    training = write("classification", tmp_path / "train", 40)
    found = []
    for name, seed in (("a", 5), ("b", 5), ("c", 6)):
        options = ("--output", tmp_path / name, "--seed", seed, "--epochs", "2", "--learning-rate", "1e-3")
        out, _ = run(capsys, "finetune", checkpoint, training, "--task", "classification", *options, "--json")
        found.append((json.loads(out)["epochs"], (tmp_path / name / "model.safetensors").read_bytes()))
    assert found[0] == found[1]
    assert found[0][0] != found[2][0] and found[0][1] != found[2][1]


def test_a_table_with_quotes_and_columns_of_other_names(
    capsys: pytest.CaptureFixture, bert: Path, tmp_path: Path
) -> None:
    rows = toys.texts(60)
    csv = "kind,said\n" + "".join(f'{row["label"]},"{row["text"]},\n""cat"""\n' for row in rows)
    training = tmp_path / "train.csv.gz"
    training.write_bytes(gzip.compress(csv.encode()))
    columns = ("--text-column", "said", "--label-column", "kind")
    command = ("finetune", bert, training, "--task", "classification", "--output", tmp_path / "model", "--epochs", "1")
    run(capsys, *command, *columns)
    (tmp_path / "new.tsv").write_text("said\tid\nit was good\t1\n")
    out, _ = run(capsys, "predict", tmp_path / "model", tmp_path / "new.tsv")
    assert json.loads(out)["label"] in ("pos", "neg")
    (tmp_path / "new.tsv").write_text("text\nit was good\n")
    assert "no column 'said': it has 'text'" in refuse(capsys, "predict", tmp_path / "model", tmp_path / "new.tsv")


@pytest.mark.parametrize("task", ["ner", "qa"])
def test_roberta(capsys: pytest.CaptureFixture, tmp_path: Path, task: str) -> None:
    """Bytes for tokens, a word with the space before it; positions behind the padding token's; no token types."""
    checkpoint = toys.save_checkpoint(tmp_path / "roberta", "RobertaForMaskedLM")
    training, dev = write(task, tmp_path / "train", 320), write(task, tmp_path / "dev", 40, seed=1)
    command = ("finetune", checkpoint, training, "--task", task, "--eval", dev, "--output", tmp_path / "model", *FAST)
    report = json.loads(run(capsys, *command, "--json")[0])
    assert report["metrics"]["f1"] >= 0.9 and report["padded"] is None
    out, _ = run(capsys, "predict", tmp_path / "model", dev)
    CHECKS[task]([json.loads(line) for line in out.splitlines()], dev)


def test_words_begin_with_their_space(tmp_path: Path) -> None:
    toys.save_byte_tokenizer(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "roberta"}')
    tokenizer = load_tokenizer(str(tmp_path), TASKS["ner"]())
    tokens = tokenizer(["anna", "sat"], is_split_into_words=True).tokens()
    assert tokens == ["<s>", "Ġanna", "Ġsat", "</s>"]


@pytest.mark.parametrize(
    ("name", "settings", "words"),
    [("BertForMaskedLM", {"hidden_act": "relu"}, "ReLU"), ("Albert", {}, "no supported model")],
)
def test_what_patch_cannot_run_is_padded(
    capsys: pytest.CaptureFixture, tmp_path: Path, name: str, settings: dict[str, Any], words: str
) -> None:
    checkpoint = tmp_path / "checkpoint"
    if name == "Albert":
        checkpoint.mkdir()
        sizes = {"hidden_size": 32, "embedding_size": 16, "num_attention_heads": 2, "intermediate_size": 64}
        config = transformers.AlbertConfig(
            vocab_size=toys.save_tokenizer(checkpoint), max_position_embeddings=40, **sizes
        )
        transformers.AlbertForMaskedLM(config).save_pretrained(checkpoint)
    else:
        toys.save_checkpoint(checkpoint, name, **settings)
    for task in ("classification", "ner", "qa"):
        training = write(task, tmp_path / task, 20)
        command = ("finetune", checkpoint, training, "--task", task, "--output", tmp_path / f"{task} model")
        out, err = run(capsys, *command, "--epochs", "1", "--json")
        assert "batches are padded" in err and words in err and words in json.loads(out)["padded"]
        out, err = run(capsys, "predict", tmp_path / f"{task} model", training)
        assert len(out.splitlines()) == 20 and "batches are padded" in err


def test_bfloat16(capsys: pytest.CaptureFixture, bert: Path, tmp_path: Path) -> None:
    losses = []
    for precision in ("float32", "bfloat16"):
        training, output = write("regression", tmp_path / "train", 40), tmp_path / precision
        command = ("finetune", bert, training, "--task", "regression", "--output", output, "--precision", precision)
        losses.append(json.loads(run(capsys, *command, "--epochs", "1", "--json")[0])["epochs"][0]["loss"])
        assert load_file(output / "model.safetensors")["classifier.weight"].dtype == torch.float32
    assert losses[0] != losses[1] and losses[1] == pytest.approx(losses[0], rel=2e-2)


# ---- what can go wrong while it runs


def test_a_full_disk_leaves_the_best_model(
    capsys: pytest.CaptureFixture, bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second save of a model fails, half written; the first is whole."""
    save = transformers.PreTrainedModel.save_pretrained
    saved: list[dict[str, torch.Tensor]] = []

    def fail_at_second(model: Any, folder: Path, **options: Any) -> None:
        save(model, folder, **options)
        if saved:
            (Path(folder) / "model.safetensors").write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        saved.append({name: tensor.clone() for name, tensor in model.state_dict().items()})

    monkeypatch.setattr(transformers.PreTrainedModel, "save_pretrained", fail_at_second)
    _measure(monkeypatch, [0.1, 0.2])
    output, training = tmp_path / "model", write("classification", tmp_path / "train", 40)
    error = refuse(capsys, "finetune", bert, training, "--task", "classification", "--output", output, *FAST)
    assert "No space left on device" in error and str(output) in error and "is whole" in error
    weights = load_file(output / "model.safetensors")
    assert all(torch.equal(weights[name], saved[0][name]) for name in weights)
    assert json.loads((output / "metrics.json").read_text())["best_epoch"] == 1
    assert not list(output.glob(".saving*"))
    run(capsys, "predict", output, training)


def _measure(monkeypatch: pytest.MonkeyPatch, accuracies: list[float]) -> None:
    """Have the epochs these accuracies, one after another."""
    left = iter(accuracies)
    kind = "bertfast.train.tasks.Classification"
    monkeypatch.setattr(f"{kind}.measure", lambda task, rows, predictions: {"accuracy": next(left)})


def test_the_best_epoch_is_kept(
    capsys: pytest.CaptureFixture, bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved: list[torch.Tensor] = []
    save = transformers.PreTrainedModel.save_pretrained

    def spy(model: Any, folder: Path, **options: Any) -> None:
        saved.append(model.classifier.weight.detach().clone())
        save(model, folder, **options)

    monkeypatch.setattr(transformers.PreTrainedModel, "save_pretrained", spy)
    _measure(monkeypatch, [0.2, math.nan, 0.9, 0.9])
    output, training = tmp_path / "model", write("classification", tmp_path / "train", 20)
    command = ("finetune", bert, training, "--task", "classification", "--output", output, "--epochs", "4")
    report = json.loads(run(capsys, *command, "--json")[0])
    assert report["best_epoch"] == 3 and report["metrics"] == {"accuracy": 0.9} and len(saved) == 2
    assert [epoch["accuracy"] for epoch in report["epochs"]] == [0.2, None, 0.9, 0.9]
    assert torch.equal(load_file(output / "model.safetensors")["classifier.weight"], saved[1])


@pytest.mark.parametrize("steps", [0, 7])
def test_an_interrupt_keeps_the_best_model(
    capsys: pytest.CaptureFixture, bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: int
) -> None:
    compute, left = Runner.loss, iter(range(steps))

    def loss(runner: Runner, features: Any) -> torch.Tensor:
        if next(left, None) is None:
            raise KeyboardInterrupt
        return compute(runner, features)

    monkeypatch.setattr(Runner, "loss", loss)
    output, training = tmp_path / "model", write("classification", tmp_path / "train", 40)
    command = ("finetune", bert, training, "--task", "classification", "--output", output, *FAST)
    error = refuse(capsys, *command, status=130)
    if steps:  # of five an epoch
        assert error.endswith(f"interrupted; {output} holds the best model so far, of epoch 1")
        run(capsys, "predict", output, training)
    else:
        assert error.endswith("interrupted; nothing was saved yet") and not list(output.iterdir())


def test_a_loss_that_is_none(capsys: pytest.CaptureFixture, bert: Path, tmp_path: Path) -> None:
    training = write("regression", tmp_path / "train", 40)
    command = ("finetune", bert, training, "--task", "regression", "--output", tmp_path / "model")
    error = refuse(capsys, *command, "--learning-rate", "1e30", "--warmup", "0")
    assert "try a smaller learning rate" in error


# ---- what is refused


def test_output_that_is_there(capsys: pytest.CaptureFixture, bert: Path, tmp_path: Path) -> None:
    training = write("classification", tmp_path / "train", 40)
    for output in (tmp_path, training):
        error = refuse(capsys, "finetune", bert, training, "--task", "classification", "--output", output)
        assert "is there and not an empty directory" in error
    error = refuse(capsys, "finetune", bert, training, "--task", "classification", "--output", training / "model")
    assert "cannot be written" in error


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--task", "summary"), "invalid choice: 'summary'"),
        (("--epochs", "0"), "must be an integer of at least 1, not '0'"),
        (("--batch-size", "1.5"), "must be an integer of at least 1, not '1.5'"),
        (("--learning-rate", "nan"), "must be a number above 0, not 'nan'"),
        (("--learning-rate", "0"), "must be a number above 0, not '0'"),
        (("--warmup", "2"), "must be a number between 0 and 1, not '2'"),
        (("--seed", "-1"), "--seed"),
        (("--max-length", "41"), "--max-length must lie between 3 and the model's 40 positions"),
        (("--stride", "3"), "--stride is not for --task classification"),
        (("--pair-column", "x"), "--pair-column is not for --task classification"),
        (("--precision", "float16"), "invalid choice: 'float16'"),
        (("--eval", "nowhere.csv"), "nowhere.csv cannot be read: No such file"),
    ],
)
def test_options(
    capsys: pytest.CaptureFixture, bert: Path, tmp_path: Path, options: tuple[str, ...], words: str
) -> None:
    training = write("classification", tmp_path / "train", 40)
    command = ("finetune", bert, training, "--task", "classification", "--output", tmp_path / "model", *options)
    assert words in refuse(capsys, *command)
    assert not (tmp_path / "model").exists()


def test_labels_of_the_evaluation(capsys: pytest.CaptureFixture, bert: Path, tmp_path: Path) -> None:
    training = write("classification", tmp_path / "train", 40)
    dev = toys.write_table(tmp_path / "dev.jsonl", [*toys.texts(3), {"text": "it", "label": "meh"}])
    command = ("finetune", bert, training, "--task", "classification", "--eval", dev, "--output", tmp_path / "model")
    assert "dev.jsonl:4: unknown label 'meh': the model knows neg, pos" in refuse(capsys, *command)


def test_too_few_rows_to_hold_some_out(capsys: pytest.CaptureFixture, bert: Path, tmp_path: Path) -> None:
    training = toys.write_table(tmp_path / "t.jsonl", [{"text": "a", "label": str(i)} for i in range(40)])
    command = ("finetune", bert, training, "--task", "classification", "--output", tmp_path / "model")
    assert "too few to hold a tenth of them out: give --eval" in refuse(capsys, *command)


def test_checkpoints_that_do_not_fit(capsys: pytest.CaptureFixture, bert: Path, tmp_path: Path) -> None:
    training = write("classification", tmp_path / "train", 40)

    def attempt(checkpoint: Path) -> str:
        command = ("finetune", checkpoint, training, "--task", "classification", "--output", tmp_path / "model")
        return refuse(capsys, *command, "--epochs", "1")

    bare = toys.save_checkpoint(tmp_path / "bare")
    for path in bare.glob("*token*"):
        path.unlink()
    assert "bare" in attempt(bare) and not (tmp_path / "model").exists()
    small = toys.save_checkpoint(tmp_path / "small", vocab_size=10)
    assert "the model has embeddings of 10 tokens only" in attempt(small)
    lacking = toys.save_checkpoint(tmp_path / "lacking")
    weights = load_file(lacking / "model.safetensors")
    kept = {name: tensor for name, tensor in weights.items() if "intermediate" not in name}
    save_file(kept, lacking / "model.safetensors", metadata={"format": "pt"})
    assert "does not hold 4 parameters of the encoder" in attempt(lacking)


@pytest.mark.parametrize("model", ["/nowhere/model", "a/b/c", "{file}", "{empty}", "x" * 5000, "nobody/nothing"])
def test_models_that_are_none(
    capsys: pytest.CaptureFixture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    training = write("classification", tmp_path / "train", 20)
    (tmp_path / "empty").mkdir()
    model = model.format(file=training, empty=tmp_path / "empty")
    command = ("finetune", model, training, "--task", "classification", "--output", tmp_path / "model")
    assert model in refuse(capsys, *command) and not (tmp_path / "model").exists()
    assert model in refuse(capsys, "predict", model, training)


def test_packages_that_are_missing(
    capsys: pytest.CaptureFixture, bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = write("ner", tmp_path / "train", 20)
    for package in ("seqeval", "sklearn", "matplotlib"):
        with monkeypatch.context() as patched:
            patched.setitem(sys.modules, package, None)
            error = refuse(capsys, "finetune", bert, training, "--task", "ner", "--output", tmp_path / "model")
        assert f"takes {package}, which is not installed: pip install 'bertfast[train]'" in error


def test_a_head_of_another_size_starts_anew(capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    checkpoint = toys.save_checkpoint(tmp_path / "bert", "BertForSequenceClassification", num_labels=5)
    training = write("classification", tmp_path / "train", 20)
    command = ("finetune", checkpoint, training, "--task", "classification", "--output", tmp_path / "model")
    _, err = run(capsys, *command, "--epochs", "1")
    assert "new, to be trained: classifier.bias, classifier.weight" in err


def test_predict_refuses(capsys: pytest.CaptureFixture, bert: Path, tmp_path: Path) -> None:
    rows = write("classification", tmp_path / "train", 20)
    assert "has no finetune.json" in refuse(capsys, "predict", bert, rows)
    run(capsys, "finetune", bert, rows, "--task", "classification", "--output", tmp_path / "model", "--epochs", "1")
    assert "--metrics" in refuse(capsys, "predict", tmp_path / "model", rows, "--metrics")
    strange = toys.write_table(tmp_path / "strange.jsonl", [{"text": "it", "label": "meh"}])
    target = tmp_path / "out.jsonl"
    error = refuse(capsys, "predict", tmp_path / "model", strange, "--metrics", "--output", target)
    assert "strange.jsonl:1: unknown label 'meh'" in error and not target.exists()
    run(capsys, "predict", tmp_path / "model", strange)  # where the label is not looked at
    for content in ("[]", '{"task": "x"}', '{"task": "qa", "color": 1}', "{"):
        (tmp_path / "model" / "finetune.json").write_text(content)
        assert "finetune.json" in refuse(capsys, "predict", tmp_path / "model", rows)


def test_metrics_that_are_no_numbers(capsys: pytest.CaptureFixture, bert: Path, tmp_path: Path) -> None:
    """A correlation with something constant: the report says null, and the model is kept all the same."""
    training = write("regression", tmp_path / "train", 20)
    dev = toys.write_table(tmp_path / "dev.jsonl", toys.scores(1))
    command = ("finetune", bert, training, "--task", "regression", "--eval", dev, "--output", tmp_path / "model")
    report = json.loads(run(capsys, *command, "--epochs", "1", "--json")[0])
    assert report["metrics"]["correlation"] is None and math.isfinite(report["metrics"]["rmse"])

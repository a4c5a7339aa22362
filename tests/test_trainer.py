"""transformers' Trainer on a patched model: the losses of a stock one step by step, and that the fused path ran."""

import copy
import gc
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import SETTINGS, make_mask
from torch import Tensor

from bertfast.packing import FlatteningCollator, PackingCollator
from bertfast.patching import patch

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from agreement import assert_same, ran  # noqa: E402
from compatibility import note  # noqa: E402
from live_models import path_of  # noqa: E402
from stock_models import FAMILIES, build, family_of, head_of  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")

CLASSIFIER = "BertForSequenceClassification"
STEPS, BATCH, SEQ_LEN = 4, 3, 11
DROPOUT = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
# float32 rounding is 1e-7 of a loss, and AdamW, which divides a gradient by its own size, makes the most of it: after
# four steps losses were seen to agree to 3e-6. A step with a wrong gradient moves the next loss by more than 1e-3.
LOSS_TOLERANCE = 2e-5
# The bias of the keys changes no softmax. Its gradient is nothing but rounding, and moves it by the learning rate.
KEY_BIAS = re.compile(r"\.(key|k_lin|k)\.bias$")


@pytest.fixture(autouse=True, scope="module")
def _little_garbage_to_look_at() -> Iterator[None]:
    """Every training begins by collecting garbage, which takes longer than its steps where much has been imported."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def _own_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """Training arguments leave their precision in the environment, where the next ones find it."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")


class Recorder(transformers.Trainer):
    """Keeps every loss as it is; the log rounds them."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.losses: list[float] = []

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        loss = super().training_step(*args, **kwargs)
        self.losses.append(loss.item())
        return loss


def examples(name: str) -> list[dict[str, Tensor]]:
    """Enough padded sequences for every step, none of whose labels stand on padding."""
    torch.manual_seed(1)
    family, tokens = family_of(name), head_of(name) == "ForMaskedLM"
    found = []
    for _ in range(2 * STEPS):
        mask = make_mask("right", BATCH, SEQ_LEN)
        ids = torch.randint(2, SETTINGS["vocab_size"], mask.shape).masked_fill(mask == 0, family.pad)
        labels = ids.masked_fill(mask == 0, -100) if tokens else torch.randint(0, 2, (BATCH,))
        found += [{"input_ids": i, "attention_mask": m, "labels": y} for i, m, y in zip(ids, mask, labels, strict=True)]
    return found


def _without_padding(example: Mapping[str, Tensor]) -> dict[str, Any]:
    valid = example["attention_mask"].bool()
    return {
        key: (example[key][valid] if example[key].dim() else example[key]).tolist() for key in ("input_ids", "labels")
    }


def trainer_of(
    model: torch.nn.Module, folder: Path, name: str, collator: PackingCollator | None = None, **arguments: Any
) -> Recorder:
    """A trainer on `examples`, which a collator gets without their padding."""
    settings = {
        "output_dir": str(folder),
        "max_steps": STEPS,
        "per_device_train_batch_size": BATCH,
        "learning_rate": 1e-3,
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
        "logging_strategy": "no",
        "save_strategy": "no",
    }
    arguments = transformers.TrainingArguments(**{**settings, **arguments})
    data = examples(name)
    if collator is not None:
        data = [_without_padding(example) for example in data]
    return Recorder(model=model, args=arguments, train_dataset=data, data_collator=collator)


def train(model: torch.nn.Module, folder: Path, name: str, **arguments: Any) -> list[float]:
    """The loss of every micro-batch."""
    trainer = trainer_of(model, folder, name, **arguments)
    trainer.train()
    return trainer.losses


def assert_close(losses: Iterable[float], expected: Iterable[float], tolerance: float = LOSS_TOLERANCE) -> None:
    for step, (loss, stock) in enumerate(zip(losses, expected, strict=True)):
        assert abs(loss - stock) <= tolerance * stock, f"step {step}: {loss} where stock's is {stock}"


def compare(name: str, folder: Path, micro_batches: int = 1, **arguments: Any) -> None:
    """Train a stock and a patched model alike, on the packed path, to the same losses and weights."""
    stock = build(name, dtype=torch.float32)
    patched = patch(copy.deepcopy(stock))
    theirs = train(stock, folder, name, **arguments)
    ours = train(patched, folder, name, **arguments)
    assert len(theirs) == STEPS * micro_batches and len(set(theirs)) == len(theirs)
    assert_close(ours, theirs)
    assert ran(patched) == {"packed": STEPS * micro_batches}
    weights, others = patched.state_dict(), stock.state_dict()
    for key in others:
        if not KEY_BIAS.search(key):  # single elements may have such gradients too
            assert (weights[key] - others[key]).abs().median() <= 1e-6, key


@pytest.mark.parametrize("head", ["ForSequenceClassification", "ForMaskedLM"])
@pytest.mark.parametrize("family", FAMILIES)
def test_float32(family: str, head: str, tmp_path: Path) -> None:
    name = FAMILIES[family].prefix + head
    compare(name, tmp_path)
    note("Trainer", name, "packed")


def test_gradient_accumulation(tmp_path: Path) -> None:
    for name in ("BertForMaskedLM", "BertForSequenceClassification"):
        compare(name, tmp_path, micro_batches=2, gradient_accumulation_steps=2)
        note("Trainer, gradient accumulation", name, "packed")


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["BertForMaskedLM", "DistilBertForSequenceClassification"])
def test_gradient_checkpointing(name: str, reentrant: bool, tmp_path: Path) -> None:
    how = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
    compare(name, tmp_path, **how)
    note("Trainer, gradient checkpointing", name, "packed")


def test_label_smoothing_takes_the_labels_from_the_head(tmp_path: Path) -> None:
    compare("BertForMaskedLM", tmp_path, label_smoothing_factor=0.1)


@pytest.mark.parametrize("name", [*(family.prefix + "ForMaskedLM" for family in FAMILIES.values()), CLASSIFIER])
def test_batches_that_never_were_padded(name: str, tmp_path: Path) -> None:
    """The losses of stock models that train on the same sequences, padded."""
    stock = build(name, dtype=torch.float32)
    patched = patch(copy.deepcopy(stock))
    collator = FlatteningCollator(token_labels=name != CLASSIFIER)
    assert_close(train(patched, tmp_path, name, collator=collator), train(stock, tmp_path, name))
    assert ran(patched) == {"packed": STEPS}
    note("Trainer, batches that never were padded", name, "packed")


def test_adapters_of_peft(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    losses = []
    for model in (build(CLASSIFIER, dtype=torch.float32), patch(build(CLASSIFIER, dtype=torch.float32))):
        torch.manual_seed(3)
        config = peft.LoraConfig(task_type="SEQ_CLS", r=4, target_modules=["query", "value"], init_lora_weights=False)
        adapted = peft.get_peft_model(model, config)
        losses.append(train(adapted, tmp_path, CLASSIFIER))
    assert_close(losses[1], losses[0])
    assert ran(model) == {"stock": STEPS}
    merged = adapted.merge_and_unload().eval()
    merged(torch.tensor([[5, 6, 7]]))
    assert ran(merged) == {"stock": STEPS, "packed": 1}
    note("Trainer, PEFT LoRA", CLASSIFIER, "stock")


@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert"])
def test_bfloat16_autocast(family: str, tmp_path: Path) -> None:
    name = FAMILIES[family].prefix + "ForSequenceClassification"
    gold_model = build(name, dtype=torch.float32)
    stock, patched = copy.deepcopy(gold_model), patch(copy.deepcopy(gold_model))
    gold = train(gold_model, tmp_path, name)
    theirs, ours = (train(model, tmp_path, name, bf16=True) for model in (stock, patched))
    assert theirs != gold  # autocast was on
    # No further from float32 than stock code is, by its own worst step, and the unit of bfloat16.
    worst = max(abs(a - b) for a, b in zip(theirs, gold, strict=True))
    scale = max(gold)
    for loss, exact in zip(ours, gold, strict=True):
        assert abs(loss - exact) <= 2 * worst + torch.finfo(torch.bfloat16).eps * scale, (ours, theirs, gold)
    assert ran(patched) == {"packed": STEPS}
    note("Trainer, bf16 autocast", name, "packed")


@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert"])
def test_resumed_training_is_uninterrupted_training(family: str, tmp_path: Path) -> None:
    """With dropout: its seeds come from the generators whose state the checkpoint has."""
    name = FAMILIES[family].prefix + "ForSequenceClassification"
    saves = {"save_strategy": "steps", "save_steps": STEPS // 2}
    model = patch(build(name, dtype=torch.float32, **DROPOUT))
    whole = train(model, tmp_path / "whole", name, **saves)
    again = patch(build(name, dtype=torch.float32, **DROPOUT))
    with torch.no_grad():
        for parameter in again.parameters():
            parameter.zero_()  # all of it has to come from the checkpoint
    trainer = trainer_of(again, tmp_path / "again", name, **saves)
    trainer.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{STEPS // 2}"))
    assert trainer.losses == whole[STEPS // 2 :]
    assert_same(again.state_dict(), model.state_dict(), 0.0)
    assert set(ran(again)) == {"packed"}
    note("Trainer, resumed with dropout", name, "packed")


def test_saved_models_are_stock_models(tmp_path: Path) -> None:
    name = "BertForMaskedLM"  # two of its parameters share their memory
    patched = patch(build(name, dtype=torch.float32))
    trainer = trainer_of(patched, tmp_path, name)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    loaded = transformers.BertForMaskedLM.from_pretrained(tmp_path / "saved")
    assert type(loaded.bert.encoder) is transformers.models.bert.modeling_bert.BertEncoder
    assert_same(loaded.state_dict(), patched.state_dict(), 0.0)


@pytest.mark.parametrize("family", FAMILIES)
def test_evaluation_and_prediction(family: str, tmp_path: Path) -> None:
    name = FAMILIES[family].prefix + "ForTokenClassification"
    stock = build(name, dtype=torch.float32)
    patched = patch(copy.deepcopy(stock))

    def evaluate(model: torch.nn.Module) -> Mapping[str, Tensor]:
        labelled = [
            {**e, "labels": (e["input_ids"] % 2).masked_fill(e["attention_mask"] == 0, -100)} for e in examples(name)
        ]
        trainer = trainer_of(model, tmp_path, name, per_device_eval_batch_size=BATCH)
        loss = trainer.evaluate(labelled)["eval_loss"]
        logits = torch.from_numpy(trainer.predict(labelled).predictions)
        valid = torch.stack([example["attention_mask"] for example in labelled]).bool()
        return {"loss": torch.tensor(loss), "logits": logits[valid]}

    assert_same(evaluate(patched), evaluate(stock), LOSS_TOLERANCE)
    note("Trainer, evaluation", name, path_of(patched))
    assert path_of(patched) == "packed"

"""Pre-training: both of BERT's tasks, in one process or many, from the first step or from a checkpoint.

The gradient of a step is exactly that of the mean over all its labelled tokens plus the mean over all its pairs,
however these are divided among processes and parts of the step.
"""

import math
import random
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_

from bertfast.errors import BertfastError, CheckpointError
from bertfast.heads import BertForPreTraining
from bertfast.train.checkpoints import SUMS, Checkpoints
from bertfast.train.distributed import Processes
from bertfast.train.interrupts import noted_interrupts, unnoticed_by_children
from bertfast.train.optimizers import linear_schedule, make_optimizer
from bertfast.train.progress import CURVE, Log, draw_curves, read_log
from bertfast.train.recomputation import recompute_layers
from bertfast.train.saving import write_together

PRECISIONS = ("float32", "bfloat16")
STATE = "training_state.pt"
_PREFIX = "model."  # of the weights' names in `_Objective`
Record = dict[str, float]


class DivergedError(BertfastError):
    """The loss or its gradient is no longer finite."""


class InterruptedTraining(Exception):
    """The training was told to stop, and has been saved."""


class Batches(Protocol):
    """Where the examples come from: the same for the same epoch and start, whatever was asked before."""

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Any]: ...


@dataclass(frozen=True)
class PretrainingSettings:
    """steps: updates of the weights in all. accumulate: how many batches of each process one update is computed from.

    learning_rate: the highest; it rises over the `warmup` first steps and falls over the rest. optimizer: see
    OPTIMIZERS. clip: the gradient's largest norm. precision: "bfloat16" computes under autocast, on float32 weights.
    recompute: save memory, see `recompute_layers`. sharded: each process keeps only its share of the weights and of the
    optimizer's state (FSDP). save_every: steps between checkpoints. seed: of dropout.
    """

    steps: int
    accumulate: int = 1
    learning_rate: float = 1e-4
    warmup: int = 0
    weight_decay: float = 0.01
    optimizer: str = "adamw"
    clip: float = 1.0
    precision: str = "float32"
    recompute: bool = False
    sharded: bool = False
    save_every: int = 1000
    seed: int = 0


class _Position(NamedTuple):
    """The next batch: which epoch, and how many batches of it are done."""

    epoch: int = 0
    batch: int = 0


class _Sums(NamedTuple):
    """What a step adds up over its parts and processes."""

    mlm_loss: float
    nsp_loss: float
    mlm_correct: float
    nsp_correct: float
    tokens: float
    interrupted: float


class _Objective(nn.Module):
    """What DistributedDataParallel watches: examples in, the loss and its summands out."""

    def __init__(self, model: BertForPreTraining) -> None:
        super().__init__()
        self.model = model

    def forward(self, examples: Any, labelled: int, sequences: int) -> tuple[Tensor, Tensor]:
        """sum of the words' losses / labelled + sum of the pairs' losses / sequences, and (4,) of the first `_Sums`."""
        batch, follows = examples.batch, examples.next_sentence_labels
        out = self.model.bert(batch, pad_output=False)
        words = self.model.cls.predictions.loss(out.last_hidden_state, batch.labels, reduction="sum")
        scores = self.model.cls.seq_relationship(out.pooler_output).float()
        pairs = F.cross_entropy(scores, follows, reduction="sum")
        correct = (scores.argmax(1) == follows).sum()
        sums = torch.stack([t.detach().double() for t in (words.loss, pairs, words.correct, correct)])
        return words.loss / max(labelled, 1) + pairs / max(sequences, 1), sums


class Pretraining:
    """A training of a model on batches, in a directory of its own.

    model: on any device. batches: this process's. save_vocabulary: writes the tokenizer's files into a directory, so
    that transformers and bertfast can use the checkpoints. processes: this one and the others.
    """

    def __init__(
        self,
        model: BertForPreTraining,
        batches: Batches,
        save_vocabulary: Callable[[Path], Any],
        settings: PretrainingSettings,
        directory: Path,
        keep: int = 2,
        processes: Processes = Processes(),  # noqa: B008 (immutable)
    ) -> None:
        self.settings, self.directory, self.processes = settings, directory, processes
        self.checkpoints = Checkpoints(directory / "checkpoints", keep)
        self.model = model.to(processes.device).train()
        if settings.recompute:
            recompute_layers(model.bert.encoder)
        self._objective = _parallel(_Objective(model), processes, settings.sharded)
        self._batches, self._save_vocabulary = batches, save_vocabulary
        self.optimizer = make_optimizer(settings.optimizer, model, settings.learning_rate, settings.weight_decay)
        self.schedule = linear_schedule(self.optimizer, settings.warmup, settings.steps)
        self.step, self._position, self._saved = 0, _Position(), 0
        torch.manual_seed(settings.seed + processes.rank)

    def resume(self) -> int:
        """Go on from the newest checkpoint, where there is one. Returns how many steps are done."""
        with self.processes.together():
            newest = self.checkpoints.newest() if self.processes.first else None
        newest = self.processes.from_first(newest)
        with self.processes.together():
            if newest is not None:
                self._load(newest)
        return self.step

    def run(
        self, report: Callable[[Record], Any] = lambda record: None, noticed: Callable[[], Any] = lambda: None
    ) -> None:
        """Train until the last step and leave the model, its vocabulary and the curve in the directory.

        report: called with what the log says of each step, in the first process. noticed: called when a signal to stop
        has come, before the step is finished and saved.

        Raises InterruptedTraining after Ctrl-C or SIGTERM, when a checkpoint has been saved; DivergedError where the
        loss is not finite; CheckpointError where the disk is full; and what `batches` raises.
        """
        with (
            self._log() as log,
            closing(self._stream()) as stream,
            noted_interrupts(noticed, once=self.processes.count == 1) as interrupted,
        ):
            while self.step < self.settings.steps:
                record, stop = self._update(stream, interrupted)
                if self.processes.first:
                    log.write(self.step, record)
                    report({"step": self.step, **record})
                last = self.step == self.settings.steps
                if stop or last or self.step % self.settings.save_every == 0:
                    self._save(log)
                if stop and not last:
                    raise InterruptedTraining(f"interrupted after step {self.step} of {self.settings.steps}, and saved")
        with self.processes.together():
            if self.processes.first:
                self._finish()

    def _log(self) -> AbstractContextManager[Any]:
        with self.processes.together():
            return Log(self.directory, self.step) if self.processes.first else nullcontext()

    def _stream(self) -> Iterator[tuple[Any, _Position]]:
        """The batches from the position on, epoch after epoch, each with the position behind it."""
        epoch, start = self._position
        while True:
            end = start
            for examples in self._batches.epoch(epoch, start):
                end += 1
                yield examples, _Position(epoch, end)
            if end == 0:
                raise BertfastError("the texts hold nothing to train on: not a single batch")
            epoch, start = epoch + 1, 0

    def _update(self, stream: Iterator[tuple[Any, _Position]], interrupted: Callable[[], bool]) -> tuple[Record, bool]:
        """One step. Returns its record, and whether one of the processes was told to stop."""
        begin, settings = time.perf_counter(), self.settings
        with unnoticed_by_children():  # the workers that make batches
            parts = [next(stream) for _ in range(settings.accumulate)]
        labelled = sum(examples.labelled for examples, _ in parts)
        sequences = sum(examples.sequences for examples, _ in parts)
        sums = self._backward([examples for examples, _ in parts], labelled, sequences)
        norm = clip_grad_norm_(self.model.parameters(), settings.clip)
        norm = norm.full_tensor() if settings.sharded else norm
        tokens = sum(examples.batch.packing.tokens for examples, _ in parts)
        sums = self.processes.total(torch.cat((sums, sums.new_tensor([tokens, interrupted()]))))
        *found, norm = torch.cat((sums, norm.detach().double()[None])).tolist()
        total = _Sums(*found)
        record = self._record(total, labelled, sequences) | {"gradient_norm": norm}
        self._check_finite(record)
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()
        self.step, self._position = self.step + 1, parts[-1][1]
        return record | {"tokens": int(total.tokens), "seconds": time.perf_counter() - begin}, total.interrupted > 0

    def _backward(self, parts: Sequence[Any], labelled: int, sequences: int) -> Tensor:
        """The gradients of a step; DDP averages them over processes after its last part. Returns (4,) of `_Sums`."""
        objective, device, sums = self._objective, self.processes.device, 0
        for i, examples in enumerate(parts, 1):
            waits = i < len(parts) and isinstance(objective, DistributedDataParallel)
            examples = examples._replace(
                batch=examples.batch.to(device), next_sentence_labels=examples.next_sentence_labels.to(device)
            )
            with objective.no_sync() if waits else nullcontext():
                with torch.autocast(device.type, torch.bfloat16, enabled=self.settings.precision == "bfloat16"):
                    loss, found = objective(examples, labelled, sequences)
                # The average over processes is the sum again: each has divided by the counts of all of them.
                (loss * self.processes.count).backward()
            sums = sums + found
        return sums

    def _record(self, total: _Sums, labelled: int, sequences: int) -> Record:
        mlm, nsp = total.mlm_loss / max(labelled, 1), total.nsp_loss / max(sequences, 1)
        return {
            "loss": mlm + nsp,
            "mlm_loss": mlm,
            "nsp_loss": nsp,
            "mlm_accuracy": total.mlm_correct / max(labelled, 1),
            "nsp_accuracy": total.nsp_correct / max(sequences, 1),
            "learning_rate": self.schedule.get_last_lr()[0],
        }

    def _check_finite(self, record: Record) -> None:
        wrong = [name.replace("_", " ") for name in ("loss", "gradient_norm") if not math.isfinite(record[name])]
        if wrong:
            saved = f"the checkpoint of step {self._saved} stands" if self._saved else "there is no checkpoint yet"
            raise DivergedError(
                f"the {' and the '.join(wrong)} of step {self.step + 1} is not finite: {saved}; "
                "start anew with a lower learning rate or a longer warm-up"
            )

    def _save(self, log: Log) -> None:
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict  # slow to import

        whole = StateDictOptions(full_state_dict=True, cpu_offload=True)  # gathered by the first process alone
        weights, optimizer = get_state_dict(self._objective, self.optimizer, options=whole)
        state = {
            "step": self.step,
            "position": tuple(self._position),
            "optimizer": optimizer,
            "schedule": self.schedule.state_dict(),
            "generators": self.processes.gather(_generator_states(self.processes.device)),
        }
        with self.processes.together():
            if self.processes.first:
                log.sync()
                self.checkpoints.save(self.step, lambda directory: self._write(directory, weights, state))
        self._saved = self.step

    def _write(self, directory: Path, weights: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Everything that `_load` reads, and what transformers does."""
        with torch.device("meta"):
            model = BertForPreTraining(self.model.config)
        model.load_state_dict({key.removeprefix(_PREFIX): t for key, t in weights.items()}, assign=True)
        model.tie_weights()
        model.save_pretrained(directory)
        self._save_vocabulary(directory)
        torch.save(state, directory / STATE)

    def _load(self, checkpoint: Path) -> None:
        from torch.distributed.checkpoint.state_dict import StateDictOptions, set_state_dict

        stored = BertForPreTraining.from_pretrained(checkpoint)
        weights = {_PREFIX + key: t for key, t in stored.state_dict().items()}
        try:
            state = torch.load(checkpoint / STATE, map_location="cpu", weights_only=True)
        except (OSError, RuntimeError) as error:
            raise CheckpointError(f"{checkpoint / STATE} cannot be read: {error}") from error
        set_state_dict(
            self._objective,
            self.optimizer,
            model_state_dict=weights,
            optim_state_dict=state["optimizer"],
            options=StateDictOptions(full_state_dict=True),
        )
        self.schedule.load_state_dict(state["schedule"])
        self.step = self._saved = state["step"]
        self._position = _Position(*state["position"])
        _restore_generators(state["generators"][self.processes.rank], self.processes.device)

    def _finish(self) -> None:
        """The finished model with its vocabulary, which are the last checkpoint's, and the curve, in the directory."""

        def write(folder: Path) -> None:
            for path in self.checkpoints.place(self.step).iterdir():
                if path.name not in (STATE, SUMS):
                    shutil.copy(path, folder)
            draw_curves(read_log(self.directory), PANELS, folder / CURVE)

        write_together(self.directory, write)


def _parallel(objective: _Objective, processes: Processes, sharded: bool) -> nn.Module:
    """The objective of one process among several."""
    if processes.count == 1:
        return objective
    if not sharded:
        return DistributedDataParallel(objective)
    from torch.distributed.fsdp import fully_shard

    mesh = dist.init_device_mesh(processes.device.type, (processes.count,))
    for layer in objective.model.bert.encoder.layer:
        fully_shard(layer, mesh=mesh)
    return fully_shard(objective, mesh=mesh)


PANELS = {
    "loss (nats)": {"mlm_loss": "masked words", "nsp_loss": "next sentence"},
    "accuracy": {"mlm_accuracy": "masked words", "nsp_accuracy": "next sentence"},
}


def _generator_states(device: torch.device) -> dict[str, Any]:
    """What every random generator of this process would draw next."""
    name, keys, *rest = np.random.get_state()
    states = {"python": random.getstate(), "numpy": (name, keys.tolist(), *rest), "torch": torch.get_rng_state()}
    return states | ({"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {})


def _restore_generators(states: dict[str, Any], device: torch.device) -> None:
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    torch.set_rng_state(states["torch"])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states["cuda"], device)

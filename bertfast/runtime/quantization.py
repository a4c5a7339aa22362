"""quantize(model, texts): inference in int8 on the CPU, if the model's answers to these texts stay what they were."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import torch
from torch import nn

from bertfast import backend, machine, native
from bertfast.calls import STATE
from bertfast.errors import BackendError, QuantizationError, UnsupportedModelError
from bertfast.model import BertEncoder
from bertfast.patching import backbones, patch, root_of, unpatch
from bertfast.runtime.answers import Agreement
from bertfast.runtime.places import Place, Places
from bertfast.runtime.questions import Answers, Questions

# Texts that a place's own damage is measured with: it only has to be told from that of others.
_FEW = 64


@dataclass(frozen=True)
class QuantizationReport:
    """What `quantize` measured. `str()` prints it, `to_dict()` is for JSON.

    passed: whether the limits are kept. limits: those that were asked for.
    outputs: how each output agrees with what it was without int8.
    texts: how many were asked. truncated: how many of them were too long and were cut.
    places: GEMMs in all. kept: those that are not int8. kept_in: what these multiply instead.
    damage: for each layer, how far the outputs move when it alone is int8: the mean of |b - a| / |a| over some of the
        texts, of the output where it is largest.
    bytes_before, bytes_after: of the packed weights.
    notes: what else there is to know.
    """

    passed: bool
    limits: Mapping[str, float]
    outputs: tuple[Agreement, ...]
    texts: int
    truncated: int
    places: int
    kept: tuple[str, ...]
    kept_in: str
    damage: Mapping[str, float]
    bytes_before: int
    bytes_after: int
    notes: tuple[str, ...] = field(default=())

    def to_dict(self) -> dict[str, Any]:
        """The report in dicts, lists, strings and numbers."""
        found = asdict(self)
        outputs = [{**output, "changed_texts": list(output["changed_texts"])} for output in found["outputs"]]
        return {**found, "outputs": outputs, "kept": list(self.kept), "notes": list(self.notes)}

    def __str__(self) -> str:
        limits = ", ".join(f"{name} {value:g}" for name, value in self.limits.items())
        cut = f", {self.truncated} of them cut" if self.truncated else ""
        lines = [f"int8 {'passes' if self.passed else 'FAILS'} ({limits}) on {self.texts} texts{cut}"]
        lines += [f"  {output.output:<24} {output}" for output in self.outputs]
        int8 = f"{self.places - len(self.kept)} of {self.places} GEMMs in int8"
        lines.append(f"  {int8}, {self.bytes_after / 1e6:.1f} MB packed, before {self.bytes_before / 1e6:.1f}")
        if self.kept:
            lines.append(f"  in {self.kept_in}: {', '.join(self.kept)}")
        lines += [f"  {name:<24} alone moves the outputs by {value:.2%}" for name, value in self.damage.items()]
        return "\n".join([*lines, *(f"  note: {note}" for note in self.notes)])


class _Limits(NamedTuple):
    min_cosine: float
    min_worst_cosine: float
    min_agreement: float

    def allow(self, before: Answers, after: Answers) -> tuple[bool, tuple[Agreement, ...]]:
        """Whether every output keeps them, and how it agrees."""
        found = tuple(Agreement.of(name, answer, after[name]) for name, answer in before.items())
        return all(agreement.passes(*self) for agreement in found), found


def quantize(
    model: Any,
    texts: Iterable,
    *,
    tokenizer: Any = None,
    max_length: int | None = None,
    batch_size: int = 32,
    min_cosine: float = 0.999,
    min_worst_cosine: float = 0.995,
    min_agreement: float = 0.99,
) -> QuantizationReport:
    """Have the GEMMs of the model's inference on the CPU multiply int8, if its answers stay what they were.

    The model answers the texts as it is and in int8. Where the two differ by more than the limits, the GEMMs that do
    most of it, as measured one by one, are kept in bfloat16 (float32 where the processor has none), as few as will do
    and at most half. `unquantize` undoes it, and so do `unpatch` and a further `patch`. Calls of the model from other
    threads meanwhile get some of one and some of the other.

    Weights stay what they are: state_dict, save_pretrained, training and calls that need gradients see no int8. Copies
    and pickles of the model stay int8. Weights that change afterwards are packed anew, in int8; what was measured is of
    those that were there then.

    Args:
        model: what `patch` takes, patched or not (then it is patched), or a native model; float32 or bfloat16, on a
            CPU. It is asked in evaluation mode, whatever mode it is in.
        texts: some hundred that are like those the model is for: strings, or pairs of strings, or batches as the model
            takes them (mappings of tensors, padded to rectangles; labels are not looked at).
        tokenizer: of transformers; sentence-transformers' models have their own, batches need none.
        max_length: tokens to cut texts to; None: as many as the tokenizer and the model take.
        batch_size: texts at once.
        min_cosine, min_worst_cosine: mean and smallest cosine of vectors before and after: a SentenceTransformer's
            embeddings; of a model without a head the mean of each text's hidden states, and what the pooler gives.
        min_agreement: of a head that chooses (a class, each token's class or word, where an answer begins), the share
            of choices that stay; of a head with one number, the share of pairs of texts that it ranks as before.

    Raises QuantizationError, with the report in it, where the limits cannot be kept: the model is then as it was.
    Raises UnsupportedModelError for what is no such model or runs stock code; BackendError where there are no CPU
    kernels; TypeError and ValueError for texts and weights that are not as said, and for weights that are not finite.
    """
    limits = _Limits(min_cosine, min_worst_cosine, min_agreement)
    _check(model, limits, batch_size)
    questions = Questions(model, texts, tokenizer, max_length, batch_size)
    patched_here = [m for _, m, _ in backbones(root_of(model)) if STATE not in m.__dict__]
    if patched_here:
        patch(model)
    places, passed = Places(model), False
    before = places.take()
    try:
        if not places.packed:
            raise ValueError("int8 weights are packed weights: build or patch the model without pack_weights=False")
        with _inference(model):
            report = _Gate(places, questions, limits).run()
        passed = report.passed
    finally:
        if not passed:
            places.put(before)
            if patched_here:
                unpatch(model)
    if not passed:
        raise QuantizationError(
            "in int8 the model's answers differ by more than the limits, even with half of its GEMMs in "
            f'{report.kept_in}; it was left as it was. Use compute="bf16" instead, or allow more.\n{report}',
            report,
        )
    return report


def unquantize(model: Any) -> Any:
    """Undo `quantize`: GEMMs multiply again what they did before. Returns the same object.

    Does nothing to a model that is not quantised, and leaves a patched one patched.
    """
    root = root_of(model)
    if any(STATE in m.__dict__ for _, m, _ in backbones(root)) or any(
        isinstance(m, BertEncoder) for m in root.modules()
    ):
        Places(model).set({})
    return model


class _Gate:
    """Measures, and finds what has to be kept out of int8."""

    def __init__(self, places: Places, questions: Questions, limits: _Limits) -> None:
        self._places, self._questions, self._limits = places, questions, limits
        self._few = questions.first(_FEW)
        self._kept_in = "bfloat16" if machine.has_bfloat16() else "float32"

    def run(self) -> QuantizationReport:
        """The report, with the places set to what it says."""
        places, every = self._places, self._places.all
        places.set({})
        before, few = self._questions.ask(), self._few.ask()
        bytes_before = places.nbytes
        damage = {layer: self._damage(few, [p for p in every if p.layer == layer]) for layer in places.layers}
        kept: list[Place] = []
        passed, agreements = self._try(before, kept)
        if unused := places.unused():
            raise UnsupportedModelError(f"{unused[0].layer} did not run on packed weights: see bertfast.explain(model)")
        if not passed:
            worst = sorted(every, key=lambda place: -self._damage(few, [place]))
            low, high = 0, len(every) // 2
            passed, agreements = self._try(before, worst[:high])
            while passed and high - low > 1:  # `low` of them are too few, `high` will do
                middle = (low + high) // 2
                if self._try(before, worst[:middle])[0]:
                    high = middle
                else:
                    low = middle
            kept = worst[:high]
            passed, agreements = self._try(before, kept)
        return QuantizationReport(
            passed,
            self._limits._asdict(),
            agreements,
            len(self._questions),
            self._questions.truncated,
            len(every),
            tuple(str(place) for place in every if place in kept),
            self._kept_in,
            damage,
            bytes_before,
            places.nbytes,
            _notes(),
        )

    def _try(self, before: Answers, kept: list[Place]) -> tuple[bool, tuple[Agreement, ...]]:
        """Everything in int8 but these."""
        self._places.set({place: self._kept_in if place in kept else "int8" for place in self._places.all})
        return self._limits.allow(before, self._questions.ask())

    def _damage(self, before: Answers, quantised: list[Place]) -> float:
        """How far the outputs move where only these are int8.

        The outputs and not the hidden states behind the layer: they are what counts, whatever the head, and the
        encoder runs as it will.
        """
        self._places.set(dict.fromkeys(quantised, "int8"))
        after = self._few.ask()
        return max(answer.errors(after[name]).mean().item() for name, answer in before.items())


def _notes() -> tuple[str, ...]:
    if native.cpu.isa() in ("avx512_vnni", "avx512_bf16"):
        return ()
    return (f"{native.cpu.isa()} has no instructions for int8 (AVX512_VNNI): int8 saves memory here, but no time",)


def _check(model: Any, limits: _Limits, batch_size: int) -> None:
    for name, value in limits._asdict().items():
        if not 0 <= value <= 1:
            raise ValueError(f"{name} must be between 0 and 1, not {value}")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, not {batch_size}")
    if native.cpu is None:
        raise BackendError(f"int8 takes the CPU kernels: {native.cpu_reason}")
    if backend.current() not in ("auto", "cpu"):
        raise BackendError(f"int8 takes the CPU kernels, and the backend in use is {backend.current()}")
    root = root_of(model)
    for name, parameter in root.named_parameters():
        if parameter.device.type != "cpu":
            raise ValueError(f"{name} is on {parameter.device}: int8 is for CPUs, move the model with .to('cpu')")
        if not bool(torch.isfinite(parameter).all()):
            raise ValueError(f"{name} holds NaN or infinite numbers: int8 can make nothing of them")
        if parameter.dtype not in (torch.float32, torch.bfloat16):
            raise TypeError(f"{name} is {parameter.dtype}: convert the model with .float() or .bfloat16() before")


@contextmanager
def _inference(model: Any) -> Iterator[None]:
    """Evaluation mode, without gradients and autocast."""
    root: nn.Module = root_of(model)
    training = [module for module in root.modules() if module.training]
    root.eval()
    try:
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            yield
    finally:
        for module in training:
            module.training = True

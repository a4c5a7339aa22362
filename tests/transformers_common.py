"""transformers' own common tests of models, and for them small models of every family that `patch` knows.

The tests are those in the source distribution of exactly the installed version: `make test` unpacks it beside its
environment, and nothing of it is kept here. It carries the mixin that every model of transformers is tested with, and
one for training, but neither the tests of single models, in whose place `case_of` stands, nor the mixins for generation
and export. Those for sharding need modules that are not distributed either, and the one for pipelines needs the hub.
"""

import functools
import importlib
import os
import random
import re
import sys
import unittest
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import transformers
from small_models import SETTINGS, WEIGHT_STD
from stock_models import FAMILIES, LEGACY, Family
from torch import Tensor
from transformers import utils

import bertfast

# Neither we nor the numbers in transformers' tests have seen them run elsewhere with these models.
os.environ.setdefault("TRANSFORMERS_TEST_DEVICE", "cpu")

DIRECTORY = Path(sys.prefix) / "transformers-tests" / transformers.__version__
_PACKAGE = "transformers_tests"  # "tests" in the source distribution, which our own are as well

# Tests that say nothing about a model that is only an encoder of text, and are skipped for those.
_OTHER_KINDS = re.compile(
    r"_(text|image|audio|video)_features_|composite|subconfig|encoder_decoder|batched_and_grouped|sliding_window"
    r"|_moe_|router_logits|_rope|_tp_plan"
)
# A call of which the test reads what it returned at padding positions, which patched models leave zero, beside one that
# stock code has to run: they get batches without padding.
_READS_PADDING = "test_feed_forward_chunking"
# It asks for the mixin for generation, which is not distributed.
_CANNOT_RUN = "test_generation_tester_mixin_inheritance"
# What costs time and shows nothing more: the kernels that PyTorch's own attention may choose from, which is on for half
# of the cases; that loading casts weights, in seven dtypes and every way to say so, in more than one family.
_OTHER_KERNELS = "_sdpa_kernels"
_FOR_BERT = "test_bc_torch_dtype"


def _module(name: str) -> ModuleType:
    """A module of the unpacked tests, which import one another as the parts of a package."""
    if _PACKAGE not in sys.modules:
        package = ModuleType(_PACKAGE)
        package.__path__ = [str(DIRECTORY)]
        sys.modules[_PACKAGE] = package
        # The two that are not distributed, and that the others have among their bases.
        for place, mixin in (
            ("generation.test_utils", "GenerationTesterMixin"),
            ("exporters.test_export", "ExportTesterMixin"),
        ):
            stub = ModuleType(f"{_PACKAGE}.{place}")
            setattr(stub, mixin, type(mixin, (), {}))
            sys.modules[stub.__name__] = stub
    with warnings.catch_warnings():  # pytest does not know transformers' marks
        warnings.simplefilter("ignore", pytest.PytestUnknownMarkWarning)
        return importlib.import_module(f"{_PACKAGE}.{name}")


class ModelTester:
    """What the mixins ask for: sizes, a small configuration of a family, and a batch."""

    is_training = True
    padded = True
    batch_size, seq_length, num_choices = 5, 7, 3
    hidden_size, num_hidden_layers, num_attention_heads = 32, 2, 4

    def __init__(self, family: Family) -> None:
        self.family = family
        # What the mixin for training trains, by the name of the kind that it has in mind.
        self.causal_lm_class = getattr(transformers, family.prefix + "ForMaskedLM")

    def get_config(self) -> Any:
        """Small, with dropout and large weights, and without a choice of the attention."""
        names = self.family.names or {}
        settings = {
            **SETTINGS,
            "hidden_size": self.hidden_size,
            "num_hidden_layers": self.num_hidden_layers,
            "num_attention_heads": self.num_attention_heads,
            "intermediate_size": 37,
            "hidden_dropout_prob": 0.1,
            "attention_probs_dropout_prob": 0.1,
            "initializer_range": WEIGHT_STD,
            "pad_token_id": self.family.pad,
            **(self.family.settings or {}),
        }
        kind = getattr(transformers, self.family.prefix + "Config")
        return kind(**{names.get(key, key): value for key, value in settings.items()})

    def prepare_config_and_inputs_for_common(self) -> tuple[Any, dict[str, Tensor]]:
        """The configuration, and a batch with padding anywhere but in the first column."""
        common = _module("test_modeling_common")
        shape, config = [self.batch_size, self.seq_length], self.get_config()
        # No padding tokens: models that count positions by them give other results for the embeddings of the tokens.
        ids = common.ids_tensor(shape, config.vocab_size - 2) + 2
        mask = common.random_attention_mask(shape) if self.padded else torch.ones_like(ids)
        if self.family is FAMILIES["mpnet"]:  # which is not packed where there is padding between tokens
            mask = mask.sort(dim=1, descending=True).values
        inputs = {"input_ids": ids, "attention_mask": mask}
        if self.family.token_types:
            inputs["token_type_ids"] = common.ids_tensor(shape, config.type_vocab_size)
        return config, inputs


class _ForPreTraining:
    """Adds the labels of the heads for pre-training, each of which takes its own."""

    model_tester: ModelTester

    def _prepare_for_class(self, inputs_dict: dict, model_class: type, return_labels: bool = False) -> dict:
        inputs = super()._prepare_for_class(inputs_dict, model_class, return_labels=return_labels)
        if return_labels and model_class.__name__.endswith("ForPreTraining"):
            labels = torch.zeros_like(inputs["input_ids"])
            inputs["labels"] = labels
            if model_class.__name__ == "BertForPreTraining":
                inputs["next_sentence_label"] = labels[:, 0]
        return inputs


_FLAGS = {
    "distilbert": {"test_resize_position_embeddings": True},  # the others cannot
    "mpnet": {"test_pruning": False},  # which its relative positions do not survive
}
# Where a family is the code of another one under other names, as these are RoBERTa's, a few are enough.
_HEADS = dict.fromkeys(("xlm-roberta", "camembert"), ("Model", "ForMaskedLM", "ForQuestionAnswering"))


@functools.cache
def case_of(name: str) -> type[unittest.TestCase]:
    """transformers' common tests for the models of this family."""
    family = FAMILIES[name]
    heads = ("Model", *family.heads)
    mixins: tuple[type, ...] = (_module("test_modeling_common").ModelTesterMixin,)
    if not LEGACY:
        mixins += (_module("test_training_mixin").TrainingTesterMixin,)
    content = {
        "model_tester": ModelTester(family),
        "all_model_classes": tuple(getattr(transformers, family.prefix + head) for head in _HEADS.get(name, heads)),
        "test_can_init_all_missing_weights_before_2023": True,
        # A model learns its batch by heart in a third of the steps, if they are larger.
        "training_overfit_seq_length": 24,
        "training_overfit_steps": 100,
        "training_overfit_learning_rate": 4e-3,
        **_FLAGS.get(name, {}),
    }
    return type(f"{family.prefix}ModelTest", (_ForPreTraining, *mixins, unittest.TestCase), content)


def names_of(name: str) -> list[str]:
    """The names of the tests, without those that are skipped on this machine before they begin, or left out above."""
    case = case_of(name)
    return [
        test
        for test in unittest.TestLoader().getTestCaseNames(case)
        if not getattr(getattr(case, test), "__unittest_skip__", False)
        and not _OTHER_KINDS.search(test)
        and test != _CANNOT_RUN
        and not test.endswith(_OTHER_KERNELS)
        and (test != _FOR_BERT or name == "bert")
    ]


@dataclass(frozen=True)
class Call:
    """What the test got from one call of a model.

    model: the model's class. training: whether dropout was on. mask: the attention mask that was given, if any.
    kind: the class of what was returned. tensors: those in it, by their place.
    """

    model: str
    training: bool
    mask: Tensor | None
    kind: str
    tensors: dict[str, Tensor]


@dataclass(frozen=True)
class Outcome:
    """What came of one test.

    problems: failures and errors with their tracebacks. skips: what was skipped and why. Both by subtest.
    skipped: why the whole test was skipped, if it was.
    calls: those that the test made of models. models: those that were made.
    """

    problems: tuple[str, ...]
    skips: tuple[tuple[str, str], ...]
    skipped: str | None
    calls: tuple[Call, ...]
    models: tuple[Any, ...]

    @property
    def paths(self) -> Counter[str]:
        """How often each path ran in the models, which are patched."""
        paths: Counter[str] = Counter()
        for model in self.models:
            for backbone in bertfast.explain(model).backbones:
                if not backbone.name:  # once, and not again as a part of the task model around it
                    paths.update(backbone.calls)
        return paths


def run(name: str, test: str, patch: Callable[[Any], Any] | None = None) -> Outcome:
    """Run one of the tests; every model of transformers that it makes is patched, at the end of its construction.

    Loading makes a model first and fills it later, so that those are patched before they have their weights. Copies
    of a patched model are patched. Classes that a test derives stay stock, which is what `patch` does to them.

    The seed is fixed, as the tolerances of the tests do not hold for every draw of weights.
    """
    _try_dtypes()
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    _module("test_modeling_common").global_rng.seed(0)
    case, result = case_of(name)(test), unittest.TestResult()
    case.model_tester.padded = test != _READS_PADDING
    models: list[Any] = []
    calls: list[Call] = []
    with _construction(models, patch), _calls(calls):
        case.run(result)
    assert result.testsRun == 1
    return Outcome(
        tuple(f"{which}\n{trace}" for which, trace in result.failures + result.errors),
        tuple((str(which), reason) for which, reason in result.skipped),
        next((reason for which, reason in result.skipped if which is case), None),
        tuple(calls),
        tuple(models),
    )


def _try_dtypes() -> None:
    """Some tests ask whether a dtype works, and transformers finds that out once, with numbers from the generator."""
    device = _module("test_modeling_common").torch_device
    utils.is_torch_fp16_available_on_device(device)
    utils.is_torch_bf16_available_on_device(device)


@contextmanager
def _construction(models: list[Any], patch: Callable[[Any], Any] | None) -> Iterator[None]:
    """Patches every model, and the model inside a task model before that, when its weights are first drawn.

    There every construction ends, while not all of them in transformers 4 call `post_init`.
    """
    stock = transformers.PreTrainedModel.init_weights

    def init_weights(self: Any) -> None:
        stock(self)
        if type(self).__module__.startswith("transformers.models."):
            if all(model is not self for model in models):
                models.append(self)
            if patch is not None:
                patch(self)

    with mock.patch.object(transformers.PreTrainedModel, "init_weights", init_weights):
        yield


@contextmanager
def _calls(calls: list[Call]) -> Iterator[None]:
    """Notes the calls of models that no other model makes.

    Dropout draws from the generator in ways of its own in a patched model, which must not change what comes after.
    """
    stock = torch.nn.Module.__call__
    inside = False

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal inside
        if inside:
            return stock(self, *args, **kwargs)
        inside, generator = True, torch.get_rng_state()
        try:
            output = stock(self, *args, **kwargs)
        finally:
            inside = False
            torch.set_rng_state(generator)
        tensors = {place: tensor.detach().clone() for place, tensor in _tensors(output)}
        mask = kwargs.get("attention_mask")
        calls.append(Call(type(self).__name__, self.training, mask, type(output).__name__, tensors))
        return output

    with mock.patch.object(transformers.PreTrainedModel, "__call__", call):
        yield


def _tensors(output: Any, place: str = "") -> Iterator[tuple[str, Tensor]]:
    if isinstance(output, Tensor):
        yield place, output
    elif isinstance(output, Mapping):
        for key, value in output.items():
            yield from _tensors(value, f"{place}.{key}")
    elif isinstance(output, (tuple, list)):
        for i, value in enumerate(output):
            yield from _tensors(value, f"{place}[{i}]")


# Relative to the largest value. Weights of these models are small and the fused ops round less often than stock code:
# on a CPU the residual stream stays float32, and it is stock's error, twice ours, that makes most of the difference in
# bfloat16.
_TOLERANCES = {torch.float64: 1e-11, torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}


def differences(patched: Outcome, stock: Outcome) -> list[str]:
    """In what one test did not come to the same with patched models: the verdicts, or what the models returned.

    With dropout, values are not compared; and never those of tokens at padding positions.
    """
    found = list(patched.problems)
    if patched.skips != stock.skips:
        found.append(f"skipped {patched.skips} where stock skipped {stock.skips}")
    if len(patched.calls) != len(stock.calls):
        found.append(f"{len(patched.calls)} calls of models where stock had {len(stock.calls)}")
    for i, (ours, theirs) in enumerate(zip(patched.calls, stock.calls, strict=False)):
        found += [f"call {i}, of a {theirs.model}: {difference}" for difference in _call_differences(ours, theirs)]
    return found


def _call_differences(ours: Call, theirs: Call) -> Iterator[str]:
    if (ours.model, ours.kind, ours.tensors.keys()) != (theirs.model, theirs.kind, theirs.tensors.keys()):
        yield f"a {ours.kind} with {list(ours.tensors)}, and of stock a {theirs.kind} with {list(theirs.tensors)}"
        return
    for place, expected in theirs.tensors.items():
        actual = ours.tensors[place]
        if (actual.shape, actual.dtype) != (expected.shape, expected.dtype):
            yield f"{place}: {actual.dtype} {actual.shape} where stock returned {expected.dtype} {expected.shape}"
        elif not theirs.training and expected.is_floating_point() and expected.numel():
            seen = _visible(expected, theirs.mask)
            error = (_visible(actual, theirs.mask) - seen).abs().max().item()
            if not error <= _TOLERANCES[expected.dtype] * max(1.0, seen.abs().max().item()):
                yield f"{place}: off by {error:.3g}"


def _visible(tensor: Tensor, mask: Tensor | None) -> Tensor:
    """The tensor without what it says about padding. Choices are one more dimension of the mask."""
    if mask is None or tensor.shape[:2] != mask.flatten(0, -2).shape:
        return tensor
    return tensor[mask.flatten(0, -2).bool()]

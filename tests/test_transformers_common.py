"""transformers' own common tests of models come to the same end on patched models as on stock ones.

They show that saving, loading, copying, resizing, checkpointing, the forms of outputs, ... still work. About numbers
they prove little by themselves, since they compare patched models with patched ones: so what every call of a model
returned is compared with stock here, too.
"""

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("parameterized")

from stock_models import FAMILIES
from transformers.utils import logging
from transformers_common import DIRECTORY, case_of, differences, names_of, run

import bertfast

if not DIRECTORY.is_dir():
    pytest.skip(f"needs transformers' own tests in {DIRECTORY}: make test puts them there", allow_module_level=True)


@pytest.fixture(autouse=True)
def _warnings_are_logged() -> Iterator[None]:
    """Some of the tests look for them, and whatever ran before in this process may have turned them off."""
    before = logging.get_verbosity()
    logging.set_verbosity_warning()
    yield
    logging.set_verbosity(before)


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(("family", "test"), [(family, test) for family in FAMILIES for test in names_of(family)])
def test_as_on_stock(family: str, test: str) -> None:
    stock = run(family, test)
    assert not stock.problems, "fails on stock models: " + "\n".join(stock.problems)
    found = differences(run(family, test, bertfast.patch), stock)
    assert not found, "\n".join(found)
    if stock.skipped is not None:
        pytest.skip(f"as on stock: {stock.skipped}")


@pytest.mark.parametrize("family", FAMILIES)
def test_patched_models_ran_fused(family: str) -> None:
    outcomes = [run(family, test, bertfast.patch) for test in ("test_determinism", "test_training")]
    paths = sum((outcome.paths for outcome in outcomes), Counter())
    classes = len(case_of(family).all_model_classes)
    # The heads that read padding, and labels on padding in training, keep calls on the rectangle.
    assert paths["packed"] >= classes and paths["rectangle"] >= classes - 1 and not paths["stock"], paths


def test_a_patch_that_changes_more_is_noticed() -> None:
    def patch(model: Any) -> None:
        model.unused = torch.nn.Parameter(torch.zeros(()))

    stock = run("bert", "test_training_gradient_checkpointing")
    found = differences(run("bert", "test_training_gradient_checkpointing", patch), stock)
    assert "unused in BertForMaskedLM has no gradient" in "".join(found)


def test_a_patch_that_computes_something_else_is_noticed() -> None:
    def patch(model: Any) -> None:
        model.register_forward_pre_hook(
            lambda model, args, kwargs: (args, kwargs | {"attention_mask": None}), with_kwargs=True
        )

    stock = run("bert", "test_determinism")
    found = differences(run("bert", "test_determinism", patch), stock)
    assert found and all("off by" in difference for difference in found)

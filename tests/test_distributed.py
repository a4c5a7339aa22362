"""Patched models under DDP and FSDP2, in two processes that talk over gloo: the gradients of stock models under DDP.

Starting a process takes longer than everything it computes here: two of them run all cases once, before the first test,
and leave what they found in files. MPNet has no gradient checkpointing in transformers.
"""

import copy
import traceback
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from small_models import SETTINGS
from torch import Tensor, nn

from bertfast.errors import UnsupportedModelError
from bertfast.patching import patch, unpatch

transformers = pytest.importorskip("transformers")
if not dist.is_available() or not dist.is_gloo_available():
    pytest.skip("needs torch.distributed with gloo", allow_module_level=True)

from agreement import assert_same  # noqa: E402
from compatibility import note  # noqa: E402
from live_models import GRADIENT_TOLERANCE, path_of  # noqa: E402
from stock_models import FAMILIES, build, call_of, family_of, mask_of  # noqa: E402
from torch.distributed.fsdp import fully_shard  # noqa: E402
from torch.nn.parallel import DistributedDataParallel  # noqa: E402

WAYS = ("DDP", "DDP, gradient checkpointing", "FSDP2", "FSDP2, gradient checkpointing")
NAMES = (*(family.prefix + "ForSequenceClassification" for family in FAMILIES.values()), "BertForMaskedLM")
CASES = [(name, way) for name in NAMES for way in WAYS if not ("checkpointing" in way and name.startswith("MPNet"))]
PROCESSES = 2


def _gradients(model: nn.Module) -> dict[str, Tensor]:
    """The whole gradients, gathered where they are sharded."""
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {name: g.full_tensor() if hasattr(g, "full_tensor") else g for name, g in grads.items()}


def _shard(model: nn.Module) -> nn.Module:
    mesh = dist.init_device_mesh("cpu", (PROCESSES,))
    layers = [m for name, m in model.named_modules() if name.rpartition(".")[0].endswith(".layer")]
    assert len(layers) == model.config.num_hidden_layers
    for layer in layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def _run(model: Any, way: str, call: dict[str, Tensor]) -> dict[str, Tensor]:
    """The loss of one step on this process's share of the batch, and the gradients, averaged over the processes."""
    if "checkpointing" in way:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    wrapped = _shard(model) if "FSDP2" in way else DistributedDataParallel(model)
    loss = wrapped.train()(**call).loss
    loss.backward()
    return {"loss": loss.detach()} | _gradients(model)


def _case(name: str, way: str, rank: int) -> dict[str, Any]:
    call = {key: value.roll(rank, 0) for key, value in call_of(name, mask_of("right")).items()}
    ids = (call["input_ids"] + rank) % SETTINGS["vocab_size"]  # another share for each process
    call["input_ids"] = ids.masked_fill(call["attention_mask"] == 0, family_of(name).pad)
    stock = build(name)
    alone = copy.deepcopy(stock).train()
    alone(**call).loss.backward()
    patched = patch(copy.deepcopy(stock))
    found = {"theirs": _run(stock, "DDP", call), "alone": _gradients(alone), "ours": _run(patched, way, call)}
    found["path"] = path_of(patched)
    if "FSDP2" in way:
        try:
            unpatch(patched)
        except UnsupportedModelError as error:
            found["unpatch"] = str(error)
    return found


def _process(rank: int, folder: str) -> None:
    """What one of the two processes does."""
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", PROCESSES)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=PROCESSES, timeout=timedelta(seconds=60))
    found = {}
    for name, way in CASES:
        try:
            found[name, way] = _case(name, way, rank)
        except Exception:
            found[name, way] = {"error": traceback.format_exc()}
    torch.save(found, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[dict]]:
    """What the cases gave, by process."""
    folder = tmp_path_factory.mktemp("distributed")
    mp.spawn(_process, args=(str(folder),), nprocs=PROCESSES)
    yield [torch.load(folder / f"{rank}.pt") for rank in range(PROCESSES)]


@pytest.mark.parametrize(("name", "way"), CASES)
def test_gradients_are_those_of_stock_models_under_ddp(found: list[dict], name: str, way: str) -> None:
    first, second = (of_process[name, way] for of_process in found)
    for case in (first, second):
        assert "error" not in case, case["error"]
        assert_same(case["ours"], case["theirs"], GRADIENT_TOLERANCE)
    shared = {k: v for k, v in first["ours"].items() if k != "loss"}
    assert_same({k: second["ours"][k] for k in shared}, shared, 0.0)
    # Each process had a share of its own: the gradients are neither's.
    mean = {key: (first["alone"][key] + second["alone"][key]) / 2 for key in first["alone"]}
    assert_same(shared, mean, GRADIENT_TOLERANCE)
    assert not any(torch.allclose(first["alone"][key], shared[key]) for key in shared if "LayerNorm.weight" in key)
    assert {case["path"] for case in (first, second)} == {"packed"}
    note(way, name, "packed")


def test_models_have_to_be_unsharded_before_they_are_unpatched(found: list[dict]) -> None:
    assert "FSDP" in found[0][NAMES[0], "FSDP2"]["unpatch"]

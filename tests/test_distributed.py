"""Patched models under DDP and FSDP2, in two processes that talk over gloo: the gradients of stock models under DDP.

Starting a process takes longer than everything it computes here: two of them run all cases, and leave what they found
in files.
"""

import traceback
from datetime import timedelta
from pathlib import Path
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
from live_models import GRADIENT_TOLERANCE, loss_gradients, path_of  # noqa: E402
from stock_models import FAMILIES, build, call_of, family_of, mask_of  # noqa: E402
from torch.distributed.fsdp import fully_shard  # noqa: E402
from torch.nn.parallel import DistributedDataParallel  # noqa: E402

WAYS = ("DDP", "DDP, gradient checkpointing", "FSDP2", "FSDP2, gradient checkpointing")
NAMES = (*(family.prefix + "ForSequenceClassification" for family in FAMILIES.values()), "BertForMaskedLM")
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


def _call(name: str, rank: int) -> dict[str, Tensor]:
    """This process's share of the batch."""
    call = {key: value.roll(rank, 0) for key, value in call_of(name, mask_of("right")).items()}
    ids = (call["input_ids"] + rank) % SETTINGS["vocab_size"]
    call["input_ids"] = ids.masked_fill(call["attention_mask"] == 0, family_of(name).pad)
    return call


def _patched(name: str, way: str, call: dict[str, Tensor]) -> dict[str, Any]:
    """What a patched model gives, the path it ran, and what unpatching it says while it is wrapped."""
    patched = patch(build(name))
    found = {"ours": _run(patched, way, call), "path": path_of(patched), "unpatching": "done"}
    try:
        unpatch(patched)
    except UnsupportedModelError as error:
        found["unpatching"] = str(error)
    return found


def _process(rank: int, folder: str) -> None:
    """What one of the two processes does."""
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", PROCESSES)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=PROCESSES, timeout=timedelta(seconds=60))
    found: dict[Any, Any] = {}
    for name in NAMES:
        call = _call(name, rank)
        found[name] = {"theirs": _run(build(name), "DDP", call), "alone": loss_gradients(build(name), call)}
        for way in WAYS:
            if "checkpointing" in way and name.startswith("MPNet"):
                continue  # which has none in transformers
            try:
                found[name][way] = _patched(name, way, call)
            except Exception:
                found[name][way] = {"error": traceback.format_exc()}
    torch.save(found, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def _check(way: str, first: dict[str, Any], second: dict[str, Any]) -> None:
    """What two processes found for one model."""
    for process in (first, second):
        case = process[way]
        assert "error" not in case, case["error"]
        assert_same(case["ours"], process["theirs"], GRADIENT_TOLERANCE)
        assert case["path"] == "packed"
        assert case["unpatching"] == "done" if way.startswith("DDP") else "FSDP" in case["unpatching"]
    shared = {key: grad for key, grad in first[way]["ours"].items() if key != "loss"}
    assert_same({key: second[way]["ours"][key] for key in shared}, shared, 0.0)
    # Each process had a share of its own: the gradients are those of both, and neither's.
    alone = first["alone"]
    mean = {key: (alone[key] + second["alone"][key]) / 2 for key in alone}
    assert_same(shared, mean, GRADIENT_TOLERANCE)
    assert not any(torch.allclose(alone[key], shared[key]) for key in shared if key.endswith("weight"))


def test_gradients_are_those_of_stock_models_under_ddp(tmp_path: Path) -> None:
    """One test for all cases: parallel workers would each start two processes for theirs."""
    mp.spawn(_process, args=(str(tmp_path),), nprocs=PROCESSES)
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in range(PROCESSES)]
    wrong = {}
    for name in NAMES:
        for way in WAYS:
            if way in found[0][name]:
                try:
                    _check(way, *(process[name] for process in found))
                    note(way, name, "packed")
                except AssertionError as error:
                    wrong[name, way] = error
    assert not wrong, "\n".join(f"{name}, {way}: {error}" for (name, way), error in wrong.items())
    assert len([way for name in NAMES for way in WAYS if way in found[0][name]]) == len(NAMES) * len(WAYS) - 2

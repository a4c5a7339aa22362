"""Facts about objects, noted and compared: in C++ and as Python says what that computes."""

import gc
import weakref
from collections import OrderedDict
from collections.abc import Callable

import pytest
from torch import nn

from bertfast import guard, native
from bertfast.guard import Guard

CHANGES: dict[str, Callable[[nn.Module, dict], object]] = {
    "another module": lambda m, d: setattr(m, "up", nn.Linear(2, 2)),
    "another class": lambda m, d: setattr(m.up, "__class__", nn.Identity),
    "a hook": lambda m, d: m.up.register_forward_hook(print),
    "a new entry": lambda m, d: d.update(forward=print),
    "an entry removed": lambda m, d: d.pop("p"),
    "an equal object": lambda m, d: d.update(p=float("0.25")),
    "another dtype": lambda m, d: m.up.half(),
    "another parameter": lambda m, d: setattr(m.up, "weight", nn.Parameter(m.up.weight.detach())),
}


@pytest.fixture(params=["C++", "Python"])
def compare(request: pytest.FixtureRequest) -> Callable[[list], bool]:
    if request.param == "Python":
        return guard.holds
    if native.cpu is None:
        pytest.skip("bertfast._cpu is not built")
    return lambda facts: native.cpu.Facts(facts).hold()


def noted() -> tuple[nn.Module, dict, Guard]:
    module, mapping = nn.ModuleDict({"up": nn.Linear(2, 2)}), {"p": 0.25, "n": OrderedDict()}
    found = Guard()
    found.entry(module._modules, "up")
    found.type(module.up)
    found.empty(module.up._forward_hooks)
    found.entry(mapping, "forward")
    found.entry(mapping, "p")
    found.empty(mapping["n"])
    found.entry(module.up._parameters, "weight")
    found.attribute(module.up.weight, "dtype")
    return module, mapping, found


@pytest.mark.parametrize("change", [None, *CHANGES])
def test_facts_hold_until_one_changes(change: str | None, compare: Callable[[list], bool]) -> None:
    module, mapping, found = noted()
    assert compare(found.facts) and found.holds()
    if change is not None:
        CHANGES[change](module, mapping)
        assert not compare(found.facts) and not found.holds()


def test_an_attribute_that_is_gone_raises(compare: Callable[[list], bool]) -> None:
    class Thing:
        pass

    thing, found = Thing(), Guard()
    thing.name = object()
    found.attribute(thing, "name")
    assert compare(found.facts)
    del thing.name
    with pytest.raises(AttributeError, match="name"):
        compare(found.facts)


def test_facts_keep_no_cycle_alive() -> None:
    module, _, found = noted()
    module.__dict__["guard"] = found
    gone = weakref.ref(module)
    del module, found
    gc.collect()
    assert gone() is None


def test_no_facts(compare: Callable[[list], bool]) -> None:
    assert compare([]) and Guard().holds()

"""Facts about live objects that a conclusion rests on: while they hold, it need not be drawn anew.

A patched model may be changed between any two calls: a submodule replaced, a hook registered, a parameter exchanged.
Looking at all of that takes Python 20 µs a layer; the same facts, noted once, are compared in C++.
"""

from typing import Any

from torch import nn

from bertfast import native

ENTRY, ABSENT, EMPTY, TYPE, ATTRIBUTE = range(5)
Fact = tuple[int, Any, Any, Any]
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class Guard:
    """A list of facts, noted as they are now. Objects are compared by identity."""

    def __init__(self) -> None:
        self.facts: list[Fact] = []
        self._native: Any = None

    def entry(self, mapping: dict, key: str) -> None:
        """The dict has what it has under this key, or has not that key."""
        if key in mapping:
            self._note((ENTRY, mapping, key, mapping[key]))
        else:
            self._note((ABSENT, mapping, key, None))

    def empty(self, mapping: dict) -> None:
        """The dict has no entries."""
        self._note((EMPTY, mapping, None, None))

    def type(self, thing: object) -> None:
        """The object is of the class that it is of."""
        self._note((TYPE, thing, None, type(thing)))

    def attribute(self, thing: object, name: str) -> None:
        """The attribute is the object that it is."""
        self._note((ATTRIBUTE, thing, name, getattr(thing, name)))

    def _note(self, fact: Fact) -> None:
        self.facts.append(fact)
        self._native = None

    def holds(self) -> bool:
        """Whether all facts are as they were noted."""
        if native.cpu is None:
            return holds(self.facts)
        if self._native is None:
            self._native = native.cpu.Facts(self.facts)
        return self._native.hold()


def holds(facts: list[Fact]) -> bool:
    """What csrc/guard.h computes."""
    for kind, thing, key, expected in facts:
        if kind == ENTRY:
            as_expected = thing.get(key) is expected
        elif kind == ABSENT:
            as_expected = key not in thing
        elif kind == EMPTY:
            as_expected = not thing
        elif kind == TYPE:
            as_expected = type(thing) is expected
        else:
            as_expected = getattr(thing, key) is expected
        if not as_expected:
            return False
    return True


def global_hooks() -> bool:
    """Whether hooks on all modules of the process are registered."""
    m = nn.modules.module
    return bool(
        m._global_forward_hooks
        or m._global_forward_pre_hooks
        or m._global_backward_hooks
        or m._global_backward_pre_hooks
    )


def watch_module(guard: Guard, module: nn.Module) -> None:
    """Note that the module is of its class, with no hook and no forward of its own."""
    guard.type(module)
    for hooks in HOOKS:  # which are registered in these dicts; nobody puts others in their place
        guard.empty(module.__dict__[hooks])
    guard.entry(module.__dict__, "forward")

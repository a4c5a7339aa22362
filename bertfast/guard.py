"""Facts about live objects that a conclusion rests on: while they hold, it need not be drawn anew.

A patched model may be changed between any two calls: a submodule replaced, a hook registered, a parameter exchanged.
Looking at all of that takes Python 20 µs a layer; the same facts, noted once and compared in C++, take 1 µs.
"""

from typing import Any

from bertfast import native

ENTRY, ABSENT, EMPTY, TYPE, ATTRIBUTE = range(5)
Fact = tuple[int, Any, Any, Any]


class Guard:
    """A list of facts, noted as they are now. Objects are compared by identity."""

    def __init__(self) -> None:
        self.facts: list[Fact] = []

    def entry(self, mapping: dict, key: str) -> None:
        """The dict has what it has under this key, or has not that key."""
        if key in mapping:
            self.facts.append((ENTRY, mapping, key, mapping[key]))
        else:
            self.facts.append((ABSENT, mapping, key, None))

    def empty(self, mapping: dict) -> None:
        """The dict has no entries."""
        self.facts.append((EMPTY, mapping, None, None))

    def type(self, thing: object) -> None:
        """The object is of the class that it is of."""
        self.facts.append((TYPE, thing, None, type(thing)))

    def attribute(self, thing: object, name: str) -> None:
        """The attribute is the object that it is."""
        self.facts.append((ATTRIBUTE, thing, name, getattr(thing, name)))

    def holds(self) -> bool:
        """Whether all facts are as they were noted."""
        return _holds(self.facts)


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


_holds = holds if native.cpu is None else native.cpu.holds

"""Keeps calls of patched models and the patching of models apart where threads share them.

A call keeps what it has open in stacks of its thread. Whoever patches waits until those of all other threads are empty;
a call that begins meanwhile waits for the patching to end.
"""

import contextlib
import threading
import time
import weakref
from collections.abc import Iterator
from typing import Any

_WAIT = 30.0  # seconds, at most, for calls under way

_lock = threading.RLock()
_patching: int | None = None  # the thread that is


class Stack(list):
    """What one thread has open. Known to the gate as long as the thread keeps it."""

    __hash__ = object.__hash__

    def __init__(self) -> None:
        super().__init__()
        with _lock:
            _stacks.add(self)

    def open(self, item: Any, *others: "Stack") -> None:
        """Append; waits for patching to end where the thread has nothing open yet, here or in its `others`."""
        nested = any((self, *others))
        self.append(item)
        # First to be seen, then to look: of the two sides one sees the other.
        if not nested and _patching not in (None, threading.get_ident()):
            self.pop()
            with _lock:
                self.append(item)


_stacks: weakref.WeakSet[Stack] = weakref.WeakSet()


@contextlib.contextmanager
def closed(*own: Stack) -> Iterator[None]:
    """While this lasts, no other thread has a call open. own: the stacks of this thread.

    RuntimeError from within a call, which would wait for itself, and where others' do not end.
    """
    global _patching
    if any(own):
        raise RuntimeError("a model cannot be patched or unpatched from within a call of a patched model")
    with _lock:
        before, _patching = _patching, threading.get_ident()
        try:
            end = time.monotonic() + _WAIT
            while any(_stacks):
                if time.monotonic() > end:
                    raise RuntimeError(f"calls of patched models in other threads did not end within {_WAIT:.0f} s")
                time.sleep(1e-4)
            yield
        finally:
            _patching = before

"""Ctrl-C and SIGTERM: a training finishes its step and saves before it stops."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def terminated_as_interrupted() -> Iterator[None]:
    """SIGTERM raises KeyboardInterrupt inside of the block, as Ctrl-C does."""
    with _handling(signal.default_int_handler, signal.SIGTERM):
        yield


@contextmanager
def noted_interrupts(noticed: Callable[[], Any] = lambda: None, once: bool = True) -> Iterator[Callable[[], bool]]:
    """A function that says whether a signal to stop has come since the block began; it has raised nothing.

    noticed: called when it comes, in the middle of whatever is done just then.
    once: whether a second signal does what it did before the block. torchrun passes on what its processes were sent
        already, so that they had better take no notice of repetitions.
    """
    seen = False
    before = {number: signal.getsignal(number) for number in _SIGNALS}

    def note(number: int, frame: Any) -> None:
        nonlocal seen
        if not seen:
            noticed()
        seen = True
        if once:
            for other in _SIGNALS:
                signal.signal(other, before[other])

    with _handling(note, *_SIGNALS):
        yield lambda: seen


@contextmanager
def unnoticed_by_children() -> Iterator[None]:
    """Processes that begin inside of the block never see a signal to stop, which would take them from their parent.

    Terminals and schedulers send it to all of them; the parent is told at the end of the block.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _handling(handler: Callable[[int, Any], Any], *numbers: int) -> Iterator[None]:
    """The handler in place of those of before. Only the main thread has any: elsewhere nothing is done."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)

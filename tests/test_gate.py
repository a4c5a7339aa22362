"""Calls of a patched model in some threads while another patches and unpatches it: right numbers, and no errors."""

import sys
import threading
from collections.abc import Iterator

import pytest
import torch
from stock_models import build, call_of, mask_of

from bertfast import gate, patch, unpatch
from bertfast.calls import calls
from bertfast.gate import Stack, closed


@pytest.fixture
def busy_interpreter() -> Iterator[None]:
    """Threads take turns every few bytecodes."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("busy_interpreter")
@pytest.mark.parametrize("name", ["BertModel", "DistilBertForTokenClassification"])
def test_patching_while_others_call(name: str) -> None:
    model, call = build(name, dtype=torch.float32), call_of(name, mask_of("right"))
    call.pop("labels", None)
    valid = call["attention_mask"].bool()
    with torch.inference_mode():
        right = model(**call)[0][valid]
    wrong, stop = [], threading.Event()

    def work() -> None:
        while not stop.is_set():
            try:
                with torch.inference_mode():
                    error = (model(**call)[0][valid] - right).abs().max().item()
                if error > 1e-4 * right.abs().max():
                    wrong.append(error)
            except Exception as error:
                wrong.append(error)

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for _ in range(150):
        unpatch(patch(model))
    stop.set()
    for thread in threads:
        thread.join()
    assert not wrong
    assert not calls.frames and not calls.heads


def test_patching_from_within_a_call_is_an_error() -> None:
    model, call = patch(build()), call_of("BertModel", mask_of("right"))
    handle = model.pooler.register_forward_pre_hook(lambda *given: unpatch(model))
    with pytest.raises(RuntimeError, match="from within a call"):
        model(**call)
    handle.remove()
    assert unpatch(model) is model


def test_calls_that_do_not_end_are_not_waited_for_forever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate, "_WAIT", 0.05)
    opened, stop = threading.Event(), threading.Event()

    def work() -> None:
        stack = Stack()
        stack.open("a call")
        opened.set()
        stop.wait()

    thread = threading.Thread(target=work)
    thread.start()
    opened.wait()
    try:
        with pytest.raises(RuntimeError, match="did not end within"), closed():
            pass
    finally:
        stop.set()
        thread.join()
    with closed():  # what a thread that is gone had open does not count
        pass


def test_a_call_waits_for_patching_to_end() -> None:
    order, begun = [], threading.Event()

    def work() -> None:
        begun.set()
        Stack().open("a call")
        order.append("called")

    thread = threading.Thread(target=work)
    with closed():
        thread.start()
        begun.wait()
        thread.join(0.05)
        order.append("patched")
    thread.join()
    assert order == ["patched", "called"]

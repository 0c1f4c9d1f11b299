"""Values from a thread: they arrive, or what went wrong does, and no thread outlives its use."""

import threading
import time
from contextlib import contextmanager

import pytest
import torch

from fastcorl.errors import UserError
from fastcorl.rewards.background import Background

CPU = torch.device("cpu")


@pytest.fixture
def background():
    background = Background()
    yield background
    background.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "rewards"]


def test_values_come_from_a_thread_without_gradients(background):
    weight = torch.ones(2, requires_grad=True)
    threads = []

    def compute():
        threads.append(threading.current_thread())
        return 2 * weight

    with torch.inference_mode():  # a thread's own
        job = background.start({"one": compute, "two": lambda: 3 * weight}, CPU)
        values = job.result()
    assert list(values) == ["one", "two"] and values["two"].tolist() == [3.0, 3.0]
    assert threads != [threading.main_thread()]
    assert not any(value.requires_grad or value.is_inference() for value in values.values())


def test_what_was_waited_for_is_told(background):
    job = background.start({"one": lambda: time.sleep(0.2)}, CPU)
    time.sleep(0.1)
    job.result()
    assert 0.2 <= job.seconds < 2.0 and 0.0 < job.waited < job.seconds - 0.05


@pytest.mark.parametrize("error", [UserError("rewards.spice_folder: nothing there"), KeyboardInterrupt()])
def test_errors_reach_whoever_asks(background, error):
    def fail():
        raise error

    job = background.start({"one": fail, "two": lambda: pytest.fail("computed all the same")}, CPU)
    with pytest.raises(type(error)) as raised:
        job.result()
    assert raised.value is error


def test_closing_waits_for_the_value_at_hand_only(background):
    begun, go, computed = threading.Event(), threading.Event(), []

    def first():
        begun.set()
        go.wait(10)
        computed.append("first")

    background.start({"first": first, "second": lambda: computed.append("second")}, CPU)
    begun.wait(10)
    threading.Timer(0.05, go.set).start()
    background.close()
    assert computed == ["first"]
    background.close()


def test_a_new_job_ends_the_last(background):
    computed = []
    background.start({"slow": lambda: time.sleep(0.05), "never": lambda: computed.append(1)}, CPU)
    assert background.start({"one": lambda: torch.ones(1)}, CPU).result()["one"] == 1
    assert not computed


def test_on_cuda_there_is_a_stream_that_waits(background, monkeypatch):
    log, current = [], threading.local()

    class Stream:
        def __init__(self, device):
            self.device = device
            log.append("made")

        def wait_stream(self, other):
            log.append(f"waits for {other}")

        def synchronize(self):
            log.append("synchronized")

    @contextmanager
    def on(stream):
        current.stream = stream
        yield
        current.stream = None

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: "the caller's")
    monkeypatch.setattr(torch.cuda, "stream", on)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: setattr(current, "device", device))
    used, device = [], torch.device("cuda", 1)

    def compute():
        assert current.device == device
        used.append(current.stream)

    for _ in range(2):
        background.start({"one": compute, "two": compute}, device).result()
    assert log == ["made", *["waits for the caller's", "synchronized"] * 2]
    assert len(used) == 4 and len(set(map(id, used))) == 1 and isinstance(used[0], Stream)

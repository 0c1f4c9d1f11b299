"""SIGTERM, with which schedulers and launchers announce the end: a run saves what it has, and goes."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from fastcorl.runtime.distributed import Distributed

# What a shell reports of a process that SIGTERM ended: neither success, after which a script would go on, nor a fault.
EXIT_CODE = 128 + signal.SIGTERM


class Interrupted(Exception):
    """A step was given up before its update."""


class Termination:
    """Ends the process with EXIT_CODE on SIGTERM: at once, or inside `deferred` where the run asks for it."""

    def __init__(self, ranks: Distributed):
        self.ranks = ranks
        self._received = self._deferred = False

    @contextmanager
    def handled(self) -> Iterator[None]:
        """While the block runs SIGTERM is this object's. Python hands signals to the main thread only."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        former = signal.signal(signal.SIGTERM, self._receive)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, former)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Inside the block there is something to save first: look at `asked`."""
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False
        if self._received:
            raise SystemExit(EXIT_CODE)

    def asked(self) -> bool:
        """Whether any rank was told to end; a collective call, the same everywhere."""
        return bool(self.ranks.reduce([float(self._received)], "max")[0])

    def _receive(self, number: int, frame: FrameType | None) -> None:
        first, self._received = not self._received, True
        if first and not self._deferred:  # a group's signal and a launcher's both arrive
            raise SystemExit(EXIT_CODE)

"""A program that answers lines of JSON with lines of JSON, started when first asked and kept running."""

import json
import os
import queue
import subprocess
import threading
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

from fastcorl.errors import LocalError, UserError

KEPT_LINES = 20  # of what the program writes to stderr


class ProcessFailure(Exception):
    """The program ended, took too long, or wrote something that is no reply."""


class JsonProcess:
    """Sends requests to a program that writes {"ready": true} once it can take them.

    One that has ended is started again with the next request; a request that it fails, by ending, hanging or writing
    what is no JSON object, is tried once more in a fresh process. It ends with this object or with Python.
    """

    def __init__(
        self, name: str, command: Callable[[], Sequence[str]], *, start_timeout: float, timeout: float
    ) -> None:
        """`command` gives the program and its arguments when it is to be started; the two times are seconds, the
        second per request. `name` begins every error message."""
        self.name = name
        self.command = command
        self.start_timeout = start_timeout
        self.timeout = timeout
        self._running: _Running | None = None

    def request(self, message: dict[str, Any]) -> dict[str, Any]:
        """The program's reply to a message.

        UserError where it cannot be started, fails the message twice or answers with an "error".
        """
        try:
            reply = self._ask(message)
        except ProcessFailure:
            try:
                reply = self._ask(message)
            except ProcessFailure as failure:
                raise LocalError(f"{self.name}: {failure}") from None
        if "error" in reply:
            raise LocalError(f"{self.name}: {reply['error']}")
        return reply

    def close(self) -> None:
        """End the program; a later request starts it again."""
        if self._running is not None:
            self._running.end()
            self._running = None

    def _ask(self, message: dict[str, Any]) -> dict[str, Any]:
        if self._running is None or not self._running.alive():
            self.close()
            self._running = self._start()
        try:
            return self._running.ask(message, self.timeout)
        except ProcessFailure:
            self.close()
            raise

    def _start(self) -> "_Running":
        command = list(self.command())
        try:
            running = _Running(command)
        except OSError as error:
            raise UserError(f"{self.name}: cannot run {command[0]}: {error.strerror or error}") from None
        try:
            first = running.read(self.start_timeout)
            if first != {"ready": True}:
                raise ProcessFailure(first.get("error", f"wrote {first!r} first"))
        except ProcessFailure as failure:
            running.end()
            raise UserError(f"{self.name}: could not be started: {failure}") from None
        except BaseException:
            running.end()
            raise
        return running


class _Running:
    """One started process with threads that read what it writes."""

    def __init__(self, command: list[str]) -> None:
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            encoding="utf-8",
            errors="replace",
        )
        self.replies: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self.said: deque[str] = deque(maxlen=KEPT_LINES)
        self.listener = threading.Thread(target=_drain, args=(self.process.stderr, self.said.append), daemon=True)
        self.listener.start()
        threading.Thread(target=_pass_on, args=(self.process.stdout, self.replies), daemon=True).start()
        self.end = weakref.finalize(self, _end, self.process, os.getpid())

    def alive(self) -> bool:
        return self.process.poll() is None

    def ask(self, message: dict[str, Any], timeout: float) -> dict[str, Any]:
        # written by a thread of its own, since a program that hangs does not read
        threading.Thread(target=_write, args=(self.process.stdin, json.dumps(message) + "\n"), daemon=True).start()
        return self.read(timeout)

    def read(self, timeout: float) -> dict[str, Any]:
        try:
            line = self.replies.get(timeout=timeout)
        except queue.Empty:
            raise ProcessFailure(f"gave no answer within {timeout:g} s{self._last_words()}") from None
        if line is None:
            code = self._exit_code()
            self.listener.join(timeout=1)  # what it said last may still be on its way
            raise ProcessFailure(f"ended with code {code}{self._last_words()}")
        try:
            reply = json.loads(line)
        except json.JSONDecodeError:
            reply = None
        if not isinstance(reply, dict):
            raise ProcessFailure(f"wrote what is no reply: {line.strip()[:200]!r}")
        return reply

    def _exit_code(self) -> int | None:
        try:
            return self.process.wait(timeout=5)
        except subprocess.TimeoutExpired:  # it closed its output and goes on
            return None

    def _last_words(self) -> str:
        said = " | ".join(line.strip() for line in self.said if line.strip())
        return f": {said[-1000:]}" if said else ""


def _drain(stream: Any, take: Callable[[str], None]) -> None:
    with stream:
        for line in stream:
            take(line)


def _pass_on(stream: Any, replies: "queue.SimpleQueue[str | None]") -> None:
    _drain(stream, replies.put)
    replies.put(None)


def _write(stream: Any, text: str) -> None:
    with suppress(OSError, ValueError):  # where the process has ended, which its reader reports
        stream.write(text)
        stream.flush()


def _end(process: subprocess.Popen, owner: int) -> None:
    if os.getpid() != owner:  # a fork of the trainer must not end the trainer's process
        return
    process.kill()
    process.wait()
    with suppress(OSError, ValueError):
        process.stdin.close()

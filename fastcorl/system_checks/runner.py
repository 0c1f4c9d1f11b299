"""Trials in processes of their own, so that a crash or a hang is one line of the report."""

import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import IO

from fastcorl.system_checks.findings import Finding
from fastcorl.system_checks.trials import GROUPS, TRIALS

MODULE = "fastcorl.system_checks.trials"


class TrialRunner:
    """Args:
    seconds: what a trial may take, imports included.
    module: which is run with the names of trials, for tests.
    """

    def __init__(self, seconds: float, module: str = MODULE):
        self._seconds, self._module = seconds, module
        self._running: set[subprocess.Popen] = set()
        self._stopped = False

    def run(self, groups: Sequence[Sequence[str]] = GROUPS) -> dict[str, Finding]:
        """What each trial finds, by its name; groups run beside one another."""
        with ThreadPoolExecutor(len(groups)) as pool:
            try:
                return {finding.name: finding for found in pool.map(self.run_group, groups) for finding in found}
            except KeyboardInterrupt:
                self._stopped = True
                for process in tuple(self._running):
                    _kill(process)
                raise

    def run_group(self, names: Sequence[str]) -> list[Finding]:
        """Trials one after another in one process; after a problem in another one, as a library may be half imported.
        None is tried after the first has failed."""
        findings: list[Finding] = []
        left = list(names)
        while left and not self._stopped:
            findings += self._run_process(left)
            left = list(names[len(findings) :])
            if findings[0].status == "problem":
                reason = f"not tried, since {findings[0].name} does not work"
                return findings + [Finding(name, "n/a", reason) for name in left]
        return findings

    def _run_process(self, names: list[str]) -> list[Finding]:
        """Findings of the first of `names`, up to and with the first problem."""
        findings: list[Finding] = []
        with tempfile.TemporaryFile() as errors:
            process = subprocess.Popen(
                [sys.executable, "-m", self._module, *names],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=errors,
                encoding="utf-8",
                start_new_session=True,
            )
            self._running.add(process)
            lines: queue.Queue[str] = queue.Queue()
            threading.Thread(target=_read, args=(process.stdout, lines), daemon=True).start()
            try:
                for name in names:
                    findings.append(self._next_finding(name, lines, process, errors))
                    if findings[-1].status == "problem":
                        break
            finally:
                _kill(process)
                self._running.remove(process)
        return findings

    def _next_finding(
        self, name: str, lines: "queue.Queue[str]", process: subprocess.Popen, errors: IO[bytes]
    ) -> Finding:
        try:
            line = lines.get(timeout=self._seconds)
        except queue.Empty:
            reason = f"does not end within {self._seconds:g} s"
        else:
            if line:
                return Finding(**json.loads(line))
            reason = _how_it_ended(process.wait(), errors)
        return Finding(name, "problem", reason, TRIALS[name].remedy, TRIALS[name].needed)


def _read(stream: IO[str], lines: "queue.Queue[str]") -> None:
    with stream:
        for line in stream:
            lines.put(line)
    lines.put("")


def _how_it_ended(code: int, errors: IO[bytes]) -> str:
    if code < 0:
        return f"crashes with {signal.Signals(-code).name}"
    errors.seek(0)
    said = errors.read().decode(errors="replace").strip().splitlines()
    return f"ends Python with code {code}" + (f": {said[-1].strip()[:300]}" if said else "")


def _kill(process: subprocess.Popen) -> None:
    """End the process and whatever it has started, such as compilers."""
    try:
        if hasattr(os, "killpg"):
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()
    except (ProcessLookupError, PermissionError):  # all of them have ended
        pass
    process.wait()

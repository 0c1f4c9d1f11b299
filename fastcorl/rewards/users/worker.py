"""A user's reward function in a process of its own, which can hang, crash or be killed without harm to the training."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from fastcorl.errors import UserError
from fastcorl.rewards.users import worker_process
from fastcorl.rewards.users.worker_process import GRACE_SECONDS, read_message, write_message

STARTUP_SECONDS = 300.0  # that a user's module may take to be imported
_LAUNCHER_VARIABLES = (
    "RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE LOCAL_SIZE CROSS_RANK CROSS_SIZE GROUP_RANK GROUP_WORLD_SIZE "
    "ROLE_RANK ROLE_NAME ROLE_WORLD_SIZE MASTER_ADDR MASTER_PORT"
)


class Reply(NamedTuple):
    values: torch.Tensor  # (count,) float32, NaN where there is no score; all NaN after a failure
    failure: str | None  # why the call failed, in one line
    seconds: float  # from `start` to the reply, what is left of a restart included
    applies: bool = True  # False where the function has nothing to say of such rollouts


class WorkerGone(Exception):
    """The process has ended, or was ended at its deadline; the message says which."""


class RewardWorker:
    """Calls `module:function` in a child process, one call at a time, each with a deadline.

    A call that raises, returns the wrong thing, passes its deadline or loses its process is a failure: its reply is
    all NaN and says why. After a deadline or a death the process is started anew at once. On POSIX what the
    function itself started goes with it. The process is of one thread (torch, OpenMP), knows nothing of the
    launcher's ranks, and sees no GPU unless `gpu`, and then only its rank's. Whatever it prints goes to stderr.
    """

    def __init__(
        self,
        spec: str,
        key: str = "rewards.extra",
        *,
        timeout: float = 60.0,
        startup: float = STARTUP_SECONDS,
        gpu: bool = False,
        spare: "Spare | None" = None,
    ) -> None:
        """Start the process; `ready` waits for it.

        Args: `key` is the configuration key that errors point to; `timeout` is the deadline of a call in seconds,
        `startup` that of starting the process and importing the function; `spare` has what takes the place of a process
        that is lost.
        """
        self.spec, self.key, self.timeout, self.startup, self.gpu = spec, key, timeout, startup, gpu
        self._spare = spare
        self._reply: Reply | None = None
        self._thread: threading.Thread | None = None
        self._closed = False
        self._child: _Child | None = _Child(gpu)
        self._finalizer = weakref.finalize(self, self._child.kill)
        self._import_error: str | None = None
        self._restart: threading.Thread | None = None
        self._restart_error: Exception = WorkerGone("not started")
        self._run(self._first_import)

    def ready(self) -> None:
        """Wait until the function is imported; UserError, naming the key, where that fails."""
        self._join()
        if self._import_error is not None:
            self.close()
            raise UserError(self._import_error)

    def start(self, rollout: Sequence[Any], count: int, pairs: Sequence[tuple[int, int]] | None = None) -> None:
        """Begin a call with the buffers of `pack_rollout`, for `count` values; `pairs` is a second argument."""
        if self._closed or self._thread is not None:
            raise RuntimeError(f"{self.spec}: start() needs an open worker, ready and without a call under way")
        self._reply = None
        request = json.dumps({"count": count, "pairs": pairs}).encode()
        self._run(self._call, [request, *rollout], count)

    def collect(self) -> Reply:
        """Wait for the call that `start` began."""
        if self._thread is None:
            raise RuntimeError(f"{self.spec}: collect() without start()")
        self._join()
        if self._reply is None:
            raise RuntimeError(f"{self.spec}: the call ended without a reply")
        return self._reply

    def close(self) -> None:
        """End the process: kindly where it is idle, at once where it is not."""
        self._closed = True
        child = self._child
        if self._thread is None and self._restart is None and child is not None:
            child.end()
        self._finalizer()
        self._join()
        if self._restart is not None:
            self._finalizer()  # of a process that was just being started
            self._restart.join()
        self._drop_child()

    def _run(self, target: Any, *arguments: Any) -> None:
        self._thread = threading.Thread(target=target, args=arguments, daemon=True)
        self._thread.start()

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _drop_child(self) -> None:
        self._finalizer()  # kills, once
        if self._child is not None:
            self._child.close_pipes()
        self._child = None

    def _first_import(self) -> None:
        try:
            self._import(self._child)
        except WorkerGone as gone:
            self._import_error = f"{self.key}: {self.spec}: importing it: {gone}"
        except UserError as error:
            self._import_error = str(error)

    def _import(self, child: "_Child") -> None:
        setup = {"path": sys.path, "spec": self.spec, "key": self.key}
        header, _ = child.exchange([json.dumps(setup).encode()], self.startup)
        if header["error"] is not None:
            raise UserError(header["error"])

    def _call(self, message: list[Any], count: int) -> None:
        started = time.monotonic()
        values, applies = torch.full((count,), torch.nan), True
        try:
            header, parts = self._started_child().exchange(message, self.timeout)
            failure, applies = header["failure"], header["applies"]
            values = torch.from_numpy(np.frombuffer(parts[0], np.float32))
        except (WorkerGone, UserError, OSError) as error:
            failure = str(error)
            self._drop_child()
            if not self._closed:
                # At once, so that what it imports is imported while the step goes on.
                self._restart = threading.Thread(target=self._start_anew, daemon=True)
                self._restart.start()
        self._reply = Reply(values, failure, time.monotonic() - started, applies)

    def _started_child(self) -> "_Child":
        """The process, once it is started anew; raises why it could not be."""
        if self._restart is not None:
            self._restart.join()
            self._restart = None
        if self._child is None:
            raise self._restart_error
        return self._child

    def _start_anew(self) -> None:
        try:
            self._child = _Child(self.gpu) if self._spare is None else self._spare.take()
            self._finalizer = weakref.finalize(self, self._child.kill)
            if self._closed:  # by another thread, meanwhile
                raise WorkerGone("closed")
            self._import(self._child)
        except (WorkerGone, UserError, OSError) as error:
            self._restart_error = error
            self._drop_child()


class Spare:
    """A process that has imported torch, which takes seconds, and is not told its function before it is taken."""

    def __init__(self, gpu: bool) -> None:
        self.gpu = gpu
        self._lock = threading.Lock()
        self._put(_Child(gpu))

    def take(self) -> "_Child":
        """The process, now the caller's to end; another is started in its place."""
        with self._lock:
            if self._child.process.poll() is not None:
                self._put(_Child(self.gpu))
            child, other = self._child, _Child(self.gpu)
            self._finalizer.detach()
            self._put(other)
        return child

    def close(self) -> None:
        with self._lock:
            self._finalizer()
            self._child.close_pipes()

    def _put(self, child: "_Child") -> None:
        self._child = child
        self._finalizer = weakref.finalize(self, child.kill)


class _Child:
    """The process and its pipes."""

    def __init__(self, gpu: bool) -> None:
        script = str(Path(worker_process.__file__))
        group = {"process_group": 0} if os.name == "posix" else {}
        self.process = subprocess.Popen(
            # -P: the script's folder must not be searched for modules
            [sys.executable, "-P", script],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            env=worker_environment(gpu),
            **group,
        )
        _widen(self.process.stdin.fileno())
        self._owner = os.getpid()
        self._lock = threading.Lock()

    def exchange(self, message: Sequence[Any], seconds: float) -> tuple[dict[str, Any], list[bytearray]]:
        """Send a message and wait for the reply, at most `seconds`; WorkerGone where there is none."""
        expired = threading.Event()

        def expire() -> None:
            expired.set()
            self.kill()

        timer = threading.Timer(seconds, expire)
        timer.daemon = True
        timer.start()
        try:
            # a death while writing is told by the guard's message
            with contextlib.suppress(OSError):
                write_message(self.process.stdin, message)
            header, *parts = read_message(self.process.stdout)
            reply = json.loads(bytes(header))
        except (OSError, EOFError, ValueError):
            reply, parts = {"died": None}, []
        finally:
            timer.cancel()
        if expired.is_set():
            raise WorkerGone(f"not done after {seconds:g} s, stopped")
        if "died" in reply:
            raise WorkerGone(f"its process {_how_it_ended(reply['died'])}")
        return reply, parts

    def end(self) -> None:
        """Let an idle process end by itself, in little time."""
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            self.process.stdin.close()
            self.process.wait(GRACE_SECONDS + 1)

    def kill(self) -> None:
        """End the process and, on POSIX, its whole group."""
        with self._lock:
            # not where this object was copied by a fork, and not once the number may be another process's
            if os.getpid() != self._owner or self.process.returncode is not None:
                return
            with contextlib.suppress(ProcessLookupError, PermissionError):
                if os.name == "posix":
                    os.killpg(self.process.pid, signal.SIGKILL)
                else:
                    self.process.kill()
            self.process.wait()

    def close_pipes(self) -> None:
        for pipe in (self.process.stdin, self.process.stdout):
            with contextlib.suppress(OSError):
                pipe.close()


def _how_it_ended(code: int | None) -> str:
    if code is None:
        return "died"
    if code >= 0:
        return f"ended with exit code {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    return f"was ended by {name}" + (", perhaps for lack of memory" if name == "SIGKILL" else "")


def worker_environment(gpu: bool) -> dict[str, str]:
    """This process's environment without the launcher's ranks, of one thread; with `gpu`, its rank's and no other."""
    hidden = _LAUNCHER_VARIABLES.split()
    kept = {
        name: value
        for name, value in os.environ.items()
        if name not in hidden and not name.startswith(("TORCHELASTIC_", "TORCH_NCCL_"))
    }
    devices = ""
    if gpu:
        visible = [device for device in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if device]
        local_rank = int(os.environ.get("LOCAL_RANK", 0))
        devices = visible[local_rank] if local_rank < len(visible) else str(local_rank)
    return kept | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": devices}


def _widen(pipe: int) -> None:
    """A pipe of 1 MiB, where that can be had, takes a rollout in fewer turns."""
    try:
        import fcntl

        fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, 2**20)
    except (ImportError, AttributeError, OSError):
        pass

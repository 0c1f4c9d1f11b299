"""Values computed in a thread beside the caller's: on CUDA on a stream of its own."""

import threading
import time
from collections.abc import Callable, Mapping

import torch


class Background:
    """Does one `Job` at a time."""

    def __init__(self) -> None:
        self._job: Job | None = None
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    def start(self, work: Mapping[str, Callable[[], torch.Tensor]], device: torch.device) -> "Job":
        """Begin to compute values by name, one after the other, from tensors on `device`: on CUDA once the caller's
        current stream has come to where it is now."""
        self.close()
        stream = None
        if device.type == "cuda":
            if device not in self._streams:
                self._streams[device] = torch.cuda.Stream(device)
            stream = self._streams[device]
            stream.wait_stream(torch.cuda.current_stream(device))
        self._job = Job(work, stream)
        return self._job

    def close(self) -> None:
        """Return once nothing is computed any more; of a job in progress only the value at hand is still finished."""
        if self._job is not None:
            self._job.cancel()
            self._job = None


class Job:
    """Work in progress. `seconds` is the time it took, `waited` how much of it somebody had to wait for."""

    def __init__(self, work: Mapping[str, Callable[[], torch.Tensor]], stream: torch.cuda.Stream | None) -> None:
        self.seconds = self.waited = 0.0
        self._values: dict[str, torch.Tensor] = {}
        self._error: BaseException | None = None
        self._cancelled = False
        # A daemon: where a second Ctrl-C ends the wait for it, the interpreter must not wait again.
        self._thread = threading.Thread(target=self._run, args=(work, stream), name="rewards", daemon=True)
        self._thread.start()

    def result(self) -> dict[str, torch.Tensor]:
        """Wait for the values; raises what computing them raised."""
        start = time.perf_counter()
        self._thread.join()
        self.waited += time.perf_counter() - start
        if self._error is not None:
            raise self._error
        return self._values

    def cancel(self) -> None:
        self._cancelled = True
        self._thread.join()

    def _run(self, work: Mapping[str, Callable[[], torch.Tensor]], stream: torch.cuda.Stream | None) -> None:
        start = time.perf_counter()
        try:
            if stream is not None:  # a new thread's device is the first, which leaving the stream would wake
                torch.cuda.set_device(stream.device)
            with torch.no_grad(), torch.cuda.stream(stream):  # both are a thread's own
                for name, compute in work.items():
                    if self._cancelled:
                        break
                    self._values[name] = compute()
                if stream is not None:
                    stream.synchronize()
        except BaseException as error:  # for whoever asks for the values
            self._error = error
        self.seconds = time.perf_counter() - start

"""Ranks, devices and the few collectives a step needs. One process without a launcher is a world of one."""

import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from fastcorl.errors import UserError

# Seconds that a rank waits for another in a collective.
LONG_WAIT = 1800.0
JOIN_WAIT = 600.0  # one that has met a mistake never comes
SHORT_WAIT = 120.0


@dataclass(frozen=True)
class Distributed:
    rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def reduce(self, values: list[float], op: str = "sum") -> list[float]:
        """Element-wise "sum", "mean" or "max" over ranks."""
        if self.world_size == 1:
            return values
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX if op == "max" else dist.ReduceOp.SUM)
        return (tensor / self.world_size if op == "mean" else tensor).tolist()

    def mean(self, tensor: torch.Tensor) -> torch.Tensor:
        """The mean of a tensor over ranks, in its own memory."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
            tensor /= self.world_size
        return tensor

    def gather(self, value: Any) -> list[Any]:
        """`value` of every rank, in rank order, on every rank."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def from_main(self, action: Callable[[], Any]) -> Any:
        """What `action` returns on the main rank, on every rank; a UserError of it is raised on every rank."""
        result = error = None
        if self.is_main:
            try:
                result = action()
            except UserError as caught:
                error = caught
        result, error = self.gather((result, error))[0]
        if error:
            raise error
        return result

    def barrier(self) -> None:
        if self.world_size > 1:
            dist.barrier()

    @contextmanager
    def waiting(self, seconds: float | None) -> Iterator[None]:
        """Inside the block a rank that hears nothing of another for `seconds` in a collective gives up, which ends the
        run. None, and outside it, is LONG_WAIT: for first steps, in which ranks compile, and for saving."""
        self._set_wait(seconds or LONG_WAIT)
        try:
            yield
        finally:
            self.wait_long()

    def wait_long(self) -> None:
        """Give other ranks LONG_WAIT from now on."""
        self._set_wait(LONG_WAIT)

    def _set_wait(self, seconds: float) -> None:
        if self.world_size > 1:
            for group in list(dist.distributed_c10d._world.pg_map):  # DeepSpeed has groups of its own
                dist.distributed_c10d._set_pg_timeout(timedelta(seconds=seconds), group)


def start(*, threads: int, process_group: bool) -> Distributed:
    """Join the launcher's process group, if any, and choose device and thread count.

    Args: `threads` per rank on CPU, 0 for what OMP_NUM_THREADS says, or else to share the cores out among local ranks;
    `process_group` asks for a process group even in a world of one, as DeepSpeed needs.
    """
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    rank, local_rank = int(os.environ.get("RANK", 0)), int(os.environ.get("LOCAL_RANK", 0))
    # torchrun and DeepSpeed's launcher name it differently.
    local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or world_size)
    if torch.cuda.is_available():
        if local_rank >= torch.cuda.device_count():
            raise UserError(
                f"this machine has GPUs for {torch.cuda.device_count()} of {local_world_size} ranks: start one rank "
                "for each GPU, or train on the CPU with CUDA_VISIBLE_DEVICES= (set, and empty)"
            )
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
        if threads or "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(threads or max(1, _usable_cores() // local_world_size))
    if (world_size > 1 or process_group) and not dist.is_initialized():
        for key, value in {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(_free_port()),
            "RANK": "0",
            "WORLD_SIZE": "1",
        }.items():
            os.environ.setdefault(key, value)
        os.environ.setdefault("LOCAL_RANK", str(local_rank))
        try:
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(seconds=JOIN_WAIT))
        except dist.DistNetworkError as error:
            if "EADDRINUSE" not in str(error):
                raise
            raise UserError(
                f"port {os.environ['MASTER_PORT']} of this machine is taken, maybe by another run: give the launcher "
                "another one with --master_port"
            ) from None
    ranks = Distributed(rank, world_size, device)
    ranks.wait_long()
    return ranks


def stop() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

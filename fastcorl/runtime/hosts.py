"""What the hosts of a run must have in common, looked at once, before anything is trained."""

import socket
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastcorl.errors import UserError
from fastcorl.runtime.distributed import Distributed

VISIBLE_WITHIN = 65.0  # seconds; over NFS a host sees up to 60 s late what another one writes
MAY_DIFFER = {"output_dir", "threads"}  # a folder may have a name of its own on each host; `check_shared` looks at it


def check_alike(facts: dict[str, Any], ranks: Distributed) -> None:
    """A collective call: raises UserError on every rank where the facts of one, by name, are not those of the first."""
    (first_host, first), *others = ranks.gather((socket.gethostname(), facts))
    for rank, (host, theirs) in enumerate(others, 1):
        for name in {**first, **theirs}:
            here, there = first.get(name), theirs.get(name)
            if here != there:
                raise UserError(
                    f"{name} is {here!r} on {first_host}, rank 0, and {there!r} on {host}, rank {rank}: "
                    "start all ranks of a run with the same files, packages and options"
                )


def check_shared(folder: Path, ranks: Distributed) -> None:
    """A collective call: raises UserError on every rank unless all hosts see what the first one writes in `folder`."""
    if ranks.world_size == 1:
        return
    mark = folder / f"tmp-seen-{uuid.uuid4().hex}"
    try:
        if ranks.is_main:
            folder.mkdir(parents=True, exist_ok=True)
            mark.touch()
        seen = _appears(folder / ranks.gather(mark.name)[0])
        (first_host, _), *others = ranks.gather((socket.gethostname(), seen))
    finally:
        if ranks.is_main:
            mark.unlink(missing_ok=True)
    blind = [f"{host}, rank {rank}" for rank, (host, seen) in enumerate(others, 1) if not seen]
    if blind:
        raise UserError(
            f"output_dir: {str(folder)!r} of {first_host}, rank 0, is not the folder of that name of {blind[0]}: "
            "give one that all hosts share"
        )


def settings_of(dump: dict[str, Any], section: str = "") -> Iterator[tuple[str, Any]]:
    """The settings of a configuration, by dotted names, that must be the same on all ranks."""
    for key, value in dump.items():
        if isinstance(value, dict):
            yield from settings_of(value, f"{section}{key}.")
        elif section or key not in MAY_DIFFER:
            yield f"{section}{key}", value


@torch.no_grad()
def checksum(module: nn.Module) -> int:
    """Of all weights; sums of integers are the same in any order, and so on any device."""
    sizes = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    sums = [
        weight.reshape(-1).view(sizes[weight.element_size()]).sum(dtype=torch.int64).cpu()
        for weight in module.state_dict().values()
    ]
    return int(torch.stack(sums).sum())


def _appears(path: Path) -> bool:
    until = time.monotonic() + VISIBLE_WITHIN
    while not path.exists():
        if time.monotonic() > until:
            return False
        time.sleep(0.2)
    return True

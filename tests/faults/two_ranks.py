"""What a fault of one rank does to both, on a module of a few weights; started with torchrun by test_two_ranks.py.

The first rank prints a line of JSON per case.
"""

import errno
import json
import os
import sys
import time
from pathlib import Path

import torch
from torch import nn

from fastcorl.config import DeepSpeedConfig, OptimizerConfig
from fastcorl.runtime import distributed
from fastcorl.runtime.checkpoints import Checkpoints, Position
from fastcorl.runtime.engine import TrainEngine, make_engine

# In the loss or in one gradient, of these ranks, a value that is not finite.
FAULTS = {
    "loss nan on one rank": ("loss", [1], float("nan")),
    "loss inf on all ranks": ("loss", [0, 1], float("inf")),
    "gradient nan on one rank": ("gradient", [1], float("nan")),
    "gradient inf on all ranks": ("gradient", [0, 1], float("inf")),
}


class Policy(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.text_head, self.image_head = nn.Linear(8, 8), nn.Linear(8, 3), nn.Linear(8, 3)

    def lay_out(self) -> None:
        """A policy's, before weights are copied."""


class Objective(nn.Module):
    def __init__(self):
        super().__init__()
        self.policy = Policy()

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        hidden = self.policy.body(inputs).tanh()
        return self.policy.text_head(hidden).square().mean() + self.policy.image_head(hidden).square().mean()


def make(zero_stage: int, dtype: torch.dtype, ranks: distributed.Distributed) -> TrainEngine:
    torch.manual_seed(0)
    module, settings = Objective().to(dtype), DeepSpeedConfig(zero_stage=zero_stage)
    return make_engine(module, OptimizerConfig(), settings, ranks, launched=ranks.world_size > 1)


def step(engine: TrainEngine, ranks: distributed.Distributed, number: int, fault: str | None = None) -> float:
    """Two micro-batches and an update; the fault is in the first of them."""
    place, faulty, value = FAULTS.get(fault, ("", [], 0.0))
    generator = torch.Generator().manual_seed(10 * number + ranks.rank)
    weight = engine.module.policy.body.bias
    for index in range(2):
        inputs = torch.randn(4, 8, generator=generator).to(weight.dtype)
        loss = engine.forward(inputs)
        hook = None
        if index == 0 and ranks.rank in faulty:
            if place == "loss":
                loss = loss + value  # its gradient alone would not show it
            else:
                hook = weight.register_hook(lambda gradient: gradient.index_fill(0, torch.tensor([3]), value))
        engine.backward(loss, last=index == 1)
        if hook:
            hook.remove()
    return engine.step(1e-2)


def weights(engine: TrainEngine) -> torch.Tensor:
    return torch.cat([weight.detach().flatten().clone() for weight in engine.full_policy().parameters()])


def refusals(zero_stage: int, dtype: torch.dtype, ranks: distributed.Distributed) -> dict:
    """Every fault between two good steps; the second must end where it ends without any."""
    engine, norms, same = make(zero_stage, dtype, ranks), [], []
    step(engine, ranks, 1)
    for fault in FAULTS:
        before = weights(engine)
        norms.append(step(engine, ranks, 7, fault))
        same.append(torch.equal(before, weights(engine)))
    step(engine, ranks, 2)
    unharmed = make(zero_stage, dtype, ranks)
    for number in (1, 2):
        step(unharmed, ranks, number)
    same.append(torch.equal(weights(engine), weights(unharmed)))
    told = ranks.gather((norms, same))
    engine.close()
    unharmed.close()
    return {"case": f"{dtype} ZeRO {zero_stage}", "norms": [t[0] for t in told], "same": [t[1] for t in told]}


def full_disk(zero_stage: int, folder: Path, ranks: distributed.Distributed) -> dict:
    """The second rank cannot write its part of the second checkpoint."""
    engine, checkpoints, problems = make(zero_stage, torch.float32, ranks), Checkpoints(folder, ""), []
    real_save = torch.save

    def no_room(*arguments, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    for number in (1, 2, 3):
        step(engine, ranks, number)
        torch.save = no_room if ranks.rank == 1 and number == 2 else real_save
        position = Position("unified", number, number, 2, "deepspeed", zero_stage)
        problems.append(checkpoints.save(position, engine.save, ranks.gather, main=ranks.is_main, keep=9))
    told = ranks.gather(problems)
    engine.close()
    return {"case": f"full disk ZeRO {zero_stage}", "problems": told, "left": sorted(os.listdir(folder))}


def silence(ranks: distributed.Distributed) -> dict:
    """The second rank goes on, but into no collective."""
    start = time.perf_counter()
    if ranks.rank == 1:
        time.sleep(8)
        return {}
    error = ""
    with ranks.waiting(3):
        try:
            ranks.reduce([1.0])
        except RuntimeError as caught:
            error = str(caught)
    return {"case": "silence", "error": error, "seconds": time.perf_counter() - start}


def main(folder: Path) -> None:
    ranks = distributed.start(threads=1, process_group=True)
    cases = [
        *(refusals(stage, torch.float32, ranks) for stage in (0, 1, 2, 3)),
        *(refusals(stage, torch.bfloat16, ranks) for stage in (0, 1, 2, 3)),
        *(full_disk(stage, folder / f"zero{stage}", ranks) for stage in (1, 3)),
        silence(ranks),
    ]
    if ranks.is_main:
        for case in cases:
            print("CASE", json.dumps(case), flush=True)
    os._exit(0)  # the last case leaves no process group to end in order


if __name__ == "__main__":
    main(Path(sys.argv[1]))

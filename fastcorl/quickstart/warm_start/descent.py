"""The optimisation that every part of the warm start has in common."""

import time
from collections.abc import Callable, Iterable

import torch


class Descent:
    """AdamW with clipped gradients through one warm-up and decay of the learning rate."""

    def __init__(
        self,
        name: str,
        parameters: Iterable[torch.nn.Parameter],
        *,
        steps: int,
        peak_learning_rate: float,
        warmup: float = 0.1,  # fraction of the steps
        betas: tuple[float, float] = (0.9, 0.98),
        weight_decay: float = 0.05,
        log: Callable[[str], None] = print,
        log_every: int = 50,
    ):
        self.name, self.steps, self.log, self.log_every = name, steps, log, log_every
        self.parameters = list(parameters)
        self.optimizer = torch.optim.AdamW(self.parameters, betas=betas, weight_decay=weight_decay)
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(
            self.optimizer, max_lr=peak_learning_rate, total_steps=steps, pct_start=warmup
        )
        self.done = 0
        self.start = time.time()

    def step(self, loss: torch.Tensor, /, **shown: float | torch.Tensor) -> None:
        """Descend `loss` once; now and then log the values `shown`."""
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.schedule.step()
        self.done += 1
        if self.done % self.log_every == 0:
            values = " ".join(f"{name} {float(value):.4f}" for name, value in shown.items())
            self.log(f"{self.name} {self.done}/{self.steps} {values} ({time.time() - self.start:.0f} s)")

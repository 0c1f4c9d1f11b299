"""A user's own rewards, each in its worker, at the same time as one another and as whatever the trainer does."""

from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from fastcorl.errors import LocalError
from fastcorl.records import Rollout
from fastcorl.rewards.users.pairwise import group_pairs, win_rates
from fastcorl.rewards.users.worker import STARTUP_SECONDS, Reply, RewardWorker, Spare
from fastcorl.rewards.users.worker_process import pack_rollout


class RewardFailure(LocalError):
    """A user's reward fails so often that training on would mean training without it."""


@dataclass(frozen=True)
class Result:
    """One reward of a rollout."""

    values: torch.Tensor  # (n,) float32 on the CPU, NaN where a row has no score
    failure: str | None  # why the whole call failed, in one line; every value then is NaN
    seconds: float


class FailureLog:
    """Counts calls and failures by reward, and says when it is too many."""

    def __init__(self, window: int = 20, least: int = 5) -> None:
        self.window = window
        self.least = least
        self.calls: Counter[str] = Counter()
        self.failures: Counter[str] = Counter()
        self.last_reason: dict[str, str] = {}
        self._recent: dict[str, deque[bool]] = {}

    def record(self, name: str, failure: str | None) -> None:
        self.calls[name] += 1
        self._recent.setdefault(name, deque(maxlen=self.window)).append(failure is not None)
        if failure is not None:
            self.failures[name] += 1
            self.last_reason[name] = failure

    def check(self) -> None:
        """Raise RewardFailure where over half of a reward's last `window` calls failed, and at least `least` did."""
        for name, recent in self._recent.items():
            failed = sum(recent)
            if failed >= self.least and 2 * failed > len(recent):
                raise RewardFailure(
                    f"reward {name} failed in {failed} of its last {len(recent)} calls, so the run ends; "
                    f"the last time: {self.last_reason[name]}"
                )


class UserRewards:
    """The rewards of `rewards.extra` and `rewards.pairwise`: `start(rollout)`, then `collect()`.

    `extra` names functions of a rollout that return n numbers, None for a row without a score, or NotImplemented for a
    rollout that they have nothing to say of, such as one without answers; `pairwise` functions
    of a rollout and pairs of rows that return the probability that the first of each pair is better (see
    `pairwise.win_rates`). They get the rollout on the CPU, pixels rounded to 1/255 and without vision features, and
    may raise, hang or crash: that step's rows are then NaN, and the failure is counted in `failures`.
    """

    def __init__(
        self,
        extra: Iterable[str] = (),
        pairwise: Iterable[str] = (),
        *,
        timeout: float = 60.0,
        startup: float = STARTUP_SECONDS,
        gpu: bool = False,
    ) -> None:
        """Import all functions, each in its process; UserError where one cannot be. Arguments as of `RewardWorker`."""
        keys = [(name, "rewards.extra") for name in extra]
        keys += [(name, "rewards.pairwise") for name in pairwise]
        self.failures = FailureLog()
        self._rollout: Rollout | None = None
        self._pairs: list[tuple[int, int]] = []
        self._workers: dict[str, RewardWorker] = {}
        self._spare = Spare(gpu) if keys else None
        try:
            for name, key in keys:
                self._workers[name] = RewardWorker(
                    name, key, timeout=timeout, startup=startup, gpu=gpu, spare=self._spare
                )
            for worker in self._workers.values():
                worker.ready()
        except BaseException:
            self.close()
            raise

    def start(self, rollout: Rollout) -> None:
        """Hand the rollout to every worker; returns once it is copied."""
        if self._rollout is not None:
            raise RuntimeError("start() before the rollout before it was collected")
        self._rollout = rollout
        self._pairs = group_pairs(len(rollout.prompts), rollout.group_size)
        if not self._workers:
            return
        message = pack_rollout(rollout)
        for worker in self._workers.values():
            if worker.key == "rewards.pairwise":
                worker.start(message, len(self._pairs), self._pairs)
            else:
                worker.start(message, rollout.num_rows)

    def collect(self) -> dict[str, Result]:
        """Wait for every reward, extra before pairwise, each in the order of the configuration; those that do not apply
        to this rollout are left out.

        RewardFailure where one of them has failed too often.
        """
        if self._rollout is None:
            raise RuntimeError("collect() without start()")
        num_rows, self._rollout = self._rollout.num_rows, None
        results = {}
        for name, worker in self._workers.items():
            reply = worker.collect()
            if not reply.applies:
                continue
            pairs = self._pairs if worker.key == "rewards.pairwise" else None
            results[name] = _result(reply, num_rows, pairs)
            self.failures.record(name, results[name].failure)
        self.failures.check()
        return results

    def close(self) -> None:
        """End all processes."""
        for worker in self._workers.values():
            worker.close()
        if self._spare is not None:
            self._spare.close()

    def __enter__(self) -> "UserRewards":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _result(reply: Reply, num_rows: int, pairs: list[tuple[int, int]] | None) -> Result:
    if pairs is None:
        return Result(reply.values, reply.failure, reply.seconds)
    outside = ((reply.values < 0) | (reply.values > 1)).nonzero().flatten().tolist()
    if outside:
        value = reply.values[outside[0]].item()
        failure = f"returned {value:g} for the pair {pairs[outside[0]]}, not a probability"
        return Result(torch.full((num_rows,), torch.nan), failure, reply.seconds)
    return Result(win_rates(reply.values, pairs, num_rows), reply.failure, reply.seconds)

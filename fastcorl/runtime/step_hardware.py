"""What a step made of the hardware: useful operations over the peak, energy, memory."""

from torch import nn

from fastcorl.records import Rollout
from fastcorl.runtime.distributed import Distributed
from fastcorl.runtime.flops import ModelShape, rollout_work, step_flops
from fastcorl.runtime.hardware import HardwareMeter, device_peak, hardware_record


class StepHardware:
    """Call `begin` before a step and `figures` after it, on every rank.

    Args:
        policy: the policy that is trained. guided_sampling, guided_training: whether unconditional rows run beside the
            drawings in each.
    """

    def __init__(
        self,
        policy: nn.Module,
        ranks: Distributed,
        *,
        guided_sampling: bool,
        guided_training: bool,
    ):
        self.ranks = ranks
        self.guided_sampling, self.guided_training = guided_sampling, guided_training
        self.meter = HardwareMeter(ranks.device)
        self.peak = device_peak(ranks.device, policy.dtype)
        self.shape = ModelShape.of(policy)

    def begin(self) -> None:
        self.meter.begin()

    def figures(self, rollout: Rollout, trained: Rollout, train_seconds: float, *, updates: int) -> dict[str, float]:
        """See `hardware_record`. `trained` is what of `rollout` was trained on."""
        own = int((~rollout.external_rows()).sum())
        drawn = own if rollout.images is not None else 0
        flops = step_flops(
            self.shape,
            rollout_work(rollout, guided=self.guided_sampling, sampled=True),
            rollout_work(trained, guided=self.guided_training),
            images=len(rollout.prompts) if rollout.texts is not None else 0,
            drawn=drawn,
            updates=updates,
        )
        return hardware_record(
            self.meter.read(),
            self.ranks,
            images=drawn,
            train_flops=flops.train,
            train_seconds=train_seconds,
            peak=self.peak,
        )

    def close(self) -> None:
        self.meter.close()

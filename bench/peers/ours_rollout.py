"""fastcorl's rollout engine, with the time that its frozen parts take."""

import time
from collections import defaultdict

import torch

from bench.measure import synchronize
from bench.rollout_problems import GROUP_SIZE, GUIDANCE
from fastcorl.rollout import RolloutEngine, SamplingParams

STAGES = {"preprocess": "vision", "vision_features": "vision", "decode_images": "pixels"}


class OurRollout:
    """``spent`` holds the seconds of the last call in the vision tower and in the VQ decoder."""

    def __init__(self, policy):
        # One for each kind of call, since an engine keeps what the last kind needed.
        self.engines = {kind: RolloutEngine(policy) for kind in ((True, False), (False, True), (True, True))}
        self.device = policy.device
        self.spent = defaultdict(float)
        for name, stage in STAGES.items():
            setattr(policy, name, self._timed(stage, getattr(policy, name)))

    def generate(self, prompts, new_tokens, *, draw=True, answer=True, greedy=False):
        self.spent.clear()
        params = SamplingParams(0.0 if greedy else 1.0, GUIDANCE, new_tokens)
        group_size = 1 if greedy else GROUP_SIZE
        return self.engines[draw, answer].generate(prompts, group_size, params, draw=draw, answer=answer)

    def _timed(self, stage, method):
        def call(argument: list | torch.Tensor):
            synchronize(self.device)
            start = time.perf_counter()
            result = method(argument)
            synchronize(self.device)
            self.spent[stage] += time.perf_counter() - start
            return result

        return call

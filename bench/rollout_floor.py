"""The least time that a rollout can take, from bytes, operations, and what this machine reaches on each.

    floor = sum over decode steps of max(weight bytes / bandwidth, linear layers) + KV bytes / bandwidth
          + the prefill's max(weight bytes / bandwidth, linear layers) + frozen parts

* Linear layers: for every product of backbone and heads, at the rows of that step, the time of the fastest product of
  that shape and type that this machine has: a hot `torch.mm`, or on a CPU one with weights in oneDNN's layout. q, k, v
  and gate, up are fused. Guided drawings have two rows each in both the backbone and
  the image head, since rollouts return the conditional log-probability too.
* Bandwidth: that of a copy too large for the caches.
* KV bytes: what is distinct, read once a step, and the new position's written. Rows of a group share their prompt, and
  all drawings share one unconditional prompt. A row's own positions are its own.
* Prefill: the positions of the distinct prompts.
* Frozen parts: the vision tower and the VQ decoder are transformers' modules on both sides; they count with the time
  that they take within the call that is judged, so that the ratio speaks of the engine.

Attention's arithmetic, norms, sampling and the first token's heads count nothing. Everything is measured once a round,
at its fastest.
"""

import time
from collections import Counter

import torch

from bench.floors import copy
from bench.measure import synchronize
from fastcorl.rollout.linear import JointLinear

COPY_BYTES = {"cpu": 2**27, "cuda": 2**31}
SAMPLES = 20
SAMPLE_SECONDS = {"cpu": 2e-4, "cuda": 5e-3}  # of one sample, in which short calls are repeated


class RolloutFloor:
    def __init__(self, policy, prompts, workload):
        self.policy = policy
        self.copy = copy(COPY_BYTES[workload.device], policy.device)
        draws = [len(policy.encoder.draw(prompt.caption)) for prompt in prompts] if workload.draws else []
        asks = [len(policy.encoder.ask(prompt.question)) for prompt in prompts] if workload.answers else []
        prefixes = sum(draws) + max(draws, default=0), sum(asks)
        rows = 2 * workload.rows * workload.draws, workload.rows * workload.answers
        steps = (policy.num_image_tokens - 1) * workload.draws, (workload.answer_tokens - 1) * workload.answers
        alone = (rows[0], 0) if steps[0] > steps[1] else (0, rows[1])
        # How often each set of products runs: the prefill, steps of both kinds, steps of the kind that lasts longer.
        self.phases = [
            (1, self._backbone(sum(prefixes))),
            (min(steps), self._backbone(sum(rows)) + self._heads(*rows)),
            (max(steps) - min(steps), self._backbone(sum(alone)) + self._heads(*alone)),
        ]
        self.kv_bytes = self._kv_position_bytes() * sum(
            count * prefix + own * count * (count + 3) // 2  # at step s of `count`, a row reads s and writes one
            for count, prefix, own in zip(steps, prefixes, rows, strict=True)
        )

    def seconds(self):
        """Without the frozen parts."""
        bandwidth = self.copy.work / self._time(self.copy.run)
        shapes = {shape for count, products in self.phases if count for shape in products}
        taken = {shape: self._time_product(*shape) for shape in shapes}
        total = self.kv_bytes / bandwidth
        for count, products in self.phases:
            if count:
                weights = sum(times * k * n for (_, k, n), times in products.items()) * self.policy.dtype.itemsize
                total += count * max(weights / bandwidth, sum(n * taken[shape] for shape, n in products.items()))
        return total

    def _backbone(self, rows):
        """(rows, in, out) of each product, and how many there are."""
        text = self.policy.janus.config.text_config
        queries, values = text.num_attention_heads * text.head_dim, text.num_key_value_heads * text.head_dim
        hidden, layers = text.hidden_size, text.num_hidden_layers
        products = Counter()
        for inputs, outputs in (
            (hidden, queries + 2 * values),
            (queries, hidden),
            (hidden, 2 * text.intermediate_size),
            (text.intermediate_size, hidden),
        ):
            products[rows, inputs, outputs] += layers
        return products

    def _heads(self, image_rows, text_rows):
        head = self.policy.janus.model.generation_head
        products = Counter()
        for rows, layer in (
            (image_rows, head.proj_out),
            (image_rows, head.vision_head),
            (text_rows, self.policy.text_head),
        ):
            if rows:
                products[rows, layer.in_features, layer.out_features] += 1
        return products

    def _kv_position_bytes(self):
        text = self.policy.janus.config.text_config
        return 2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim * self.policy.dtype.itemsize

    def _time_product(self, rows, inputs, outputs):
        options = dict(dtype=self.policy.dtype, device=self.policy.device)
        left, weight = torch.randn(rows, inputs, **options), torch.randn(outputs, inputs, **options)
        product = torch.empty(rows, outputs, **options)
        taken = self._time(lambda: torch.mm(left, weight.T, out=product))
        linear = torch.nn.Linear(inputs, outputs, bias=False, **options)
        joint = JointLinear(linear)
        with torch.inference_mode():
            return min(taken, self._time(lambda: joint(left))) if joint.packed else taken

    def _time(self, call):
        def sample(count):
            synchronize(self.policy.device)
            start = time.perf_counter()
            for _ in range(count):
                call()
            synchronize(self.policy.device)
            return (time.perf_counter() - start) / count

        sample(1)
        count = max(1, round(SAMPLE_SECONDS[self.policy.device.type] / sample(1)))
        return min(sample(count) for _ in range(SAMPLES))

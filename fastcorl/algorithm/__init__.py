"""CoRL's algorithm: packing, the objective and the merge of refined policies."""

from fastcorl.algorithm.budget import budget_lengths
from fastcorl.algorithm.gradients import gradient_cosine
from fastcorl.algorithm.merge import gaussian_merge, merge_state_dicts
from fastcorl.algorithm.objective import CoRLObjective, ObjectiveOptions, StepTotals, packed_log_probs
from fastcorl.algorithm.packing import Packer, PackOptions, pack_rollout, set_advantages

__all__ = [
    "CoRLObjective",
    "ObjectiveOptions",
    "PackOptions",
    "Packer",
    "StepTotals",
    "budget_lengths",
    "gaussian_merge",
    "gradient_cosine",
    "merge_state_dicts",
    "pack_rollout",
    "packed_log_probs",
    "set_advantages",
]

"""A vocabulary whose head is split by rows over the processes of a group."""

import torch
import torch.distributed as dist

from fastcorl_kernels.checks import require


class VocabularyShard:
    """This process's ``size`` rows of the head, from ``start`` on; the hidden states are the same everywhere.

    One gathering of three numbers per row joins the processes' statistics, in rank order, so that all of them hold the
    same bits.
    """

    def __init__(self, group, start, size):
        self.group, self.start, self.size = group, start, size

    def local(self, index):
        """(index within this shard, clamped; whether it lies in it), each (C,)."""
        shifted = index - self.start
        hit = (shifted >= 0) & (shifted < self.size)
        return shifted.clamp(0, self.size - 1), hit

    def combine(self, lse, target, entropy):
        """(logsumexp, log_probs, entropy) over the whole vocabulary from this shard's; each (C,).

        ``target`` is the scaled logit of the index, -inf where another process has it.
        """
        mine = torch.stack([lse, target, lse - entropy])
        parts = [torch.empty_like(mine) for _ in range(dist.get_world_size(self.group))]
        dist.all_gather(parts, mine, group=self.group)
        all_lse, all_targets, means = torch.stack(parts, dim=1)
        whole = torch.logsumexp(all_lse, dim=0)
        share = (all_lse - whole).exp()
        # A shard without probability has no mean.
        mean = torch.where(share == 0, 0.0, share * means).sum(dim=0)
        return whole, all_targets.amax(dim=0) - whole, whole - mean

    def sum_(self, values):
        """Add up over the group, in place."""
        dist.all_reduce(values, group=self.group)


def make_shard(group, start, weight):
    """The shard that the arguments of a linear op describe; None for a whole head."""
    if group is None:
        require(start is None, "vocab_start", "None without process_group", start)
        return None
    size = weight.shape[0]
    start = dist.get_rank(group) * size if start is None else start
    whole = isinstance(start, int) and not isinstance(start, bool) and start >= 0
    require(whole, "vocab_start", "an integer of at least 0", start)
    return VocabularyShard(group, start, size)

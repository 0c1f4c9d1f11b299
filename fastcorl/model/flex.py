"""Packs, with shared prefixes or not, on torch's FlexAttention (arXiv 2412.05496) with a block mask.

Every position sees two ranges: its own sequence up to itself, and a part of another sequence. Which blocks these touch
or fill is computed from the ranges of N positions and the N / 128 blocks; an (N, N) mask is never made.
"""

import functools

import torch

from fastcorl.model.pack_layout import PackLayout

BLOCK = 128


def by_flex(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layout: PackLayout, scaling: float
) -> torch.Tensor:
    """See `Attend`."""
    q, k, v = (states.transpose(0, 1)[None] for states in (query, key, value))
    out = flex_attention()(
        q,
        k,
        v,
        block_mask=layout.plan(block_mask),
        scale=scaling,
        enable_gqa=q.shape[1] != k.shape[1],
        # Not the kernel for decoding, which torch would take for short packs and has none of for some of their lengths.
        kernel_options={"FORCE_USE_FLEX_ATTENTION": True},
    )
    return out[0].transpose(0, 1)


@functools.cache
def flex_attention():
    """Compiled, because it has no kernel otherwise. From the second length of a pack on it is the same for all."""
    from torch.nn.attention import flex_attention as module

    return torch.compile(module.flex_attention)


def block_mask(layout: PackLayout):
    """The `torch.nn.attention.flex_attention.BlockMask` of a pack."""
    from torch.nn.attention.flex_attention import BlockMask

    device = layout.device
    lengths = torch.tensor([span.length for span in layout.sequences])
    spans = torch.tensor([(own.start, *seen) for own, seen in zip(layout.sequences, layout.seen, strict=True)])
    starts, seen_starts, seen_ends = spans.repeat_interleave(lengths, 0).int().T.contiguous().to(device)

    def mask(batch, head, query, key):
        own = (key >= starts[query]) & (key <= query)
        return own | ((key >= seen_starts[query]) & (key < seen_ends[query]))

    positions = torch.arange(layout.size, device=device)[:, None]
    firsts = torch.arange(0, layout.size, BLOCK, device=device)
    lasts = (firsts + BLOCK).clamp(max=layout.size) - 1
    own, seen = starts[:, None], (seen_starts[:, None], seen_ends[:, None])
    touched = (own <= lasts) & (positions >= firsts) | (seen[0] <= lasts) & (seen[1] > firsts) & (seen[1] > seen[0])
    filled = (own <= firsts) & (positions >= lasts) | (seen[0] <= firsts) & (seen[1] > lasts)
    touched = torch.stack([rows.any(0) for rows in touched.split(BLOCK)])
    filled = torch.stack([rows.all(0) for rows in filled.split(BLOCK)])
    if layout.size % BLOCK:  # not to be read without a mask, for they go beyond the pack
        filled[-1], filled[:, -1] = False, False
    return BlockMask.from_kv_blocks(
        *_listed(touched & ~filled), *_listed(filled), BLOCK, mask, seq_lengths=(layout.size, layout.size)
    )


def _listed(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(Q, K) bool -> (1, 1, Q) int32 number of true ones in a row, and (1, 1, Q, K) int32 columns, those first."""
    order = blocks.int().argsort(dim=-1, descending=True, stable=True)
    return blocks.sum(-1).int()[None, None], order.int()[None, None]

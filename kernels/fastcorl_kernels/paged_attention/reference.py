"""Plain torch decoding over pages: gathers all of them, and holds all scores."""

import torch

from fastcorl_kernels.checks import accumulator_dtype


def rope_to_pages_reference(qkv, cos, sin, positions, slots, key_pages, value_pages):
    """See ``rope_to_pages``."""
    kv_heads, head_dim = key_pages.shape[2:]
    heads = qkv.unflatten(1, (-1, head_dim))
    query, key, value = heads.split((heads.shape[1] - 2 * kv_heads, kv_heads, kv_heads), dim=1)
    cos, sin = (table[positions][:, None] for table in (cos, sin))
    key_pages.flatten(0, 1)[slots] = _rotate(key, cos, sin)
    value_pages.flatten(0, 1)[slots] = value
    return _rotate(query, cos, sin)


def _rotate(x, cos, sin):
    """x (R, heads, D), cos and sin (R, 1, D)."""
    first, second = x.to(cos.dtype).chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    return (x.to(cos.dtype) * cos + turned * sin).to(x.dtype)


def paged_decode_attention_reference(query, key_pages, value_pages, block_table, context_lengths, scaling, prefix=None):
    """See ``paged_decode_attention``; ``prefix`` changes nothing."""
    dtype = accumulator_dtype(query)
    page_size, kv_heads = key_pages.shape[1:3]
    tokens = torch.arange(block_table.shape[1] * page_size, device=query.device)
    seen = tokens < context_lengths[:, None]
    table = torch.where(seen[:, ::page_size], block_table, 0).long()
    unseen = ~seen[:, :, None, None]
    # What is not seen may be NaN, which a weight of 0 would not stop.
    keys, values = (pages[table].flatten(1, 2).to(dtype).masked_fill(unseen, 0.0) for pages in (key_pages, value_pages))
    grouped = query.to(dtype).unflatten(1, (kv_heads, -1))
    scores = torch.einsum("rhgd,rthd->rhgt", grouped, keys) * scaling
    hidden = ~seen[:, None, None, :]
    weights = scores.masked_fill(hidden, -torch.inf).softmax(dim=-1).masked_fill(hidden, 0.0)
    return torch.einsum("rhgt,rthd->rhgd", weights, values).flatten(1, 2).to(query.dtype)

"""Runs prompts through the backbone once each, packed without padding, and keeps what decoding continues from."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from fastcorl.model import PackedAttention, Policy, pack_prompts

PACK_TOKENS = 16384  # bounds the activations of one forward


@dataclass(eq=False)
class Prefill:
    """One packed forward: keys and values per layer (N, kv_heads, D), rotated; `hidden` (prompts, hidden) are the final
    states of each prompt's last token."""

    keys: list[torch.Tensor]
    values: list[torch.Tensor]
    hidden: torch.Tensor


class Source(NamedTuple):
    """Where a prompt stands in a prefill: all but its last token at [start, start + length), that token at `last`."""

    prefill: Prefill
    start: int
    length: int
    last: int
    index: int  # into prefill.hidden


def prefill_prompts(
    policy: Policy, prompts: Sequence[Sequence[int]], features: Sequence[torch.Tensor | None]
) -> list[Source]:
    """Run each prompt once. `features[i]` are the (T, hidden) image features of prompt i, None without an image."""
    sources = []
    for part in _packs(prompts):
        batch = _pack(policy, prompts[part], features[part])
        attention = PackedAttention(batch.cu_seqlens, keep_kv=True)
        hidden = policy.run_backbone(policy.embed(batch)[None], batch.position_ids[None], attention)[0]
        lasts = batch.cu_seqlens[1:].long() - 1
        prefill = Prefill(attention.keys, attention.values, hidden[lasts])
        start = 0
        for index, prompt in enumerate(prompts[part]):
            end = start + len(prompt)
            sources.append(Source(prefill, start, len(prompt) - 1, end - 1, index))
            start = end
    return sources


def prefill_unconditional(policy: Policy, lengths: Sequence[int]) -> dict[int, Source]:
    """The unconditional prompts `[BOS, PAD ..., BOI]` of these lengths.

    Attention is causal, so each one without its last token is the beginning of the longest: that chain is run once, and
    of every length only the last token.
    """
    encoder, device = policy.encoder, policy.device
    chain = encoder.unconditional(max(lengths))[:-1]
    ids = torch.tensor(chain + [encoder.begin_image_id] * len(lengths), device=device)
    positions = torch.tensor([*range(len(chain)), *(length - 1 for length in lengths)], device=device)
    bounds = torch.tensor([0, *range(len(chain), len(ids) + 1)], device=device)
    attention = PackedAttention(
        bounds,
        torch.tensor([-1] + [0] * len(lengths)),
        prefix_lengths=torch.tensor([0, *(length - 1 for length in lengths)]),
        keep_kv=True,
    )
    hidden = policy.run_backbone(policy.embed_text(ids)[None], positions[None], attention)[0]
    prefill = Prefill(attention.keys, attention.values, hidden[len(chain) :])
    return {length: Source(prefill, 0, length - 1, len(chain) + i, i) for i, length in enumerate(lengths)}


def hidden_states(
    policy: Policy, sequences: Sequence[Sequence[int]], features: Sequence[torch.Tensor | None]
) -> Iterator[torch.Tensor]:
    """Yields the final hidden states (L_i, hidden) of each sequence, in order; `features` as in `prefill_prompts`."""
    for part in _packs(sequences):
        batch = _pack(policy, sequences[part], features[part])
        yield from policy.hidden_states(batch).split([len(sequence) for sequence in sequences[part]])


def _packs(prompts: Sequence[Sequence[int]]) -> Iterator[slice]:
    """Consecutive prompts of at most PACK_TOKENS together; a longer one is alone."""
    first, tokens = 0, 0
    for i, prompt in enumerate(prompts):
        if i > first and tokens + len(prompt) > PACK_TOKENS:
            yield slice(first, i)
            first, tokens = i, 0
        tokens += len(prompt)
    if first < len(prompts):
        yield slice(first, len(prompts))


def _pack(policy: Policy, prompts: Sequence[Sequence[int]], features: Sequence[torch.Tensor | None]):
    present = [each for each in features if each is not None]
    return pack_prompts(
        [list(prompt) for prompt in prompts],
        torch.stack(present) if present else None,
        policy.encoder.image_id,
        policy.device,
    )

"""Runs prompts through the backbone once each, packed without padding, and keeps what decoding continues from."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from fastcorl.model import PackedAttention, Policy, pack_prompts
from fastcorl.records import PackedBatch
from fastcorl.rollout.decoder import Decoder, Rope, rotate

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


class Prefiller:
    """Runs packs through a decoder. `features[i]` are everywhere the (T, hidden) image features that stand at the
    placeholders of prompt i, None without an image."""

    def __init__(self, policy: Policy, decoder: Decoder, rope: Rope):
        self.policy, self.decoder, self.rope = policy, decoder, rope

    def prompts(self, prompts: Sequence[Sequence[int]], features: Sequence[torch.Tensor | None]) -> list[Source]:
        """Run each prompt once."""
        sources = []
        for part in _packs(prompts):
            batch = self._pack(prompts[part], features[part])
            attention = self._attention(batch, keep_kv=True)
            hidden = self._run(self.policy.embed(batch), batch.position_ids, attention)
            lasts = (batch.cu_seqlens[1:].long() - 1).to(hidden.device)
            prefill = Prefill(attention.keys, attention.values, hidden[lasts])
            start = 0
            for index, prompt in enumerate(prompts[part]):
                end = start + len(prompt)
                sources.append(Source(prefill, start, len(prompt) - 1, end - 1, index))
                start = end
        return sources

    def unconditional(self, lengths: Sequence[int]) -> dict[int, Source]:
        """The unconditional prompts `[BOS, PAD ..., BOI]` of these lengths.

        Attention is causal, so each one without its last token is the beginning of the longest: that chain is run once,
        and of every length only the last token.
        """
        encoder, device = self.policy.encoder, self.policy.device
        chain = encoder.unconditional(max(lengths))[:-1]
        ids = torch.tensor(chain + [encoder.begin_image_id] * len(lengths), device=device)
        positions = torch.tensor([*range(len(chain)), *(length - 1 for length in lengths)], device=device)
        attention = PackedAttention(
            torch.tensor([0, *range(len(chain), len(ids) + 1)], device=device),
            torch.tensor([-1] + [0] * len(lengths)),
            prefix_lengths=torch.tensor([0, *(length - 1 for length in lengths)]),
            keep_kv=True,
            backend=self.policy.attention_backend,
        )
        hidden = self._run(self.policy.embed_text(ids), positions, attention)
        prefill = Prefill(attention.keys, attention.values, hidden[len(chain) :])
        return {length: Source(prefill, 0, length - 1, len(chain) + i, i) for i, length in enumerate(lengths)}

    def hidden_states(
        self, sequences: Sequence[Sequence[int]], features: Sequence[torch.Tensor | None]
    ) -> Iterator[torch.Tensor]:
        """Yields the final hidden states (L_i, hidden) of each sequence, in order."""
        for part in _packs(sequences):
            batch = self._pack(sequences[part], features[part])
            hidden = self._run(self.policy.embed(batch), batch.position_ids, self._attention(batch))
            yield from hidden.split([len(sequence) for sequence in sequences[part]])

    def _attention(self, batch: PackedBatch, *, keep_kv: bool = False) -> PackedAttention:
        device, backend = batch.token_ids.device, self.policy.attention_backend
        return PackedAttention(batch.cu_seqlens, device=device, keep_kv=keep_kv, backend=backend)

    def _pack(self, prompts: Sequence[Sequence[int]], features: Sequence[torch.Tensor | None]) -> PackedBatch:
        present = [each for each in features if each is not None]
        ids = [list(prompt) for prompt in prompts]
        stacked = torch.stack(present) if present else None
        return pack_prompts(ids, stacked, self.policy.encoder.image_id, self.policy.device)

    def _run(self, embeds: torch.Tensor, positions: torch.Tensor, attention: PackedAttention) -> torch.Tensor:
        return self.decoder(embeds, _Packed(self.decoder, self.rope, positions, attention))


class _Packed:
    """Attention of a decoder inside the sequences of a pack."""

    def __init__(self, decoder: Decoder, rope: Rope, positions: torch.Tensor, attention: PackedAttention):
        self.geometry = decoder.geometry
        self.turns = rope.at(positions, self.geometry.dtype)
        self.attention = attention

    def attend(self, layer: int, qkv: torch.Tensor) -> torch.Tensor:
        heads, kv_heads = self.geometry.heads, self.geometry.kv_heads
        states = qkv.view(len(qkv), heads + 2 * kv_heads, -1)
        turned = rotate(states[:, : heads + kv_heads], *self.turns)
        values = states[:, heads + kv_heads :]
        return self.attention.attend_packed(
            turned[:, :heads], turned[:, heads:], values, self.geometry.scaling
        ).flatten(1)


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

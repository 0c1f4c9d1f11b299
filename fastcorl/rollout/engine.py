"""Samples drawings and answers together: one prefill over distinct prompts, then one decode loop for all rows.

Row regions of a decode step are `[image conditional | image unconditional | text]`: every row goes through one backbone
forward, each head reads its contiguous region. The engine uses the policy's own parameters, without a copy.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fastcorl.model import CachedAttention, PackedAttention, Policy, pack_prompts
from fastcorl.records import ImageSamples, Prompt, Rollout, TextSamples
from fastcorl.rollout.sampling import row_seed, sample

DECODE_PIXELS_AT_ONCE = 16 * 384**2


@dataclass(frozen=True)
class SamplingParams:
    """`temperature` 0 is greedy; `guidance` w mixes logits as u + w (c - u), 1 runs the conditional branch alone."""

    temperature: float = 1.0
    guidance: float = 1.0
    max_new_tokens: int = 512


class _Images:
    """Decoding state of the drawing rows."""

    def __init__(self, rows: int, length: int, seeds: torch.Tensor):
        self.seeds = seeds
        self.length = length
        self.tokens = seeds.new_zeros(rows, length)
        self.log_probs = torch.zeros(rows, length, device=seeds.device)
        self.cond_log_probs = torch.zeros_like(self.log_probs)


class _Texts:
    """Decoding state of the answer rows; `active` are the rows still in the cache."""

    def __init__(self, rows: int, limit: int, seeds: torch.Tensor, pad_id: int):
        self.seeds = seeds
        self.limit = limit
        self.tokens = torch.full((rows, limit), pad_id, device=seeds.device)
        self.log_probs = torch.zeros(rows, limit, device=seeds.device)
        self.lengths = seeds.new_full((rows,), limit)
        self.finished = torch.zeros(rows, dtype=torch.bool, device=seeds.device)
        self.active = torch.arange(rows, device=seeds.device)


class RolloutEngine:
    """Generates rollouts with a policy. Results are per row reproducible: see `sampling.row_seed`."""

    def __init__(self, policy: Policy):
        self.policy = policy

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[Prompt],
        group_size: int,
        params: SamplingParams,
        *,
        draw: bool = True,
        answer: bool = True,
        seed: object = 0,
    ) -> Rollout:
        """Sample `group_size` drawings of each caption and as many answers to each question.

        `seed` identifies the call (say, run seed and step); rows add their prompt's id, their index and modality.
        """
        policy, encoder = self.policy, self.policy.encoder
        draw_ids = [encoder.draw(prompt.caption) for prompt in prompts] if draw else []
        ask_ids = [encoder.ask(prompt.question) for prompt in prompts] if answer else []
        features = None
        if ask_ids:
            features = policy.vision_features(policy.preprocess([prompt.image for prompt in prompts]))
        rows = len(prompts) * group_size

        def seeds(modality: str) -> torch.Tensor:
            values = [row_seed(seed, prompt.id, k, modality) for prompt in prompts for k in range(group_size)]
            return torch.tensor(values, dtype=torch.int64, device=policy.device)

        images = _Images(rows, policy.num_image_tokens, seeds("image")) if draw else None
        texts = _Texts(rows, params.max_new_tokens, seeds("text"), encoder.pad_id) if answer else None
        guided = draw and params.guidance != 1
        uncond_ids = [encoder.unconditional(len(ids)) for ids in draw_ids]
        lengths = sorted({len(ids) for ids in draw_ids}) if guided else []
        unconditional = [encoder.unconditional(length) for length in lengths]

        # Which prefilled prompt each row continues, in region order.
        first_uncond, first_ask = len(draw_ids), len(draw_ids) + len(unconditional)
        sources = [p for p in range(len(draw_ids)) for _ in range(group_size)]
        if guided:
            sources += [first_uncond + lengths.index(len(ids)) for ids in draw_ids for _ in range(group_size)]
        sources += [first_ask + p for p in range(len(ask_ids)) for _ in range(group_size)]
        if sources:
            hidden, attention = self._prefill(draw_ids + unconditional + ask_ids, features, sources, images, texts)
            self._decode(hidden, attention, images, texts, params)

        return Rollout(
            prompts=list(prompts),
            group_size=group_size,
            images=self._image_samples(images) if images else None,
            texts=self._text_samples(texts) if texts else None,
            draw_ids=draw_ids,
            uncond_ids=uncond_ids,
            ask_ids=ask_ids,
            image_token_id=encoder.image_id,
            vision_features=features,
        )

    def _prefill(
        self,
        prompts: list[list[int]],
        features: torch.Tensor | None,
        sources: list[int],
        images: _Images | None,
        texts: _Texts | None,
    ) -> tuple[torch.Tensor, CachedAttention]:
        """Run each distinct prompt once; give every row a copy of its prompt's cache and its last hidden state."""
        policy = self.policy
        batch = pack_prompts(prompts, features, policy.encoder.image_id, policy.device)
        packed = PackedAttention(batch.cu_seqlens, keep_kv=True)
        hidden = policy.run_backbone(policy.embed(batch)[None], batch.position_ids[None], packed)[0]
        source = torch.tensor(sources, device=policy.device)
        lengths = batch.cu_seqlens.diff().long()
        starts = batch.cu_seqlens[:-1].long()
        longest = int(lengths.max())
        new_tokens = max(images.length if images else 0, texts.limit if texts else 0)
        grid = (starts[:, None] + torch.arange(longest, device=policy.device)).clamp(max=batch.num_tokens - 1)
        grid = grid[source]

        def cache(states: torch.Tensor) -> torch.Tensor:
            out = states.new_zeros(len(source), states.shape[1], longest + new_tokens, states.shape[2])
            out[:, :, :longest] = states[grid].transpose(1, 2)
            return out

        keys = [cache(states) for states in packed.keys]
        values = [cache(states) for states in packed.values]
        last = hidden[starts + lengths - 1]
        return last[source], CachedAttention(keys, values, lengths[source])

    def _decode(
        self,
        hidden: torch.Tensor,
        attention: CachedAttention,
        images: _Images | None,
        texts: _Texts | None,
        params: SamplingParams,
    ) -> None:
        policy = self.policy
        num_images = len(images.tokens) if images else 0
        step = 0
        while True:
            embeds = []
            num_image_rows = len(hidden) - (len(texts.active) if texts else 0)
            if num_image_rows:
                tokens = self._sample_images(hidden[:num_image_rows], images, step, params)
                if step + 1 == images.length:
                    attention.keep(torch.arange(num_image_rows, len(hidden), device=hidden.device))
                else:
                    codes = policy.embed_codes(tokens)
                    embeds += [codes] * (num_image_rows // num_images)
            if texts is not None and len(texts.active):
                tokens, alive = self._sample_texts(hidden[num_image_rows:], texts, step, params)
                # The cache is compacted when a quarter of its rows is idle, not at each row's end.
                if len(alive) <= 0.75 * len(texts.active) or len(alive) == 0:
                    kept_images = len(attention.lengths) - len(texts.active)
                    image_rows = torch.arange(kept_images, device=hidden.device)
                    attention.keep(torch.cat([image_rows, kept_images + alive]))
                    texts.active, tokens = texts.active[alive], tokens[alive]
                if len(tokens):
                    embeds.append(policy.embed_text(tokens))
            if not embeds:
                return
            inputs = torch.cat([part.to(hidden.dtype) for part in embeds])
            hidden = policy.run_backbone(inputs[:, None], attention.lengths[:, None], attention)[:, 0]
            attention.advance()
            step += 1

    def _sample_images(self, hidden: torch.Tensor, images: _Images, step: int, params: SamplingParams) -> torch.Tensor:
        policy = self.policy
        logits = policy.image_head(policy.image_head_input(hidden)).float()
        cond = logits[: len(images.tokens)]
        if len(logits) > len(cond):
            uncond = logits[len(cond) :]
            guided = uncond + params.guidance * (cond - uncond)
        else:
            guided = cond
        tokens, log_probs = sample(guided, images.seeds, step, params.temperature)
        images.tokens[:, step] = tokens
        images.log_probs[:, step] = log_probs
        cond_log_probs = (cond / (params.temperature or 1.0)).log_softmax(-1)
        images.cond_log_probs[:, step] = cond_log_probs.gather(-1, tokens[:, None]).squeeze(-1)
        return tokens

    def _sample_texts(
        self, hidden: torch.Tensor, texts: _Texts, step: int, params: SamplingParams
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the tokens of the active rows and the indices, among them, of those that go on."""
        policy = self.policy
        active = texts.active
        tokens, log_probs = sample(policy.text_head(hidden), texts.seeds[active], step, params.temperature)
        going = ~texts.finished[active]
        live, tokens_live = active[going], tokens[going]
        texts.tokens[live, step] = tokens_live
        texts.log_probs[live, step] = log_probs[going]
        ended = live[tokens_live == policy.encoder.eos_id]
        texts.finished[ended] = True
        texts.lengths[ended] = step + 1
        if step + 1 == texts.limit:
            return tokens, active[:0]
        return tokens, (~texts.finished[active]).nonzero().squeeze(-1)

    def _image_samples(self, images: _Images) -> ImageSamples:
        at_once = max(1, DECODE_PIXELS_AT_ONCE // self.policy.image_size**2)
        pixels = [self.policy.decode_images(part) for part in images.tokens.split(at_once)]
        return ImageSamples(
            tokens=images.tokens,
            log_probs=images.log_probs,
            cond_log_probs=images.cond_log_probs,
            pixels=torch.cat(pixels) if pixels else torch.empty(0, 3, 0, 0),
        )

    def _text_samples(self, texts: _Texts) -> TextSamples:
        longest = int(texts.lengths.max()) if len(texts.lengths) else 0
        rows = zip(texts.tokens.tolist(), texts.lengths.tolist(), strict=True)
        return TextSamples(
            tokens=texts.tokens[:, :longest],
            lengths=texts.lengths,
            log_probs=texts.log_probs[:, :longest],
            answers=[self.policy.encoder.decode(row[:length]) for row, length in rows],
            finished=texts.finished,
        )

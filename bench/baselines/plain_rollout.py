"""Sampling with transformers: `generate` for answers, for drawings the token loop of its Janus model."""

from collections.abc import Sequence

import torch
from transformers import DynamicCache, JanusForConditionalGeneration, JanusProcessor

from bench.baselines.plain_inputs import PlainInputs
from fastcorl.records import ImageSamples, Prompt, Rollout, TextSamples


class PlainSampler:
    """Every sample of a group prefills its prompt. Answers end by the model's generation configuration."""

    def __init__(
        self,
        janus: JanusForConditionalGeneration,
        processor: JanusProcessor,
        *,
        group_size: int,
        temperature: float,
        guidance: float,
        max_new_tokens: int,
    ):
        self.janus, self.processor, self.group_size = janus, processor, group_size
        self.temperature, self.guidance, self.max_new_tokens = temperature, guidance, max_new_tokens

    @torch.no_grad()
    def __call__(self, prompts: Sequence[Prompt], inputs: PlainInputs) -> Rollout:
        """A drawing and an answer in every row; log-probabilities are not captured, and NaN."""
        codes = self._codes(inputs)
        tokens, lengths, finished = self._answers(inputs)
        unknown_codes, unknown_tokens = (torch.full(each.shape, torch.nan) for each in (codes, tokens))
        answers = self.processor.batch_decode(tokens, skip_special_tokens=True)
        return Rollout(
            prompts=list(prompts),
            group_size=self.group_size,
            images=ImageSamples(codes, unknown_codes, unknown_codes, self._decode(codes)),
            texts=TextSamples(tokens, lengths, unknown_tokens, [answer.strip() for answer in answers], finished),
            draw_ids=[],
            uncond_ids=[],
            ask_ids=[],
            image_token_id=self.janus.config.image_token_id,
        )

    def _codes(self, inputs: PlainInputs) -> torch.Tensor:
        """(n, T) codes; with guidance each row has a second one, whose prompt is padded out but for its ends."""
        model, config = self.janus.model, self.janus.generation_config
        ids, mask = (
            inputs.draw[name].repeat_interleave(self.group_size, 0) for name in ("input_ids", "attention_mask")
        )
        guided = self.guidance != 1
        if guided:
            ends = torch.tensor([config.bos_token_id, config.generation_kwargs["boi_token_id"]], device=ids.device)
            ids = torch.cat([ids, ids.masked_fill(~torch.isin(ids, ends), config.pad_token_id)])
            mask = mask.repeat(2, 1)
        embeds = self.janus.get_input_embeddings()(ids)
        cache, drawn = DynamicCache(config=model.language_model.config), []
        for _ in range(self.processor.num_image_tokens):
            hidden = model.language_model(
                inputs_embeds=embeds, attention_mask=mask, past_key_values=cache, use_cache=True
            ).last_hidden_state[:, -1]
            logits = model.generation_head(hidden)
            if guided:
                cond, uncond = logits.chunk(2)
                logits = uncond + self.guidance * (cond - uncond)
            code = torch.multinomial(torch.softmax(logits.float() / self.temperature, -1), 1)
            drawn.append(code)
            embeds = self.janus.prepare_embeddings_for_image_generation(code.repeat(1 + guided, 1))
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
        return torch.cat(drawn, 1)

    def _answers(self, inputs: PlainInputs) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(n, L) tokens, right-padded; (n,) lengths, which count the end token; (n,) whether there is one."""
        sequences = self.janus.generate(
            **inputs.ask,
            do_sample=True,
            temperature=self.temperature,
            top_k=0,
            top_p=1.0,
            max_new_tokens=self.max_new_tokens,
            max_length=None,
            num_return_sequences=self.group_size,
        )
        tokens = sequences[:, inputs.ask["input_ids"].shape[1] :]
        ended = tokens == (-1 if (end := self.janus.generation_config.eos_token_id) is None else end)
        finished = ended.any(1)
        lengths = torch.where(finished, ended.int().argmax(1) + 1, tokens.shape[1])
        return tokens, lengths, finished

    def _decode(self, codes: torch.Tensor) -> torch.Tensor:
        """(n, 3, H, W) pixels in [0, 1]."""
        return (self.janus.decode_image_tokens(codes).permute(0, 3, 1, 2).float() / 2 + 0.5).clamp(0, 1)

"""transformers' own ``generate``, from prompts to pixels and answers, on a copy of the policy's model."""

from copy import deepcopy

import torch

from bench.rollout_problems import GROUP_SIZE, GUIDANCE

PIXELS_AT_ONCE = 64 * 384**2


class TransformersRollout:
    """Its defaults: a static cache for drawings, a growing one for answers, SDPA; nothing truncates the distribution.

    Prompts are padded on the left by Janus's processor.
    """

    def __init__(self, policy):
        self.processor = policy.processor
        self.janus = deepcopy(policy.janus)
        self.janus.set_attn_implementation("sdpa")
        self.janus.generation_config.eos_token_id = None

    @torch.inference_mode()
    def images(self, prompts, *, greedy=False):
        """(codes, pixels) of ``GROUP_SIZE`` drawings of each prompt, or of one greedy drawing."""
        inputs = self._inputs([self._chat(text=prompt.caption) for prompt in prompts], generation_mode="image")
        codes = self.janus.generate(
            **inputs,
            **_sampling(greedy),
            generation_mode="image",
            guidance_scale=GUIDANCE,
            max_length=inputs["input_ids"].shape[1] + self.processor.num_image_tokens,
        )
        at_once = max(1, PIXELS_AT_ONCE // self.janus.config.vision_config.image_size**2)
        pixels = torch.cat([self.janus.decode_image_tokens(part) for part in codes.split(at_once)])
        return codes, (pixels.permute(0, 3, 1, 2).float() / 2 + 0.5).clamp(0, 1)

    @torch.inference_mode()
    def answers(self, prompts, new_tokens, *, greedy=False):
        """(tokens, strings) of ``GROUP_SIZE`` answers to each prompt, or of one greedy answer."""
        texts = [self._chat(image=True, text=prompt.question) for prompt in prompts]
        inputs = self._inputs(texts, images=[prompt.image for prompt in prompts])
        sequences = self.janus.generate(**inputs, **_sampling(greedy), max_new_tokens=new_tokens)
        tokens = sequences[:, inputs["input_ids"].shape[1] :]
        return tokens, self.processor.batch_decode(tokens, skip_special_tokens=True)

    def _chat(self, *, text, image=False):
        content = [{"type": "image"}] * image + [{"type": "text", "text": text}]
        messages = [{"role": "user", "content": content}]
        return self.processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)

    def _inputs(self, texts, **kwargs):
        inputs = self.processor(text=texts, padding=True, return_tensors="pt", **kwargs)
        return inputs.to(self.janus.device, self.janus.dtype)


def _sampling(greedy):
    if greedy:
        return dict(do_sample=False)
    return dict(do_sample=True, temperature=1.0, top_k=0, num_return_sequences=GROUP_SIZE)

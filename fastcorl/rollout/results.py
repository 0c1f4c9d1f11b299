"""Finished rows as the records that the rest of a step reads."""

import torch

from fastcorl.model import Policy
from fastcorl.records import ImageSamples, TextSamples
from fastcorl.rollout.rows import ImageRows, TextRows

DECODE_PIXELS_AT_ONCE = 16 * 384**2


def image_samples(policy: Policy, images: ImageRows | None, count: int) -> ImageSamples:
    """The first `count` drawings, decoded in batches on the device."""
    if not count:
        blank = torch.zeros(0, policy.num_image_tokens, device=policy.device)
        pixels = torch.zeros(0, 3, policy.image_size, policy.image_size, device=policy.device)
        return ImageSamples(blank.long(), blank, blank.clone(), pixels)
    tokens, log_probs, cond_log_probs = (
        each[:count].clone() for each in (images.out_tokens, images.out_log_probs, images.out_cond_log_probs)
    )
    at_once = max(1, DECODE_PIXELS_AT_ONCE // policy.image_size**2)
    pixels = torch.cat([policy.decode_images(part) for part in tokens.split(at_once)])
    return ImageSamples(tokens, log_probs, cond_log_probs, pixels)


def text_samples(policy: Policy, texts: TextRows | None, count: int) -> TextSamples:
    """The first `count` answers."""
    if not count:
        nothing = torch.zeros(0, 0, device=policy.device)
        lengths = torch.zeros(0, dtype=torch.int64, device=policy.device)
        return TextSamples(nothing.long(), lengths, nothing, [], lengths.bool())
    lengths = texts.out_lengths[:count].clone()
    longest = int(lengths.max())
    beyond = torch.arange(longest, device=lengths.device) >= lengths[:, None]
    tokens = texts.out_tokens[:count, :longest].masked_fill(beyond, policy.encoder.pad_id)
    answers = [row[:length] for row, length in zip(tokens.tolist(), lengths.tolist(), strict=True)]
    return TextSamples(
        tokens=tokens,
        lengths=lengths,
        # What was written there for an earlier call is not this one's.
        log_probs=texts.out_log_probs[:count, :longest].masked_fill(beyond, 0.0),
        answers=[policy.encoder.decode(answer) for answer in answers],
        finished=texts.out_finished[:count].clone(),
    )

"""Trains the tiny BLIP that recaptions drawings."""

import random

import torch
from transformers import BlipForConditionalGeneration, JanusVQVAE, PreTrainedTokenizerFast
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

from fastcorl.quickstart.scenes import IMAGE_SIZE
from fastcorl.quickstart.warm_start.architecture import blip_config
from fastcorl.quickstart.warm_start.batches import disturb, scene_batches, to_pixels
from fastcorl.quickstart.warm_start.descent import Descent
from fastcorl.quickstart.warm_start.vision import train_vision


def make_image_processor() -> BlipImageProcessorPil:
    return BlipImageProcessorPil(
        size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )


def train_captioner(
    tokenizer: PreTrainedTokenizerFast,
    vq: JanusVQVAE,
    *,
    vision_steps: int,
    steps: int,
    batch_size: int = 64,
    seed: int = 0,
    log=print,
) -> BlipForConditionalGeneration:
    """Learn `begin caption end` on train scenes, half of them as the VQ model redraws them, all of them disturbed."""
    torch.manual_seed(seed)
    blip = BlipForConditionalGeneration(blip_config(tokenizer)).train()
    train_vision(blip.vision_model, steps=vision_steps, seed=seed, log=log)
    blip.vision_model.requires_grad_(False)
    decoder = blip.text_decoder.parameters()
    descent = Descent("captioner", decoder, steps=steps, peak_learning_rate=1.5e-3, log=log)
    generator, rng = torch.Generator().manual_seed(seed), random.Random(seed)
    for _, scenes in zip(range(steps), scene_batches(batch_size, seed + 1), strict=False):
        rng.shuffle(scenes)
        pixels = to_pixels([scene.image for scene in scenes])
        with torch.no_grad():
            half = batch_size // 2
            codes = vq.encode(pixels[:half], return_dict=True).image_tokens.view(half, -1)
            pixels = disturb(torch.cat([vq.decode(codes).clamp(-1, 1), pixels[half:]]), generator)
        text = tokenizer(
            [scene.caption + tokenizer.eos_token for scene in scenes],
            padding=True,
            padding_side="right",
            return_tensors="pt",
        )
        labels = text["input_ids"].masked_fill(text["attention_mask"] == 0, -100)
        loss = blip(
            pixel_values=pixels, input_ids=text["input_ids"], attention_mask=text["attention_mask"], labels=labels
        ).loss
        descent.step(loss, loss=loss)
    return blip.eval()

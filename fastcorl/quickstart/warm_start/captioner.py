"""Trains the tiny BLIP that recaptions drawings."""

import random
import time

import torch
import torch.nn.functional as F
from transformers import BlipForConditionalGeneration, JanusVQVAE, PreTrainedTokenizerFast
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

from fastcorl.quickstart.scenes import IMAGE_SIZE
from fastcorl.quickstart.warm_start.architecture import blip_config
from fastcorl.quickstart.warm_start.batches import scene_batches, to_pixels


def make_image_processor() -> BlipImageProcessorPil:
    return BlipImageProcessorPil(
        size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )


def disturb(pixels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Turn, scale and shift (n, 3, H, W) images a little and add noise: drawings are less tidy than scenes."""
    n = len(pixels)
    angle, scale, shift = (torch.rand(n, k, generator=generator) * 2 - 1 for k in (1, 1, 2))
    cos, sin = torch.cos(0.12 * angle), torch.sin(0.12 * angle)
    size = 1 + 0.06 * scale
    rows = [torch.cat([cos * size, -sin * size], 1), torch.cat([sin * size, cos * size], 1)]
    matrix = torch.cat([torch.stack(rows, 1), (shift / (IMAGE_SIZE / 2)).unsqueeze(-1)], -1)
    moved = F.grid_sample(pixels + 1, F.affine_grid(matrix, pixels.shape, align_corners=False), align_corners=False) - 1
    return (moved + 0.05 * torch.randn(pixels.shape, generator=generator)).clamp(-1, 1)


def train_captioner(
    tokenizer: PreTrainedTokenizerFast,
    vq: JanusVQVAE,
    *,
    steps: int,
    batch_size: int = 64,
    seed: int = 0,
    log=print,
) -> BlipForConditionalGeneration:
    """Learn `begin caption end` on train scenes, half of them as the VQ model redraws them, all of them disturbed."""
    torch.manual_seed(seed)
    blip = BlipForConditionalGeneration(blip_config(tokenizer)).train()
    optimizer = torch.optim.AdamW(blip.parameters(), lr=2e-3, betas=(0.9, 0.98), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-3, total_steps=steps, pct_start=0.1)
    generator, rng = torch.Generator().manual_seed(seed), random.Random(seed)
    start = time.time()
    for step, scenes in zip(range(steps), scene_batches(batch_size, seed + 1), strict=False):
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
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(blip.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if (step + 1) % 50 == 0:
            log(f"captioner {step + 1}/{steps} loss {loss:.4f} ({time.time() - start:.0f} s)")
    return blip.eval()

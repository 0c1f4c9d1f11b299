"""Trains the tiny BLIP that recaptions drawings."""

import random
import time

import torch
import torch.nn.functional as F
from transformers import BlipForConditionalGeneration, JanusVQVAE, PreTrainedTokenizerFast
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

from fastcorl.quickstart.grammar import COLOURS, Item
from fastcorl.quickstart.scenes import IMAGE_SIZE, render
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


def train_vision(blip: BlipForConditionalGeneration, *, steps: int, batch_size: int, seed: int, log) -> None:
    """Teach the vision tower digits and colours on scenes with all four cells filled; every patch names its cell's.

    Captions alone teach so small a tower digits only after very many steps.
    """
    tower, colours = blip.vision_model, list(COLOURS)
    width = tower.config.hidden_size
    mean_head, digit_head, colour_head = (torch.nn.Linear(width, classes) for classes in (10, 10, len(colours)))
    parameters = [
        *tower.parameters(),
        *(parameter for head in (mean_head, digit_head, colour_head) for parameter in head.parameters()),
    ]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, betas=(0.9, 0.98), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-3, total_steps=steps, pct_start=0.1)
    generator, rng = torch.Generator().manual_seed(seed), random.Random(seed)
    for step in range(steps):
        scenes = [
            tuple(Item(rng.randrange(10), rng.choice(colours), cell) for cell in range(4)) for _ in range(batch_size)
        ]
        pixels = to_pixels([render(items, rng, "train") for items in scenes])
        # Undisturbed at first: the first digits are hard enough.
        states = tower(disturb(pixels, generator) if step > steps // 2 else pixels).last_hidden_state
        patches = states[:, 1:].unflatten(1, (2, 4, 2, 4)).transpose(2, 3).flatten(3, 4).flatten(1, 2)
        digits = torch.tensor([[item.digit for item in items] for items in scenes])
        names = torch.tensor([[colours.index(item.colour) for item in items] for items in scenes])
        # A cell's mean is where a digit is learnt first; naming it in every patch is what the decoder can read.
        mean_loss = F.cross_entropy(mean_head(patches.mean(2)).flatten(0, 1), digits.flatten())
        digit_loss = F.cross_entropy(digit_head(patches).permute(0, 3, 1, 2), digits[..., None].expand(-1, -1, 16))
        colour_loss = F.cross_entropy(colour_head(patches).permute(0, 3, 1, 2), names[..., None].expand(-1, -1, 16))
        optimizer.zero_grad()
        (mean_loss + digit_loss + colour_loss).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if (step + 1) % 50 == 0:
            log(f"captioner's vision {step + 1}/{steps} digits by cell {mean_loss:.4f} by patch {digit_loss:.4f}")


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
    train_vision(blip, steps=3 * steps // 2, batch_size=batch_size, seed=seed, log=log)
    blip.vision_model.requires_grad_(False)
    decoder = list(blip.text_decoder.parameters())
    optimizer = torch.optim.AdamW(decoder, lr=1.5e-3, betas=(0.9, 0.98), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1.5e-3, total_steps=steps, pct_start=0.1)
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
        torch.nn.utils.clip_grad_norm_(decoder, 1.0)
        optimizer.step()
        schedule.step()
        if (step + 1) % 50 == 0:
            log(f"captioner {step + 1}/{steps} loss {loss:.4f} ({time.time() - start:.0f} s)")
    return blip.eval()

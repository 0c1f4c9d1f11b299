"""Trains the VQ model that turns a 32 x 32 scene into 8 x 8 tokens."""

import time

import torch
import torch.nn.functional as F
from transformers import JanusVQVAE
from transformers.models.janus.configuration_janus import JanusVQVAEConfig

from fastcorl.quickstart.warm_start.batches import image_batches

REVIVE_EVERY = 50
REVIVE_UNTIL = 0.5  # fraction of the steps


def train_vq(config: JanusVQVAEConfig, *, steps: int, batch_size: int = 32, seed: int = 0, log=print) -> JanusVQVAE:
    """Reconstruction training with unit-norm codes; codes nobody uses early on are moved to busy latents.

    Janus normalises codes when it decodes but not when it encodes. With every code on the unit sphere the nearest code
    is the one of largest cosine, so both directions agree whatever the latent's length.
    """
    torch.manual_seed(seed)
    vq = JanusVQVAE(config).train()
    codes = vq.quantize.embedding.weight
    with torch.no_grad():
        codes.copy_(F.normalize(torch.randn_like(codes), dim=-1))
    optimizer = torch.optim.AdamW(vq.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1.5e-3, total_steps=steps, pct_start=0.1)
    used = torch.zeros(len(codes))
    start = time.time()
    for step, pixels in zip(range(steps), image_batches(batch_size, seed), strict=False):
        latents = F.normalize(vq.quant_conv(vq.encoder(pixels)), dim=1)
        flat = latents.permute(0, 2, 3, 1).reshape(-1, config.embed_dim)
        unit_codes = F.normalize(codes, dim=-1)
        ids = (flat.detach() @ unit_codes.detach().T).argmax(-1)
        quantized = unit_codes[ids].view(len(pixels), *latents.shape[2:], -1).permute(0, 3, 1, 2)
        commitment = F.mse_loss(latents, quantized.detach()) + F.mse_loss(quantized, latents.detach())
        straight_through = latents + (quantized - latents).detach()
        drawn = vq.decoder(vq.post_quant_conv(straight_through))
        # Most pixels are background, so the painted ones are weighted up.
        weight = 1 + 3 * (pixels.amax(1, keepdim=True) > -0.8)
        reconstruction = (weight * ((drawn - pixels).abs() + (drawn - pixels).square())).mean()
        loss = reconstruction + 0.5 * commitment
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vq.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        used += torch.bincount(ids, minlength=len(codes))
        if (step + 1) % REVIVE_EVERY == 0:
            dead = (used < 1).nonzero().squeeze(-1)
            if step < REVIVE_UNTIL * steps and len(dead):
                with torch.no_grad():
                    codes[dead] = flat[torch.randint(len(flat), (len(dead),))]
            log(
                f"vq {step + 1}/{steps} loss {loss.item():.4f} reconstruction {reconstruction.item():.4f} "
                f"codes used {(used > 0).sum().item()} ({time.time() - start:.0f} s)"
            )
            used.zero_()
    with torch.no_grad():
        codes.copy_(F.normalize(codes, dim=-1))
    return vq.eval()

"""Trains the VQ model that turns a 32 x 32 scene into 8 x 8 tokens."""

import torch
import torch.nn.functional as F
from transformers import JanusVQVAE
from transformers.models.janus.configuration_janus import JanusVQVAEConfig

from fastcorl.quickstart.warm_start.batches import image_batches
from fastcorl.quickstart.warm_start.descent import Descent

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
    descent = Descent(
        "vq", vq.parameters(), steps=steps, peak_learning_rate=1.5e-3, betas=(0.9, 0.95), weight_decay=0.0, log=log
    )
    used = torch.zeros(len(codes))
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
        used += torch.bincount(ids, minlength=len(codes))
        descent.step(loss, loss=loss, reconstruction=reconstruction, codes_used=(used > 0).sum())
        if (step + 1) % REVIVE_EVERY == 0:
            dead = (used < 1).nonzero().squeeze(-1)
            if step < REVIVE_UNTIL * steps and len(dead):
                with torch.no_grad():
                    codes[dead] = flat[torch.randint(len(flat), (len(dead),))]
            used.zero_()
    with torch.no_grad():
        codes.copy_(F.normalize(codes, dim=-1))
    return vq.eval()

"""A tiny VQ encoder, a tiny BLIP, a policy double and rollouts of random drawings."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import BlipForConditionalGeneration
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil
from transformers.models.janus.modeling_janus import JanusVQVAE

from fastcorl.quickstart.warm_start.architecture import blip_config, make_tokenizer, vq_config
from fastcorl.records import ImageSamples, Prompt, Rollout, TextSamples
from fastcorl.rewards import BlipCaptioner

SIZE = 32


@pytest.fixture(scope="session")
def encoder():
    torch.manual_seed(0)
    return JanusVQVAE(vq_config()).encoder.eval().requires_grad_(False)


@pytest.fixture(scope="session")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="session")
def image_processor():
    return BlipImageProcessorPil(
        size={"height": SIZE, "width": SIZE}, image_mean=[0.4, 0.5, 0.6], image_std=[0.2, 0.3, 0.4]
    )


@pytest.fixture(scope="session")
def blip(tokenizer):
    """Random, with weights large enough for captions to differ from image to image."""
    torch.manual_seed(1)
    model = BlipForConditionalGeneration(blip_config(tokenizer)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.15)
    return model


@pytest.fixture(scope="session")
def captioner(blip, tokenizer, image_processor):
    return BlipCaptioner(blip, tokenizer, image_processor, max_new_tokens=12)


@pytest.fixture
def policy(encoder):
    """A policy whose match states depend on the pixels and the captions' words only."""

    def match_states(pixels, captions):
        image = pixels.mean(dim=3).transpose(1, 2).repeat(1, 1, 2) - 0.5  # (n, H, 6)
        lengths = torch.tensor([len(caption.split()) for caption in captions])
        mask = torch.arange(16) < lengths[:, None]
        seeds = [torch.Generator().manual_seed(len(caption)) for caption in captions]
        text = torch.stack([torch.randn(16, 6, generator=seed) for seed in seeds])
        return image, text, mask

    return SimpleNamespace(
        janus=SimpleNamespace(model=SimpleNamespace(vqmodel=SimpleNamespace(encoder=encoder))),
        match_states=match_states,
    )


@pytest.fixture
def make_rollout():
    """Rollouts of two prompts and groups of `group_size`; `answers` adds texts, `images=False` leaves drawings out."""

    def make(answers=None, images=True, group_size=2):
        generator = torch.Generator().manual_seed(5)
        photo = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 48, 3), np.uint8))
        prompts = [
            Prompt("0", "a red three at top left", photo, "how many digits are there?", "<answer>one</answer>", "OE"),
            Prompt(
                "1",
                "a blue two at top right and a red two at bottom left",
                photo.rotate(90),
                "where is the blue digit?\nA. top left\nB. top right",
                "<answer>B</answer>",
                "MC",
            ),
        ]
        n = len(prompts) * group_size
        pixels = torch.rand(n, 3, SIZE, SIZE, generator=generator)
        blank = torch.zeros(n, 4)
        drawn = ImageSamples(torch.zeros(n, 4, dtype=torch.long), blank, blank, pixels) if images else None
        texts = None
        if answers is not None:
            tokens, lengths = torch.zeros(n, 4, dtype=torch.long), torch.full((n,), 4)
            texts = TextSamples(tokens, lengths, blank, answers, lengths > 0)
        ids = [[0]] * len(prompts)
        return Rollout(prompts, group_size, drawn, texts, draw_ids=ids, uncond_ids=ids, ask_ids=ids, image_token_id=1)

    return make

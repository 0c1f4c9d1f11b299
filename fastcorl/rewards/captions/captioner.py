"""Recaptioners of drawings that are already on the device: BLIP (Li et al. 2022), or the policy itself."""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import torch
from PIL import Image
from torch import nn
from transformers import AutoTokenizer, BlipForConditionalGeneration, PreTrainedTokenizerBase
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

from fastcorl.places import QUICKSTART
from fastcorl.records import Prompt, Rollout
from fastcorl.rewards.checkpoints import check_model_type, load_model, loading

QUICKSTART_FOLDER = Path(__file__).resolve().parents[2] / "quickstart" / "weights" / "captioner"


class Captioner(Protocol):
    def __call__(self, pixels: torch.Tensor) -> list[str]:
        """One caption for each of (n, 3, H, W) drawings in [0, 1]."""
        ...


class Answerer(Protocol):
    def generate(
        self, prompts: Sequence[Prompt], group_size: int, params: object, *, draw: bool = True, answer: bool = True
    ) -> Rollout:
        """A rollout engine; of its rollout only `texts.answers` is read."""
        ...


class BlipCaptioner:
    """Captions (n, 3, H, W) pixels in [0, 1] greedily and without a text prompt, many rows in one generate call."""

    def __init__(
        self,
        model: BlipForConditionalGeneration,
        tokenizer: PreTrainedTokenizerBase,
        image_processor: BlipImageProcessorPil,
        *,
        max_new_tokens: int = 40,
        rows_per_pass: int = 64,
    ) -> None:
        """Of `image_processor` only size, mean and standard deviation are read; its work is done on the device.

        `rows_per_pass` bounds the memory: BLIP-base keeps 42 MB of image keys and values per row.
        """
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.max_new_tokens = max_new_tokens
        self.rows_per_pass = rows_per_pass
        self.size = (image_processor.size["height"], image_processor.size["width"])
        self.mean = torch.tensor(image_processor.image_mean, device=model.device).view(1, 3, 1, 1)
        self.std = torch.tensor(image_processor.image_std, device=model.device).view(1, 3, 1, 1)

    @classmethod
    def from_pretrained(
        cls, path: str | Path, *, device: torch.device | str = "cpu", max_new_tokens: int = 40
    ) -> "BlipCaptioner":
        """Load a folder or hub name, like Salesforce/blip-image-captioning-base, in float32; "quickstart" is the
        shipped captioner. Raises UserError where there is no BLIP captioner."""
        folder = QUICKSTART_FOLDER if str(path) == QUICKSTART else path
        with loading("rewards.captioner", folder) as name:
            check_model_type(name, "blip")
            model = load_model(BlipForConditionalGeneration, name)
            tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
            image_processor = BlipImageProcessorPil.from_pretrained(name)
        return cls(model.to(device), tokenizer, image_processor, max_new_tokens=max_new_tokens)

    @torch.no_grad()
    def __call__(self, pixels: torch.Tensor) -> list[str]:
        passes = pixels.split(self.rows_per_pass) if len(pixels) else ()
        return [caption for rows in passes for caption in self._caption(rows)]

    def _caption(self, pixels: torch.Tensor) -> list[str]:
        pixels = pixels.to(self.mean)
        if pixels.shape[-2:] != self.size:
            pixels = nn.functional.interpolate(pixels, self.size, mode="bicubic", antialias=True).clamp(0, 1)
        text = self.model.config.text_config
        # BLIP's generate writes the begin token over the first prompt token and drops the last one: two tokens in,
        # one begin token used, as in training on `begin caption separator`.
        prompt = torch.tensor([text.bos_token_id, text.sep_token_id], device=pixels.device).repeat(len(pixels), 1)
        tokens = self.model.generate(
            pixel_values=(pixels - self.mean) / self.std,
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=self.max_new_tokens,
            do_sample=False,
            num_beams=1,
        )
        captions = self.tokenizer.batch_decode(tokens[:, 1:].tolist(), skip_special_tokens=True)
        return [caption.strip() for caption in captions]


class PolicyCaptioner:
    """The policy describes its own drawings: each is put to it as a picture with an instruction.

    It costs a pass of the vision tower, the prefill of an image prompt and an answer per drawing: more than sampling as
    many answers, whose group shares its prompt. Captions change as the policy is trained, so the same drawing is not
    always scored alike.
    """

    def __init__(
        self, engine: Answerer, params: object, instruction: str = "Describe this image in one sentence."
    ) -> None:
        """
        Args:
            engine: a RolloutEngine over the policy. Best one of its own: an engine keeps its caches and CUDA graphs for
                calls of the same `params`, so the training rollout's would be built anew in every step. Its
                `weight_version` must be counted up with the policy's updates or be None.
            params: its SamplingParams; temperature 0 for greedy captions, `max_new_tokens` for their length.
            instruction: asked as it is, without the template of a question type.
        """
        self.engine = engine
        self.params = params
        self.instruction = instruction

    @torch.no_grad()
    def __call__(self, pixels: torch.Tensor) -> list[str]:
        """Pixels are rounded to 8 bits, as pictures are; NaN is black."""
        if not len(pixels):
            return []
        levels = (pixels.float().nan_to_num(0).clamp(0, 1) * 255).round().to(torch.uint8)
        prompts = [
            Prompt(f"drawing-{row}", "", Image.fromarray(array), self.instruction, "", "")
            for row, array in enumerate(levels.permute(0, 2, 3, 1).cpu().numpy())
        ]
        rollout = self.engine.generate(prompts, 1, self.params, draw=False, answer=True)
        return [" ".join(answer.split()) for answer in rollout.texts.answers]

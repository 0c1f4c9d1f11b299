"""BLIP (Li et al. 2022) as a batched recaptioner of drawings that are already on the device."""

from pathlib import Path

import torch
from torch import nn
from transformers import AutoTokenizer, BlipForConditionalGeneration, PreTrainedTokenizerBase
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

QUICKSTART = "quickstart"
QUICKSTART_FOLDER = Path(__file__).resolve().parents[1] / "quickstart" / "weights" / "captioner"


class BlipCaptioner:
    """Captions (n, 3, H, W) pixels in [0, 1] with one greedy generate call for all rows."""

    def __init__(
        self,
        model: BlipForConditionalGeneration,
        tokenizer: PreTrainedTokenizerBase,
        image_processor: BlipImageProcessorPil,
        *,
        max_new_tokens: int = 40,
    ) -> None:
        """Of `image_processor` only size, mean and standard deviation are read; its work is done on the device."""
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.max_new_tokens = max_new_tokens
        self.size = (image_processor.size["height"], image_processor.size["width"])
        self.mean = torch.tensor(image_processor.image_mean, device=model.device).view(1, 3, 1, 1)
        self.std = torch.tensor(image_processor.image_std, device=model.device).view(1, 3, 1, 1)

    @classmethod
    def from_pretrained(
        cls, path: str | Path, *, device: torch.device | str = "cpu", max_new_tokens: int = 40
    ) -> "BlipCaptioner":
        """Load a folder or hub name; "quickstart" is the shipped captioner. A ValueError says when there is none."""
        folder = QUICKSTART_FOLDER if str(path) == QUICKSTART else path
        if Path(folder).is_absolute() and not Path(folder).is_dir():
            raise ValueError(f"no captioner at {str(path)!r}: {folder} is not a folder")
        try:
            model = BlipForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
            tokenizer = AutoTokenizer.from_pretrained(folder)
            image_processor = BlipImageProcessorPil.from_pretrained(folder)
        except (OSError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise ValueError(f"no captioner at {str(path)!r}, as a folder or on the hub: {reason}") from error
        return cls(model.to(device), tokenizer, image_processor, max_new_tokens=max_new_tokens)

    @torch.no_grad()
    def __call__(self, pixels: torch.Tensor) -> list[str]:
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

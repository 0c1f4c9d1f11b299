"""Similarity of a drawing and its caption by CLIP (Radford et al. 2021), CLIPScore's cosine (Hessel et al. 2021)."""

from pathlib import Path

import torch
from PIL.Image import Resampling
from torch.nn.functional import interpolate, normalize
from transformers import AutoTokenizer, CLIPModel
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from fastcorl.errors import UserError
from fastcorl.records import Rollout
from fastcorl.rewards.checkpoints import check_model_type, load_model, loading

_MODES = {Resampling.BILINEAR: "bilinear", Resampling.BICUBIC: "bicubic"}


class ClipScore:
    """max(cos(drawing, caption), 0), in [0, 1] and without CLIPScore's factor of 2.5 or 100."""

    range = (0.0, 1.0)

    def __init__(self, path: str | Path, device: torch.device | str = "cpu", *, batch_size: int = 64) -> None:
        """Load a CLIP in the transformers format, a folder or hub name, in float32.

        `batch_size` is the number of drawings, or captions, per pass. Raises UserError where there is no such model.
        """
        if str(path).startswith("open_clip:"):
            raise UserError(
                f"rewards.clip: {str(path)!r} cannot be loaded, as open_clip models need torchvision; "
                "give a checkpoint in the transformers format, as the hub has it for most of them"
            )
        with loading("rewards.clip", path) as name:
            check_model_type(name, "clip")
            self.model = load_model(CLIPModel, name).to(device)
            self.tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
            self.processor = CLIPImageProcessorPil.from_pretrained(name)
            if self.processor.do_resize and self.processor.resample not in _MODES:
                raise ValueError("its images are resized neither bilinearly nor bicubically")
        self.batch_size = batch_size
        self.mean = torch.tensor(self.processor.image_mean, device=device).view(1, 3, 1, 1)
        self.std = torch.tensor(self.processor.image_std, device=device).view(1, 3, 1, 1)

    @torch.no_grad()
    def __call__(self, pixels: torch.Tensor, captions: list[str]) -> torch.Tensor:
        """Pixels (n, 3, H, W) in [0, 1], n captions -> (n,) float32; each distinct caption is embedded once.

        A drawing with a NaN scores NaN.
        """
        if len(pixels) != len(captions):
            raise ValueError(f"{len(captions)} captions for {len(pixels)} drawings")
        if not captions:
            return torch.zeros(0, device=pixels.device)
        distinct = {caption: index for index, caption in enumerate(dict.fromkeys(captions))}
        texts = self.embed_texts(list(distinct))[[distinct[caption] for caption in captions]]
        return (self.embed_images(pixels) * texts).sum(dim=-1).clamp(0, 1).to(pixels.device)

    @torch.no_grad()
    def embed_images(self, pixels: torch.Tensor) -> torch.Tensor:
        """(n, 3, H, W) in [0, 1] -> (n, D) float32 of length 1."""
        features = [
            self.model.get_image_features(self.preprocess(rows)).pooler_output for rows in pixels.split(self.batch_size)
        ]
        return normalize(torch.cat(features), dim=-1)

    @torch.no_grad()
    def embed_texts(self, captions: list[str]) -> torch.Tensor:
        """(n, D) float32 of length 1; what is over the model's limit is cut, the end token, which is read, stays."""
        features = []
        for start in range(0, len(captions), self.batch_size):
            tokens = self.tokenizer(
                captions[start : start + self.batch_size],
                padding=True,
                padding_side="right",
                truncation=True,
                max_length=self.model.config.text_config.max_position_embeddings,
                return_tensors="pt",
            ).to(self.mean.device)
            output = self.model.get_text_features(tokens["input_ids"], attention_mask=tokens["attention_mask"])
            features.append(output.pooler_output)
        return normalize(torch.cat(features), dim=-1)

    def preprocess(self, pixels: torch.Tensor) -> torch.Tensor:
        """What the checkpoint's image processor does, on the device: resize, crop the middle, normalise.

        The processor works on 8-bit pictures and rounds and clips after each pass of its resizing; nothing is rounded
        here. That makes up to 2 of 255 levels.
        """
        processor, pixels = self.processor, pixels.to(self.mean)
        if processor.do_resize:
            size = resized(pixels.shape[-2:], processor.size)
            if size != pixels.shape[-2:]:
                pixels = interpolate(pixels, size, mode=_MODES[processor.resample], antialias=True).clamp(0, 1)
        if processor.do_center_crop:
            height, width = processor.crop_size["height"], processor.crop_size["width"]
            top, left = (pixels.shape[-2] - height) // 2, (pixels.shape[-1] - width) // 2
            pixels = pixels[..., top : top + height, left : left + width]
        return (pixels - self.mean) / self.std if processor.do_normalize else pixels


class ClipReward:
    """`ClipScore` of a row's drawing and its prompt's caption, in [0, 1]; the reward of the paper's pilot study."""

    range = (0.0, 1.0)

    def __init__(self, clip: ClipScore) -> None:
        self.clip = clip

    def __call__(self, rollout: Rollout) -> torch.Tensor:
        captions = [rollout.prompt_of(row).caption for row in range(rollout.num_rows)]
        return self.clip(rollout.images.pixels, captions)


def resized(shape: tuple[int, int], size: dict[str, int]) -> tuple[int, int]:
    """Height and width that an image processor with the setting `size` gives a picture of `shape`."""
    if not size.get("shortest_edge"):
        return size["height"], size["width"]
    edge, (height, width) = size["shortest_edge"], shape
    return (edge, edge * width // height) if height <= width else (edge * height // width, edge)

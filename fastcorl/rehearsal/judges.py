"""Random models that score drawings, in the files of the published ones: a BLIP captioner and VGG-16 for LPIPS."""

import re
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn
from transformers import BertTokenizer, BlipConfig, BlipForConditionalGeneration
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil
from transformers.utils.constants import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

IMAGE_SIZE = 384
BERT_TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
VGG16 = (64, 64, "pool", 128, 128, "pool", 256, 256, 256, "pool", 512, 512, 512, "pool", 512, 512, 512)


def write_blip(folder: Path, captions: Sequence[str], seed: int) -> None:
    """A small BLIP as Salesforce/blip-image-captioning-base has it; its vocabulary is the words of `captions`.

    As published, its begin token is outside of the tokenizer's vocabulary and captions end with the separator.
    """
    tokenizer = _bert_tokenizer(captions)
    size = {"hidden_size": 64, "intermediate_size": 192, "num_attention_heads": 4}
    text = {
        "vocab_size": len(tokenizer) + 2,
        "encoder_hidden_size": 64,
        "projection_dim": 64,
        "num_hidden_layers": 2,
        "bos_token_id": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "sep_token_id": tokenizer.sep_token_id,
    }
    vision = {"num_hidden_layers": 3, "image_size": IMAGE_SIZE, "patch_size": 16}
    torch.manual_seed(seed)
    blip = BlipForConditionalGeneration(
        BlipConfig(text_config=size | text, vision_config=size | vision, projection_dim=64, image_text_hidden_size=64)
    )
    _draw_weights(blip)
    blip.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    BlipImageProcessorPil(
        size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}, image_mean=OPENAI_CLIP_MEAN, image_std=OPENAI_CLIP_STD
    ).save_pretrained(folder)


@torch.no_grad()
def _draw_weights(blip: BlipForConditionalGeneration) -> None:
    """Such that captions differ from image to image, do not repeat one word for ever, and end."""
    for name, parameter in blip.named_parameters():
        if parameter.dim() == 1:
            continue
        if "position_embeddings" in name:
            scale = 0.3
        elif "crossattention" in name:
            scale = 0.15
        else:
            scale = 0.05 if "text_decoder.bert.encoder" in name else 0.2
        parameter.normal_(0, scale)
    blip.text_decoder.cls.predictions.bias[blip.config.text_config.sep_token_id] = 1


def _bert_tokenizer(captions: Sequence[str]) -> BertTokenizer:
    """Whole words only, so that random captions say something now and then."""
    words = sorted({word for caption in captions for word in re.findall(r"\w+|[^\w\s]", caption.lower())})
    return BertTokenizer(
        vocab={token: index for index, token in enumerate([*BERT_TOKENS, *words])}, model_max_length=512
    )


def write_vgg16(path: Path, seed: int) -> None:
    """The convolutions of torchvision's vgg16 under their names, drawn so that maps keep their size from layer to
    layer. The classifier, which LPIPS does not read, is left out: it is 90 % of the file."""
    generator = torch.Generator().manual_seed(seed)
    state: dict[str, torch.Tensor] = {}
    place, channels = 0, 3
    for width in VGG16:
        if width == "pool":
            place += 1
            continue
        layer = nn.Conv2d(channels, width, 3)
        nn.init.kaiming_normal_(layer.weight, generator=generator)
        nn.init.zeros_(layer.bias)
        state |= {f"features.{place}.{name}": tensor.detach() for name, tensor in layer.named_parameters()}
        place, channels = place + 2, width  # its ReLU has a place of its own
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(state, path)

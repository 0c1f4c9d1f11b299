"""A tiny VQ encoder, tiny checkpoints in their published files, a policy double and rollouts of random drawings."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BlipConfig,
    BlipForConditionalGeneration,
    CLIPConfig,
    CLIPModel,
    DistilBertConfig,
    DistilBertForMaskedLM,
    RobertaConfig,
    RobertaForMaskedLM,
)
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


WORDS = "a the red blue two three dog cat digit on in of at top left right table stand ##s ##ing and with . ,"


def enlarge(model, scale=0.3):
    """Weights large enough for tokens, layers and images to make a difference."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 or name.endswith("class_embedding"):
                parameter.normal_(0, scale, generator=generator)
    return model.eval()


def write_bert_tokenizer(folder, model_max_length):
    """A BertTokenizer in the published files: vocab.txt, special_tokens_map.json, tokenizer_config.json."""
    specials = {"unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "pad": "[PAD]", "mask": "[MASK]"}
    vocabulary = ["[PAD]", "[unused0]", "[unused1]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS.split()]
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
    tokens = {f"{name}_token": token for name, token in specials.items()}
    settings = {"do_lower_case": True, "model_max_length": model_max_length, "tokenizer_class": "BertTokenizer"}
    (folder / "special_tokens_map.json").write_text(json.dumps(tokens))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | tokens))
    return vocabulary


@pytest.fixture(scope="session")
def bert_folders(tmp_path_factory):
    """Random encoders of three layers by architecture, saved with a language-model head and without a pooler."""
    folders = {}
    for name in ("bert", "distilbert", "roberta"):
        folder = folders[name] = tmp_path_factory.mktemp("encoders") / name
        folder.mkdir()
        vocabulary = write_bert_tokenizer(folder, 512)
        size = {"vocab_size": len(vocabulary), "max_position_embeddings": 16}
        layers = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 48}
        if name == "bert":
            model = BertForMaskedLM(BertConfig(**size, **layers))
        elif name == "roberta":
            model = RobertaForMaskedLM(RobertaConfig(**size, **layers, pad_token_id=0))
        else:
            model = DistilBertForMaskedLM(DistilBertConfig(**size, dim=32, n_layers=3, n_heads=2, hidden_dim=48))
        enlarge(model).save_pretrained(folder)
    return folders


@pytest.fixture(scope="session")
def published_blip(tmp_path_factory):
    """A random BLIP in the files of Salesforce/blip-image-captioning-base: the begin token is outside the tokenizer's
    vocabulary, the end token is another than the separator, the weights are a .bin file."""
    folder = tmp_path_factory.mktemp("published") / "blip"
    folder.mkdir()
    vocabulary = write_bert_tokenizer(folder, 512)
    text = {
        "vocab_size": len(vocabulary) + 2,
        "bos_token_id": len(vocabulary),
        "eos_token_id": 2,
        "pad_token_id": 0,
        "sep_token_id": vocabulary.index("[SEP]"),
        "hidden_size": 32,
        "encoder_hidden_size": 32,
        "intermediate_size": 48,
        "projection_dim": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 64,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = BlipConfig(text_config=text, vision_config=vision | {"image_size": SIZE, "patch_size": 8})
    model = enlarge(BlipForConditionalGeneration(config))
    with torch.no_grad():
        model.text_decoder.cls.predictions.bias[text["sep_token_id"]] = 2.5  # captions end now and then
    config = model.config.to_dict() | {"architectures": ["BlipForConditionalGeneration"]}
    (folder / "config.json").write_text(json.dumps(config))
    positions = {"text_decoder.bert.embeddings.position_ids": torch.arange(64)[None]}
    torch.save(model.state_dict() | positions, folder / "pytorch_model.bin")
    pixels = {"image_mean": [0.481, 0.457, 0.408], "image_std": [0.268, 0.261, 0.275], "resample": 3}
    steps = {"do_normalize": True, "do_rescale": True, "do_resize": True, "rescale_factor": 1 / 255}
    settings = {"image_processor_type": "BlipImageProcessor", "size": {"height": SIZE, "width": SIZE}}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings | steps | pixels))
    return folder


@pytest.fixture(scope="session")
def clip_folders(tmp_path_factory):
    """A random CLIP in the published files, with the end token in its configuration, and as OpenAI's have it."""
    folders = {}
    for name in ("laion", "openai"):
        folder = folders[name] = tmp_path_factory.mktemp("clips") / name
        folder.mkdir()
        letters = [chr(code) for code in range(ord("!"), ord("~") + 1)]
        merges = ["a t", "r e", "re d</w>", "t o", "to p</w>", "d o", "do g</w>"]
        pieces = [*letters, *(letter + "</w>" for letter in letters), *("".join(merge.split()) for merge in merges)]
        vocabulary = [*pieces, "<|startoftext|>", "<|endoftext|>"]
        end = len(vocabulary) - 1
        (folder / "vocab.json").write_text(json.dumps({piece: index for index, piece in enumerate(vocabulary)}))
        (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
        tokens = {"bos_token": "<|startoftext|>"} | dict.fromkeys(
            ("eos_token", "pad_token", "unk_token"), "<|endoftext|>"
        )
        settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "do_lower_case": True}
        (folder / "tokenizer_config.json").write_text(json.dumps(settings | tokens))
        layers = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
        text = {"vocab_size": end + 1, "max_position_embeddings": 48, "bos_token_id": end - 1, "pad_token_id": end}
        text |= {"eos_token_id": 2 if name == "openai" else end}
        vision = {"image_size": SIZE, "patch_size": 8}
        config = CLIPConfig(text_config=layers | text, vision_config=layers | vision, projection_dim=16)
        enlarge(CLIPModel(config)).save_pretrained(folder)
        pixels = {"image_mean": [0.481, 0.457, 0.408], "image_std": [0.268, 0.261, 0.275], "resample": 3}
        steps = {"do_resize": True, "size": SIZE, "do_center_crop": True, "crop_size": SIZE, "do_normalize": True}
        kind = {"feature_extractor_type": "CLIPFeatureExtractor"}
        (folder / "preprocessor_config.json").write_text(json.dumps(kind | steps | pixels))
    return folders

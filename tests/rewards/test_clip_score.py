import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torchmetrics.functional.multimodal.clip_score import clip_score
from transformers import AutoTokenizer, CLIPModel, CLIPProcessor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from fastcorl.errors import UserError
from fastcorl.rewards.images.clip_score import ClipReward, ClipScore, resized

CAPTIONS = ["a red dog at top", "two cats", "", "a red dog at top", "dog"]


@pytest.fixture(params=["laion", "openai"])
def folder(request, clip_folders):
    return clip_folders[request.param]


@pytest.fixture
def pixels():
    generator = torch.Generator().manual_seed(1)
    return torch.rand(5, 3, 32, 32, generator=generator) * torch.linspace(0.2, 1, 5).view(5, 1, 1, 1)


def published_cosines(folder, pixels, captions):
    """The diagonal of transformers' own similarity, before its scale."""
    model, tokenizer = CLIPModel.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    processor = CLIPImageProcessorPil.from_pretrained(folder)
    mean, std = (torch.tensor(x).view(1, 3, 1, 1) for x in (processor.image_mean, processor.image_std))
    with torch.no_grad():
        output = model(pixel_values=(pixels - mean) / std, **tokenizer(captions, padding=True, return_tensors="pt"))
    return torch.diagonal(output.logits_per_image) / model.logit_scale.exp()


def test_scores_equal_transformers(folder, pixels):
    expected = published_cosines(folder, pixels, CAPTIONS)
    assert (expected < 0).any()
    assert (expected > 0.05).any()
    for batch_size in (1, 2, 64):
        values = ClipScore(folder, batch_size=batch_size)(pixels, CAPTIONS)
        assert values.dtype == torch.float32
        torch.testing.assert_close(values, expected.clamp(min=0), atol=2e-6, rtol=0)


def test_scores_equal_torchmetrics(folder, pixels):
    model, tokenizer = CLIPModel.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    # torchmetrics 1.9 expects the tensors that transformers returned before version 5
    older = SimpleNamespace(
        config=model.config,
        get_image_features=lambda *inputs: model.get_image_features(*inputs).pooler_output,
        get_text_features=lambda *inputs: model.get_text_features(*inputs).pooler_output,
    )
    older.to = lambda device: older
    processor = CLIPProcessor(CLIPImageProcessorPil.from_pretrained(folder), tokenizer)
    levels = (pixels * 255).round().to(torch.uint8)
    with torch.no_grad():
        expected = [
            clip_score(image, caption, lambda: (older, processor)).item() / 100
            for image, caption in zip(levels, CAPTIONS, strict=True)
        ]
    assert ClipScore(folder)(levels / 255, CAPTIONS).tolist() == pytest.approx(expected, abs=2e-6)


def test_over_long_captions_keep_the_end_token(folder, pixels):
    score, seen = ClipScore(folder), []
    score.model.text_model.register_forward_pre_hook(
        lambda _, inputs, named: seen.append(named.get("input_ids", inputs[0] if inputs else None)), with_kwargs=True
    )
    caption = "red dog " * 40
    values = score(pixels, [caption] * 5)
    (tokens,) = seen
    end = score.tokenizer.eos_token_id
    assert tokens.shape == (1, 48)
    assert tokens[0, -1] == end
    assert (tokens[0, :-1] != end).all()
    kept = score.tokenizer.decode(tokens[0, 1:-1])
    torch.testing.assert_close(values, score(pixels, [kept] * 5))
    torch.testing.assert_close(values, published_cosines(folder, pixels, [kept] * 5).clamp(min=0), atol=2e-6, rtol=0)


@pytest.mark.parametrize("shape", [(64, 48), (20, 31), (32, 45), (45, 32), (32, 32)])
def test_preprocessing_is_the_image_processors(clip_folders, shape):
    score = ClipScore(clip_folders["laion"])
    array = np.random.default_rng(0).integers(80, 176, (*shape, 3), np.uint8)
    expected = score.processor(Image.fromarray(array), return_tensors="pt")["pixel_values"]
    values = score.preprocess(torch.from_numpy(array).permute(2, 0, 1)[None] / 255)
    # PIL rounds (and clips, which grey noise avoids) after each of its two passes, we do not
    torch.testing.assert_close(values * score.std, expected * score.std, atol=1.5 / 255, rtol=0)


@pytest.mark.parametrize(
    ("shape", "size", "expected"),
    [
        ((480, 640), {"shortest_edge": 224}, (224, 298)),
        ((640, 480), {"shortest_edge": 224}, (298, 224)),
        ((384, 384), {"shortest_edge": 224}, (224, 224)),
        ((384, 300), {"height": 224, "width": 200}, (224, 200)),
    ],
)
def test_sizes(shape, size, expected):
    assert resized(shape, size) == expected


def test_reward_scores_each_row_with_its_own_prompt(clip_folders, make_rollout):
    score = ClipScore(clip_folders["laion"])
    rollout, read = make_rollout(group_size=3), []
    score.model.text_model.register_forward_hook(lambda _, inputs, output: read.append(len(output.pooler_output)))
    reward = ClipReward(score)(rollout)
    assert read == [2]
    assert reward.shape == (6,)
    assert not reward.requires_grad
    captions = [rollout.prompts[row // 3].caption for row in range(6)]
    for row in range(6):
        alone = score(rollout.images.pixels[row : row + 1], captions[row : row + 1])
        torch.testing.assert_close(reward[row : row + 1], alone, atol=2e-6, rtol=0)
    expected = published_cosines(clip_folders["laion"], rollout.images.pixels, captions).clamp(min=0)
    torch.testing.assert_close(reward, expected, atol=2e-6, rtol=0)
    assert (reward > 0.01).any()


def test_a_drawing_that_is_not_a_number_is_a_nan_alone(clip_folders, pixels):
    pixels[2, 0, 0, 0] = torch.nan
    assert ClipScore(clip_folders["laion"])(pixels, CAPTIONS).isnan().tolist() == [False, False, True, False, False]


def test_a_wrong_number_of_captions_is_an_error_and_none_is_none(clip_folders, pixels):
    score = ClipScore(clip_folders["laion"])
    with pytest.raises(ValueError, match="4 captions for 5 drawings"):
        score(pixels, CAPTIONS[:4])
    assert score(pixels[:0], []).shape == (0,)


def test_no_checkpoint_is_one_line_that_names_the_key(clip_folders, bert_folders, tmp_path):
    with pytest.raises(UserError, match=r"^rewards.clip: there is no folder '.*nowhere'"):
        ClipScore(tmp_path / "nowhere")
    with pytest.raises(UserError, match=rf"^rewards.clip: cannot load '{tmp_path}'[^\n]*$"):
        ClipScore(tmp_path)
    with pytest.raises(UserError, match=r"^rewards.clip: .*it is a 'bert' model; expected 'clip'$"):
        ClipScore(bert_folders["bert"])
    with pytest.raises(UserError, match=r"^rewards.clip: 'open_clip:ViT-H-14' .* need torchvision"):
        ClipScore("open_clip:ViT-H-14")
    broken = tmp_path / "broken"
    shutil.copytree(clip_folders["laion"], broken)
    (broken / "preprocessor_config.json").unlink()
    with pytest.raises(UserError, match=r"^rewards.clip: cannot load [^\n]*$"):
        ClipScore(broken)

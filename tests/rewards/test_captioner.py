import numpy as np
import pytest
import torch
from PIL import Image

from fastcorl.rewards import BlipCaptioner
from fastcorl.rewards import captioner as captioner_module


def greedy_by_hand(captioner, pixels):
    """Greedy decoding of one image with full forwards: `begin` first, until `separator`, as BLIP is trained."""
    text = captioner.model.config.text_config
    tokens = [text.bos_token_id]
    values = (pixels[None] - captioner.mean) / captioner.std
    for _ in range(captioner.max_new_tokens):
        with torch.no_grad():
            logits = captioner.model(pixel_values=values, input_ids=torch.tensor([tokens])).logits
        token = int(logits[0, -1].argmax())
        if token == text.sep_token_id:
            break
        tokens.append(token)
    return captioner.tokenizer.decode(tokens[1:], skip_special_tokens=True).strip()


@pytest.fixture(scope="module")
def pixels():
    return torch.rand(5, 3, 32, 32, generator=torch.Generator().manual_seed(3)) * torch.linspace(0, 1, 5).view(
        5, 1, 1, 1
    )


def test_batched_captions_equal_one_by_one(captioner, pixels):
    captions = captioner(pixels)
    assert len(set(captions)) > 1
    assert captions == [captioner(row[None])[0] for row in pixels]


def test_captions_equal_greedy_decoding_by_hand(captioner, pixels):
    assert captioner(pixels) == [greedy_by_hand(captioner, row) for row in pixels]


def test_rows_that_end_early_are_cut_at_the_separator(captioner, pixels, monkeypatch):
    """With the separator moved to a token that the model likes, rows stop at different lengths."""
    text = captioner.model.config.text_config
    with torch.no_grad():
        values = (pixels - captioner.mean) / captioner.std
        tokens = captioner.model.generate(values, max_new_tokens=12, do_sample=False)
    separator = int(tokens[0, 5])
    monkeypatch.setattr(text, "sep_token_id", separator)
    captions = captioner(pixels)
    kept = tokens[0, 1:6].tolist()
    kept = kept[: kept.index(separator) + 1]
    assert captions[0] == captioner.tokenizer.decode(kept, skip_special_tokens=True).strip()
    assert captions == [captioner(row[None])[0] for row in pixels]


def test_preprocessing_is_the_image_processors(captioner, image_processor, pixels, monkeypatch):
    array = np.random.default_rng(0).integers(80, 176, (64, 48, 3), np.uint8)
    seen = {}

    def generate(pixel_values, input_ids, **_):
        seen["values"] = pixel_values
        return input_ids

    monkeypatch.setattr(captioner.model, "generate", generate)
    captioner(torch.from_numpy(array).permute(2, 0, 1)[None] / 255)
    expected = image_processor(Image.fromarray(array), return_tensors="pt")["pixel_values"]
    # PIL rounds (and clips, which grey noise avoids) after each of its two passes, we do not
    torch.testing.assert_close(seen["values"] * captioner.std, expected * captioner.std, atol=1.5 / 255, rtol=0)
    captioner(pixels)
    assert torch.equal(seen["values"], (pixels - captioner.mean) / captioner.std)


def test_saved_folder_loads_and_captions_alike(captioner, blip, tokenizer, image_processor, pixels, tmp_path):
    for part in (blip, tokenizer, image_processor):
        part.save_pretrained(tmp_path)
    loaded = BlipCaptioner.from_pretrained(tmp_path, max_new_tokens=12)
    assert loaded(pixels) == captioner(pixels)
    assert torch.equal(loaded.mean, captioner.mean)
    assert torch.equal(loaded.std, captioner.std)
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())


def test_quickstart_is_a_folder_of_the_package(monkeypatch, tmp_path):
    assert captioner_module.QUICKSTART_FOLDER.parts[-4:] == ("fastcorl", "quickstart", "weights", "captioner")
    monkeypatch.setattr(captioner_module, "QUICKSTART_FOLDER", tmp_path / "gone")
    with pytest.raises(ValueError, match=r"^no captioner at 'quickstart': .*gone is not a folder$"):
        BlipCaptioner.from_pretrained("quickstart")


def test_a_folder_without_a_model_is_one_clear_line(tmp_path):
    with pytest.raises(ValueError, match="no captioner at") as caught:
        BlipCaptioner.from_pretrained(tmp_path)
    assert "\n" not in str(caught.value)

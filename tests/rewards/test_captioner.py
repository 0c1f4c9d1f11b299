import pickle
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer, BlipForConditionalGeneration, BlipProcessor
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

from fastcorl.errors import UserError
from fastcorl.records import Prompt
from fastcorl.rewards import BlipCaptioner
from fastcorl.rewards.captions import captioner as captioner_module
from fastcorl.rewards.captions.captioner import PolicyCaptioner
from fastcorl.rollout import RolloutEngine, SamplingParams
from tests.helpers import IMAGE_SIZE, make_policy, make_prompts, make_reference, published_text_inputs


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


def test_a_published_blip_captions_as_transformers_does(published_blip, pixels):
    """Unconditional captioning as in the documentation of BlipForConditionalGeneration."""
    model = BlipForConditionalGeneration.from_pretrained(published_blip)
    tokenizer = AutoTokenizer.from_pretrained(published_blip)
    text = model.config.text_config
    assert text.bos_token_id >= len(tokenizer)
    assert text.eos_token_id != text.sep_token_id
    captioner = BlipCaptioner.from_pretrained(published_blip, max_new_tokens=12)
    with torch.no_grad():
        tokens = model.generate(pixel_values=(pixels - captioner.mean) / captioner.std, max_new_tokens=12)
    expected = tokenizer.batch_decode(tokens, skip_special_tokens=True)
    captions = captioner(pixels)
    assert captions == [caption.strip() for caption in expected]
    assert len(set(captions)) > 1
    ended = (tokens == text.sep_token_id).any(dim=1)
    assert ended.any()
    assert not ended.all()


def test_processor_files_of_today_load_too(published_blip, pixels, tmp_path):
    """transformers 5 writes the image processor's settings into processor_config.json."""
    BlipForConditionalGeneration.from_pretrained(published_blip).save_pretrained(tmp_path)
    image_processor = BlipImageProcessorPil.from_pretrained(published_blip)
    BlipProcessor(image_processor, AutoTokenizer.from_pretrained(published_blip)).save_pretrained(tmp_path)
    assert not (tmp_path / "preprocessor_config.json").exists()
    loaded, published = (BlipCaptioner.from_pretrained(folder) for folder in (tmp_path, published_blip))
    assert torch.equal(loaded.mean, published.mean)
    assert torch.equal(loaded.std, published.std)
    assert loaded(pixels) == published(pixels)


def test_passes_of_fewer_rows_caption_alike(captioner, pixels, monkeypatch):
    expected, rows = captioner(pixels), []
    generate = captioner.model.generate
    monkeypatch.setattr(captioner, "rows_per_pass", 2)
    monkeypatch.setattr(
        captioner.model,
        "generate",
        lambda pixel_values, **named: rows.append(len(pixel_values)) or generate(pixel_values=pixel_values, **named),
    )
    assert captioner(pixels) == expected
    assert rows == [2, 2, 1]
    assert captioner(pixels[:0]) == []


def test_quickstart_is_a_folder_of_the_package(monkeypatch, tmp_path):
    assert captioner_module.QUICKSTART_FOLDER.parts[-4:] == ("fastcorl", "quickstart", "weights", "captioner")
    monkeypatch.setattr(captioner_module, "QUICKSTART_FOLDER", tmp_path / "gone")
    with pytest.raises(UserError, match=r"^rewards.captioner: there is no folder '.*gone'"):
        BlipCaptioner.from_pretrained("quickstart")


def test_no_captioner_is_one_line_that_names_the_key(bert_folders, published_blip, tmp_path):
    with pytest.raises(UserError, match=rf"^rewards.captioner: cannot load '{tmp_path}'[^\n]*$"):
        BlipCaptioner.from_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"^rewards.captioner: there is no folder 'models/of/mine'"):
        BlipCaptioner.from_pretrained("models/of/mine")
    with pytest.raises(UserError, match=r"^rewards.captioner: .*it is a 'bert' model; expected 'blip'$"):
        BlipCaptioner.from_pretrained(bert_folders["bert"])
    folder = tmp_path / "blip"
    shutil.copytree(published_blip, folder)
    weights = torch.load(folder / "pytorch_model.bin", weights_only=True)
    del weights["text_decoder.bert.encoder.layer.1.output.dense.bias"]
    torch.save(weights, folder / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"it lacks 1 weights, the first is text_decoder.*layer.1.output.dense.bias$"):
        BlipCaptioner.from_pretrained(folder)
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(print, protocol=2))
    with pytest.raises(UserError, match=r"^rewards.captioner: cannot load [^\n]*$"):
        BlipCaptioner.from_pretrained(folder)


INSTRUCTION = "what is this?"
GREEDY = SamplingParams(temperature=0, max_new_tokens=12)


@pytest.fixture
def janus():
    return make_policy()


@pytest.fixture
def drawings():
    return torch.rand(4, 3, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(7))


def test_policy_captions_are_transformers_greedy_answers(janus, drawings):
    captions = PolicyCaptioner(RolloutEngine(janus), GREEDY, INSTRUCTION)(drawings)
    reference, tokenizer = make_reference(), janus.processor.tokenizer
    for drawing, caption in zip(drawings, captions, strict=True):
        image = Image.fromarray((drawing.permute(1, 2, 0) * 255).round().to(torch.uint8).numpy())
        prompt = Prompt("0", "", image, INSTRUCTION, "", "")
        inputs = published_text_inputs(janus, prompt)
        tokens = reference.generate(**inputs, generation_mode="text", max_new_tokens=12, do_sample=False)
        answer = tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        assert caption == " ".join(answer.split())
    assert len(set(captions)) > 1


def test_policy_captions_leave_the_training_rollout_as_it_is(janus, drawings):
    engine, params = RolloutEngine(janus, weight_version=0), SamplingParams(guidance=2.0, max_new_tokens=8)
    captioner = PolicyCaptioner(RolloutEngine(janus), GREEDY, INSTRUCTION)

    def sample():
        rollout = engine.generate(make_prompts()[:2], 2, params, seed="step 1")
        return rollout.images.tokens, rollout.images.log_probs, rollout.texts.tokens

    torch.manual_seed(0)
    before, noise = sample(), torch.get_rng_state()
    worker = engine._worker
    captions = captioner(drawings)
    assert torch.equal(torch.get_rng_state(), noise)
    assert all(map(torch.equal, sample(), before))
    assert engine._worker is worker
    assert PolicyCaptioner(engine, GREEDY, INSTRUCTION)(drawings) == captions  # one engine for both is right, too
    assert all(map(torch.equal, sample(), before))


def test_policy_captions_follow_the_weights(janus, drawings):
    captioner = PolicyCaptioner(RolloutEngine(janus), GREEDY, INSTRUCTION)
    before = captioner(drawings)
    with torch.no_grad():
        janus.janus.lm_head.weight.neg_()
    after = captioner(drawings)
    assert after != before
    assert after == PolicyCaptioner(RolloutEngine(janus), GREEDY, INSTRUCTION)(drawings)


def test_the_instruction_is_asked_without_a_template(drawings):
    calls = []

    class Engine:
        def generate(self, prompts, group_size, params, *, draw=True, answer=True):
            calls.append((prompts, group_size, params, draw, answer))
            texts = SimpleNamespace(answers=[" two\n words "] * len(prompts))
            return SimpleNamespace(texts=texts)

    drawings[0, :, 0, 0] = torch.tensor([torch.nan, 1.7, -0.2])
    drawings[1, :, 0, 0] = torch.tensor([0.5, 127.4 / 255, 1.0])
    captioner = PolicyCaptioner(Engine(), GREEDY, INSTRUCTION)
    assert captioner(drawings) == ["two words"] * 4
    assert captioner(drawings[:0]) == []
    ((prompts, *settings),) = calls
    assert settings == [1, GREEDY, False, True]
    assert {prompt.question for prompt in prompts} == {INSTRUCTION}
    assert len({prompt.id for prompt in prompts}) == 4
    templates = {"MC": "M {question}", "OE": "O {question}"}
    assert not any(prompt.question_type in templates for prompt in prompts)
    assert prompts[0].image.getpixel((0, 0)) == (0, 255, 0)
    assert prompts[1].image.getpixel((0, 0)) == (128, 127, 255)
    assert prompts[1].image.getpixel((3, 5)) == tuple((drawings[1, :, 5, 3] * 255).round().int().tolist())

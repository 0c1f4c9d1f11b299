import pytest
import torch

from fastcorl.model import PromptEncoder
from tests.helpers import NUM_IMAGE_TOKENS, make_processor, published_draw_ids, published_text_inputs


@pytest.fixture(params=[False, True], ids=["no system prompt", "system prompt"])
def encoder(request):
    return PromptEncoder(make_processor(use_default_system_prompt=request.param))


def test_prompts_are_those_of_transformers(encoder, prompts):
    for prompt in prompts:
        assert encoder.ask(prompt.question) == published_text_inputs(encoder, prompt)["input_ids"][0].tolist()
        assert encoder.draw(prompt.caption) == published_draw_ids(encoder, prompt).tolist()


def test_what_a_prompt_is_made_of(encoder, prompts):
    for prompt in prompts:
        draw, ask = encoder.draw(prompt.caption), encoder.ask(prompt.question)
        assert draw[0] == ask[0] == encoder.bos_id
        assert draw.count(encoder.bos_id) == ask.count(encoder.bos_id) == 1
        assert draw[-1] == encoder.begin_image_id and draw.count(encoder.begin_image_id) == 1
        assert encoder.image_id not in draw
        assert ask.count(encoder.image_id) == NUM_IMAGE_TOKENS
        first = ask.index(encoder.image_id)
        assert ask[first - 1] == encoder.begin_image_id
        assert ask[first : first + NUM_IMAGE_TOKENS] == [encoder.image_id] * NUM_IMAGE_TOKENS
        assert encoder.pad_id not in draw + ask and encoder.eos_id not in draw + ask
        assert prompt.caption in encoder.tokenizer.decode(draw)


@pytest.mark.parametrize("length", [2, 3, 17])
def test_the_unconditional_prompt_keeps_its_ends(encoder, length):
    ids = encoder.unconditional(length)
    assert len(ids) == length
    assert ids[0] == encoder.bos_id and ids[-1] == encoder.begin_image_id
    assert ids[1:-1] == [encoder.pad_id] * (length - 2)


def test_match_says_where_the_caption_stands(encoder, prompts):
    for prompt in prompts:
        ids, span = encoder.match(prompt.caption)
        assert encoder.tokenizer.decode(ids[span]) == prompt.caption
        assert span.stop == len(ids)
        before = ids[: span.start]
        assert before.count(encoder.image_id) == NUM_IMAGE_TOKENS
        assert before[-NUM_IMAGE_TOKENS - 2 : -1] == [encoder.begin_image_id] + [encoder.image_id] * NUM_IMAGE_TOKENS


def test_a_question_types_template():
    encoder = PromptEncoder(make_processor(), templates={"MC": "{question} Answer with a letter."})
    plain = PromptEncoder(make_processor())
    # Braces in a question are text.
    assert encoder.ask("is {this} it?", "MC") == plain.ask("is {this} it? Answer with a letter.")
    assert encoder.ask("is {this} it?", "OE") == plain.ask("is {this} it?")


def test_special_ids_come_from_the_tokenizer(encoder):
    tokenizer = encoder.tokenizer
    ids = [encoder.bos_id, encoder.eos_id, encoder.pad_id, encoder.begin_image_id, encoder.image_id]
    assert len(set(ids)) == len(ids)
    assert tokenizer.unk_token_id not in ids
    assert torch.tensor(ids).max() < len(tokenizer)


def test_decode_drops_special_tokens(encoder):
    ids = encoder.tokenizer(" a red 3", add_special_tokens=False)["input_ids"]
    assert encoder.decode([*ids, encoder.eos_id, encoder.pad_id]) == "a red 3"

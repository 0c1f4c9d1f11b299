import pytest
import torch

from fastcorl.model import pack_prompts
from tests.helpers import HIDDEN_SIZE, IMAGE_SIZE, NUM_CODES, NUM_IMAGE_TOKENS


def test_what_is_trained(policy):
    trained = {name for name, parameter in policy.janus.named_parameters() if parameter.requires_grad}
    expected = {
        name for name, _ in policy.janus.named_parameters() if name.startswith(("model.language_model.", "lm_head."))
    }
    assert trained == expected
    assert not policy.training and not policy.backbone.training


def test_guidance_may_be_applied_before_the_linear_layer_of_the_image_head(policy, reference):
    hidden = torch.randn(2, 7, HIDDEN_SIZE, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        cond, uncond = reference.model.generation_head(hidden)
        inputs = policy.image_head_input(hidden)
        torch.testing.assert_close(policy.image_head(inputs[0]), cond)
        guided = policy.image_head(inputs[1] + 5 * (inputs[0] - inputs[1]))
        torch.testing.assert_close(guided, uncond + 5 * (cond - uncond), rtol=1e-4, atol=1e-4)


def test_decoded_images_are_those_of_transformers(policy, reference):
    codes = torch.randint(0, NUM_CODES, (3, NUM_IMAGE_TOKENS), generator=torch.Generator().manual_seed(0))
    pixels = policy.decode_images(codes)
    assert pixels.shape == (3, 3, IMAGE_SIZE, IMAGE_SIZE) and pixels.dtype == torch.float32
    assert pixels.min() >= 0 and pixels.max() <= 1
    expected = reference.decode_image_tokens(codes).permute(0, 3, 1, 2) / 2 + 0.5  # the VQ model speaks [-1, 1]
    torch.testing.assert_close(pixels, expected.clamp(0, 1))


def test_match_states_of_a_batch_equal_those_one_by_one(policy, reference, prompts):
    captions = [prompt.caption for prompt in prompts]
    captions[3] = captions[0]  # the same caption twice
    pixels = torch.rand(len(captions), 3, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(0))
    images, texts, mask = policy.match_states(pixels, captions)
    assert images.shape == (len(captions), NUM_IMAGE_TOKENS, HIDDEN_SIZE)
    tokenizer, processor = policy.processor.tokenizer, policy.processor
    mean, std = (
        torch.tensor(values).view(3, 1, 1)
        for values in (processor.image_processor.image_mean, processor.image_processor.image_std)
    )
    for row, caption in enumerate(captions):
        caption_ids = tokenizer(caption, add_special_tokens=False)["input_ids"]
        ids = [tokenizer.bos_token_id, policy.encoder.begin_image_id]
        ids += [policy.encoder.image_id] * NUM_IMAGE_TOKENS
        ids += tokenizer.convert_tokens_to_ids([processor.image_end_token]) + caption_ids
        with torch.no_grad():
            hidden = reference.model(
                input_ids=torch.tensor([ids]), pixel_values=((pixels[row] - mean) / std)[None]
            ).last_hidden_state[0]
        torch.testing.assert_close(images[row], hidden[2 : 2 + NUM_IMAGE_TOKENS], rtol=0, atol=1e-5)
        assert mask[row].sum() == len(caption_ids)
        torch.testing.assert_close(texts[row][mask[row]], hidden[-len(caption_ids) :], rtol=0, atol=1e-5)
        assert not texts[row][~mask[row]].any()
        one = policy.match_states(pixels[row : row + 1], [caption])
        torch.testing.assert_close(one[0][0], images[row], rtol=0, atol=1e-5)
        torch.testing.assert_close(one[1][0], texts[row][mask[row]], rtol=0, atol=1e-5)


def test_match_states_resizes_drawings(policy):
    pixels = torch.rand(2, 3, 4 * IMAGE_SIZE, 4 * IMAGE_SIZE, generator=torch.Generator().manual_seed(0))
    images, _, _ = policy.match_states(pixels, ["a red 3", "5"])
    assert images.shape == (2, NUM_IMAGE_TOKENS, HIDDEN_SIZE) and images.isfinite().all()


@pytest.mark.parametrize("features", [None, torch.zeros(2, NUM_IMAGE_TOKENS, HIDDEN_SIZE)])
def test_placeholders_and_features_must_match(policy, features):
    prompts = [policy.encoder.ask("what?")]
    with pytest.raises(ValueError, match="16 image placeholders for (0|32) image features"):
        pack_prompts(prompts, features, policy.encoder.image_id, policy.device)

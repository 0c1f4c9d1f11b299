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


@pytest.mark.parametrize("features", [None, torch.zeros(2, NUM_IMAGE_TOKENS, HIDDEN_SIZE)])
def test_placeholders_and_features_must_match(policy, features):
    prompts = [policy.encoder.ask("what?")]
    with pytest.raises(ValueError, match="16 image placeholders for (0|32) image features"):
        pack_prompts(prompts, features, policy.encoder.image_id, policy.device)


def test_images_are_encoded_by_the_nearest_direction(policy):
    """Janus's own quantizer normalises latents and codes (janus/models/vq_model.py)."""
    pixels = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    vq = policy.janus.model.vqmodel
    with torch.no_grad():
        latents = vq.quant_conv(vq.encoder(pixels * 2 - 1)).double()
    codes = policy.encode_images(pixels)
    assert codes.shape == (2, 16) and len(codes.unique()) > 2
    for image in range(2):
        for place in range(16):
            latent = latents[image, :, place // 4, place % 4]
            cosines = torch.nn.functional.cosine_similarity(latent[None], vq.quantize.embedding.weight.double())
            assert int(cosines.argmax()) == int(codes[image, place])


def test_the_shipped_models_own_drawings_are_encoded_back():
    from fastcorl.model import load_policy

    quickstart = load_policy("quickstart")
    drawings = quickstart.decode_images(torch.randint(256, (4, 64), generator=torch.Generator().manual_seed(0)))
    again = quickstart.decode_images(quickstart.encode_images(drawings))
    assert float((again - drawings).abs().mean()) < 0.1 * float((drawings - drawings.roll(1, 0)).abs().mean()) + 0.05

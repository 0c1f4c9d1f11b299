import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import JanusForConditionalGeneration
from transformers.models.janus.processing_janus import DEFAULT_SYSTEM_PROMPT

from fastcorl.errors import UserError
from fastcorl.model import load_policy, original_config, weight_files
from fastcorl.model.convert import convert_checkpoint, restore_checkpoint
from tests.helpers import NUM_CODES, NUM_IMAGE_TOKENS, image_logits, make_tokenizer, published_draw_ids
from tests.model.original_layout import change_config, change_json, write_original

UNUSED = 5  # tensors of the helper's original that only the original has


@pytest.mark.parametrize("kind, files", [("safetensors", 1), ("safetensors", 3), ("bin", 1), ("bin", 2)])
def test_a_converted_model_computes_what_the_source_does(
    original_tensors, tiny_parts, reference, prompts, tmp_path, kind, files
):
    write_original(tmp_path / "original", original_tensors, kind=kind, files=files)
    report = convert_checkpoint(tmp_path / "original", tmp_path / "new")
    theirs = reference.state_dict()
    assert report.tensors == len(theirs) and len(report.unused) == UNUSED
    assert report.parameters == sum(tensor.numel() for tensor in theirs.values())
    assert report.dtype == torch.float32

    policy = load_policy(tmp_path / "new")
    loaded = JanusForConditionalGeneration.from_pretrained(tmp_path / "new", attn_implementation="eager")
    for name, tensor in theirs.items():
        assert torch.equal(tensor, policy.janus.state_dict()[name]), name
        assert torch.equal(tensor, loaded.state_dict()[name]), name
    pixels = policy.preprocess([prompt.image for prompt in prompts])
    codes = torch.randint(NUM_CODES, (NUM_IMAGE_TOKENS,), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        for model in (policy.janus, loaded):
            features = [
                each.model.get_image_features(pixels, return_dict=True).pooler_output for each in (reference, model)
            ]
            torch.testing.assert_close(*features, rtol=0, atol=1e-5)
            assert torch.equal(reference.decode_image_tokens(codes[None]), model.decode_image_tokens(codes[None]))
        ids = published_draw_ids(policy, prompts[0])
        assert torch.equal(image_logits(loaded, ids, codes), image_logits(reference, ids, codes))
        assert torch.equal(loaded(input_ids=ids[None]).logits, reference(input_ids=ids[None]).logits)


def test_transformers_draws_with_what_was_converted(original, reference, prompts, tmp_path):
    convert_checkpoint(original, tmp_path / "new")
    policy = load_policy(tmp_path / "new")
    loaded = JanusForConditionalGeneration.from_pretrained(tmp_path / "new", attn_implementation="eager")
    assert loaded.generation_config.guidance_scale == 5
    ids = published_draw_ids(policy, prompts[0])[None]
    draw = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "generation_mode": "image", "do_sample": False}
    drawn = [model.generate(**draw, guidance_scale=5.0) for model in (loaded, reference)]
    assert torch.equal(*drawn) and drawn[0].shape == (1, NUM_IMAGE_TOKENS)


def test_prompts_are_the_original_ones(original, prompts, policy, tmp_path):
    convert_checkpoint(original, tmp_path / "new")
    encoder = load_policy(tmp_path / "new").encoder
    tokenizer = make_tokenizer()
    assert (encoder.bos_id, encoder.eos_id, encoder.pad_id) == (0, 1, tokenizer.convert_tokens_to_ids("<｜▁pad▁｜>"))
    image = "<begin_of_image>" + "<image_placeholder>" * NUM_IMAGE_TOKENS + "<end_of_image>"
    for prompt in prompts:
        question = f"{DEFAULT_SYSTEM_PROMPT}<|User|>: {image}\n{prompt.question}\n\n<|Assistant|>:"
        assert encoder.ask(prompt.question) == tokenizer(question)["input_ids"]
        drawing = f"<|User|>: {prompt.caption}\n\n<|Assistant|>:<begin_of_image>"
        assert encoder.draw(prompt.caption) == tokenizer(drawing)["input_ids"]
        assert encoder.decode([*encoder.draw(prompt.caption), encoder.eos_id]) == f": {prompt.caption}\n\n:"
    new = load_policy(tmp_path / "new")
    assert torch.equal(new.preprocess([prompts[1].image]), policy.preprocess([prompts[1].image]))


def test_a_conversation_of_several_turns(original, tmp_path):
    convert_checkpoint(original, tmp_path / "new")
    processor = load_policy(tmp_path / "new").processor

    def text(*parts):
        return [{"type": "text", "text": part} for part in parts]

    turns = [
        {"role": "system", "content": text("be brief")},
        {"role": "User", "content": [*text(" compare "), {"type": "image"}, {"type": "image"}]},
        {"role": "assistant", "content": text(" the first ", "is red ")},
        {"role": "user", "content": text("why?")},
    ]
    eos = "<｜end▁of▁sentence｜>"
    expected = (
        f"System: be brief{eos}<|User|>: compare \n<image_placeholder>\n\n<image_placeholder>\n\n"
        f"<|Assistant|>: the first  is red{eos}<|User|>: why?"
    )
    rendered = [
        processor.apply_chat_template(turns, add_generation_prompt=add, tokenize=False) for add in (False, True)
    ]
    assert rendered == [expected, expected + "\n\n<|Assistant|>:"]
    begun = processor.apply_chat_template([turns[3], {"role": "assistant", "content": text("")}], tokenize=False)
    assert begun == "<|User|>: why?\n\n<|Assistant|>:"


def test_a_template_of_the_source_is_kept(original, tmp_path):
    own = "{% for part in messages[0]['content'] %}{{ part.get('text', '<image_placeholder>') }}!{% endfor %}"
    (original / "chat_template.jinja").write_text(own)
    convert_checkpoint(original, tmp_path / "new")
    assert load_policy(tmp_path / "new").processor.chat_template == own


def test_the_configuration_is_the_source_s(original, tmp_path):
    tokenizer = json.loads((original / "tokenizer.json").read_text())
    (original / "tokenizer.json").write_text(
        json.dumps(tokenizer, ensure_ascii=False).replace("<｜▁pad▁｜>", "<filler>")
    )
    change_json(original / "processor_config.json", pad_tag="<filler>")
    change_config(original, "language_config.rms_norm_eps", 1e-5)
    change_config(original, "language_config.rope_theta", 5e5)
    change_config(original, "language_config._attn_implementation_internal", "flash_attention_2")
    convert_checkpoint(original, tmp_path / "new")
    policy = load_policy(tmp_path / "new")
    text = policy.janus.config.text_config
    assert text.rms_norm_eps == 1e-5 and text.rope_parameters["rope_theta"] == 5e5
    filler = policy.processor.tokenizer.convert_tokens_to_ids("<filler>")
    assert text.pad_token_id == policy.encoder.pad_id == policy.janus.generation_config.pad_token_id == filler
    assert not policy.janus.config.tie_word_embeddings and not text.tie_word_embeddings


def test_sizes_of_the_published_1b():
    """Against an independent count of Janus-Pro-1B: 2,089,297,547 with the attention pool and the codebook's use
    count, which are unused; 1,652,656,128 are the language model's."""
    size = 2048
    mlp = {"depth": 2, "n_embed": size, "projector_type": "mlp_gelu"}
    published = {
        "model_type": "multi_modality",
        "vision_config": {
            "cls": "CLIPVisionTower",
            "params": {"image_size": 384, "model_name": "siglip_large_patch16_384", "select_layer": -1},
        },
        "aligner_config": {"cls": "MlpProjector", "params": {"input_dim": 1024, **mlp}},
        "gen_vision_config": {"cls": "VQ-16", "params": {"image_token_size": 16384, "n_embed": 8}},
        "gen_aligner_config": {"cls": "MlpProjector", "params": {"input_dim": 8, **mlp}},
        "gen_head_config": {
            "cls": "vision_head",
            "params": {"image_token_embed": size, "image_token_size": 16384, "n_embed": size},
        },
        "language_config": {
            "hidden_size": size,
            "intermediate_size": 5632,
            "max_position_embeddings": 16384,
            "num_attention_heads": 16,
            "num_hidden_layers": 24,
            "num_key_value_heads": 16,
            "vocab_size": 102400,
        },
    }
    config = original_config.janus_config(
        original_config.OriginalConfig(published, "config.json"), image_token_id=1, token_ids={}, dtype=torch.bfloat16
    )
    with torch.device("meta"):
        model = JanusForConditionalGeneration(config)
    pool = 1024 + 4 * (1024 * 1024 + 1024) + 2 * 1024 + (4096 * 1024 + 4096) + (1024 * 4096 + 1024)
    language = [*model.model.language_model.parameters(), *model.lm_head.parameters()]
    assert sum(parameter.numel() for parameter in model.parameters()) + pool + 65536 == 2_089_297_547
    assert sum(parameter.numel() for parameter in language) == 1_652_656_128
    assert config.vision_config.num_image_tokens == 576 and config.vq_config.num_patches == 24


def test_types_are_kept_or_cast(original_tensors, tiny_parts, tmp_path):
    half = {name: tensor.bfloat16() for name, tensor in original_tensors.items()}
    write_original(tmp_path / "original", half, kind="bin")
    assert convert_checkpoint(tmp_path / "original", tmp_path / "kept").dtype == torch.bfloat16
    assert convert_checkpoint(tmp_path / "original", tmp_path / "cast", torch.float32).dtype == torch.float32
    for folder, dtype in (("kept", torch.bfloat16), ("cast", torch.float32)):
        tensors = load_file(tmp_path / folder / "model.safetensors")
        assert {tensor.dtype for tensor in tensors.values()} == {dtype}
        loaded = JanusForConditionalGeneration.from_pretrained(tmp_path / folder, dtype="auto")
        assert loaded.dtype == dtype
        assert torch.equal(tensors["lm_head.weight"].float(), half["language_model.lm_head.weight"].float())


def test_files_are_of_bounded_size(original, reference, tmp_path, monkeypatch):
    monkeypatch.setattr(weight_files, "FILE_BYTES", 200_000)
    convert_checkpoint(original, tmp_path / "new")
    files = sorted((tmp_path / "new").glob("model-*.safetensors"))
    assert len(files) > 3 and not (tmp_path / "new" / "model.safetensors").exists()
    largest = max(tensor.numel() for tensor in reference.state_dict().values()) * 4
    assert max(file.stat().st_size for file in files) < max(200_000, largest) + 20_000
    loaded = load_policy(tmp_path / "new").janus.state_dict()
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in reference.state_dict().items())


def test_back_to_the_original_layout(original, original_tensors, tmp_path):
    convert_checkpoint(original, tmp_path / "new")
    trained = load_file(tmp_path / "new" / "model.safetensors")
    trained["model.language_model.norm.weight"] += 1
    weight_files.save_file(trained, tmp_path / "new" / "model.safetensors", metadata={"format": "pt"})
    report = restore_checkpoint(tmp_path / "new", original, tmp_path / "back")
    restored = load_file(tmp_path / "back" / "model.safetensors")
    assert restored.keys() == original_tensors.keys() and report.tensors == len(restored)
    for name, tensor in original_tensors.items():
        expected = tensor + 1 if name == "language_model.model.norm.weight" else tensor
        assert torch.equal(restored[name], expected), name
    for path in original.glob("*.json"):
        assert (tmp_path / "back" / path.name).read_bytes() == path.read_bytes()


def test_back_needs_a_model_of_the_same_form(original, original_tensors, tmp_path):
    convert_checkpoint(original, tmp_path / "new")
    wider = original_tensors | {"language_model.lm_head.weight": torch.zeros(7, 64)}
    write_original(tmp_path / "wider", wider)
    with pytest.raises(UserError, match=r"lm_head\.weight becomes .* of shape 340x64, in .* 7x64"):
        restore_checkpoint(tmp_path / "new", tmp_path / "wider", tmp_path / "back")
    fewer = {name: tensor for name, tensor in original_tensors.items() if "blocks.0.attn.qkv.bias" not in name}
    write_original(tmp_path / "fewer", fewer)
    with pytest.raises(UserError, match=r"tensor model\.vision_model\.encoder.* has no counterpart"):
        restore_checkpoint(tmp_path / "new", tmp_path / "fewer", tmp_path / "back")
    deeper = original_tensors | {"language_model.model.layers.2.input_layernorm.weight": torch.ones(64)}
    write_original(tmp_path / "deeper", deeper)
    with pytest.raises(UserError, match=r"lacks tensor model\.language_model\.layers\.2\.input_layernorm\.weight"):
        restore_checkpoint(tmp_path / "new", tmp_path / "deeper", tmp_path / "back")
    assert not (tmp_path / "back").exists()

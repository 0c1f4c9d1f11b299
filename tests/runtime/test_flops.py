"""Counted operations against torch's own counter, against packs as they are laid out, and against hand formulas."""

import contextlib
import io
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from fastcorl.algorithm import PackOptions, pack_rollout
from fastcorl.model.known import known_config
from fastcorl.model.loading import empty_policy
from fastcorl.records import ImageSamples, PackedBatch, Rollout, TextSamples
from fastcorl.runtime.flops import ModelShape, Work, answers, drawings, rollout_work, step_flops
from tests.helpers import make_policy

LENGTH = 96  # long beside the 64 wide model, so that attention is a third of its arithmetic
GROUP_SIZE, CODES = 3, 5


def eager_policy():
    """Its attention is plain products, all of which torch's counter sees, of every query with every key."""
    policy = make_policy()
    policy.backbone.set_attn_implementation("eager")
    return policy


def counted(policy, heads: list[nn.Module], rows: int) -> tuple[int, int]:
    """Operations of a forward and of its backward, of the backbone and of `heads` on its last rows."""
    ids = torch.arange(LENGTH) % 200
    with FlopCounterMode(display=False) as forward:
        hidden = policy.backbone(inputs_embeds=policy.embed_text(ids)[None], use_cache=False).last_hidden_state[0]
        loss = sum((head(hidden[-rows:]).square().sum() for head in heads), hidden.sum())
    with FlopCounterMode(display=False) as backward:
        loss.backward()
    return forward.get_total_flops(), backward.get_total_flops()


@pytest.mark.parametrize("targets", [None, ["q_proj", "v_proj"], ["o_proj"], ["gate_proj", "down_proj"], "all"])
def test_a_step_of_the_model_costs_what_torch_counts(targets):
    policy = eager_policy()
    if targets is not None:
        every = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        policy.add_adapters(rank=8, alpha=16, targets=every if targets == "all" else targets)
    shape = ModelShape.of(policy)
    heads = [policy.janus.model.generation_head, policy.text_head]
    forward, backward = counted(policy, heads, rows=17)
    work = Work(LENGTH, LENGTH**2, neck_rows=17, image_rows=17, text_rows=17)
    assert shape.forward(work) == pytest.approx(forward, rel=0.005)
    assert shape.train(work) == pytest.approx(forward + backward, rel=0.005)


def test_sizes_are_those_of_the_trained_weights(policy):
    """Independent of what requires a gradient at present: under ZeRO 3 the sampled copy has none."""
    shape = ModelShape.of(policy)
    policy.requires_grad_(False)
    try:
        assert ModelShape.of(policy) == shape
    finally:
        policy.freeze()
    matrices = sum(weight.numel() for name, weight in policy.backbone.named_parameters() if "proj" in name)
    assert shape.backbone.forward == matrices and shape.backbone.backward == 2 * matrices
    assert shape.image_head.backward == policy.image_head.weight.numel()  # frozen: gradients of its inputs only
    assert shape.text_head.backward == 2 * policy.text_head.weight.numel()


def test_the_vision_tower_of_janus_pro():
    """SigLIP-L at 384 pixels in patches of 16, and two layers of an aligner, by hand."""
    shape = ModelShape.of(empty_policy(known_config("deepseek-community/Janus-Pro-1B"), torch.bfloat16))
    patches, width, layers = 576, 1024, 24
    tower = layers * (patches * 2 * (4 * width**2 + 2 * width * 4 * width) + 4 * patches**2 * width)
    stem, aligner = patches * 2 * width * 3 * 16**2, patches * 2 * (width * 2048 + 2048**2)
    assert shape.vision == tower + stem + aligner


def test_the_vq_decoder(policy):
    """Every convolution by its own output, and the one attention in the middle."""
    total = 0

    def convolution(module: nn.Conv2d, _, out: torch.Tensor) -> None:
        nonlocal total
        total += 2 * out.numel() * module.in_channels * module.kernel_size[0] * module.kernel_size[1]

    def attention(module: nn.Module, inputs: tuple[torch.Tensor], _) -> None:
        nonlocal total
        _, channels, height, width = inputs[0].shape
        total += 4 * (height * width) ** 2 * channels

    hooks = []
    for module in policy.janus.model.vqmodel.modules():
        if isinstance(module, nn.Conv2d):
            hooks.append(module.register_forward_hook(convolution))
        elif "Attn" in type(module).__name__:
            hooks.append(module.register_forward_hook(attention))
    policy.decode_images(torch.zeros(1, policy.num_image_tokens, dtype=torch.int64))
    for hook in hooks:
        hook.remove()
    assert ModelShape.of(policy).decoding == total


def make_rollout(lengths: list[int], *, external: int = 0) -> Rollout:
    """Two groups; `lengths` of the answers."""
    rows, longest = 2 * GROUP_SIZE, max(lengths)
    zeros = torch.zeros(rows, CODES)
    texts = torch.zeros(rows, longest)
    return Rollout(
        prompts=[None, None],
        group_size=GROUP_SIZE,
        images=ImageSamples(zeros.long(), zeros, zeros, torch.zeros(rows, 3, 2, 2)),
        texts=TextSamples(texts.long(), torch.tensor(lengths), texts, [""] * rows, torch.ones(rows, dtype=torch.bool)),
        draw_ids=[[1] * 4, [1] * 6],
        uncond_ids=[[1] * 4, [1] * 6],
        ask_ids=[[1, 9, 9, 1, 1], [9, 9, 1]],
        image_token_id=9,
        vision_features=torch.zeros(2, 2, 8),
        num_external=external,
    )


def keys_of(batch: PackedBatch) -> int:
    """Keys that the positions of a pack attend to, by its bounds."""
    bounds = batch.cu_seqlens.tolist()
    total = 0
    for sequence, parent in enumerate(batch.prefixes.tolist()):
        before = bounds[parent + 1] - bounds[parent] if parent >= 0 else 0
        total += sum(before + place + 1 for place in range(bounds[sequence + 1] - bounds[sequence]))
    return total


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("lengths", [[3, 1, 4, 2, 2, 7], [0, 0, 0, 1, 5, 0]])
def test_training_on_a_rollout_is_what_one_pack_of_it_holds(lengths, guided):
    rollout = make_rollout(lengths, external=1)
    (batch,) = pack_rollout(rollout, torch.ones(rollout.num_rows), PackOptions(tokens=10_000, guided=guided))
    work = rollout_work(rollout, guided=guided)
    assert (work.tokens, work.keys) == (batch.num_tokens, keys_of(batch))
    assert work.image_rows == len(batch.image.positions) and work.text_rows == len(batch.text.positions)
    assert work.neck_rows == work.image_rows * (2 if guided else 1)


def test_packs_that_repeat_prompts_are_no_more_useful():
    rollout = make_rollout([3, 1, 4, 2, 2, 7])
    packs = pack_rollout(rollout, torch.ones(rollout.num_rows), PackOptions(tokens=20, share_prefix=False))
    assert sum(batch.num_tokens for batch in packs) > rollout_work(rollout, guided=False).tokens


@pytest.mark.parametrize("guided", [False, True])
def test_sampling_step_by_step(guided):
    """Each token that is fed back attends to all before it and to itself; the data's rows are not sampled."""
    lengths = [3, 1, 4, 2, 2, 7]
    rollout = make_rollout(lengths, external=1)
    work = rollout_work(rollout, guided=guided, sampled=True)
    branches = 2 if guided else 1
    tokens = keys = heads = 0
    for group, (draw, ask) in enumerate(zip(rollout.draw_ids, rollout.ask_ids, strict=True)):
        for prompt in (draw, ask):
            tokens += len(prompt)
            keys += sum(range(1, len(prompt) + 1))
        for row in range(GROUP_SIZE - 1):
            for prompt, length, times in ((draw, CODES, branches), (ask, lengths[group * GROUP_SIZE + row], 1)):
                tokens += times * (length - 1)
                keys += times * sum(len(prompt) + step for step in range(1, length))
                heads += times * length
    assert (work.tokens, work.keys, work.image_rows + work.text_rows) == (tokens, keys, heads)
    assert work.neck_rows == work.image_rows


def test_one_modality_alone():
    rollout = make_rollout([3, 1, 4, 2, 2, 7])
    drawn = rollout_work(replace(rollout, texts=None), guided=False)
    asked = rollout_work(replace(rollout, images=None), guided=False)
    assert drawn == drawings(4, GROUP_SIZE, CODES) + drawings(6, GROUP_SIZE, CODES)
    assert asked == answers(5, [3, 1, 4]) + answers(3, [2, 2, 7])
    assert drawn + asked == rollout_work(rollout, guided=False)
    assert rollout_work(replace(rollout, images=None, texts=None), guided=False) == Work()


def test_the_parts_of_a_step(policy):
    shape = ModelShape.of(policy)
    rollout = make_rollout([3, 1, 4, 2, 2, 7])
    trained = rollout_work(rollout, guided=False)
    sampled = rollout_work(rollout, guided=True, sampled=True)
    step = step_flops(shape, sampled, trained, images=2, drawn=6, scorings=1, updates=2)
    assert step.scoring == shape.forward(trained) and step.train == 2 * shape.train(trained)
    assert (step.vision, step.decoding) == (2 * shape.vision, 6 * shape.decoding)
    assert step.total == step.rollout + step.vision + step.decoding + step.scoring + step.train


def test_the_plan_on_paper_is_what_its_code_prints():
    page = (Path(__file__).parents[2] / "docs" / "scaling.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```\n+```text\n(.*?)```", page, re.DOTALL)
    assert len(blocks) >= 3
    names: dict = {}
    for code, shown in blocks:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(code, names)
        assert printed.getvalue().split() == shown.split()

"""The dry run's memory table against DeepSpeed's own arithmetic, autograd's saved tensors and the KV cache."""

import pytest
import torch
from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs

from fastcorl.config_loading import load_config
from fastcorl.memory import (
    GIB,
    Workload,
    activation_bytes,
    block_bytes_per_token,
    cache_bytes_per_token,
    cache_tokens,
    estimate,
    workload,
)
from fastcorl.model.attention import PackedAttention
from fastcorl.model.loading import empty_policy
from fastcorl.rollout import RolloutEngine
from fastcorl.rollout.room import PAGE, Room
from tests.helpers import HIDDEN_SIZE, janus_config


@pytest.fixture
def all_trained():
    return empty_policy(janus_config(), torch.bfloat16).requires_grad_(True)


@pytest.mark.parametrize("world_size", [1, 2, 8])
def test_model_states_are_those_of_deepspeed(all_trained, world_size):
    config, total = load_config([]), sum(weight.numel() for weight in all_trained.parameters())
    _, expected = estimate_zero2_model_states_mem_needs(total, num_gpus_per_node=world_size, cpu_offload=False)
    work = workload(config, config.stages["unified"], all_trained, world_size, 64)
    table = estimate(config, all_trained, work, world_size=world_size, reference=False)
    states = sum(table[name][2] for name in ("weights", "gradients", "optimizer"))
    assert states * GIB == pytest.approx(expected, abs=2)


def test_a_reference_counts_unless_adapters_or_host_memory_stand_for_it(all_trained):
    config = load_config([])
    work = workload(config, config.stages["t2i"], all_trained, 1, 64)

    def reference(config, policy):
        return estimate(config, policy, work, world_size=1, reference=True)["reference"][0] * GIB

    assert reference(config, all_trained) == 2 * sum(weight.numel() for weight in all_trained.parameters())
    assert reference(load_config(["--algorithm.reference", "swap"]), all_trained) == 0
    all_trained.add_adapters(rank=2, alpha=4, targets=["q_proj"])
    assert reference(config, all_trained) == 0


def saved_bytes(policy, lengths, prefixes=None):
    """What autograd keeps of one packed forward of the backbone, parameters left out."""
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
    embeds = torch.randn(1, sum(lengths), HIDDEN_SIZE, requires_grad=True)
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    weights = {weight.untyped_storage()._cdata for weight in policy.parameters()}
    saved = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            saved[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        hidden = policy.run_backbone(embeds, positions, PackedAttention(cu_seqlens, prefixes))
    assert hidden.requires_grad
    return sum(storage.nbytes() for storage in saved.values())


@pytest.mark.parametrize(
    ("lengths", "prefixes"),
    [
        ([64, 64, 64, 64], None),
        ([40, 30, 200, 7], None),
        ([60, 20, 20, 20], torch.tensor([-1, 0, 0, 0])),
    ],
    ids=["equal", "unequal", "shared prompt"],
)
def test_activations_are_what_autograd_saves(policy, lengths, prefixes):
    shapes = empty_policy(janus_config(), torch.float32)
    measured = saved_bytes(policy, lengths, prefixes)
    assert activation_bytes(shapes, sum(lengths), checkpointing=False) == pytest.approx(measured, rel=0.2)


def test_checkpointing_keeps_one_block_and_the_inputs_of_the_others():
    shapes = empty_policy(janus_config(), torch.bfloat16)
    inputs = 2 * 100 * HIDDEN_SIZE * 2  # layers, positions, width, bytes
    assert activation_bytes(shapes, 100, checkpointing=True) == inputs + 100 * block_bytes_per_token(shapes)


def test_the_cache_has_the_bytes_of_the_rollouts_pages(policy):
    geometry = RolloutEngine(policy).geometry
    assert cache_bytes_per_token(policy) * 7 * PAGE == geometry.page_bytes(7 * PAGE)


@pytest.mark.parametrize("guided", [False, True])
def test_the_cache_holds_what_the_rollout_makes_room_for(guided):
    prompts, group, prompt_tokens = 4, 8, 97
    rows = prompts * group
    work = Workload(prompts, rows, rows, 576, 512, prompt_tokens, guided, 1)
    room = Room(None, None)
    for prompt in range(prompts):
        drawing = [(("image", prompt), prompt_tokens - 1)] + [("unconditional", prompt_tokens - 1)] * guided
        for _ in range(group):
            room.take(drawing, 576)
            room.take([(("text", prompt), prompt_tokens - 1)], 512)
    assert cache_tokens(load_config([]), work) == pytest.approx(room.pages * PAGE, rel=0.02)


def test_the_cache_keeps_the_limits_of_the_configuration():
    work = Workload(4, 32, 32, 576, 512, 100, True, 1)
    free = cache_tokens(load_config([]), work)
    assert cache_tokens(load_config(["--rollout.kv_cache_tokens", "5000"]), work) == 5000
    assert cache_tokens(load_config(["--rollout.kv_cache_tokens", str(2 * free)]), work) == free
    halved = cache_tokens(load_config(["--rollout.max_rows", "48"]), work)  # of 96
    assert halved - 800 == pytest.approx((free - 800) / 2)

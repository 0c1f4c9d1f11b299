"""The dry run's memory table against DeepSpeed's own arithmetic, autograd's saved tensors and the KV cache."""

import copy

import pytest
import torch

from bench.memory import extra_bytes
from fastcorl.config_loading import load_config
from fastcorl.errors import UserError
from fastcorl.memory import (
    GIB,
    MARGIN,
    Workload,
    activation_bytes,
    block_bytes_per_token,
    cache_bytes_per_token,
    cache_tokens,
    choose_recomputed,
    estimate,
    recompute_as_needed,
    recomputed_blocks,
    workload,
)
from fastcorl.model.attention import PackedAttention
from fastcorl.model.loading import empty_policy
from fastcorl.rollout import RolloutEngine
from fastcorl.rollout.room import PAGE, Room
from fastcorl.runtime.distributed import Distributed
from tests.helpers import HIDDEN_SIZE, janus_config


@pytest.fixture
def all_trained():
    return empty_policy(janus_config(), torch.bfloat16).requires_grad_(True)


@pytest.mark.parametrize("world_size", [1, 2, 8])
def test_model_states_are_those_of_deepspeed(all_trained, world_size):
    zero = pytest.importorskip("deepspeed.runtime.zero.stage_1_and_2")
    config, total = load_config([]), sum(weight.numel() for weight in all_trained.parameters())
    _, expected = zero.estimate_zero2_model_states_mem_needs(total, num_gpus_per_node=world_size, cpu_offload=False)
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
    assert activation_bytes(shapes, sum(lengths), 0) == pytest.approx(measured, rel=0.2)


@pytest.mark.parametrize(("recomputed", "kept"), [(0, 2), (1, 1), (2, 1)])
def test_recomputed_blocks_keep_their_inputs_and_one_of_them_the_rest(recomputed, kept):
    shapes = empty_policy(janus_config(), torch.bfloat16)
    inputs = recomputed * 100 * HIDDEN_SIZE * 2  # positions, width, bytes
    assert activation_bytes(shapes, 100, recomputed) == inputs + kept * 100 * block_bytes_per_token(shapes)


@pytest.mark.parametrize("recomputed", [1, 2])
def test_recomputing_frees_what_the_table_says(policy, recomputed):
    lengths = [128] * 8
    embeds = torch.randn(1, sum(lengths), HIDDEN_SIZE, requires_grad=True)
    positions = torch.cat([torch.arange(length) for length in lengths])[None]

    def peak(count):
        twin = copy.deepcopy(policy)
        twin.recompute(count)

        def call():
            attention = PackedAttention(torch.tensor([0, *lengths]).cumsum(0))
            twin.run_backbone(embeds, positions, attention).sum().backward()
            return ()

        call()
        return extra_bytes(call, embeds.device)

    shapes = empty_policy(janus_config(), torch.float32)
    expected = [activation_bytes(shapes, sum(lengths), count) for count in (0, recomputed)]
    assert peak(0) - peak(recomputed) == pytest.approx(expected[0] - expected[1], rel=0.25)


def test_what_auto_recomputes_depends_on_the_free_memory():
    config = load_config(["--model.gradient_checkpointing", "auto"])
    shapes, stage = empty_policy(janus_config(), torch.bfloat16), config.stages["unified"]
    work = workload(config, stage, shapes, 1, config.data.max_prompt_tokens)
    table = estimate(config, shapes, work, world_size=1, reference=False)
    assert table["activations"][0] * GIB == activation_bytes(shapes, work.pack_tokens, 0)
    weights = sum(weight.numel() for weight in shapes.parameters()) * 2
    needed = [
        table["total"][0] * GIB
        - weights
        + activation_bytes(shapes, work.pack_tokens, count)
        - activation_bytes(shapes, work.pack_tokens, 0)
        for count in range(2)
    ]

    def chosen(room, fused=False):
        free = int(room / (1 - MARGIN))
        return choose_recomputed(config, stage, shapes, free, world_size=1, reference=False, fused=fused)

    assert [chosen(need + 1000) for need in needed] == [0, 1]
    assert [chosen(need - 1000) for need in needed] == [1, 2]
    assert chosen(needed[0] - 1000, fused=True) == 0
    assert chosen(0) == 2


@pytest.mark.gpu
def test_auto_recomputes_nothing_where_a_gpu_has_room(policy):
    config = load_config(["--model.gradient_checkpointing", "auto"])
    ranks = Distributed(0, 1, torch.device("cuda", 0))
    twin = copy.deepcopy(policy).to(ranks.device)
    told = recompute_as_needed(config, config.stages["unified"], twin, ranks, reference=True)
    assert told.startswith("0 of 2 blocks are recomputed, for ")


def test_auto_recomputes_nothing_on_a_cpu(policy):
    config = load_config(["--model.gradient_checkpointing", "auto"])
    twin = copy.deepcopy(policy)
    twin.recompute(2)
    ranks = Distributed(0, 1, torch.device("cpu"))
    told = recompute_as_needed(config, config.stages["unified"], twin, ranks, reference=False)
    assert told == "off, since there is no GPU"
    assert not any(layer.gradient_checkpointing or layer.training for layer in twin.backbone.layers)


@pytest.mark.parametrize(
    ("setting", "expected"), [("false", 0), ("true", 2), ("auto", 0), ("1", 1), ("0", 0), ("7", 2)]
)
def test_the_table_counts_the_blocks_that_the_configuration_names(setting, expected):
    config = load_config(["--model.gradient_checkpointing", setting])
    shapes = empty_policy(janus_config(), torch.bfloat16)
    assert recomputed_blocks(config, shapes) == expected
    work = workload(config, config.stages["t2i"], shapes, 1, 64)
    table = estimate(config, shapes, work, world_size=1, reference=False)
    assert table["activations"][0] * GIB == activation_bytes(shapes, work.pack_tokens, expected)


@pytest.mark.parametrize("setting", ["-1", "some", "1.5"])
def test_a_number_of_blocks_is_a_whole_number(setting):
    with pytest.raises(UserError, match="gradient_checkpointing: must be true, false, auto or a number of blocks"):
        load_config(["--model.gradient_checkpointing", setting])


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

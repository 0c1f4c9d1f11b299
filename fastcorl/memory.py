"""What a run will hold on each GPU, from a model that has shapes and no memory (the meta device)."""

import gc
from dataclasses import dataclass

import torch

from fastcorl.config import Config, StageConfig
from fastcorl.model import Policy
from fastcorl.model.fused_layers import uses_liger
from fastcorl.model.loading import empty_policy, resolve
from fastcorl.runtime.distributed import Distributed
from fastcorl.tasks import TASKS
from fastcorl_kernels.chunking import workspace_rows

GIB = 2**30
STAGES = (0, 1, 2, 3)
MARGIN = 0.1  # of the free memory, for fragments and what reward models need while they run


@dataclass(frozen=True)
class Workload:
    """What one rank does at once: `images` drawings and `texts` answers, to prompts of `prompt_tokens` tokens."""

    prompts: int
    images: int
    texts: int
    image_tokens: int
    text_tokens: int
    prompt_tokens: int
    guided: bool
    pack_tokens: int


def workload(config: Config, stage: StageConfig, policy: Policy, world_size: int, prompt_tokens: int) -> Workload:
    """The workload of a rank in `stage`; `prompt_tokens` is the length of a long prompt."""
    prompts = -(-stage.prompts_per_step // world_size)
    rows = prompts * (stage.group_size or config.algorithm.group_size)
    draws, answers, _ = TASKS[stage.task]
    sampled = (policy.num_image_tokens if draws else 0, config.rollout.max_new_tokens if answers else 0)
    trained = (rows + prompts * config.algorithm.external) * sum(sampled) + prompts * prompt_tokens
    return Workload(
        prompts,
        rows if draws else 0,
        rows if answers else 0,
        *sampled,
        prompt_tokens,
        config.rollout.guidance != 1,
        min(config.packing.tokens, trained),
    )


def estimate(
    config: Config, policy: Policy, work: Workload, *, world_size: int, reference: bool
) -> dict[str, list[float]]:
    """GiB per GPU by what holds it, one figure per ZeRO stage 0 to 3. Reward models and fragmentation come on top.

    Liger's kernels count where they are asked for, and "auto" as the torch modules and as no gradient checkpointing.
    """
    element = policy.dtype.itemsize
    whole = sum(weight.numel() for weight in policy.parameters()) * element
    trained = sum(weight.numel() for weight in policy.parameters() if weight.requires_grad)
    rows: dict[str, list[float]] = {}
    # Under ZeRO 3 sampling uses a whole copy beside the shards.
    rows["weights"] = [whole, whole, whole, whole / world_size + whole]
    rows["gradients"] = [trained * element / (world_size if stage >= 2 else 1) for stage in STAGES]
    # Both of Adam's moments; but for float32 weights without ZeRO also float32 copies of the weights and, at the
    # update, of their gradients.
    state = [8 if element == 4 and stage == 0 else 16 for stage in STAGES]
    rows["optimizer"] = [trained * state[stage] / (world_size if stage >= 1 else 1) for stage in STAGES]
    copies = reference and not policy.has_adapters and config.algorithm.reference == "keep"
    rows["reference"] = [whole if copies else 0.0] * 4
    rows["KV cache"] = [cache_tokens(config, work) * cache_bytes_per_token(policy)] * 4
    recomputed = recomputed_blocks(config, policy)
    fused = config.model.liger == "on"
    rows["activations"] = [activation_bytes(policy, work.pack_tokens, recomputed, fused=fused)] * 4
    rows["logits"] = [logits_bytes(policy, work)] * 4
    table = {name: [value / GIB for value in values] for name, values in rows.items()}
    table["total"] = [sum(values[stage] for values in table.values()) for stage in STAGES]
    return table


def cache_tokens(config: Config, work: Workload) -> int:
    """Tokens in the KV cache at once: each prompt once, each row's own tokens, the limits of the configuration."""
    copies = 2 if work.guided else 1
    rows, own = copies * work.images + work.texts, copies * work.images * work.image_tokens
    own += work.texts * work.text_tokens
    if config.rollout.max_rows is not None and rows > config.rollout.max_rows:
        own = own * config.rollout.max_rows // rows
    kinds = (work.images > 0) + (work.texts > 0)
    tokens = own + work.prompts * work.prompt_tokens * kinds
    return min(tokens, config.rollout.kv_cache_tokens or tokens)


def cache_bytes_per_token(policy: Policy) -> int:
    """Keys and values of one token in all layers."""
    text = policy.backbone.config
    head_dim = policy.backbone.layers[0].self_attn.head_dim
    return 2 * text.num_hidden_layers * text.num_key_value_heads * head_dim * policy.dtype.itemsize


def recomputed_blocks(config: Config, policy: Policy) -> int:
    """How many blocks backward runs again; "auto" counts as none."""
    setting, layers = config.model.gradient_checkpointing, policy.backbone.config.num_hidden_layers
    if setting == "auto":
        return 0
    return layers if setting is True else min(int(setting), layers)


def recompute_as_needed(
    config: Config, stage: StageConfig, policy: Policy, ranks: Distributed, *, reference: bool
) -> str:
    """Have `policy`, which is on its device and not in an engine yet, recompute as many blocks as a stage needs.
    Returns what was decided, in a line; a collective call."""
    if policy.device.type != "cuda":
        policy.recompute(0)
        return "off, since there is no GPU"
    gc.collect()  # engine and policy of an earlier stage refer to one another
    free, _ = torch.cuda.mem_get_info(policy.device)
    free += torch.cuda.memory_reserved(policy.device) - torch.cuda.memory_allocated(policy.device)
    shapes = empty_policy(resolve(config.model.path)[1], policy.dtype)
    lora, fused = config.model.lora, uses_liger(policy.backbone)
    if policy.has_adapters:
        shapes.add_adapters(rank=lora.rank, alpha=lora.alpha, targets=lora.targets)
    count = choose_recomputed(
        config, stage, shapes, free, world_size=ranks.world_size, reference=reference, fused=fused
    )
    # Under ZeRO 3 every rank must call the same modules.
    count = int(ranks.reduce([float(count)], "max")[0])
    policy.recompute(count)
    return f"{count} of {len(policy.backbone.layers)} blocks are recomputed, for {free / GIB:.1f} GiB are free"


def choose_recomputed(
    config: Config, stage: StageConfig, policy: Policy, free: int, *, world_size: int, reference: bool, fused: bool
) -> int:
    """How many blocks "auto" recomputes: the fewest with which a stage finds room in `free` bytes, of which a margin is
    left. `policy` has shapes and no memory; its weights, but no gradients, are already where `free` was measured."""
    work = workload(config, stage, policy, world_size, config.data.max_prompt_tokens)
    table = estimate(config, policy, work, world_size=world_size, reference=reference)
    held = {name: values[config.deepspeed.zero_stage] * GIB for name, values in table.items()}
    held["weights"] -= sum(weight.numel() for weight in policy.parameters()) * policy.dtype.itemsize
    held["KV cache"] = min(held["KV cache"], free / 2)  # more is not taken
    del held["activations"], held["total"]
    room, layers = free * (1 - MARGIN) - sum(held.values()), policy.backbone.config.num_hidden_layers
    kept = block_bytes_per_token(policy, fused=fused)
    fitting = (n for n in range(layers) if _activation_bytes(policy, work.pack_tokens, n, kept) <= room)
    return next(fitting, layers)


def activation_bytes(policy: Policy, tokens: int, recomputed: int, *, fused: bool = False) -> int:
    """What backward keeps of the backbone for `tokens` packed positions: counted on one block run without memory.

    Of the first `recomputed` blocks that is their input, and all of one block again, at a time when nothing is kept of
    the others.
    """
    return _activation_bytes(policy, tokens, recomputed, block_bytes_per_token(policy, fused=fused))


def _activation_bytes(policy: Policy, tokens: int, recomputed: int, kept: int) -> int:
    """`kept` are the bytes per token of one block."""
    layers, width = policy.backbone.config.num_hidden_layers, policy.backbone.config.hidden_size
    inputs = recomputed * tokens * width * policy.dtype.itemsize
    return inputs + max(layers - recomputed, 1) * kept * tokens


def block_bytes_per_token(policy: Policy, *, fused: bool = False) -> int:
    """Bytes per position that autograd saves in one block, parameters left out; `fused` with Liger's kernels."""
    # Few positions: without memory attention keeps its scores, tokens x tokens, which the kernels that train do not.
    block, tokens = policy.backbone.layers[0], 8
    hidden = torch.empty(1, tokens, policy.backbone.config.hidden_size, dtype=policy.dtype, device="meta")
    positions = torch.arange(tokens, device="meta")[None]
    weights = {weight.untyped_storage()._cdata for weight in block.parameters()}
    saved: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            saved[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        cos_sin = policy.backbone.rotary_emb(hidden, positions)
        block(hidden.requires_grad_(), position_embeddings=cos_sin, attention_mask=None)
    kept = sum(storage.nbytes() for storage in saved.values()) // tokens
    if fused:
        # Each norm does without the normalised states, and in half precision keeps its input in that; SwiGLU does
        # without silu(gate).
        text = policy.backbone.config
        kept -= 2 * 4 * text.hidden_size + text.intermediate_size * policy.dtype.itemsize
    return kept


def logits_bytes(policy: Policy, work: Workload) -> int:
    """The larger head's workspace, and the float32 gradient of a trained text head."""
    chunks = []
    sampled = ((work.images * work.image_tokens, policy.image_head), (work.texts * work.text_tokens, policy.text_head))
    for rows, head in sampled:
        if rows:
            trained = head.weight.requires_grad
            chunk = workspace_rows(len(head.weight), min(rows, work.pack_tokens), trained) * len(head.weight)
            chunks.append(chunk * policy.dtype.itemsize + (4 * head.weight.numel() if trained else 0))
    return max(chunks, default=0)

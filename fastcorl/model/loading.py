"""Loading and saving a policy in the transformers format."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoProcessor,
    JanusConfig,
    JanusForConditionalGeneration,
    PreTrainedConfig,
)
from transformers.utils import logging

from fastcorl.errors import UserError
from fastcorl.model.adapters import merged_state_dict, save_adapters
from fastcorl.model.attention import IMPLEMENTATION
from fastcorl.model.backends import packed_backend
from fastcorl.model.fused_layers import compile_blocks, use_liger
from fastcorl.model.lean_layers import use_lean
from fastcorl.model.policy import Policy
from fastcorl.model.prompts import PromptEncoder
from fastcorl.places import QUICKSTART, check_model_type, janus_folder

QUICKSTART_WEIGHTS = Path(__file__).parent.parent / "quickstart" / "weights"
_WHOLE = "give all files of a Janus in the transformers format"


def load_policy(
    path: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    templates: Mapping[str, str] | None = None,
    gradient_checkpointing: bool | int = False,
    liger: str = "off",
    compile: bool = False,
    attention: str = "auto",
) -> Policy:
    """Load a Janus checkpoint: a folder or hub name, or "quickstart" for the one that is shipped.

    Args:
        gradient_checkpointing: recompute all blocks in backward, or the first so many.
        liger: "on", "off" or "auto", see `speed_up`.
        compile: see `compile_blocks`; blocks that are compiled do without Liger.
        attention: what computes attention in packs, see `packed_backend`.

    Raises:
        UserError: there is no such checkpoint, it is not a Janus in the transformers format, or its blocks cannot be
            made faster as asked for, or its attention not be computed so.
    """
    name, config = resolve(path)
    packed_backend(attention, dtype, config.text_config.head_dim, torch.device(device))
    try:
        processor = AutoProcessor.from_pretrained(name)
        with quiet_transformers():
            janus, report = JanusForConditionalGeneration.from_pretrained(name, dtype=dtype, output_loading_info=True)
    except (OSError, ValueError, RuntimeError, AttributeError, SafetensorError) as error:
        raise UserError(f"model.path: cannot load {str(path)!r}: {_first_line(error)}; {_WHOLE}") from error
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise UserError(f"model.path: {str(path)!r} lacks {len(missing)} tensors, the first is {missing[0]}; {_WHOLE}")
    if not processor.chat_template:
        raise UserError(f"model.path: {str(path)!r} has no chat template (chat_template.jinja); {_WHOLE}")
    janus.model.language_model.set_attn_implementation(IMPLEMENTATION)
    policy = Policy(janus, processor, PromptEncoder(processor, templates=templates), attention_backend=attention)
    # Dropout would make the trained distribution differ from the sampled one, so nothing is ever put in train mode.
    policy.eval()
    policy.recompute(len(policy.backbone.layers) if gradient_checkpointing is True else gradient_checkpointing)
    policy.to(device)
    policy.lay_out()
    if compile:
        compile_blocks(policy.backbone)
    else:
        speed_up(policy.backbone, liger)
    return policy


def speed_up(backbone: nn.Module, liger: str) -> None:
    """Have a backbone compute with Liger's kernels, as `liger` says: "on", "off" or "auto" (`use_liger`), which on a
    CPU is `use_lean`."""
    if liger == "auto" and backbone.norm.weight.device.type == "cpu":
        use_lean(backbone)
    elif liger != "off":
        use_liger(backbone, liger)


def resolve(path: str | Path) -> tuple[str, JanusConfig]:
    """What `from_pretrained` is to be given for `path`, and the configuration found there. Raises UserError."""
    folder = QUICKSTART_WEIGHTS / "janus" if str(path) == QUICKSTART else janus_folder(str(path), "model.path")
    name = str(folder or path)
    if folder is None:
        try:
            model_type = PreTrainedConfig.get_config_dict(name)[0].get("model_type")
        except (OSError, ValueError) as error:
            raise UserError(f"model.path: cannot load {name!r}: {_first_line(error)}") from error
        check_model_type(model_type, name, "model.path")
    try:
        return name, AutoConfig.from_pretrained(name)
    except (OSError, ValueError, TypeError, StrictDataclassError) as error:
        raise UserError(f"model.path: {name!r}: its config.json is wrong: {_first_line(error)}; {_WHOLE}") from error


def empty_policy(config: JanusConfig, dtype: torch.dtype) -> Policy:
    """A policy of this architecture that has shapes and no memory (the meta device), nor a tokenizer."""
    with torch.device("meta"):
        return Policy(JanusForConditionalGeneration._from_config(config, dtype=dtype), None, None)


def load_encoder(path: str | Path, templates: Mapping[str, str] | None = None) -> PromptEncoder:
    """The prompts of the checkpoint at `path`, without its weights. Raises UserError."""
    name, _ = resolve(path)
    try:
        return PromptEncoder(AutoProcessor.from_pretrained(name), templates=templates)
    except (OSError, ValueError) as error:
        raise UserError(f"model.path: cannot load {str(path)!r}: {_first_line(error)}") from error


def save_policy(policy: Policy, folder: str | Path) -> None:
    """Write weights, configuration, processor and tokenizer so that transformers' `from_pretrained` reads them.

    Adapters are merged into the weights, and written to `folder`/adapter as peft reads them, for their start model.
    """
    if policy.has_adapters:
        policy.janus.save_pretrained(folder, state_dict=merged_state_dict(policy.janus))
        save_adapters(policy.janus, Path(folder) / "adapter")
    else:
        policy.janus.save_pretrained(folder)
    policy.processor.save_pretrained(folder)


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Without transformers' table of what a checkpoint lacks, and what of it no model has a use for."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__

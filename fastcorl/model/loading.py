"""Loading and saving a policy in the transformers format."""

from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoProcessor, JanusForConditionalGeneration

from fastcorl.errors import UserError
from fastcorl.model.attention import IMPLEMENTATION
from fastcorl.model.policy import Policy
from fastcorl.model.prompts import PromptEncoder

QUICKSTART_WEIGHTS = Path(__file__).parent.parent / "quickstart" / "weights"


def load_policy(
    path: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    question_template: str = "{question}",
    gradient_checkpointing: bool = False,
) -> Policy:
    """Load a Janus checkpoint: a folder or hub name, or "quickstart" for the one that is shipped.

    Raises UserError when there is no such checkpoint or it is not a Janus in the transformers format.
    """
    source = QUICKSTART_WEIGHTS / "janus" if str(path) == "quickstart" else Path(path)
    name = str(source) if source.exists() else str(path)
    if not source.exists() and (name.startswith((".", "/", "~")) or name.count("/") > 1):  # not a hub name
        raise UserError(f"model.path: there is no folder {name!r}")
    try:
        config = AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise UserError(f"model.path: cannot load {str(path)!r}: {_first_line(error)}") from error
    if config.model_type != "janus":
        raise UserError(f"model.path: {str(path)!r} is a {config.model_type!r} model; expected 'janus'")
    try:
        processor = AutoProcessor.from_pretrained(name)
        janus, report = JanusForConditionalGeneration.from_pretrained(name, dtype=dtype, output_loading_info=True)
    except (OSError, ValueError, RuntimeError, AttributeError, SafetensorError) as error:
        raise UserError(f"model.path: cannot load {str(path)!r}: {_first_line(error)}") from error
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise UserError(f"model.path: {str(path)!r} lacks {len(missing)} tensors, the first is {missing[0]}")
    if not processor.chat_template:
        raise UserError(f"model.path: {str(path)!r} has no chat template (chat_template.jinja)")
    janus.model.language_model.set_attn_implementation(IMPLEMENTATION)
    if gradient_checkpointing:
        janus.model.language_model.gradient_checkpointing_enable({"use_reentrant": False})
    policy = Policy(janus, processor, PromptEncoder(processor, question_template=question_template))
    # Dropout would make the trained distribution differ from the sampled one, so nothing is ever put in train mode,
    # except the flag that transformers asks for before it checkpoints a block.
    policy.eval()
    if gradient_checkpointing:
        for layer in janus.model.language_model.layers:
            layer.training = True
    policy.to(device)
    policy.lay_out()
    return policy


def save_policy(policy: Policy, folder: str | Path) -> None:
    """Write weights, configuration, processor and tokenizer so that transformers' `from_pretrained` reads them."""
    policy.janus.save_pretrained(folder)
    policy.processor.save_pretrained(folder)


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__

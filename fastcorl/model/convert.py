"""Checkpoints of the original `multi_modality` layout in the transformers format, and back."""

import shutil
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError
from transformers import JanusConfig, JanusForConditionalGeneration, JanusProcessor

from fastcorl.errors import UserError
from fastcorl.model.loading import QUICKSTART_WEIGHTS, load_policy, save_policy
from fastcorl.model.original_config import OriginalConfig, janus_config
from fastcorl.model.original_names import from_transformers, is_unused, target_names, to_transformers
from fastcorl.model.original_processor import generation_config, load_processor
from fastcorl.model.weight_files import new_folder, open_weights, read_json, write_weights

_HUB_FILES = ["*.json", "*.safetensors", "*.bin", "*.jinja", "*.model"]


@dataclass(frozen=True)
class Report:
    """What was written."""

    tensors: int
    parameters: int
    dtype: torch.dtype
    """Of most tensors."""
    unused: tuple[str, ...]
    """Tensors of the source that the target has no use for."""


def checkpoint_folder(source: str | Path) -> Path:
    """A local checkpoint folder, or the local copy of a hub name. Raises UserError when there is neither."""
    path, name = Path(source), str(source)
    if name == "quickstart":
        return QUICKSTART_WEIGHTS / "janus"
    if path.is_dir():
        return path
    if path.exists() or name.startswith((".", "/", "~")) or name.count("/") > 1:  # not a hub name
        raise UserError(f"{name}: there is no such folder")
    try:
        return Path(snapshot_download(name, allow_patterns=_HUB_FILES))
    except (OSError, ValueError, HfHubHTTPError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{name}: no such folder, and the hub gave no checkpoint of that name ({reason})") from error


def layout(folder: Path) -> str:
    """`model_type` of a checkpoint folder: "multi_modality" is the original layout, "janus" the transformers format."""
    stages = sorted(path.parent.name for path in folder.glob("*/config.json"))
    if not (folder / "config.json").exists() and stages:
        raise UserError(f"{folder}: holds several checkpoints; name one of them: {', '.join(stages)}")
    return str(read_json(folder / "config.json").get("model_type"))


def convert_checkpoint(source: str | Path, out: Path, dtype: torch.dtype | None = None) -> Report:
    """Write a checkpoint of the original layout in the transformers format.

    `source`: a folder or hub name; `out`: the new folder, complete or absent; `dtype` None keeps every tensor's type.
    Values are not touched otherwise. Raises UserError when a tensor is missing, unknown or of another shape than the
    configuration says, or when a file is missing or damaged; all is checked before anything is written.
    """
    folder = checkpoint_folder(source)
    original = OriginalConfig(read_json(folder / "config.json"), str(folder / "config.json"))
    tensors = open_weights(folder)
    config, processor = _describe(folder, original, dtype or _main_dtype(tensors))
    with torch.device("meta"):
        model = JanusForConditionalGeneration(config)
    unused = tuple(sorted(name for name in tensors if is_unused(name)))
    converted: dict[str, torch.Tensor] = {}
    origin: dict[str, str] = {}
    for name in sorted(tensors.keys() - set(unused)):
        for target, tensor in to_transformers(name, tensors[name]).items():
            converted[target] = tensor
            origin[target] = name
    unknown = sorted(tensors.keys() - set(unused) - set(origin.values()))
    _check(folder, model.state_dict(), converted, origin, unknown)
    with new_folder(out) as partial:
        write_weights(partial, converted, dtype)
        config.save_pretrained(partial)
        generation_config(processor).save_pretrained(partial)
        processor.save_pretrained(partial)
    return _report(converted, dtype, unused)


def restore_checkpoint(source: str | Path, like: str | Path, out: Path, dtype: torch.dtype | None = None) -> Report:
    """Write a checkpoint of the transformers format in the original layout, the inverse of `convert_checkpoint`.

    `like` is a checkpoint of the original layout from which the model descends, such as deepseek-ai/Janus-Pro-1B: its
    configuration, tokenizer and processor files are copied, and the tensors that only it has. Raises UserError where
    the two do not fit.
    """
    folder, model_folder = checkpoint_folder(like), checkpoint_folder(source)
    if layout(folder) != "multi_modality":
        raise UserError(f"{folder}: is a {layout(folder)!r} model; it must be in the original layout, multi_modality")
    theirs, ours = open_weights(folder), open_weights(model_folder)
    restored: dict[str, torch.Tensor] = {}
    kept = tuple(sorted(name for name in theirs if is_unused(name)))
    wanted: set[str] = set()
    for name, tensor in theirs.items():
        targets = target_names(name)
        wanted.update(targets)
        if name in kept:
            restored[name] = tensor
            continue
        if not targets or not ours.keys() >= set(targets):
            missing = sorted(set(targets) - ours.keys()) or [name]
            raise UserError(f"{model_folder}: lacks tensor {missing[0]}, which {name} of {folder} is made of")
        restored[name] = from_transformers(name, ours)
        if restored[name].shape != tensor.shape:
            shapes = f"{_shape(restored[name])}, in {folder} {_shape(tensor)}"
            raise UserError(f"{model_folder}: tensor {targets[0]} becomes {name} of shape {shapes}")
    if surplus := sorted(ours.keys() - wanted):
        raise UserError(f"{model_folder}: tensor {surplus[0]} has no counterpart in {folder}")
    with new_folder(out) as partial:
        write_weights(partial, restored, dtype)
        for path in sorted(folder.iterdir()):
            if path.suffix in (".json", ".jinja", ".model") and not path.name.endswith(".index.json"):
                shutil.copyfile(path, partial / path.name)
    return _report(restored, dtype, ())


def rewrite_checkpoint(source: str | Path, out: Path, dtype: torch.dtype | None = None) -> Report:
    """Write a checkpoint of the transformers format anew, with only what belongs to one: a copy, a cast, a clean-up.

    `dtype` None takes the type of most tensors for all. Raises UserError where `load_policy` does.
    """
    folder = checkpoint_folder(source)
    dtype = dtype or _main_dtype(open_weights(folder))
    try:
        policy = load_policy(folder, dtype=dtype)
    except UserError as error:
        raise UserError(str(error).removeprefix("model.path: ")) from error
    with new_folder(out) as partial:
        save_policy(policy, partial)
    return _report(policy.janus.state_dict(), dtype, ())


def _describe(folder: Path, original: OriginalConfig, dtype: torch.dtype) -> tuple[JanusConfig, JanusProcessor]:
    """Configuration and processor, each needing something of the other."""
    draft = janus_config(original, image_token_id=0, token_ids={}, dtype=dtype)
    vision = draft.vision_config
    processor = load_processor(folder, image_size=vision.image_size, num_image_tokens=vision.num_image_tokens)
    tokenizer = processor.tokenizer
    ids = {key: getattr(tokenizer, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    image = tokenizer.convert_tokens_to_ids(processor.image_token)
    vocabulary = draft.text_config.vocab_size
    if len(tokenizer) > vocabulary:
        raise UserError(f"{folder / 'tokenizer.json'}: has {len(tokenizer)} tokens, but the model only {vocabulary}")
    return janus_config(original, image_token_id=image, token_ids=ids, dtype=dtype), processor


def _check(
    folder: Path,
    expected: dict[str, torch.Tensor],
    converted: dict[str, torch.Tensor],
    origin: dict[str, str],
    unknown: list[str],
) -> None:
    if unknown:
        raise UserError(f"{folder}: tensor {unknown[0]} is not known ({len(unknown)} such); is this a Janus?")
    for name, tensor in converted.items():
        if name not in expected:
            raise UserError(
                f"{folder}: tensor {origin[name]} ({name}) has no place in the model that config.json describes"
            )
        if tensor.shape != expected[name].shape:
            shapes = f"{_shape(tensor)}, but config.json makes it {_shape(expected[name])}"
            raise UserError(f"{folder}: tensor {origin[name]} ({name}) has shape {shapes}")
    if missing := sorted(expected.keys() - converted.keys()):
        raise UserError(f"{folder}: lacks {len(missing)} tensors; the first, in transformers' names, is {missing[0]}")


def _main_dtype(tensors: dict[str, torch.Tensor]) -> torch.dtype:
    sizes = Counter[torch.dtype]()
    for tensor in tensors.values():
        if tensor.is_floating_point():
            sizes[tensor.dtype] += tensor.numel()
    return sizes.most_common(1)[0][0] if sizes else torch.float32


def _report(tensors: dict[str, torch.Tensor], dtype: torch.dtype | None, unused: tuple[str, ...]) -> Report:
    count = sum(tensor.numel() for tensor in tensors.values())
    return Report(len(tensors), count, dtype or _main_dtype(tensors), unused)


def _shape(tensor: torch.Tensor) -> str:
    return "x".join(map(str, tensor.shape))

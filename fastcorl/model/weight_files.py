"""Checkpoint folders on disk: tensors read without loading them, written in files of bounded size."""

import json
import shutil
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from fastcorl.errors import UserError
from fastcorl.places import check_new_folder

FILE_BYTES = 2 << 30
"""Most bytes of tensors in one file that is written; about twice as much memory is used."""


def read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; it belongs to the checkpoint") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({error})") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: must be a JSON object")
    return value


def open_weights(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of all safetensors files of a checkpoint folder, or else of its pytorch_model*.bin files, by name.

    They are mapped from the files: memory is used where a tensor is read. Raises UserError for a file that is missing,
    damaged or holds anything but tensors.
    """
    tensors: dict[str, torch.Tensor] = {}
    for path in _weight_files(folder):
        for name, tensor in _open_file(path).items():
            if name in tensors:
                raise UserError(f"{path}: tensor {name} is in another file of the checkpoint too; remove one of them")
            tensors[name] = tensor
    return tensors


def _weight_files(folder: Path) -> list[Path]:
    for index, pattern in (
        ("model.safetensors.index.json", "*.safetensors"),
        ("pytorch_model.bin.index.json", "pytorch_model*.bin"),
    ):
        if (folder / index).exists():
            weight_map = read_json(folder / index).get("weight_map")
            if not isinstance(weight_map, dict) or not weight_map:
                raise UserError(f"{folder / index}: has no weight_map")
            return [folder / Path(name).name for name in sorted(set(map(str, weight_map.values())))]
        if files := sorted(folder.glob(pattern)):
            return files
    raise UserError(f"{folder}: holds no weights (*.safetensors or pytorch_model*.bin)")


def _open_file(path: Path) -> dict[str, torch.Tensor]:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        # Files from before torch 1.6 are not zip files and cannot be mapped.
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; the checkpoint's index names it") from None
    except (SafetensorError, OSError, RuntimeError, EOFError, ValueError, UnpicklingError) as error:
        raise UserError(f"{path}: cannot be read as weights ({str(error).strip().splitlines()[0]})") from error
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise UserError(f"{path}: must be a mapping of names to tensors")
    return state


def write_weights(folder: Path, tensors: Mapping[str, torch.Tensor], dtype: torch.dtype | None = None) -> None:
    """Write model.safetensors, or several files with an index where `FILE_BYTES` asks for it, as transformers does.

    Floating-point tensors are cast to `dtype`, file by file; None keeps what they are.
    """

    def target(tensor: torch.Tensor) -> torch.dtype:
        return dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype

    files: list[list[str]] = [[]]
    room, total = FILE_BYTES, 0
    for name, tensor in tensors.items():
        size = tensor.numel() * target(tensor).itemsize
        if files[-1] and size > room:
            files.append([])
            room = FILE_BYTES
        files[-1].append(name)
        room -= size
        total += size
    weight_map = {}
    for number, names in enumerate(files, 1):
        file = f"model-{number:05d}-of-{len(files):05d}.safetensors" if len(files) > 1 else "model.safetensors"
        # Copies, because views of one fused tensor must not share memory in a file.
        part = {name: tensors[name].to(target(tensors[name]), copy=True).contiguous() for name in names}
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    if len(files) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder to write into that becomes `out` when the block ends without an error, and goes away otherwise."""
    check_new_folder(out, str(out))
    partial = out.with_name(out.name + ".partial")
    if partial.exists():
        shutil.rmtree(partial)
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"{out}: cannot be made: {error.strerror}") from error
    try:
        yield partial
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)

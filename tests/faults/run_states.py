"""What a run left, held bit for bit against what another left: steps, figures, scores, weights and optimizer state."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from fastcorl.runtime.checkpoints import MANIFEST
from tests.loop.launching import read_metrics

# Figures of time, memory and energy, which no two runs share.
MEASURED = ("seconds", "memory_gib", "mfu", "power_w", "joules", "utilisation", "alloc_retries", "ooms")


@dataclass
class Comparison:
    """Counts what is compared, and what differs."""

    tensors: int = 0
    values: int = 0
    differing_bits: int = 0
    differences: list[str] = field(default_factory=list)

    def see(self, one: Any, other: Any, name: str) -> None:
        """Nested dictionaries and lists of tensors and plain values."""
        first, second = dict(_leaves(one, name)), dict(_leaves(other, name))
        for missing in sorted(first.keys() ^ second.keys()):
            self.differences.append(f"{missing} is in one only")
        for key in first.keys() & second.keys():
            self._see_leaf(first[key], second[key], key)

    def _see_leaf(self, one: Any, other: Any, name: str) -> None:
        if not isinstance(one, torch.Tensor):
            self.values += 1
            if type(one) is not type(other) or one != other:
                self.differences.append(f"{name}: {one!r} and {other!r}"[:200])
            return
        self.tensors += 1
        self.values += one.numel()
        if (one.shape, one.dtype) != (other.shape, other.dtype):
            self.differences.append(f"{name}: {one.dtype} {tuple(one.shape)} and {other.dtype} {tuple(other.shape)}")
            return
        changed = _bytes(one) ^ _bytes(other)
        if changed.any():
            bits = int(np.unpackbits(changed).sum())
            self.differing_bits += bits
            self.differences.append(f"{name}: {bits} bits")


def compare_runs(one: Path, other: Path) -> Comparison:
    """All that two run folders have in common to be: figures, scores, exports, and what the last checkpoint holds."""
    found = Comparison()
    found.see([figures(line) for line in read_metrics(one)], [figures(line) for line in read_metrics(other)], "metrics")
    for name in ("scores.json", "bad_rows.jsonl"):
        found.see(*((folder / name).read_text() if (folder / name).exists() else "" for folder in (one, other)), name)
    exports, checkpoints = one / "export", _last_checkpoint(one)
    for file in sorted(exports.rglob("*.safetensors")):
        name = file.relative_to(one)
        found.see(load_file(file), load_file(other / name), str(name))
    for file in sorted(path for path in checkpoints.rglob("*") if path.is_file() and path.name != MANIFEST):
        name = file.relative_to(one)
        found.see(read_state(file), read_state(other / name), str(name))
    return found


def figures(line: dict) -> dict:
    """A line of metrics.jsonl without what was measured of the machine."""
    metrics = {name: value for name, value in line["metrics"].items() if not name.endswith(MEASURED)}
    return {name: value for name, value in line.items() if name not in MEASURED} | {"metrics": metrics}


def read_state(file: Path) -> Any:
    """A file of a checkpoint of ours."""
    if file.suffix == ".safetensors":
        return load_file(file)
    if file.suffix == ".pt":
        state = torch.load(file, map_location="cpu", weights_only=False)  # DeepSpeed's, written by this very test
        _cut_padding(state, file.name)
        return state
    return json.loads(file.read_text()) if file.suffix == ".json" else file.read_bytes()


def read_steps(folder: Path, rank: int) -> list[dict]:
    """The lines of `recorded_run` by a rank."""
    return [json.loads(line) for line in (folder / f"rank-{rank}.jsonl").read_text().splitlines()]


def _cut_padding(state: dict, name: str) -> None:
    """Under ZeRO 3 a frozen weight that the ranks cannot share evenly ends, on the last, in memory never written."""
    shard = re.match(r"zero_pp_rank_(\d+)_", name)  # under the others they are whole
    fragments = (state.get("frozen_param_fragments") or {}) if shard else {}
    for weight, fragment in fragments.items():
        rank = int(shard[1])
        fragments[weight] = fragment[: max(0, state["frozen_param_shapes"][weight].numel() - rank * len(fragment))]


def _last_checkpoint(run: Path) -> Path:
    return run / "checkpoints" / (run / "checkpoints" / "latest").read_text().strip()


def _bytes(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().contiguous().view(-1).view(torch.uint8).numpy()


def _leaves(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    """Tensors and plain values below `value`, by where they are. Objects are what their attributes are."""
    if isinstance(value, list | tuple):
        value = dict(enumerate(value))
    elif hasattr(value, "__dict__") and not isinstance(value, dict | torch.Tensor | type):
        value = vars(value)
    if not isinstance(value, dict):
        yield name, value
        return
    yield f"{name} has", len(value)
    for key, part in value.items():
        yield from _leaves(part, f"{name}.{key}")

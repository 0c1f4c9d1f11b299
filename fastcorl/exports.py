"""A model's drawings in the folders that public scorers read.

| layout | pictures | read by |
|---|---|---|
| geneval | `00000/samples/0000.png`, `00000/metadata.jsonl` | `evaluation/evaluate_images.py` of djghosh13/geneval |
| dpg | `<prompt file's name>.png`, four samples as 2 x 2 | `dpg_bench/compute_dpg_bench.py` of TencentQQGYLab/ELLA |
| wise | `<prompt_id>.png` | `vllm_eval.py`, `WISE_legacy/gpt_eval.py` of PKU-YuanGroup/WISE |

Nothing else is left in these folders: DPG-Bench's scorer takes every file for a picture, and GenEval's every name that
begins like one, so unfinished files begin with `tmp-`. Each PNG says in a text chunk what it was drawn from.
"""

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, PngImagePlugin

from fastcorl.benchmark_prompts import DrawingTask, read_tasks
from fastcorl.errors import UserError
from fastcorl.model import Policy
from fastcorl.records import Prompt
from fastcorl.rollout import RolloutEngine, SamplingParams
from fastcorl.runtime.durable import write_text

RECORD = "fastcorl"  # the text chunk's keyword
SAMPLES = {"geneval": 4, "dpg": 4, "wise": 1}  # what is published
WEIGHTS_LOOKED_AT = 64


@dataclass(frozen=True)
class Exported:
    """`drawn` pictures were written and `kept` were there; each sample is `side` pixels wide and high."""

    drawn: int
    kept: int
    side: int


def export_drawings(
    engine: RolloutEngine,
    layout: str,
    sources: Sequence[str | Path],
    out: str | Path,
    params: SamplingParams,
    *,
    samples: int | None = None,
    seed: object = 0,
    drawings_at_once: int = 64,
    part: tuple[int, int] = (0, 1),
    progress: Callable[[int, int], None] | None = None,
) -> Exported:
    """Draw a benchmark's prompts into `out`, at the decoder's size. What is there already is kept.

    A sample depends on `seed`, the name of its prompt and its index, not on what is drawn with it or was drawn before:
    up to rounding, which may change a grey level (and on a GPU what is drawn, see `RolloutEngine`).

    Args:
        layout, sources: as in `benchmark_prompts.read_tasks`.
        samples: per prompt; None is what the benchmark publishes: 4, 4 and 1. DPG-Bench takes 1 or 4, WISE 1.
        drawings_at_once: samples per call of the engine, at least one prompt's.
        part: (i, n) draws every n-th prompt from the i-th on, for n processes that share `out`.
        progress: called with samples drawn so far and samples to draw in all.

    Raises:
        UserError: for prompts that cannot be used, that do not fit the model's context, or for pictures in `out` that
            came from another prompt, model, seed or setting; nothing has been drawn then.
    """
    if samples is None:
        samples = SAMPLES.get(layout, 1)
    if not 0 <= part[0] < part[1]:
        raise UserError(f"--part {part[0]}/{part[1]}: must count from 0 to {max(part[1] - 1, 0)}")
    tasks = read_tasks(layout, sources)[part[0] :: part[1]]
    if samples < 1 or (layout == "wise" and samples != 1) or (layout == "dpg" and samples not in (1, 4)):
        raise UserError(f"--samples {samples}: must be 1 for wise, 1 or 4 for dpg, at least 1 for geneval")
    _check_lengths(engine, tasks)
    drawer = _Drawer(engine, layout, Path(out), params, samples, seed)
    counts = {task.name: len(drawer.missing(task)) for task in tasks}
    missing = [task for task in tasks if counts[task.name]]
    kept = sum(len(drawer.pictures(task)) - counts[task.name] for task in tasks)
    for task in tasks:
        if not counts[task.name]:
            drawer.write_metadata(task)
    drawn, side = 0, 0
    at_once = max(1, drawings_at_once // samples)
    for start in range(0, len(missing), at_once):
        group = missing[start : start + at_once]

        def tell(tokens: int, before: int = start * samples) -> None:
            if progress is not None:
                progress(before + tokens // engine.policy.num_image_tokens, len(missing) * samples)

        pixels = drawer.draw(group, tell)
        side = pixels.shape[-1]
        drawn += sum(drawer.write(task, each) for task, each in zip(group, pixels, strict=True))
        tell(len(group) * samples * engine.policy.num_image_tokens)
    return Exported(drawn, kept, side or drawer.side(tasks))


class _Drawer:
    """What a call has in common for all prompts."""

    def __init__(
        self, engine: RolloutEngine, layout: str, out: Path, params: SamplingParams, samples: int, seed: object
    ):
        self.engine, self.layout, self.out, self.params = engine, layout, out, params
        self.samples, self.seed = samples, seed
        settings = asdict(params)
        del settings["max_new_tokens"]  # of answers
        self.common = {"weights": _weights_digest(engine.policy), "seed": str(seed), **settings}
        size = engine.policy.image_size
        self.blank = Image.new("RGB", (size, size))

    def pictures(self, task: DrawingTask) -> dict[Path, list[int]]:
        """Each picture of a prompt and the samples it shows."""
        if self.layout == "geneval":
            folder = self.out / task.name / "samples"
            return {folder / f"{index:04d}.png": [index] for index in range(self.samples)}
        return {self.out / f"{task.name}.png": list(range(self.samples))}

    def missing(self, task: DrawingTask) -> dict[Path, list[int]]:
        """The pictures that are still to draw."""
        missing = {}
        for path, indices in self.pictures(task).items():
            if path.exists():
                self._check_origin(path, task, indices)
            else:
                missing[path] = indices
        return missing

    def draw(self, tasks: Sequence[DrawingTask], progress: Callable[[int], None]) -> torch.Tensor:
        """(prompts, samples, 3, H, W) uint8."""
        prompts = [Prompt(task.name, task.prompt, self.blank, "", "", "OE") for task in tasks]
        rollout = self.engine.generate(
            prompts, self.samples, self.params, answer=False, seed=self.seed, progress=progress
        )
        pixels = rollout.images.pixels.mul(255).round().byte().cpu()
        return pixels.unflatten(0, (len(tasks), self.samples))

    def write(self, task: DrawingTask, drawings: torch.Tensor) -> int:
        """Write the missing pictures of a prompt, of (samples, 3, H, W) uint8; returns how many."""
        missing = self.missing(task)
        for path in missing:
            path.parent.mkdir(parents=True, exist_ok=True)
        self.write_metadata(task)  # before the pictures: GenEval's scorer stops at a folder without it
        for path, indices in missing.items():
            note = PngImagePlugin.PngInfo()
            note.add_text(RECORD, json.dumps(self._record(task, indices)))
            temporary = path.with_name(f"tmp-{path.name}")
            _sheet(drawings[indices]).save(temporary, format="PNG", pnginfo=note)
            os.replace(temporary, path)
        return len(missing)

    def write_metadata(self, task: DrawingTask) -> None:
        if task.metadata is not None:
            write_text(self.out / task.name / "metadata.jsonl", json.dumps(task.metadata))

    def side(self, tasks: Sequence[DrawingTask]) -> int:
        """Pixels across one sample, from a picture that is there; 0 without any."""
        for path, indices in (picture for task in tasks[:1] for picture in self.pictures(task).items()):
            with Image.open(path, formats=["PNG"]) as image:
                return image.width // (2 if len(indices) == 4 else 1)
        return 0

    def _record(self, task: DrawingTask, indices: Sequence[int]) -> dict[str, object]:
        return {**self.common, "prompt": task.prompt, "samples": list(indices)}

    def _check_origin(self, path: Path, task: DrawingTask, indices: Sequence[int]) -> None:
        try:
            with Image.open(path, formats=["PNG"]) as image:
                record = json.loads(image.info.get(RECORD, "null"))
        except (OSError, ValueError, SyntaxError) as error:
            raise UserError(f"{path}: is no whole picture of an export, delete it: {error}") from error
        expected = self._record(task, indices)
        if not isinstance(record, dict):
            raise UserError(f"{path}: was not drawn by an export: give another --out")
        for key, value in expected.items():
            if record.get(key) != value:
                raise UserError(f"{path}: was drawn with {key} {record.get(key)}, not {value}: give another --out")


def _check_lengths(engine: RolloutEngine, tasks: Sequence[DrawingTask]) -> None:
    room = engine.context - engine.policy.num_image_tokens
    for task in tasks:
        length = len(engine.policy.encoder.draw(task.prompt))
        if length > room:
            raise UserError(f"{task.place}: the prompt has {length} tokens, the model takes {room} before a drawing")


def _sheet(drawings: torch.Tensor) -> Image.Image:
    """One or four (n, 3, H, W) uint8 drawings as one picture; four row by row, as DPG-Bench's scorer cuts them."""
    columns = 2 if len(drawings) == 4 else 1
    grid = drawings.unflatten(0, (-1, columns)).permute(0, 3, 1, 4, 2).flatten(0, 1).flatten(1, 2)
    return Image.fromarray(np.ascontiguousarray(grid.numpy()))


@torch.no_grad()
def _weights_digest(policy: Policy) -> str:
    """Tells one model from another by some entries of each tensor."""
    digest = hashlib.sha256()
    for name, parameter in policy.named_parameters():
        flat = parameter.flatten()
        places = torch.linspace(0, len(flat) - 1, min(len(flat), WEIGHTS_LOOKED_AT), dtype=torch.float64).long()
        digest.update(f"{name} {tuple(parameter.shape)}".encode())
        digest.update(flat[places.to(flat.device)].float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]

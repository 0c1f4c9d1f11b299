"""What the commands have in common: models, sampling flags and progress."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from fastcorl.errors import UserError


def check_flag(flag: str, check: Callable, value):
    """`check(value)`, whose ValueError is the user's mistake in `flag`."""
    try:
        return check(value)
    except ValueError as error:
        raise UserError(f"{flag}: {error}") from error


def writable_file(flag: str, path: Path, *suffixes: str) -> Path:
    """`path` if a file can be written there, its folder made; with `suffixes` it must end in one of them."""
    if path.is_dir():
        raise UserError(f"{flag} {path}: is a folder; give the name of a file")
    if suffixes and path.suffix.lower() not in suffixes:
        raise UserError(f"{flag} {path}: must end in {' or '.join(suffixes)}")
    writable_folder(flag, path.parent)
    return path


def writable_folder(flag: str, path: Path) -> Path:
    """`path` if it is a folder or can be made one; it is made."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{flag} {path}: cannot be a folder: {error.strerror}") from error
    return path


def check_counts(command, *names: str) -> None:
    """Raise UserError for a flag whose number is below 1."""
    for name in names:
        value = getattr(command, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} {value}: must be at least 1")


def sampling_params(command, **settings: float):
    """The command's flags as sampling parameters."""
    return make_params(command.temperature, top_k=command.top_k, top_p=command.top_p, **settings)


def make_params(temperature: float, **settings: float):
    """SamplingParams; what they do not allow is the user's mistake."""
    from fastcorl.rollout import SamplingParams

    try:
        return SamplingParams(temperature, **settings)
    except ValueError as error:
        raise UserError(str(error)) from error


def sample(command, policy, prompt, params, what: str, total: int | None, **kind: bool):
    """A rollout of one prompt, with a progress bar; limits are named as the command's flags."""
    from fastcorl.rollout import RolloutEngine

    engine = RolloutEngine(policy, max_rows=command.max_rows)
    try:
        with progress_bar(what, total) as progress:
            return engine.generate([prompt], command.num, params, seed=command.seed, progress=progress, **kind)
    except UserError as error:
        message = (
            str(error).replace("rollout.max_rows", "--max-rows").replace("rollout.max_new_tokens", "--max-new-tokens")
        )
        raise UserError(message) from error


@contextmanager
def progress_bar(what: str, total: int | None) -> Iterator[Callable[[int], None]]:
    """A bar with tokens per second on a terminal, and one line of the same at the end. Yields what is told the tokens
    sampled so far; `total` None is unknown."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    columns = (
        TextColumn(what),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("tokens, {task.fields[rate]:.0f}/s"),
        TimeElapsedColumn(),
    )
    start, sampled = time.perf_counter(), 0
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(what, total=total, rate=0.0)

        def tell(tokens: int) -> None:
            nonlocal sampled
            sampled = tokens
            bar.update(task, completed=tokens, rate=tokens / (time.perf_counter() - start))

        yield tell
    seconds = time.perf_counter() - start
    print(f"{what}: {sampled} tokens in {seconds:.1f} s, {sampled / seconds:.0f} tokens/s", file=sys.stderr)


def load(model: str, device: str, *, templates: dict[str, str] | None = None):
    import torch
    from transformers.utils import logging

    from fastcorl.model import load_policy

    logging.disable_progress_bar()
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {device}: {str(error).splitlines()[0]}") from error
    dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
    try:
        return load_policy(model, dtype=dtype, device=device, templates=templates)
    except UserError as error:
        raise UserError(str(error).replace("model.path", "--model")) from error

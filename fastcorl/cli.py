"""The `fastcorl` command: generate, ask, evaluate, merge. Each has --help."""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from fastcorl.errors import UserError, main_guard


@dataclass
class Generate:
    """Draw pictures of a caption."""

    prompt: str
    """What to draw."""
    model: str = "quickstart"
    """Folder or hub name of a Janus in the transformers format."""
    grid: Path = Path("drawing.png")
    """Picture that shows all drawings."""
    out: Path | None = None
    """Folder for each drawing as a picture of its own."""
    num: int = 1
    """How many drawings."""
    seed: int = 0
    temperature: float = 1.0
    """0 is greedy."""
    guidance: float = 1.0
    """Classifier-free guidance; Janus-Pro is published with 5, the quickstart model is trained at 1."""
    top_k: int | None = None
    """Draw each token from the k most likely ones."""
    top_p: float | None = None
    """Draw each token from the most likely ones that have together this probability."""
    max_rows: int | None = None
    """Rows decoded at once, two per guided drawing; None is all."""
    device: str = "auto"

    def run(self) -> None:
        import numpy as np
        import torch
        from PIL import Image

        from fastcorl.records import Prompt

        params = _sampling_params(self, guidance=self.guidance)
        policy = _load(self.model, self.device)
        blank = Image.new("RGB", (policy.image_size, policy.image_size))
        prompt = Prompt("cli", self.prompt, blank, "", "", "OE")
        rollout = _sample(self, policy, prompt, params, "drawing", self.num * policy.num_image_tokens, answer=False)
        columns = min(8, self.num)
        pixels = rollout.images.pixels.cpu()
        rows = -(-self.num // columns)
        # Tiny drawings are enlarged so that a viewer shows them.
        factor = max(1, 128 // policy.image_size)

        def save(pixels: torch.Tensor, path: Path) -> None:
            path.parent.mkdir(parents=True, exist_ok=True)
            image = Image.fromarray((pixels.permute(1, 2, 0).numpy() * 255).round().astype(np.uint8))
            image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST).save(path)

        if self.out is not None:
            for index, drawing in enumerate(pixels):
                save(drawing, self.out / f"{index:03d}.png")
        filled = torch.cat([pixels, pixels.new_zeros(rows * columns - self.num, *pixels.shape[1:])])
        save(filled.unflatten(0, (rows, columns)).permute(2, 0, 3, 1, 4).flatten(1, 2).flatten(2, 3), self.grid)
        print(f"{self.num} drawing{'s' * (self.num > 1)} of {self.prompt!r}: {self.grid}")


@dataclass
class Ask:
    """Ask a question about a picture."""

    image: Path
    """The picture."""
    question: str
    model: str = "quickstart"
    """Folder or hub name of a Janus in the transformers format."""
    num: int = 1
    """How many answers."""
    seed: int = 0
    temperature: float = 0.0
    """0 is greedy."""
    max_new_tokens: int = 512
    """Longest answer in tokens; less where the model's context ends."""
    top_k: int | None = None
    """Draw each token from the k most likely ones."""
    top_p: float | None = None
    """Draw each token from the most likely ones that have together this probability."""
    max_rows: int | None = None
    """Answers decoded at once; None is all."""
    device: str = "auto"

    def run(self) -> None:
        from fastcorl.data import ImageError, decode_image
        from fastcorl.records import Prompt

        _sampling_params(self, max_new_tokens=self.max_new_tokens)
        if not self.image.is_file():
            raise UserError(f"--image {self.image}: no such file")
        try:
            image = decode_image(self.image.read_bytes(), None)
        except ImageError as error:
            raise UserError(f"--image {self.image}: {error}") from error
        policy = _load(self.model, self.device)
        room = policy.janus.config.text_config.max_position_embeddings - len(policy.encoder.ask(self.question))
        if room < 1:
            raise UserError(f"--question is too long: {1 - room} tokens over the model's context")
        params = _sampling_params(self, max_new_tokens=min(self.max_new_tokens, room))
        prompt = Prompt("cli", "", image, self.question, "", "OE")
        rollout = _sample(self, policy, prompt, params, "answering", None, draw=False)
        for answer in rollout.texts.answers:
            print(answer)


@dataclass
class Evaluate:
    """Score a model's drawings and answers on held-out rows."""

    model: str = "quickstart"
    """Folder or hub name of a Janus in the transformers format."""
    data: str = "fastcorl.quickstart.data:held_out"
    """Rows: `module:function`, or a local parquet, jsonl or saved data set."""
    scorer: str | None = "fastcorl.quickstart.scorer:Scorer"
    """Judge of drawings, `module:class`; None scores answers only."""
    num_prompts: int = 256
    seed: str = "evaluation"
    """What the samples are drawn with; a run's own evaluations use "evaluation"."""
    temperature: float = 1.0
    guidance: float = 1.0
    max_new_tokens: int = 56
    out: Path | None = None
    """Also write the scores as JSON."""
    device: str = "auto"

    def run(self) -> None:
        from fastcorl.data import PromptData, load_rows, validate_rows
        from fastcorl.evaluation import evaluate
        from fastcorl.plugins import load_object
        from fastcorl.rollout import RolloutEngine, SamplingParams
        from fastcorl.runtime.distributed import Distributed

        if self.num_prompts < 1:
            raise UserError(f"--num-prompts {self.num_prompts}: must be at least 1")
        policy = _load(self.model, self.device)
        rows = load_rows(self.data, {}, "--data")
        count = min(self.num_prompts, len(rows))
        validate_rows(rows, range(count))
        data = PromptData(rows)
        scorer = load_object(self.scorer, "--scorer")() if self.scorer else None
        params = SamplingParams(self.temperature, self.guidance, self.max_new_tokens)
        prompts = [data[i] for i in range(count)]
        ranks = Distributed(0, 1, policy.device)
        scores = evaluate(RolloutEngine(policy, weight_version=0), prompts, params, scorer, ranks=ranks, seed=self.seed)
        for name, value in scores.items():
            print(f"{name:<10}{100 * value:6.1f} %")
        if self.out:
            self.out.parent.mkdir(parents=True, exist_ok=True)
            self.out.write_text(json.dumps({"model": self.model, "prompts": count, "scores": scores}, indent=1))


@dataclass
class Merge:
    """Join two refined models around the model both started from (Gaussian merge, arXiv 2501.10661)."""

    base: str
    """The model both were trained from."""
    first: str
    second: str
    out: Path
    """Folder for the merged model."""

    def run(self) -> None:
        from fastcorl.algorithm import merge_state_dicts
        from fastcorl.model import save_policy

        policy = _load(self.base, "cpu")
        states = [policy.janus.state_dict(), *(_load(path, "cpu").janus.state_dict() for path in self.models())]
        policy.janus.load_state_dict(merge_state_dicts(*states))
        save_policy(policy, self.out)
        print(f"merged model: {self.out}")

    def models(self) -> tuple[str, str]:
        return self.first, self.second


def _sampling_params(command: Generate | Ask, **settings: float):
    """The command's flags as sampling parameters."""
    from fastcorl.rollout import SamplingParams

    for name in ("num", "max_rows"):
        value = getattr(command, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} {value}: must be at least 1")
    try:
        return SamplingParams(command.temperature, top_k=command.top_k, top_p=command.top_p, **settings)
    except ValueError as error:
        raise UserError(str(error)) from error


def _sample(command: Generate | Ask, policy, prompt, params, what: str, total: int | None, **kind: bool):
    """A rollout of one prompt, with a progress bar; limits are named as the command's flags."""
    from fastcorl.rollout import RolloutEngine

    engine = RolloutEngine(policy, max_rows=command.max_rows)
    try:
        with _progress(what, total) as progress:
            return engine.generate([prompt], command.num, params, seed=command.seed, progress=progress, **kind)
    except UserError as error:
        message = (
            str(error).replace("rollout.max_rows", "--max-rows").replace("rollout.max_new_tokens", "--max-new-tokens")
        )
        raise UserError(message) from error


@contextmanager
def _progress(what: str, total: int | None) -> Iterator[Callable[[int], None]]:
    """A bar with tokens per second on a terminal, and one line of the same at the end. Yields what is told the tokens
    sampled so far; `total` None is unknown."""
    import time

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


def _load(model: str, device: str):
    import torch
    from transformers.utils import logging

    from fastcorl.model import load_policy

    logging.disable_progress_bar()
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
    try:
        return load_policy(model, dtype=dtype, device=device)
    except UserError as error:
        raise UserError(str(error).replace("model.path", "--model")) from error


@main_guard()
def main(argv: list[str] | None = None) -> None:
    command = tyro.cli(
        Annotated[Generate, tyro.conf.subcommand("generate")]
        | Annotated[Ask, tyro.conf.subcommand("ask")]
        | Annotated[Evaluate, tyro.conf.subcommand("evaluate")]
        | Annotated[Merge, tyro.conf.subcommand("merge")],
        prog="fastcorl",
        args=sys.argv[1:] if argv is None else argv,
    )
    command.run()


if __name__ == "__main__":
    main()

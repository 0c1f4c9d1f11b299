"""`--dry-run`: everything a run would use is looked up, one batch is read, and nothing is trained."""

import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from transformers.utils import logging as transformers_logging

from fastcorl.config import Config, StageConfig
from fastcorl.data import BadRow, Needs, PromptLengths, examine, open_stream
from fastcorl.data.catalog import public_data
from fastcorl.data.sampler import check_world
from fastcorl.errors import UserError
from fastcorl.memory import STAGES, estimate, workload
from fastcorl.model import Policy, PromptEncoder
from fastcorl.model.known import known_config
from fastcorl.model.loading import empty_policy, load_encoder, resolve
from fastcorl.parts import check_stages, kl_weight, needs_reference
from fastcorl.pipeline import check_folders
from fastcorl.plugins import load_object
from fastcorl.runtime.engine import engine_name
from fastcorl.tasks import TASKS, expand, uses

GPUS = (1, 2, 4, 8)


def describe_run(config: Config) -> None:
    """Print what `config` would train on what, and the memory it takes. Raises UserError for mistakes.

    Published models and data sets that cannot be reached are no mistake: what is known of them is used, and said.
    """
    transformers_logging.disable_progress_bar()
    if int(os.environ.get("RANK", 0)) == 0:
        console = Console(width=None if sys.stdout.isatty() else 120, emoji=False)
        DryRun(config, console, world_size=int(os.environ.get("WORLD_SIZE", 1))).run()


class DryRun:
    def __init__(self, config: Config, console: Console, *, world_size: int):
        self.config, self.console, self.world_size = config, console, world_size
        self.stages = expand(config)
        self.missing: list[str] = []

    def run(self) -> None:
        config = self.config
        engine_name(config.deepspeed, launched="WORLD_SIZE" in os.environ)
        check_stages(config, self.stages, self.world_size)
        check_folders(self.stages)
        for name, stage in self.stages.items():
            if stage.task != "merge":
                check_world(name, stage.prompts_per_step, self.world_size)
        if config.evaluation.scorer:
            load_object(config.evaluation.scorer, "evaluation.scorer")()
        self._print_stages()
        policy, encoder = self._model()
        for source, stages in self._sources():
            tasks = [TASKS[stage.task] for stage in stages]
            needs = Needs(any(task.draws for task in tasks), any(task.answers for task in tasks))
            types = {kind for task in tasks if task.answers for kind in task.question_types}
            count = max(stage.prompts_per_step for stage in stages)
            self._print_batch("data.train", source, stages[0].columns, needs, types, count, encoder)
        if config.data.held_out is not None:
            needs = Needs(draw=config.evaluation.scorer is not None, answer=True)
            tasks = [TASKS[stage.task] for stage in self.stages.values() if stage.task != "merge"]
            types = {kind for task in tasks if task.answers for kind in task.question_types}
            self._print_batch("data.held_out", config.data.held_out, config.data.columns, needs, types, 8, encoder)
        self._check_rewards()
        self._print_memory(policy)
        for line in self.missing:
            self.console.print(f"[yellow]to do[/]  {line}", highlight=False)
        self.console.print("dry run: nothing was trained", highlight=False)

    def _print_stages(self) -> None:
        config = self.config
        table = Table("stage", "task", "from", "steps", "prompts x group", "rate", "beta", "data")
        for name, stage in self.stages.items():
            group = stage.group_size or config.algorithm.group_size
            merges = stage.task == "merge"
            rate = stage.learning_rate or config.optimizer.learning_rate
            beta = kl_weight(config, stage)
            what = [str(stage.steps), f"{stage.prompts_per_step} x {group}", f"{rate:g}", f"{beta:g}"]
            source = ", ".join(stage.merge) if merges else stage.data or config.data.train
            table.add_row(name, stage.task, stage.init, *(["", "", "", ""] if merges else what), source)
        self.console.print(table)

    def _model(self) -> tuple[Policy, PromptEncoder | None]:
        model, dtype = self.config.model, getattr(torch, self.config.model.dtype)
        encoder = None
        try:
            _, janus_config = resolve(model.path)
            encoder = load_encoder(model.path, self.config.data.templates)
        except UserError as error:
            janus_config = known_config(model.path)
            if janus_config is None:
                raise
            self.missing.append(f"{error}; sizes are those published")
        policy = empty_policy(janus_config, dtype)
        if model.lora.rank:
            policy.add_adapters(rank=model.lora.rank, alpha=model.lora.alpha, targets=model.lora.targets)
        whole = sum(weight.numel() for weight in policy.parameters())
        trained = sum(weight.numel() for weight in policy.parameters() if weight.requires_grad)
        self.console.print(
            f"model          {model.path}: {whole:,} parameters, {trained:,} of them trained, {model.dtype}"
        )
        return policy, encoder

    def _sources(self) -> Iterator[tuple[str, list[StageConfig]]]:
        """Each source of training rows once, with the stages that read it."""
        readers: dict[tuple, list[StageConfig]] = {}
        for stage in self.stages.values():
            if stage.task != "merge":
                columns = self.config.data.columns if stage.columns is None else stage.columns
                key = (stage.data or self.config.data.train, tuple(sorted(columns.items())))
                readers.setdefault(key, []).append(stage)
        for (source, columns), stages in readers.items():
            yield source, [stage.model_copy(update={"columns": dict(columns)}) for stage in stages]

    def _print_batch(
        self,
        key: str,
        source: str,
        columns: dict[str, str],
        needs: Needs,
        types: set[str],
        count: int,
        encoder: PromptEncoder | None,
    ) -> None:
        """Read as many rows as a step takes, from the start of the data."""
        data = self.config.data
        lengths = None if encoder is None else PromptLengths(encoder, data.max_prompt_tokens, needs)
        try:
            rows = open_stream(
                source,
                columns,
                key,
                needs=needs,
                split=data.split,
                revision=data.revision,
                question_type=next(iter(types)) if len(types) == 1 else None,
            )
            read = list(examine(islice(rows.numbered(), count), rows.schema, lengths))
        except UserError as error:
            if public_data(source) is None or Path(source).exists():
                raise
            self.missing.append(f"{error}")
            return
        if self.config.algorithm.pair_similarity and key == "data.train" and "pair_similarity" not in rows.schema.names:
            raise UserError(f"{rows.source}: algorithm.pair_similarity needs a column pair_similarity")
        bad = [row for row in read if isinstance(row, BadRow)]
        if len(bad) == len(read):
            raise UserError(f"{bad[0]} (and all {len(read)} rows of the first batch)")
        line = f"{key:<14} {source}: {len(read) - len(bad)} rows read"
        if bad:
            line += f", {len(bad)} bad ones passed over (the first: {bad[0]})"
        if lengths is not None:
            line += f"; longest caption {lengths.longest_caption}, longest question {lengths.longest_question} tokens"
        self.console.print(line, highlight=False)

    def _check_rewards(self) -> None:
        """The user's functions import; files of models that judge are there, or are listed as to be fetched."""
        rewards = self.config.rewards
        for key, names in (("rewards.extra", rewards.extra), ("rewards.pairwise", rewards.pairwise)):
            for name in names:
                load_object(name, key)
        if not uses(self.stages).draws:
            return
        if "tuples" in rewards.caption_similarity:
            load_object(rewards.caption_tuples, "rewards.caption_tuples")
        for judge in judges(self.config):
            if judge.path and not Path(judge.path).exists():
                self.missing.append(f"{judge.key}: {judge.path} is not on this machine ({judge.remedy})")

    def _print_memory(self, policy: Policy) -> None:
        """One table for all stages that take the same."""
        tables: dict[str, list[str]] = {}
        figures = {}
        for name, stage in self.stages.items():
            if stage.task != "merge":
                found = {count: self._figures(stage, policy, count) for count in (self.world_size, *GPUS)}
                tables.setdefault(repr(found), []).append(name)
                figures[name] = found
        for names in tables.values():
            found = figures[names[0]]
            gpus = f"{self.world_size} GPU{'s' * (self.world_size > 1)}"
            title = f"{', '.join(names)}: GiB on each of {gpus}, estimated, without reward models"
            table = Table("", *(f"ZeRO {zero}" for zero in STAGES), title=title, title_justify="left")
            for term, values in found[self.world_size].items():
                table.add_row(term, *(f"{value:.2f}" for value in values), end_section=term == "logits")
            for count in GPUS:
                if count != self.world_size and found[count]:
                    table.add_row(f"total on {count}", *(f"{value:.2f}" for value in found[count]["total"]))
            self.console.print(table)
        self.console.print(
            "KV cache: for all rows at once; sampling takes half of the free memory at most", style="dim"
        )

    def _figures(self, stage: StageConfig, policy: Policy, world_size: int) -> dict[str, list[float]]:
        """Empty where the prompts of a step cannot be shared by so many ranks."""
        config = self.config
        if stage.prompts_per_step % world_size:
            return {}
        reference = needs_reference(config, stage)
        work = workload(config, stage, policy, world_size, config.data.max_prompt_tokens)
        return estimate(config, policy, work, world_size=world_size, reference=reference)


@dataclass(frozen=True)
class Judge:
    """A file or model that a reward reads."""

    key: str
    path: str | None
    remedy: str


def judges(config: Config) -> list[Judge]:
    """What the rewards of `config` read besides the policy."""
    rewards, hub = config.rewards, "fetched from the hub when the run starts"
    found = []
    if rewards.captioner not in ("policy", "quickstart"):
        found.append(Judge("rewards.captioner", rewards.captioner, hub))
    if rewards.image_similarity.startswith("lpips"):
        file = {"lpips_vgg": "vgg16-397923af.pth", "lpips_alex": "alexnet-owt-7be5be79.pth"}[rewards.image_similarity]
        remedy = f"get https://download.pytorch.org/models/{file}"
        found.append(Judge("rewards.lpips_trunk", rewards.lpips_trunk, remedy))
    if "bertscore" in rewards.caption_similarity:
        found.append(Judge("rewards.bert", rewards.bert, hub))
    if "sentence" in rewards.caption_similarity:
        found.append(Judge("rewards.sentence_encoder", rewards.sentence_encoder, hub))
    if rewards.weight("clip"):
        found.append(Judge("rewards.clip", rewards.clip, hub))
    return found

"""`--dry-run`: everything a run would use is looked up, one batch is read, and nothing is trained."""

import os
import sys
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
from fastcorl.errors import UserError
from fastcorl.evaluation import load_scorer
from fastcorl.first_checks import check_stages
from fastcorl.memory import STAGES, estimate, workload
from fastcorl.model import Policy, PromptEncoder
from fastcorl.model.known import known_config
from fastcorl.model.loading import empty_policy, load_encoder, resolve
from fastcorl.parts import kl_weight, needs_reference
from fastcorl.plugins import load_object
from fastcorl.run_data import Source, check_pair_column, evaluation_needs, source_of
from fastcorl.runtime.engine import engine_name
from fastcorl.tasks import expand, uses

GPUS = (1, 2, 4, 8)
TRUNK_FILES = {"lpips_vgg": "vgg16-397923af.pth", "lpips_alex": "alexnet-owt-7be5be79.pth"}


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
        load_scorer(config.evaluation.scorer, "evaluation.scorer")
        self._print_stages()
        policy, encoder = self._model()
        for (source, columns), stages in self._readers().items():
            count = max(stage.prompts_per_step for stage in stages)
            used = uses(stages)
            needs = Needs(used.draws, used.answers)
            self._print_batch("data.train", source, dict(columns), needs, used.only_type, count, encoder)
        if config.data.held_out is not None:
            needs, kind = evaluation_needs(config), uses(self.stages.values()).only_type
            self._print_batch("data.held_out", config.data.held_out, config.data.columns, needs, kind, 8, encoder)
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

    def _readers(self) -> dict[Source, list[StageConfig]]:
        """The stages that read each source of training rows."""
        readers: dict[Source, list[StageConfig]] = {}
        for stage in self.stages.values():
            if stage.task != "merge":
                readers.setdefault(source_of(self.config, stage), []).append(stage)
        return readers

    def _print_batch(
        self,
        key: str,
        source: str,
        columns: dict[str, str],
        needs: Needs,
        question_type: str | None,
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
                question_type=question_type,
                **data.of_hub,
            )
            read = list(examine(islice(rows.numbered(), count), rows.schema, lengths))
        except UserError as error:
            if public_data(source) is None or Path(source).exists():
                raise
            self.missing.append(f"{error}")
            return
        if key == "data.train":
            check_pair_column(self.config, rows)
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
        if not uses(self.stages.values()).draws:
            return
        if "tuples" in rewards.caption_measures:
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
        if self.config.model.gradient_checkpointing == "auto":
            self.console.print(
                "activations: with nothing recomputed; auto recomputes blocks where that does not fit", style="dim"
            )
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
    if rewards.caption_measures and rewards.captioner not in ("policy", "quickstart"):
        found.append(Judge("rewards.captioner", rewards.captioner, hub))
    if rewards.image_measure in TRUNK_FILES:
        remedy = f"get https://download.pytorch.org/models/{TRUNK_FILES[rewards.image_measure]}"
        found.append(Judge("rewards.lpips_trunk", rewards.lpips_trunk, remedy))
    if "bertscore" in rewards.caption_measures:
        found.append(Judge("rewards.bert", rewards.bert, hub))
    if "sentence" in rewards.caption_measures:
        found.append(Judge("rewards.sentence_encoder", rewards.sentence_encoder, hub))
    if rewards.weight("clip"):
        found.append(Judge("rewards.clip", rewards.clip, hub))
    return found

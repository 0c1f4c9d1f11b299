"""A run: the stages of a configuration in order, each from the weights it names, with held-out scores in between."""

import gc
import json
import os
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging as transformers_logging

from fastcorl.algorithm import merge_state_dicts
from fastcorl.config import Config, StageConfig
from fastcorl.data import PromptData, load_rows, validate_rows
from fastcorl.errors import UserError
from fastcorl.evaluation import evaluate
from fastcorl.model import Policy, load_policy, save_policy
from fastcorl.plugins import load_object
from fastcorl.records import Prompt
from fastcorl.rewards import BlipCaptioner, RewardSuite
from fastcorl.runtime import distributed
from fastcorl.runtime.engine import engine_name
from fastcorl.runtime.report import draw_report, print_scores, score_table
from fastcorl.runtime.run_folder import Position, RunFolder, placed, write_text
from fastcorl.runtime.samples import save_samples
from fastcorl.runtime.telemetry import Telemetry
from fastcorl.trainer import TASKS, Trainer, rollout_engine, sampling_params, stage_prompts


def train(config: Config) -> None:
    """Run every stage of `config` and report at the end."""
    transformers_logging.disable_progress_bar()  # a bar per file would break the one line per step
    launched = "WORLD_SIZE" in os.environ
    engine = engine_name(config.deepspeed, launched=launched)
    ranks = distributed.start(threads=config.threads, process_group=engine == "deepspeed")
    try:
        Run(config, ranks, launched=launched).train()
    finally:
        distributed.stop()


class Run:
    """One run: its folder, data and telemetry. Everything a user can get wrong is checked before the first stage."""

    def __init__(self, config: Config, ranks: distributed.Distributed, *, launched: bool):
        self.config, self.ranks, self.launched = config, ranks, launched
        scorer = config.evaluation.scorer
        self.scorer = load_object(scorer, "evaluation.scorer")() if scorer else None
        self.start_policy = self._load("model")
        self.data = self._prompts(config.data.train, "data.train")
        self.held_out = self._prompts(config.data.held_out, "data.held_out")
        for name, stage in config.stages.items():
            if stage.task != "merge":
                stage_prompts(config, name, stage, self.data)[1].for_rank(1, ranks.rank, ranks.world_size)
        self.captioner = self._captioner()
        self._check_captions(RewardSuite(config.rewards, self.start_policy, rollout_engine(config, self.start_policy)))
        self.folder = RunFolder(config)
        self.checkpoint = self.folder.resume_from(config.resume)
        self._check_checkpoint()
        steps = {name: 0 if stage.task == "merge" else stage.steps for name, stage in config.stages.items()}
        self.telemetry = Telemetry(self.folder.path, config.logging, steps, ranks.is_main)
        self.scores: list[dict] = []

    def train(self) -> None:
        with self.telemetry:
            self._open_folder()
            if not self.scores:
                self._evaluate("start", self.start_policy)
            self.start_policy = None
            finished = self._finished_stages()
            for name, stage in self.config.stages.items():
                if name in finished:
                    if not any(entry["stage"] == name for entry in self.scores):
                        self._evaluate(name, self._load(name))
                    continue
                policy = self._merge(stage) if stage.task == "merge" else self._train_stage(name, stage)
                if self.ranks.is_main:
                    with placed(self.folder.export(name)) as folder:
                        save_policy(policy, folder)
                self._evaluate(name, policy)
                del policy
                gc.collect()
            if self.ranks.is_main:
                self._report()

    def _train_stage(self, name: str, stage: StageConfig) -> Policy:
        policy = self._load(stage.init)
        beta = self.config.algorithm.beta if stage.beta is None else stage.beta
        reference = self._load(stage.init).requires_grad_(False) if beta else None
        trainer = Trainer(
            self.config, name, stage, policy, reference, self.captioner, self.data, self.ranks, launched=self.launched
        )
        first = 1
        if self.checkpoint and self.checkpoint[1].stage == name:
            folder, position = self.checkpoint
            trainer.engine.load(folder)
            first = position.step + 1
            self.telemetry.note(f"{name}: resumed at step {first} from {folder}")
        for step in range(first, stage.steps + 1):
            record, rollout, scores = trainer.train_step(step)
            every = self.config.evaluation.every
            if every and step % every == 0 and step < stage.steps:
                record.scores = self._evaluate(f"{name} {step}", trainer.engine.full_policy())
            self.telemetry.write(record)
            self._save_samples(name, step, rollout, scores)
            if self.config.checkpoint.every and step % self.config.checkpoint.every == 0:
                self._save_checkpoint(trainer, step)
        trained = trainer.engine.full_policy()
        trainer.engine.close()
        return trained

    def _merge(self, stage: StageConfig) -> Policy:
        policy = self._load(stage.init)
        states = [policy.janus.state_dict(), *(self._load(source).janus.state_dict() for source in stage.merge)]
        policy.janus.load_state_dict(merge_state_dicts(*states))
        return policy

    def _evaluate(self, label: str, policy: Policy) -> dict[str, float]:
        """Held-out scores of both abilities, printed and kept in scores.json."""
        config = self.config
        params = sampling_params(config, guidance=config.evaluation.guidance)
        count = min(config.evaluation.num_prompts, len(self.held_out))
        prompts = [self.held_out[i] for i in range(count)]
        scores = evaluate(rollout_engine(config, policy), prompts, params, self.scorer, ranks=self.ranks)
        self.scores = [entry for entry in self.scores if entry["stage"] != label]
        self.scores.append({"stage": label, "scores": scores})
        if self.ranks.is_main:
            write_text(self.folder.path / "scores.json", json.dumps(self.scores, indent=1))
            shown = "  ".join(f"{name} {100 * value:.1f}" for name, value in scores.items())
            self.telemetry.note(f"held-out scores, {label}: {shown}  (%, {count} prompts)")
        self.ranks.barrier()
        return scores

    def _save_samples(self, name: str, step: int, rollout, scores) -> None:
        every = self.config.logging.samples_every
        if self.ranks.is_main and every and (step % every == 0 or step == 1):
            global_step = self.telemetry.global_step(name, step)
            stem = self.folder.path / "samples" / f"{global_step:05d}-{name}-{step}"
            stem.parent.mkdir(exist_ok=True)
            grid = save_samples(stem, rollout, scores, self.config.logging.num_samples)
            self.telemetry.image(f"samples/{name}", grid, global_step)

    def _save_checkpoint(self, trainer: Trainer, step: int) -> None:
        position = Position(
            stage=trainer.name,
            step=step,
            global_step=self.telemetry.global_step(trainer.name, step),
            **self._engine_facts(),
        )
        self.folder.save(
            position,
            trainer.engine.save,
            self.ranks.barrier,
            main=self.ranks.is_main,
            keep=self.config.checkpoint.keep,
        )

    def _report(self) -> None:
        folder = self.folder.path
        draw_report(folder)
        write_text(folder / "scores.md", score_table(self.scores))
        print_scores(self.scores, self.telemetry.console)
        self.telemetry.note(f"report {folder / 'report.png'}, samples {folder / 'samples'}, models {folder / 'export'}")

    def _load(self, source: str) -> Policy:
        """The policy of the configured model, or of a finished stage."""
        model = self.config.model
        path: str | Path = model.path if source == "model" else self.folder.export(source)
        return load_policy(
            path,
            dtype=getattr(torch, model.dtype),
            device=self.ranks.device,
            question_template=self.config.data.question_template,
            gradient_checkpointing=model.gradient_checkpointing,
        )

    def _engine_facts(self) -> dict[str, Any]:
        """What a checkpoint's optimizer state depends on."""
        return {
            "world_size": self.ranks.world_size,
            "engine": engine_name(self.config.deepspeed, launched=self.launched),
            "zero_stage": self.config.deepspeed.zero_stage,
        }

    def _check_checkpoint(self) -> None:
        if self.checkpoint is None:
            return
        folder, position = self.checkpoint
        if position.stage not in self.config.stages:
            raise UserError(f"resume: {folder} is of stage {position.stage!r}, which this configuration does not have")
        for name, here in self._engine_facts().items():
            there = getattr(position, name)
            if there != here:
                raise UserError(f"resume: {folder} was written with {name} {there}, this run has {name} {here}")

    def _finished_stages(self) -> list[str]:
        """The stages that a resumed run does not train again: those before the one it goes back to."""
        if self.config.resume is None:
            return []
        order = list(self.config.stages)
        if self.config.resume != "auto":
            return order[: order.index(self.checkpoint[1].stage)]
        exported = [self.folder.export(name).exists() for name in order]
        return order[: exported.index(False) if False in exported else len(order)]

    def _check_captions(self, rewards: RewardSuite) -> None:
        """A caption without scene-graph tuples could never be scored."""
        if self.captioner is None:
            return
        for index, caption in enumerate(self.data.rows.column("prompt")):
            if not rewards.parse(caption):
                raise UserError(
                    f"{self.data.rows.source}: row {index}: rewards.caption_tuples "
                    f"({self.config.rewards.caption_tuples}) finds nothing in the caption {caption[:60]!r}"
                )

    def _captioner(self) -> BlipCaptioner | None:
        if not any(TASKS[stage.task][0] for stage in self.config.stages.values() if stage.task != "merge"):
            return None
        try:
            return BlipCaptioner.from_pretrained(self.config.rewards.captioner, device=self.ranks.device)
        except ValueError as error:
            raise UserError(f"rewards.captioner: {error}") from error

    def _prompts(self, source: str, key: str) -> PromptData:
        config = self.config
        rows = load_rows(source, config.data.columns, key)
        validate_rows(rows)
        data = PromptData(rows)
        self._check_lengths(data)
        return data

    def _check_lengths(self, data: PromptData) -> None:
        """No prompt over the limit, no sequence over the model's context or a pack."""
        config, policy = self.config, self.start_policy
        longest = {"caption": 0, "question": 0}

        def count(prompt: Prompt) -> tuple[int, int]:
            draw_ids, ask_ids = policy.encoder.draw(prompt.caption), policy.encoder.ask(prompt.question)
            counts = len(draw_ids), len(ask_ids)
            placeholders = [*draw_ids, *ask_ids].count(policy.encoder.image_id)
            if placeholders != policy.processor.num_image_tokens:
                token = policy.processor.image_token
                raise UserError(f"{data.rows.source}: row {prompt.id}: caption or question contains {token!r}")
            longest.update({name: max(longest[name], n) for name, n in zip(longest, counts, strict=True)})
            return counts

        data.check_lengths(count, config.data.max_prompt_tokens)
        drawing = longest["caption"] + policy.num_image_tokens
        answer = longest["question"] + config.rollout.max_new_tokens
        context = policy.janus.config.text_config.max_position_embeddings
        if max(drawing, answer) > context:
            raise UserError(
                f"the longest prompts with {policy.num_image_tokens} image tokens or rollout.max_new_tokens "
                f"{config.rollout.max_new_tokens} make {max(drawing, answer)} tokens; the model's context is {context}"
            )
        guided = config.algorithm.policy_logits != "cond" and config.rollout.guidance != 1
        needed = max(2 * drawing if guided else drawing, answer)
        if needed > config.packing.tokens:
            raise UserError(f"packing.tokens {config.packing.tokens} must hold the longest sequence, {needed} tokens")

    def _open_folder(self) -> None:
        """Prepare the run's folder; when resuming, drop what was logged after the checkpoint."""
        resume = self.config.resume is not None
        if self.ranks.is_main:
            note = self.folder.prepare(self.config, resume=resume)
            if note:
                self.telemetry.note(note)
            if resume:
                self._go_back()
        self.ranks.barrier()
        scores = self.folder.path / "scores.json"
        if resume and scores.exists():
            self.scores = json.loads(scores.read_text())
        self.ranks.barrier()

    def _go_back(self) -> None:
        """Forget what was logged after the point the run continues from."""
        order, finished = list(self.config.stages), self._finished_stages()
        remaining = order[len(finished) :]
        stage, step = order[0], 0
        if finished:
            stage, step = finished[-1], self.config.stages[finished[-1]].steps
        if self.checkpoint and self.checkpoint[1].stage in remaining[:1]:
            position = self.checkpoint[1]
            stage, step = position.stage, position.step
            self.folder.abandon_after(position.global_step, remaining)
        self.telemetry.truncate_after(order, stage, step)

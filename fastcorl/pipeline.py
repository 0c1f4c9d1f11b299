"""A run: the stages of a configuration in order, each from the weights it names, with held-out scores in between."""

import gc
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import torch
from transformers.utils import logging as transformers_logging

from fastcorl.algorithm import merge_state_dicts
from fastcorl.config import Config, StageConfig
from fastcorl.errors import UserError
from fastcorl.evaluation import drawing_reward, evaluate, load_scorer
from fastcorl.first_checks import check_stages
from fastcorl.memory import recompute_as_needed
from fastcorl.model import Policy, load_policy, save_policy
from fastcorl.ordering import best_order, measure_transfer
from fastcorl.parts import (
    liger_choice,
    needs_reference,
    reward_suite,
    rollout_engine,
    sampling_params,
)
from fastcorl.records import StepRecord
from fastcorl.resuming import Resumption, engine_facts
from fastcorl.rewards import RewardModels
from fastcorl.rewards.users.worker import STARTUP_SECONDS
from fastcorl.run_data import RunData
from fastcorl.runtime import distributed
from fastcorl.runtime.card_parts import CARD
from fastcorl.runtime.checkpoints import Position, package_versions
from fastcorl.runtime.durable import placed, write_text
from fastcorl.runtime.engine import engine_name
from fastcorl.runtime.hardware import hardware_note
from fastcorl.runtime.hosts import check_alike, check_shared, checksum, settings_of
from fastcorl.runtime.model_card import stage_card
from fastcorl.runtime.report import draw_report, print_scores, read_run, score_table
from fastcorl.runtime.report_page import write_page
from fastcorl.runtime.run_folder import RunFolder
from fastcorl.runtime.samples import save_samples
from fastcorl.runtime.telemetry import Telemetry, read_records
from fastcorl.runtime.termination import EXIT_CODE, Interrupted, Termination
from fastcorl.tasks import expand, uses
from fastcorl.trainer import Trainer

BAD_ROWS = "bad_rows.jsonl"
MAX_SKIPS = 3  # updates in a row, under optimizer.on_nonfinite skip


def train(config: Config) -> None:
    """Run every stage of `config` and report at the end."""
    transformers_logging.disable_progress_bar()  # a bar per file would break the one line per step
    launched = "WORLD_SIZE" in os.environ
    engine = engine_name(config.deepspeed, launched=launched)
    ranks = distributed.start(threads=config.threads, process_group=engine == "deepspeed")
    Run(config, ranks, launched=launched).train()
    # Not after an error of this rank alone: over NCCL it waits for the others, which wait for this one in a collective.
    distributed.stop()


class Run:
    """One run: its folder, data and telemetry. Everything a user can get wrong is checked before the first stage."""

    def __init__(self, config: Config, ranks: distributed.Distributed, *, launched: bool):
        self.config, self.ranks, self.launched = config, ranks, launched
        self.termination = Termination(ranks)
        check_alike(dict(settings_of(config.dump())) | {"stages": list(config.stages)} | package_versions(), ranks)
        self.stages = expand(config)
        self.scorer = load_scorer(config.evaluation.scorer, "evaluation.scorer")
        check_stages(config, self.stages, ranks.world_size)
        self.start_policy = self._load("model")
        self.models = RewardModels(config.rewards, ranks.device, draws=uses(self.stages.values()).draws)
        self.data = RunData(config, self.stages, self.start_policy, self.models.caption_problem, ranks)
        if ranks.world_size > 1:  # one has nobody to differ from, and the sum takes time
            check_alike({"the sum of the model's weights": checksum(self.start_policy)} | self.data.sizes(), ranks)
        check_shared(Path(config.output_dir), ranks)
        self.folder = RunFolder(config)
        facts = engine_facts(config, ranks, launched=launched)
        self.resumption = Resumption(config, self.stages, self.folder, ranks, facts)
        steps = {name: 0 if stage.task == "merge" else stage.steps for name, stage in self.stages.items()}
        self.telemetry = Telemetry(self.folder.path, config.logging, steps, ranks.is_main)
        self.scores: list[dict] = []

    def train(self) -> None:
        try:
            with self.termination.handled(), self.telemetry:
                self._open_folder()
                self.telemetry.note(hardware_note(self.ranks.device, self.start_policy.dtype))
                if not self.scores:
                    self._evaluate("start", self.start_policy)
                self.start_policy = None
                self._run_stages()
                if self.ranks.is_main:
                    self._report()
        finally:
            self.models.close()
            self.folder.release()

    def _run_stages(self) -> None:
        for name in self.stages:
            self._choose_order(name)
            if name in self.resumption.finished:
                if not any(entry["stage"] == name for entry in self.scores):
                    self._evaluate(name, self._load(name))
                continue
            self.scores = [entry for entry in self.scores if entry["stage"] != name]  # no former training's
            self._keep_scores()
            stage = self.stages[name]
            policy = self._merge(stage) if stage.task == "merge" else self._train_stage(name, stage)
            if self.ranks.is_main:
                with placed(self.folder.export(name)) as folder:
                    save_policy(policy, folder)
                    self._write_card(name, folder)
            self._evaluate(name, policy)
            del policy
            gc.collect()

    def _trainer(self, name: str, stage: StageConfig) -> Trainer:
        policy, lora = self._load(stage.init), self.config.model.lora
        if lora.rank:
            torch.manual_seed(self.config.seed)  # peft draws one matrix of each adapter
            policy.add_adapters(rank=lora.rank, alpha=lora.alpha, targets=lora.targets)
        if self.config.model.gradient_checkpointing == "auto":
            told = recompute_as_needed(
                self.config, stage, policy, self.ranks, reference=needs_reference(self.config, stage)
            )
            self.telemetry.note(f"{name}: gradient_checkpointing auto: {told}")
        prompts = self.data.prompts(name, stage)
        return Trainer(self.config, name, stage, policy, self.models, prompts, self.ranks, launched=self.launched)

    def _train_stage(self, name: str, stage: StageConfig) -> Policy:
        trainer = self._trainer(name, stage)
        done = 0
        checkpoint = self.resumption.checkpoint
        if checkpoint and checkpoint.position.stage == name:
            trainer.engine.load(checkpoint.folder)
            done = checkpoint.position.step
            self.telemetry.note(f"{name}: resumed at step {done + 1} from {checkpoint.folder}")
        with self.termination.deferred():
            if done and self._is_probed(done) and done < stage.steps:
                self._make_up_scores(trainer)
            self._train_steps(trainer, done + 1)
        trained = trainer.engine.full_policy()
        trainer.close()
        return trained

    def _train_steps(self, trainer: Trainer, first: int) -> None:
        name, stage = trainer.name, trainer.stage
        # A user's reward may keep a rank for its deadline and the start of the process that takes its place, each round
        # of sampling anew. The first step, in which ranks compile, has no limit of its own.
        least = distributed.SHORT_WAIT
        if self.config.rewards.extra or self.config.rewards.pairwise:
            rounds = 1 + self.config.algorithm.dynamic_sampling
            least += rounds * (self.config.rewards.timeout + STARTUP_SECONDS)
        wait = None
        for step in range(first, stage.steps + 1):
            cosine = self._is_probed(step) and self.config.evaluation.gradient_cosine
            try:
                with self.ranks.waiting(wait):
                    record, rollout, scores = trainer.train_step(step, probe=cosine, stop=self.termination.asked)
            except Interrupted:
                self._leave(trainer, step - 1)
            wait = max(wait or least, record.step_seconds)
            self.telemetry.write(record)
            for reward, failure in scores.failures.items():
                self.telemetry.note(f"{name} step {step}: reward {reward} failed, its rows are not scored: {failure}")
            try:
                self._check_applied(trainer, record)
            except UserError:
                # Weights are still those of the last good step, unless an earlier update of this one has changed them.
                good = step - trainer.refused
                if good and self.config.checkpoint.every and self.config.algorithm.num_iterations == 1:
                    self._save_checkpoint(trainer, good)
                raise
            self._save_samples(name, step, rollout, scores)
            if self.config.checkpoint.every and step % self.config.checkpoint.every == 0:
                self._save_checkpoint(trainer, step)
            if self.termination.asked():
                self._leave(trainer, step)
            # After the checkpoint, lest a failure of it costs these steps. The last step's scores are the stage's.
            if self._is_probed(step) and step < stage.steps:
                self._add_scores(trainer, record)

    def _is_probed(self, step: int) -> bool:
        every = self.config.evaluation.every
        return bool(every) and step % every == 0

    def _add_scores(self, trainer: Trainer, record: StepRecord) -> None:
        record.scores = self._evaluate(f"{record.stage} {record.step}", trainer.engine.full_policy())
        self.telemetry.add_scores(record)

    def _make_up_scores(self, trainer: Trainer) -> None:
        """Those of the step that the run goes on from, where it was ended before they were kept."""
        last = self.ranks.from_main(lambda: next(reversed(read_records(self.folder.path)), None))
        if last and last.stage == trainer.name and not last.scores:
            self._add_scores(trainer, last)

    def _check_applied(self, trainer: Trainer, record: StepRecord) -> None:
        """Tell of an update that was not made, and end the run where it is one too many."""
        if not trainer.refused:
            return
        several = self.config.algorithm.num_iterations > 1
        left = "an update was not applied" if several else "not applied, weights are as before"
        told = (
            f"{record.stage} step {record.step}: {left}: the loss is "
            f"{record.metrics['loss']:g}, the gradient norm {record.metrics['grad_norm']:g}"
        )
        if self.config.optimizer.on_nonfinite == "stop":
            raise UserError(f"{told} (optimizer.on_nonfinite skip goes on without up to {MAX_SKIPS} steps in a row)")
        if trainer.refused > MAX_SKIPS:
            raise UserError(f"{told}, for the {trainer.refused}th time in a row")
        self.telemetry.note(f"{told}, {trainer.refused} of at most {MAX_SKIPS} times in a row")

    def _leave(self, trainer: Trainer, step: int) -> NoReturn:
        """End early, told so by SIGTERM, with a checkpoint of the last step that is done."""
        if step and self.config.checkpoint.every:
            self._save_checkpoint(trainer, step)
        self.telemetry.note(f"{trainer.name}: SIGTERM ends the run after step {step}; --resume auto continues it")
        raise SystemExit(EXIT_CODE)

    def _choose_order(self, name: str) -> None:
        """Before the first part of an ordered stage: measure which order forgets least, or read what was measured."""
        for ordered, stage in self.config.stages.items():
            parts = [f"{ordered}_{number}" for number in range(1, len(stage.order) + 1)]
            if not stage.probe_steps or name not in parts:
                continue
            file = self.folder.path / f"order-{ordered}.json"
            if not file.exists():
                order, transfer = self._measure_order(self.stages[parts[0]], stage)
                self.ranks.barrier()
                if self.ranks.is_main:
                    write_text(file, json.dumps({"order": order, "transfer": transfer}, indent=1))
                self.ranks.barrier()
            order = json.loads(file.read_text())["order"]
            if name == parts[0]:
                self.telemetry.note(f"{ordered}: order of least forgetting: {', '.join(order)} ({file})")
            for part, task in zip(parts, order, strict=True):
                self.stages[part] = self.stages[part].model_copy(update={"task": task})

    def _measure_order(self, part: StageConfig, stage: StageConfig) -> tuple[list[str], dict]:
        """A short training of each task from the same start."""

        def burst(task: str) -> dict[str, float]:
            change = {"task": task, "steps": stage.probe_steps}
            trainer = self._trainer(f"probe_{task}", part.model_copy(update=change))
            for step in range(1, stage.probe_steps + 1):
                self._check_applied(trainer, trainer.train_step(step)[0])
            scores = self._task_scores(trainer.engine.full_policy(), stage.order)
            trainer.close()
            del trainer
            gc.collect()  # engine and policy refer to one another
            return scores

        transfer = measure_transfer(stage.order, self._task_scores(self._load(part.init), stage.order), burst)
        return best_order(stage.order, transfer), transfer

    def _task_scores(self, policy: Policy, tasks: list[str]) -> dict[str, float]:
        """Held-out score of every task: accuracy of answers, mean reward of drawings."""
        config = self.config
        engine = rollout_engine(config, policy)
        params = sampling_params(config, guidance=config.evaluation.guidance)
        prompts = self.data.held_out_prompts()
        scores = evaluate(engine, prompts, params, None, ranks=self.ranks)
        found = {"mm2t": scores.get("accuracy"), "mc": scores.get("mc"), "oe": scores.get("oe")}
        if "t2i" in tasks:
            suite = reward_suite(config, self.models, policy, engine, engine)
            found["t2i"] = drawing_reward(engine, prompts, params, suite, ranks=self.ranks)
        missing = [task for task in tasks if found[task] is None]
        if missing:
            raise UserError(f"probe_steps: the held-out rows tell nothing of task {missing[0]}; give rows that do")
        return {task: found[task] for task in tasks}

    def _merge(self, stage: StageConfig) -> Policy:
        policy = self._load(stage.init)
        states = [policy.janus.state_dict(), *(self._load(source).janus.state_dict() for source in stage.merge)]
        merged = merge_state_dicts(*states, method=stage.method, density=stage.density)
        policy.janus.load_state_dict(merged)
        return policy

    def _evaluate(self, label: str, policy: Policy) -> dict[str, float]:
        """Held-out scores of both abilities, printed and kept in scores.json."""
        config = self.config
        params = sampling_params(config, guidance=config.evaluation.guidance)
        prompts = self.data.held_out_prompts()
        scores = evaluate(rollout_engine(config, policy), prompts, params, self.scorer, ranks=self.ranks)
        self.scores = [*(entry for entry in self.scores if entry["stage"] != label), {"stage": label, "scores": scores}]
        export = self.folder.export(label)
        with self.telemetry.unless_full("scores"):
            if self.ranks.is_main and export.exists():
                # First, as a resumed run evaluates a stage again only if it is not in scores.json.
                self._write_card(label, export, self.scores, len(prompts))
            self._keep_scores()
        if self.ranks.is_main:
            shown = "  ".join(f"{name} {100 * value:.1f}" for name, value in scores.items())
            self.telemetry.note(f"held-out scores, {label}: {shown}  (%, {len(prompts)} prompts)")
        self.ranks.barrier()
        return scores

    def _keep_scores(self) -> None:
        if self.ranks.is_main:
            write_text(self.folder.path / "scores.json", json.dumps(self.scores, indent=1))

    def _write_card(self, name: str, folder: Path, scores: Sequence[dict] = (), prompts: int = 0) -> None:
        write_text(folder / CARD, stage_card(self.config, self.stages, name, scores, prompts))

    def _save_samples(self, name: str, step: int, rollout, scores) -> None:
        every = self.config.logging.samples_every
        if self.ranks.is_main and every and (step % every == 0 or step == 1):
            global_step = self.telemetry.global_step(name, step)
            stem = self.folder.path / "samples" / f"{global_step:05d}-{name}-{step}"
            with self.telemetry.unless_full("samples"):
                stem.parent.mkdir(exist_ok=True)
                grid = save_samples(stem, rollout, scores, self.config.logging.num_samples)
                self.telemetry.image(f"samples/{name}", grid, global_step)

    def _save_checkpoint(self, trainer: Trainer, step: int) -> None:
        position = Position(
            stage=trainer.name,
            step=step,
            global_step=self.telemetry.global_step(trainer.name, step),
            **self.resumption.facts,
        )
        problem = self.folder.checkpoints.save(
            position,
            trainer.engine.save,
            self.ranks.gather,
            main=self.ranks.is_main,
            keep=None if trainer.refused else self.config.checkpoint.keep,
        )
        if problem:
            told = f"{trainer.name} step {step}: no checkpoint was written, older ones are as they were: {problem}"
            if self.config.checkpoint.on_failure == "stop":
                raise UserError(told)
            self.telemetry.note(told)

    def _report(self) -> None:
        folder = self.folder.path
        draw_report(folder)
        write_text(folder / "scores.md", score_table(self.scores))
        print_scores(self.scores, self.telemetry.console)
        page = write_page([read_run(folder)], folder / "report.html")
        self.telemetry.note(f"report {page}, samples {folder / 'samples'}, models {folder / 'export'}")

    def _load(self, source: str) -> Policy:
        """The policy of the configured model, or of a finished stage."""
        model = self.config.model
        path: str | Path = model.path if source == "model" else source
        if source in self.stages:
            path = self.folder.export(source)
        return load_policy(
            path,
            dtype=getattr(torch, model.dtype),
            device=self.ranks.device,
            templates=self.config.data.templates,
            gradient_checkpointing=False if model.gradient_checkpointing == "auto" else model.gradient_checkpointing,
            liger=liger_choice(self.config),
            compile=model.compile,
            attention=model.attention,
        )

    def _open_folder(self) -> None:
        """Prepare the run's folder; when resuming, drop what was logged after the checkpoint."""
        resume = self.config.resume is not None
        note = self.ranks.from_main(lambda: self.folder.prepare(self.config, resume=resume))
        if note:
            self.telemetry.note(note)
        if self.ranks.is_main and resume:
            self.resumption.go_back(self.telemetry)
        self.ranks.barrier()
        if self.ranks.is_main:
            self.data.write_bad_rows(self.folder.path / BAD_ROWS)
        self.ranks.barrier()
        if not self.ranks.is_main:  # what all ranks know is listed by now; this is for what each meets on its own
            self.data.write_bad_rows(self.folder.path / BAD_ROWS)
        for line in [*self.resumption.notes(), *self.data.notes()]:
            self.telemetry.note(line)
        scores = self.folder.path / "scores.json"
        if resume and scores.exists():
            self.scores = json.loads(scores.read_text())
        problem = self.ranks.gather(self.telemetry.start_trackers(self.config.dump()))[0]
        if problem:
            raise UserError(problem)

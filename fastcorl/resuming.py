"""Where a run goes on, under `resume`: from which checkpoint, after which finished stages, and what it forgets."""

from dataclasses import replace
from typing import Any

from fastcorl.config import Config, StageConfig
from fastcorl.errors import UserError
from fastcorl.runtime.checkpoints import Found
from fastcorl.runtime.distributed import Distributed
from fastcorl.runtime.engine import engine_name
from fastcorl.runtime.run_folder import RunFolder
from fastcorl.runtime.telemetry import Telemetry, read_records


def engine_facts(config: Config, ranks: Distributed, *, launched: bool) -> dict[str, Any]:
    """What a checkpoint's optimizer state depends on."""
    lora = config.model.lora
    adapters = f"rank {lora.rank} alpha {lora.alpha:g} on {' '.join(sorted(lora.targets))}" if lora.rank else "none"
    return {
        "world_size": ranks.world_size,
        "engine": engine_name(config.deepspeed, launched=launched),
        "zero_stage": config.deepspeed.zero_stage,
        "lora": adapters,
    }


class Resumption:
    """`checkpoint` is what the run goes on from, if anything; `finished` are the stages that it does not train again,
    `facts` its own `engine_facts`. The first rank reads the folder, for all; raises UserError on every rank."""

    def __init__(
        self,
        config: Config,
        stages: dict[str, StageConfig],
        folder: RunFolder,
        ranks: Distributed,
        facts: dict[str, Any],
    ):
        self.resume, self.stages, self.folder, self.facts = config.resume, stages, folder, facts
        self.checkpoint, self._bad, self.finished = ranks.from_main(self._find)
        if self.checkpoint and self.resume == "auto":  # the folder may have another name on each host
            here = folder.checkpoints.folder / self.checkpoint.folder.name
            self.checkpoint = replace(self.checkpoint, folder=here)

    def go_back(self, telemetry: Telemetry) -> None:
        """Forget what was logged, saved and exported after the point the run continues from. For the first rank."""
        order = list(self.stages)
        stage, step = order[0], 0
        if self.finished:
            stage, step = self.finished[-1], self.stages[self.finished[-1]].steps
        if self.checkpoint:
            stage, step = self.checkpoint.position.stage, self.checkpoint.position.step
        self.folder.abandon_after(telemetry.global_step(stage, step), order[len(self.finished) :])
        telemetry.truncate_after(order, stage, step)

    def notes(self) -> list[str]:
        """What to tell of it: bad checkpoints, another configuration, stages that stay shorter than they should be."""
        lines = [*self._bad]
        checkpoints = self.folder.checkpoints
        if self.checkpoint and self.checkpoint.config_hash != checkpoints.config_hash:
            lines.append(f"the configuration is not the one that {self.checkpoint.folder} was written under")
        done = {record.stage: record.step for record in read_records(self.folder.path)}
        for name in self.finished:
            if done.get(name, self.stages[name].steps) < self.stages[name].steps:
                lines.append(
                    f"{name}: is finished after {done[name]} steps and is not trained on to {self.stages[name].steps}; "
                    f"--resume {checkpoints.folder}/step-N goes back to a checkpoint and on from there"
                )
        return lines

    def _find(self) -> tuple[Found | None, list[str], list[str]]:
        """The checkpoint, a line on each bad one, and the finished stages: those before the one that it is of."""
        checkpoint, lines = self.folder.checkpoints.find(self.resume)
        order = list(self.stages)
        if checkpoint and checkpoint.position.stage not in order:
            folder, stage = checkpoint.folder, checkpoint.position.stage
            raise UserError(f"resume: {folder} is of stage {stage!r}, which this configuration does not have")
        if self.resume is None:
            return None, [], []
        if self.resume != "auto":
            self._check_fits(checkpoint)
            return checkpoint, lines, order[: order.index(checkpoint.position.stage)]
        exported = [self.folder.export(name).exists() for name in order]
        finished = order[: exported.index(False) if False in exported else len(order)]
        if checkpoint and checkpoint.position.stage in order[len(finished) :][:1]:
            self._check_fits(checkpoint)
            return checkpoint, lines, finished
        return None, lines, finished  # the run goes on from the last export

    def _check_fits(self, checkpoint: Found) -> None:
        folder, position = checkpoint.folder, checkpoint.position
        others = {name: getattr(position, name) for name, here in self.facts.items() if getattr(position, name) != here}
        if others:
            there = ", ".join(f"{name} {value}" for name, value in others.items())
            here = ", ".join(f"{name} {self.facts[name]}" for name in others)
            init = self.stages[position.stage].init
            start = self.folder.export(init) if init in self.stages else init
            raise UserError(
                f"resume: {folder} was written with {there}, this run has {here}: resume with what it was written "
                f"with, or begin stage {position.stage} anew in a run of another name, with "
                f"stages.{position.stage}.init {start}"
            )

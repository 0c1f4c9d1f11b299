"""Where a run goes on, under `resume`: from which checkpoint, after which finished stages, and what it forgets."""

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
    """`checkpoint` is what the run goes on from, if anything; `facts` are its own `engine_facts`. The first rank reads
    checkpoints, for all; raises UserError on every rank."""

    def __init__(
        self,
        config: Config,
        stages: dict[str, StageConfig],
        folder: RunFolder,
        ranks: Distributed,
        facts: dict[str, Any],
    ):
        self.resume, self.stages, self.folder, self.facts = config.resume, stages, folder, facts
        found: tuple[Found | None, list[str]] | UserError = (None, [])
        if ranks.is_main:
            try:
                found = folder.checkpoints.find(self.resume)
                if found[0]:
                    self._check_fits(found[0])
            except UserError as error:
                found = error
        found = ranks.gather(found)[0]
        if isinstance(found, UserError):
            raise found
        self.checkpoint, self._bad = found

    def finished_stages(self) -> list[str]:
        """The stages that the run does not train again: those before the one it goes back to."""
        if self.resume is None:
            return []
        order = list(self.stages)
        if self.resume != "auto":
            return order[: order.index(self.checkpoint.position.stage)]
        exported = [self.folder.export(name).exists() for name in order]
        return order[: exported.index(False) if False in exported else len(order)]

    def go_back(self, telemetry: Telemetry) -> None:
        """Forget what was logged after the point the run continues from. For the first rank."""
        order, finished = list(self.stages), self.finished_stages()
        remaining = order[len(finished) :]
        stage, step = order[0], 0
        if finished:
            stage, step = finished[-1], self.stages[finished[-1]].steps
        if self.checkpoint and self.checkpoint.position.stage in remaining[:1]:
            position = self.checkpoint.position
            stage, step = position.stage, position.step
            self.folder.abandon_after(position.global_step, remaining)
        telemetry.truncate_after(order, stage, step)

    def notes(self) -> list[str]:
        """What to tell of it: bad checkpoints, another configuration, stages that stay shorter than they should be."""
        lines = [*self._bad]
        checkpoints = self.folder.checkpoints
        if self.checkpoint and self.checkpoint.config_hash != checkpoints.config_hash:
            lines.append(f"the configuration is not the one that {self.checkpoint.folder} was written under")
        done = {record.stage: record.step for record in read_records(self.folder.path)}
        for name in self.finished_stages():
            if done.get(name, self.stages[name].steps) < self.stages[name].steps:
                lines.append(
                    f"{name}: is finished after {done[name]} steps and is not trained on to {self.stages[name].steps}; "
                    f"--resume {checkpoints.folder}/step-N goes back to a checkpoint and on from there"
                )
        return lines

    def _check_fits(self, checkpoint: Found) -> None:
        folder, position = checkpoint.folder, checkpoint.position
        if position.stage not in self.stages:
            raise UserError(f"resume: {folder} is of stage {position.stage!r}, which this configuration does not have")
        if self.resume == "auto" and position.stage in self.finished_stages():
            return  # the run goes on from that stage's export
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

"""What stages train. Imports no torch."""

from collections.abc import Iterable
from typing import NamedTuple

from fastcorl.config import Config, StageConfig
from fastcorl.errors import UserError


class Task(NamedTuple):
    """What a step samples: drawings, answers, and answers to which question types."""

    draws: bool
    answers: bool
    question_types: tuple[str, ...]

    @property
    def only_type(self) -> str | None:
        """The type of all questions, where it is one."""
        return self.question_types[0] if len(self.question_types) == 1 else None


TASKS = {
    "unified": Task(True, True, ("MC", "OE")),
    "alternate": Task(True, True, ("MC", "OE")),
    "t2i": Task(True, False, ("MC", "OE")),
    "mm2t": Task(False, True, ("MC", "OE")),
    "mc": Task(False, True, ("MC",)),
    "oe": Task(False, True, ("OE",)),
}


def expand(config: Config) -> dict[str, StageConfig]:
    """The stages in the order they run. An ordered stage NAME becomes NAME_1, NAME_2, .., each from the one before, and
    who starts from NAME or merges it takes the last of them."""
    last: dict[str, str] = {}

    def source(name: str) -> str:
        return last.get(name, name)

    stages: dict[str, StageConfig] = {}
    for name, stage in config.stages.items():
        change = {"init": source(stage.init), "merge": [source(other) for other in stage.merge]}
        if stage.task != "ordered":
            stages[name] = stage.model_copy(update=change)
            continue
        for number, task in enumerate(stage.order, start=1):
            part = f"{name}_{number}"
            if part in config.stages:
                raise UserError(f"stages.{name}: its part {part} has the name of another stage")
            init = change["init"] if number == 1 else f"{name}_{number - 1}"
            stages[part] = stage.model_copy(update={"task": task, "init": init, "order": [], "probe_steps": 0})
        last[name] = f"{name}_{len(stage.order)}"
    return stages


def uses(stages: Iterable[StageConfig]) -> Task:
    """What any of the stages samples; of questions only the types that are asked for."""
    tasks = [TASKS[stage.task] for stage in stages if stage.task != "merge"]
    asked = {kind for task in tasks if task.answers for kind in task.question_types}
    return Task(any(task.draws for task in tasks), any(task.answers for task in tasks), tuple(sorted(asked)))


def check_world(stage: str, prompts_per_step: int, world: int) -> None:
    """Raise UserError where ranks cannot share a step's prompts evenly."""
    if prompts_per_step % world:
        raise UserError(f"{setting(stage)} {prompts_per_step} does not divide by {world} ranks; give a multiple of it")


def setting(stage: str) -> str:
    """The key of a stage's prompts per step."""
    return f"stages.{stage}.prompts_per_step" if stage else "prompts_per_step"

"""What is told of a configuration before torch is imported: stages that cannot start or would learn nothing, and
files, folders and modules that are not there."""

import glob
import os
import tempfile
from pathlib import Path

from fastcorl.config import Config, StageConfig
from fastcorl.config_rewards import ANSWER_REWARDS, DRAWING_REWARDS, RewardsConfig
from fastcorl.errors import UserError
from fastcorl.places import QUICKSTART, check_janus, hub_data, model_folder
from fastcorl.plugins import check_module, check_package, is_spec
from fastcorl.runtime.checkpoints import MANIFEST
from fastcorl.tasks import TASKS, check_world, expand, uses

TRACKERS = ("tensorboard", "wandb", "trackio")


def check_first(config: Config) -> None:
    """Raise UserError for what a run of `config` would stumble over."""
    stages = expand(config)
    check_stages(config, stages, int(os.environ.get("WORLD_SIZE", 1)))
    _check_output(config)
    _check_resume(config.resume)
    check_janus(config.model.path, "model.path")
    for name, stage in stages.items():
        for source in (stage.init, *stage.merge):
            if source not in stages and source != "model":
                check_janus(source, f"stages.{name}")
    for key, source in _data_sources(config, stages).items():
        check_data(source, key)
    _check_rewards(config.rewards, draws=uses(stages.values()).draws)
    if config.evaluation.scorer:
        check_module(config.evaluation.scorer, "evaluation.scorer")
    for name in TRACKERS:
        if getattr(config.logging, name):
            check_package(name, f"logging.{name}", f"--logging.{name} false does without")


def check_stages(config: Config, stages: dict[str, StageConfig], world_size: int) -> None:
    """Raise UserError for a stage that could not start or could learn nothing."""
    model = config.model
    if model.compile and config.deepspeed.zero_stage == 3:
        raise UserError(
            "model.compile: is not there under ZeRO 3, which gathers weights inside of the blocks; "
            "set model.compile to false, or deepspeed.zero_stage to 2"
        )
    if config.evaluation.gradient_cosine and (model.compile or model.liger == "on"):
        raise UserError(
            "evaluation.gradient_cosine: goes backward twice, which neither model.compile nor model.liger on can; "
            "set it to false, or those to false and off"
        )
    budget = config.algorithm.token_budget
    if budget is not None and budget < world_size:
        raise UserError(f"algorithm.token_budget {budget}: must be at least 1 for each of the {world_size} ranks")
    rewards = config.rewards
    own = any(rewards.extra.values()) or any(rewards.pairwise.values())
    for name, stage in stages.items():
        for source in (stage.init, *stage.merge):
            if source not in stages and source != "model" and not Path(source).is_dir():
                raise UserError(
                    f"stages.{name}: there is no model folder {source!r}; give a folder, or an earlier stage"
                )
        if stage.task == "merge":
            continue
        check_world(name, stage.prompts_per_step, world_size)
        task = TASKS[stage.task]
        names = [*(DRAWING_REWARDS if task.draws else ()), *(ANSWER_REWARDS if task.answers else ())]
        if not own and not any(rewards.weight(reward) for reward in names):
            raise UserError(
                f"rewards.weights: stage {name} has no reward with a weight; give one of {', '.join(names)} a weight"
            )


def _check_output(config: Config) -> None:
    folder = Path(config.output_dir) / config.name
    there = next(place for place in (folder, *folder.parents) if os.path.exists(place))
    if not there.is_dir():
        raise UserError(f"output_dir: {there} is a file; give a folder, or another name")
    try:
        with tempfile.TemporaryDirectory(dir=there, prefix="tmp-"):
            pass
    except OSError as error:
        raise UserError(f"output_dir: {there} cannot be written to ({error.strerror}); give another folder") from None


def _check_resume(resume: str | None) -> None:
    if resume in (None, "auto") or (Path(resume) / MANIFEST).is_file():
        return
    problem = f"has no {MANIFEST}" if Path(resume).is_dir() else "is no folder"
    raise UserError(f"resume: {resume!r} {problem}; give a run's checkpoints/step-N, or auto for the newest")


def _data_sources(config: Config, stages: dict[str, StageConfig]) -> dict[str, str]:
    """What rows are read from, by the key that names it."""
    trained = {name: stage for name, stage in stages.items() if stage.task != "merge"}
    sources = {f"stages.{name}.data": stage.data for name, stage in trained.items() if stage.data is not None}
    if len(sources) < len(trained):
        sources["data.train"] = config.data.train
    if config.data.held_out is not None:
        sources["data.held_out"] = config.data.held_out
    return sources


def check_data(source: str, key: str) -> None:
    """Raise UserError where the data set `source` is surely not there."""
    if os.path.exists(source) or os.path.isdir(source.partition(":")[0]) or glob.has_magic(source):
        return
    if is_spec(source):
        check_module(source, key)
    else:
        hub_data(source, f"{key} {source}")


def _check_rewards(rewards: RewardsConfig, *, draws: bool) -> None:
    for name in rewards.extra:
        check_module(name, "rewards.extra")
    for name in rewards.pairwise:
        check_module(name, "rewards.pairwise")
    if not draws:
        return
    captions = rewards.caption_measures
    if "tuples" in captions:
        check_module(rewards.caption_tuples, "rewards.caption_tuples")
    if captions and rewards.captioner not in ("policy", QUICKSTART):
        model_folder(rewards.captioner, "rewards.captioner")
    for used, key in (
        ("bertscore" in captions, "bert"),
        ("sentence" in captions, "sentence_encoder"),
        (rewards.weight("clip") > 0, "clip"),
    ):
        if used:
            model_folder(getattr(rewards, key), f"rewards.{key}")
    for key in ("lpips_trunk", "lpips_heads"):
        file = getattr(rewards, key)
        if (rewards.image_measure or "").startswith("lpips") and file and not Path(file).expanduser().is_file():
            raise UserError(f"rewards.{key}: {file} is not a file; give the weights, .pth or .safetensors")

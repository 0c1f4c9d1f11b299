"""The model card of an export: how a stage was trained, and what it scored; of merged and converted models as well."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from fastcorl import __version__
from fastcorl.config import Config, StageConfig
from fastcorl.config_rewards import ANSWER_REWARDS, DRAWING_REWARDS
from fastcorl.runtime.card_parts import (
    CARD,
    PAPER,
    TAGS,
    Origin,
    about,
    card_text,
    is_hub_name,
    joined,
    linked,
    origin_of,
    public_name,
    published,
    read_front_matter,
    use,
)
from fastcorl.runtime.report import NONE, score_table
from fastcorl.tasks import TASKS

START = "start"  # what the scores of the model that a run starts from are called
WHERE = ("output_dir", "resume")  # not what a run is, but where
MODEL = (
    "A unified multimodal model of the architecture of Janus: one language backbone answers questions about pictures "
    "and draws pictures of captions, token by token."
)
TRAINED_ON = {
    "unified": "drawings and answers in pairs, a pair having one reward and one advantage",
    "alternate": "drawings and answers in turn, a step each",
    "t2i": "drawings",
    "mm2t": "answers to questions about pictures",
    "mc": "answers to multiple-choice questions about pictures",
    "oe": "answers to open-ended questions about pictures",
}


def stage_card(
    config: Config,
    stages: Mapping[str, StageConfig],
    name: str,
    scores: Sequence[Mapping[str, Any]] = (),
    prompts: int = 0,
) -> str:
    """The card of stage `name` of a run.

    Args:
        stages: all of the run's, as they are run.
        scores: held-out scores as in scores.json. Those of the start, of `name` and of the stages it comes from are
            shown, if `name` has any.
        prompts: how many held-out prompts they are means over.
    """
    stage, line = stages[name], _lineage(stages, name)
    trained = [each for each in line if stages[each].task != "merge"]
    sources = {source for each in line for source in _sources(stages[each]) if source not in stages}
    origin = joined(origin_of(config.model.path if source == "model" else source) for source in sorted(sources))
    data_sets = [source.partition(":")[0] for each in trained if is_hub_name(source := _data(config, stages[each]))]
    origin = joined([origin, Origin(data_sets=tuple(data_sets))])
    if stage.task == "merge":
        made = f"Stage `{name}` of the run `{config.name}`, merged from models trained with {PAPER}"
    else:
        made = f"Stage `{name}` of the run `{config.name}`, trained with {PAPER}: GRPO on {TRAINED_ON[stage.task]}"
    return card_text(
        origin,
        TAGS,
        f"# {config.name}: {name}",
        f"{MODEL} {made}, by fastcorl {__version__}.",
        _history(config, stages, line),
        _settings(config, stage) if trained else "",
        _held_out(config, name, line, scores, prompts),
        use(
            guidance=_guidance(config),
            tokens=config.rollout.max_new_tokens,
            question=_question(config, stage),
        ),
        _configuration(config),
        about(),
    )


def merge_card(base: str, models: Sequence[str], out: Path, method: str, density: float | None) -> str:
    """The card of what `fastcorl merge` writes to `out`."""
    origin = joined(origin_of(source) for source in (base, *models))
    kept = "" if density is None else f", of which a fraction of {density:g} is kept"
    rows = [f"- around {linked(base)}", *(f"- {linked(source)}" for source in models)]
    return card_text(
        origin,
        (*TAGS, "merge"),
        f"# {public_name(str(out.absolute()))}",
        f"{MODEL} Merged by fastcorl {__version__}, method {method}, from what training changed{kept}:",
        "\n".join(rows),
        "No held-out scores were taken of it. Their own cards say how the models were trained.",
        use(),
        about(),
    )


def conversion_card(source: str, folder: Path, dtype: str) -> str:
    """The card of what `fastcorl export` makes of the model `source`, whose files are in `folder`: the model's own with
    a section more, if fastcorl wrote that, else a short one. Nobody else's card is passed on, as it may say how to load
    files that are no longer there."""
    done = f"`fastcorl export` (fastcorl {__version__}) wrote these files from {linked(source)}, weights in {dtype}."
    if read_front_matter(folder):
        return f"{(folder / CARD).read_text(encoding='utf-8').rstrip()}\n\n## Conversion\n\n{done}\n"
    title = f"# {public_name(source)}"
    return card_text(origin_of(source), ("fastcorl", "janus"), title, f"{MODEL} {done}", use(), about())


def _lineage(stages: Mapping[str, StageConfig], name: str) -> list[str]:
    """The stages that `name` comes from, in their order, and itself."""
    wanted = {name}
    for each in reversed(list(stages)):
        if each in wanted:
            wanted.update(_sources(stages[each]))
    return [each for each in stages if each in wanted]


def _sources(stage: StageConfig) -> list[str]:
    return [stage.init, *stage.merge]


def _data(config: Config, stage: StageConfig) -> str:
    return stage.data or config.data.train


def _history(config: Config, stages: Mapping[str, StageConfig], line: Sequence[str]) -> str:
    """A row per stage, and the rewards of each."""

    def source(text: str) -> str:
        return f"stage `{text}`" if text in stages else linked(config.model.path if text == "model" else text)

    header = ["stage", "task", "starts from", "steps", "prompts x samples", "learning rate", "beta (KL)", "data"]
    rows, rewards, draws = [], [], False
    for name in line:
        stage = stages[name]
        task = stage.task
        if task == "merge":
            task = f"{stage.method} merge of {' and '.join(map(source, stage.merge))}"
            rows.append([f"`{name}`", task, source(stage.init), *[NONE] * 5])
            continue
        group = stage.group_size or config.algorithm.group_size
        rate = stage.learning_rate or config.optimizer.learning_rate
        beta = config.algorithm.beta if stage.beta is None else stage.beta
        numbers = [f"{stage.steps:,}", f"{stage.prompts_per_step} x {group}", f"{rate:g}", f"{beta:g}"]
        rows.append([f"`{name}`", task, source(stage.init), *numbers, f"`{public_name(_data(config, stage))}`"])
        rewards.append(f"- `{name}`: {_rewards(config, stage)}")
        draws = draws or TASKS[task].draws
    lines = [" | ".join(row) for row in (header, ["---"] * len(header), *rows)]
    table = "\n".join(f"| {text} |" for text in lines)
    told = ["## How it was made", table]
    if rewards:
        told += ["Rewards and their weights:", "\n".join(rewards), *(_parts(config) if draws else [])]
    return "\n\n".join(told)


def _rewards(config: Config, stage: StageConfig) -> str:
    rewards, task = config.rewards, TASKS[stage.task]
    # In pairs, that is; a rollout of one kind is scored without the factor.
    factor = rewards.answer_weight if stage.task == "unified" else 1.0
    weights = {name: rewards.weight(name) for name in DRAWING_REWARDS if task.draws}
    weights |= {name: factor * rewards.weight(name) for name in ANSWER_REWARDS if task.answers}
    weights |= rewards.extra | rewards.pairwise
    return ", ".join(f"{name} {weight:g}" for name, weight in weights.items() if weight)


def _parts(config: Config) -> list[str]:
    """What the cycle reward consists of."""
    rewards = config.rewards
    image, captions = rewards.image_measure, rewards.caption_measures
    told = [f"drawings are compared with real images by {image}"] if image else []
    if captions:
        captioner = "the shipped BLIP" if rewards.captioner == "quickstart" else public_name(rewards.captioner)
        told.append(f"what {captioner} says of them with captions by {', '.join(captions)}")
    return ["For `cycle`, `perceptual` and `caption`, " + ", ".join(told) + "."] if told else []


def _settings(config: Config, stage: StageConfig) -> str:
    algorithm, rollout, optimizer, lora = config.algorithm, config.rollout, config.optimizer, config.model.lora
    cut = [f"{name} {value}" for name, value in (("top_k", rollout.top_k), ("top_p", rollout.top_p)) if value]
    clip = "no clip" if algorithm.eps_low is None else f"clip {algorithm.eps_low:g} / {algorithm.eps_high:g}"
    weights = "the language backbone and its text head"
    if lora.rank:
        weights = f"LoRA of rank {lora.rank}, alpha {lora.alpha:g}, merged into the weights"
        if stage.task != "merge":
            weights += "; the adapters alone are in `adapter/`"
    sampled = [f"temperature {rollout.temperature:g}", f"guidance {rollout.guidance:g} for drawings", *cut]
    rows = {
        "sampling": ", ".join([*sampled, f"answers of up to {rollout.max_new_tokens} tokens"]),
        "policy": f"policy_logits {algorithm.policy_logits}",
        "objective": f"{algorithm.loss_type}, ratio per {algorithm.importance}, {clip}, "
        f"{algorithm.num_iterations} update{'s' * (algorithm.num_iterations > 1)} per rollout",
        "advantages": f"{algorithm.advantage_mode}, scale {algorithm.advantage_scale}",
        "optimizer": f"AdamW, {optimizer.warmup_steps} steps of warm-up, then {optimizer.schedule}; "
        f"gradient norm at most {optimizer.max_grad_norm:g}",
        "trained": f"{weights}, in {config.model.dtype}",
        "seed": f"{config.seed}",
    }
    return "\n".join(["| setting | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())])


def _held_out(config: Config, name: str, line: Sequence[str], scores: Sequence[Mapping[str, Any]], prompts: int) -> str:
    title = "## Held-out scores"
    found = {entry["stage"]: entry for entry in scores if entry["stage"] in (START, *line)}
    if name not in found:
        return f"{title}\n\nIt has not been evaluated yet."
    shown = [found[each] for each in (START, *line) if each in found]
    scorer = config.evaluation.scorer
    data = f"`{public_name(config.data.held_out)}`" if config.data.held_out else "rows kept out of training"
    what = f"one drawing (guidance {_guidance(config):g}) and one answer" if scorer else "one answer"
    told = (
        f"In %, of {prompts} prompts of {data}: {what} per prompt, sampled at temperature "
        f"{config.rollout.temperature:g}. `start` is {linked(config.model.path)}. "
        f"A score near 50 has a standard error of {50 / max(prompts, 1) ** 0.5:.1f} points."
    )
    meant = (
        "`accuracy` is the fraction of answers that are right and in `<answer>` tags, `mc` and `oe` that of "
        "multiple-choice and open-ended questions, `format` the fraction in tags, `unfinished` the fraction cut at "
        "the limit."
    )
    if scorer:
        meant += f" The others are those of `{scorer}`, which judges drawings."
    return f"{title}\n\n{score_table(shown)}\n\n{told}\n{meant}"


def _guidance(config: Config) -> float:
    """Of evaluated drawings."""
    evaluation = config.evaluation
    return config.rollout.guidance if evaluation.guidance is None else evaluation.guidance


def _question(config: Config, stage: StageConfig) -> str:
    kind = TASKS[stage.task].only_type if stage.task in TASKS else None
    return config.data.templates.get(kind or "OE", "{question}").format(question="a question")


def _configuration(config: Config) -> str:
    settings = {key: value for key, value in published(config.dump()).items() if key not in WHERE}
    text = yaml.safe_dump(settings, sort_keys=False, allow_unicode=True).rstrip()
    title = "The resolved configuration; of local paths the last part"
    return f"<details><summary>{title}</summary>\n\n~~~yaml\n{text}\n~~~\n\n</details>"

"""Mistakes of users of train.py: what is typed, what lies in the current folder, and the words of the one line that
tells it: the place, and what to do. `mistakes_of_commands.py` has those of the other commands.

All of these are told before torch is imported; `mistakes_in_contents.py` has those that are not. A model's
folder is the shipped one by links, but for what is wrong.
"""

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from fastcorl.places import QUICKSTART

WEIGHTS = Path(__file__).resolve().parents[2] / "fastcorl" / QUICKSTART / "weights"
STAGE = "stages:\n  unified:\n    task: unified\n"


class Mistake(NamedTuple):
    """`make` puts files into the current folder."""

    options: list[str]
    words: tuple[str, ...]
    make: Callable[[Path], object] = lambda folder: None


def file(text: str | bytes, *words: str, name: str = "x.yaml") -> Mistake:
    """A configuration of this text."""
    data = text if isinstance(text, bytes) else text.encode()
    return Mistake(["--config", name], (name, *words), lambda folder: (folder / name).write_bytes(data))


def model(words: tuple[str, ...], *options: str, without: str = "", of: str = "janus", **files: str | bytes) -> Mistake:
    """A folder "model" without one file, or with other files under names whose dots are written as two underscores."""

    def make(folder: Path) -> None:
        (folder / "model").mkdir()
        for path in (WEIGHTS / of).iterdir():
            if path.name != without:
                (folder / "model" / path.name).symlink_to(path)
        for name, content in files.items():
            path = folder / "model" / name.replace("__", ".")
            path.unlink(missing_ok=True)
            path.write_bytes(content if isinstance(content, bytes) else content.encode())

    return Mistake(list(options) or ["--model.path", "model"], words, make)


def config_of(**changes: object) -> str:
    return json.dumps(json.loads((WEIGHTS / "janus" / "config.json").read_text()) | changes)


def folder(name: str) -> Callable[[Path], None]:
    return lambda here: (here / name).mkdir(parents=True)


FLAGS = [
    Mistake(["--algorithm.group_size", "1"], ("--algorithm.group_size: must be at least 2, got '1'",)),
    Mistake(["--algorithm.groupsize=4"], ("--algorithm.groupsize: unknown", "mean '--algorithm.group_size'?")),
    Mistake(["--optimizer.learning_rat", "1"], ("unknown option, did you mean '--optimizer.learning_rate'?",)),
    Mistake(["--learning_rate", "1"], ("--learning_rate: unknown option, did you mean '--optimizer.learning_rate'?",)),
    Mistake(["--keep=1"], ("--keep: unknown option, did you mean '--checkpoint.keep'?",)),
    Mistake(["--xyzzy", "1"], ("--xyzzy: unknown option; --help lists all",)),
    Mistake(["--optimiser.learning_rate", "1"], ("unknown option, did you mean '--optimizer.learning_rate'?",)),
    Mistake(["--stages.unifid.steps", "1"], ("did you mean '--stages.unified.steps'?",)),
    Mistake(["--algorithm.group_size", "many"], ("--algorithm.group_size: must be a whole number, got 'many'",)),
    Mistake(["--algorithm.group_size", "2.5"], ("--algorithm.group_size: must be a whole number, got '2.5'",)),
    Mistake(["--algorithm.group_size", "None"], ("--algorithm.group_size: must be a whole number, got 'None'",)),
    Mistake(["--algorithm.loss_type", "ppo"], ("--algorithm.loss_type: must be one of 'grpo', 'bnpo'", "got 'ppo'")),
    Mistake(["--algorithm.beta", "-0.1"], ("--algorithm.beta: must be at least 0, got '-0.1'",)),
    Mistake(["--algorithm.delta", "2"], ("--algorithm.delta: delta needs eps_low and eps_high",)),
    Mistake(["--algorithm.eps_low", "0.1"], ("--algorithm.eps_low: eps_low and eps_high must be given together",)),
    Mistake(["--algorithm.loss_type", "cispo"], ("loss_type cispo needs eps_low and eps_high",)),
    Mistake(["--algorithm.token_budget", "9"], ("token_budget", "loss_type must be dapo, bnpo or cispo")),
    Mistake(["--rollout.temperature", "nan"], ("--rollout.temperature: must be a finite number, got 'nan'",)),
    Mistake(["--rollout.temperature", "0"], ("--rollout.temperature: must be more than 0, got '0'",)),
    Mistake(["--rollout.top_p", "1.5"], ("--rollout.top_p: must be at most 1, got '1.5'",)),
    Mistake(["--rollout.guidance", "strong"], ("--rollout.guidance: must be a number, got 'strong'",)),
    Mistake(["--logging.tensorboard", "maybe"], ("--logging.tensorboard: must be true or false, got 'maybe'",)),
    Mistake(["--logging.project", ""], ("--logging.project: must not be empty",)),
    Mistake(["--model.dtype", "float23"], ("--model.dtype: must be one of", "got 'float23', did you mean 'float32'?")),
    Mistake(["--model.lora.targets", "proj"], ("--model.lora.targets: 'proj' is no linear layer", "q_proj, k_proj")),
    Mistake(["--model.liger=on", "--model.compile=true"], ("liger on and compile exclude one another",)),
    Mistake(["--seed"], ("Missing value for argument '--seed'",)),
    Mistake(["--seed", "-5"], ("--seed: must be at least 0, got '-5'",)),
    Mistake(["--seed", "1", "2"], ("unexpected argument '2'; options look like --section.key value",)),
    Mistake(["seed=1"], ("unexpected argument 'seed=1'; options look like --section.key value",)),
    Mistake(["--threads", "-1"], ("--threads: must be at least 0, got '-1'",)),
    Mistake(["--optimizer", "1"], ("--optimizer: is a section; set one of its keys, as in --optimizer.key value",)),
    Mistake(["--optimizer.betas", "0.9"], ("--optimizer.betas: needs more than 1 values",)),
    Mistake(["--optimizer.betas", "0.9", "1"], ("--optimizer.betas: must be less than 1, got '1'",)),
    Mistake(["--optimizer.learning_rate=fast"], ("--optimizer.learning_rate: must be a number, got 'fast'",)),
    Mistake(["--optimizer.learning_rate=-1e-5"], ("--optimizer.learning_rate: must be more than 0, got '-1e-5'",)),
    Mistake(["--data.columns", "prompt"], ("--data.columns: Failed to parse key-value pairs",)),
    Mistake(["--data.columns", "promt", "x"], ("--data.columns: 'promt' is none of our columns (prompt, real_image",)),
    Mistake(["--data.templates", "MC", "{q} {question}"], ("MC: must have no braces but those of {question}",)),
    Mistake(["--data.templates", "MC", "answer!"], ("--data.templates: MC: must contain {question}",)),
    Mistake(["--data.templates", "QA", "{question}"], ("--data.templates: 'QA' is no question type (MC, OE)",)),
    Mistake(["--data.max_bad_fraction", "2"], ("--data.max_bad_fraction: must be at most 1, got '2'",)),
    Mistake(["--stages.mc.init", "unifid"], ("--stages.mc.init: 'unifid' is not an earlier stage (one of model",)),
    Mistake(["--stages.unified.init", "t2i"], ("--stages.unified.init: 't2i' is not an earlier stage (one of model)",)),
    Mistake(["--stages.merge.merge", "mc"], ("--stages.merge.merge: merge must name two stages",)),
    Mistake(["--stages.mc.group_size", "1"], ("--stages.mc.group_size: must be at least 2, got '1'",)),
    Mistake(["--stages.mc.steps", "0"], ("--stages.mc.steps: must be more than 0, got '0'",)),
    Mistake(["--stages.mc.task", "mcq"], ("--stages.mc.task: must be one of 'unified'", "got 'mcq'")),
    Mistake(["--name", "../x"], ("--name: must be the name of a folder: letters, digits, _ - and .",)),
    Mistake(["--config", "no/such.yaml"], ("no/such.yaml: no such file",)),
    Mistake(["--config"], ("--config: needs the path of a YAML file",)),
    Mistake(["--rewards.weights", "beauty", "1"], ("--rewards.weights: 'beauty' is no reward (cycle, perceptual",)),
    Mistake(["--rewards.weights", "tim", "nan"], ("--rewards.weights: must be a finite number, got 'nan'",)),
    Mistake(["--rewards.weights", "tim", "inf"], ("--rewards.weights: must be a finite number, got 'inf'",)),
    Mistake(["--rewards.weights", "tim", "-1"], ("--rewards.weights: must be at least 0, got '-1'",)),
    Mistake(["--rewards.weights", "clip", "1"], ("rewards.clip must be given for the reward clip: a folder or",)),
    Mistake(["--rewards.caption_similarity", "bleu"], ("--rewards.caption_similarity: must be one of 'tuples'",)),
    Mistake(["--rewards.caption_similarity", "bertscore"], ("rewards.bert must be given", "a folder or hub name")),
    Mistake(
        ["--rewards.image_similarity", "lpips_vgg"], ("rewards.lpips_trunk must be given", "torchvision's weights")
    ),
    Mistake(["--rewards.timeout", "0"], ("--rewards.timeout: must be more than 0, got '0'",)),
    Mistake(
        ["--rewards.extra", "mine:f", "1", "--rewards.pairwise", "mine:f", "1"],
        ("rewards.extra and rewards.pairwise both name mine:f; give them two functions",),
    ),
    Mistake(
        ["--evaluation.gradient_cosine", "true"], ("gradient_cosine is logged at the steps of `every`, which is 0",)
    ),
    Mistake(["--deepspeed.zero_stage", "4"], ("--deepspeed.zero_stage: must be at most 3, got '4'",)),
    Mistake(["--deepspeed.config", "nowhere.json"], ("--deepspeed.config: cannot read 'nowhere.json'", "No such file")),
    Mistake(
        ["--deepspeed.config", "bad.json"],
        ("--deepspeed.config: cannot read 'bad.json'", "Expecting property name"),
        lambda folder: (folder / "bad.json").write_text("{,}"),
    ),
    Mistake(
        ["--deepspeed.config", "list.json"],
        ("--deepspeed.config: 'list.json' does not hold a JSON object",),
        lambda folder: (folder / "list.json").write_text("[]"),
    ),
    Mistake(
        ["--deepspeed.config", "z.json", "--deepspeed.zero_stage", "1"],
        ("zero_stage is 1, but z.json says 3",),
        lambda folder: (folder / "z.json").write_text('{"zero_optimization": {"stage": 3}}'),
    ),
]

FILES = [
    file(STAGE + "optimizer:\n  learning_rat: 1\n", "learning_rat: unknown key, did you mean 'learning_rate'?"),
    file(STAGE + "learning_rate: 1\n", "learning_rate: unknown key, did you mean 'optimizer.learning_rate'?"),
    file(STAGE + "zzz: 1\n", "zzz: unknown key (known here: name,"),
    file(STAGE.replace("task", "tsk"), "stages.unified.tsk: unknown key, did you mean 'task'? (and 1 more)"),
    file(STAGE + "    steps: ten\n", "stages.unified.steps: must be a whole number, got 'ten'"),
    file(STAGE + "    steps: true\n", "stages.unified.steps: takes no true or false, got true"),
    file(STAGE + "    steps: 0\n    prompts_per_step: 0\n", "steps: must be more than 0, got 0 (and 1 more)"),
    file(STAGE + "    merge: [a, b]\n", "stages.unified: merge must name stages for task merge"),
    file(STAGE + "    order: [mc]\n", "stages.unified: order must name tasks for task ordered"),
    file("stages:\n  a:\n    task: ordered\n    order: [mc, mc]\n", "stages.a: order: 'mc' must be one of t2i, mm2t"),
    file(STAGE + "name: 5\n", "name: must be text, got 5"),
    file(STAGE + "name:\n", "name: must be text, got null"),
    file(STAGE + "optimizer: fast\n", "optimizer: must be a mapping of keys, got 'fast'"),
    file(STAGE + "optimizer:\n  learning_rate: .inf\n", "optimizer.learning_rate: must be a finite number, got inf"),
    file(
        STAGE + "rewards:\n  caption_similarity: jaccard\n", "rewards.caption_similarity: must be a list, got 'jaccard'"
    ),
    file(STAGE + "rewards:\n  weights: {clip: 1}\n", "rewards: rewards.clip must be given for the reward clip"),
    file(STAGE + "1: 2\n", "1: must be a name, got 1"),
    file(STAGE + "seed: 1\nseed: 2\n", "line 5: not valid YAML: key 'seed' is given twice"),
    file("seed: 1\n", "stages: missing"),
    file("stages: {}\n", "stages: must name at least one stage"),
    file("stages: [unified]\n", "stages: must be a mapping of keys, got ['unified']"),
    file("stages:\n  ../x:\n    task: mc\n", "stages.../x: a stage's name has letters"),
    file("stages:\n  model:\n    task: mc\n", "stages.model: a stage's name", "is not 'model'"),
    file("stages:\n  a: {task: mc, init: b}\n  b: {task: oe, init: a}\n", "stages.a: 'b' is not an earlier stage"),
    file("stages:\n  a: {task: mc, init: a}\n", "stages.a: 'a' is not an earlier stage (one of model)"),
    file("a: [1\n", "line 2: not valid YAML"),
    file("stages:\n\tunified:\n", "line 2: not valid YAML", "indent with spaces"),
    file("seed: *nothing\n", "line 1: not valid YAML: found undefined alias"),
    file("stages: &s\n  unified: *s\n", "not valid YAML: an alias stands within what it names"),
    file(
        "a: &a {x: 1}\n" + "".join(f"{n}: &{n} {{x: *{m}, y: *{m}}}\n" for m, n in pairwise("abcdefghijklmnopqrstu")),
        "not valid YAML: its aliases make more than 100000 values",
    ),
    file("a: !!python/name:os.system x\n", "not valid YAML"),
    file("- 1\n- 2\n", "must be a mapping of sections, but holds a list"),
    file("", "must be a mapping of sections, but is empty"),
    file("# nothing\n", "must be a mapping of sections, but is empty"),
    file("extends: y.yaml\n", "extends: y.yaml: no such file"),
    file("extends: x.yaml\n", "extends: x.yaml is already part of this chain"),
    file("extends: [a]\n", "extends: must be the path of another file"),
    file(b"\xff\xfe\x00", "is not a UTF-8 text file; save it as one"),
    file(b"\x89PNG\r\n\x1a\n\x00\x00", "is not a UTF-8 text file; save it as one"),
    file(b"seed: 1\x00\n", "not valid YAML: unacceptable character #x0000"),
    Mistake(["--config", "folder"], ("folder: Is a directory; give a YAML file",), folder("folder")),
]

# Of what a valid configuration names; told before torch is imported too.
PLACES = [
    Mistake(["--model.path", "/no/such/model"], ("model.path: there is no folder '/no/such/model'; give a folder",)),
    Mistake(["--model.path", "./no"], ("model.path: there is no folder './no'; give a folder with a checkpoint",)),
    Mistake(
        ["--model.path", "weights.safetensors"],
        ("model.path: 'weights.safetensors' is a file; give the folder that it is in",),
        lambda folder: (folder / "weights.safetensors").write_bytes(b""),
    ),
    model(("model.path: 'model' has no config.json; give the folder of a Janus",), without="config.json"),
    model(("model.path: 'model': config.json cannot be read as JSON", "copy or download it again"), config__json="{"),
    model(("model.path: 'model': config.json must be a JSON object, not a list",), config__json="[]"),
    model(("model.path: 'model' is a 'llava' model; expected 'janus'",), config__json='{"model_type": "llava"}'),
    model(
        ("model.path: 'model' is in the original layout; convert it once: fastcorl export --from model",),
        config__json='{"model_type": "multi_modality"}',
    ),
    model(("model.path: 'model' holds no weights (*.safetensors); copy or",), without="model.safetensors"),
    model(("model.path: 'model': model.safetensors is damaged or cut short", "again"), model__safetensors=b"\x10\x00"),
    model(
        ("model.path: 'model': model.safetensors is damaged or cut short", "copy or download it again"),
        model__safetensors=(WEIGHTS / "janus" / "model.safetensors").read_bytes()[:1_000_000],
    ),
    model(
        ("model.path: 'model' lacks model-00002.safetensors, which model.safetensors.index.json names", "again"),
        model__safetensors__index__json='{"weight_map": {"a": "model-00002.safetensors"}}',
    ),
    model(
        ("stages.unified: 'model/' is a 'blip' model; expected 'janus'",),
        "--stages.unified.init",
        "model/",
        of="captioner",
    ),
    Mistake(["--stages.unified.init", "./nowhere"], ("stages.unified: there is no model folder './nowhere'; give",)),
    Mistake(["--stages.merge.merge", "mc", "./oe"], ("stages.merge: there is no model folder './oe'; give a folder",)),
    Mistake(
        ["--data.train", "no/rows.parquet"],
        ("data.train no/rows.parquet: no such file or folder, and neither module:function nor owner/name",),
    ),
    Mistake(["--data.held_out", "rows"], ("data.held_out rows: no such file or folder, and neither module:function",)),
    Mistake(["--stages.mc.data", "mc.jsonl"], ("stages.mc.data mc.jsonl: no such file or folder",)),
    Mistake(["--data.train", "nowhere:rows"], ("data.train: nowhere:rows: cannot import 'nowhere'", "install it, or")),
    Mistake(["--rewards.captioner", "/no/blip"], ("rewards.captioner: there is no folder '/no/blip'; give a folder",)),
    Mistake(["--rewards.caption_tuples", "nowhere:f"], ("rewards.caption_tuples: nowhere:f: cannot import", "install")),
    Mistake(["--rewards.caption_tuples", "f"], ("rewards.caption_tuples: 'f' is not of the form module:name",)),
    Mistake(["--rewards.extra", "nowhere:f", "1"], ("rewards.extra: nowhere:f: cannot import 'nowhere'", "install it")),
    Mistake(["--rewards.extra", "mine.f", "1"], ("rewards.extra: 'mine.f' is not of the form module:name",)),
    Mistake(["--rewards.pairwise", "nowhere:f", "1"], ("rewards.pairwise: nowhere:f: cannot import", "install it")),
    Mistake(
        ["--rewards.weights", "clip", "1", "--rewards.clip", "./clip"],
        ("rewards.clip: there is no folder './clip'; give a folder with a checkpoint, or a hub name",),
    ),
    Mistake(
        ["--rewards.image_similarity", "lpips_vgg", "--rewards.lpips_trunk", "vgg.pth"],
        ("rewards.lpips_trunk: vgg.pth is not a file; give the weights, .pth or .safetensors",),
    ),
    Mistake(
        ["--rewards.weights", "accuracy", "0", "format", "0"],
        ("rewards.weights: stage mc has no reward with a weight; give one of accuracy, format a weight",),
    ),
    Mistake(["--evaluation.scorer", "nowhere:S"], ("evaluation.scorer: nowhere:S: cannot import 'nowhere'", "install")),
    Mistake(["--evaluation.scorer", "Scorer"], ("evaluation.scorer: 'Scorer' is not of the form module:name",)),
    Mistake(["--resume", "/no/such/checkpoint"], ("resume: '/no/such/checkpoint' is no folder; give", "or auto")),
    Mistake(["--resume", "."], ("resume: '.' has no manifest.json; give a run's checkpoints/step-N, or auto",)),
    Mistake(
        ["--output_dir", "taken"],
        ("output_dir: taken is a file; give a folder, or another name",),
        lambda folder: (folder / "taken").write_text(""),
    ),
    Mistake(
        ["--output_dir", ".", "--name", "taken", "--resume", "auto"],
        ("output_dir: taken is a file; give a folder, or another name",),
        lambda folder: (folder / "taken").write_text(""),
    ),
    Mistake(["--output_dir", "/proc/1"], ("output_dir: /proc/1 cannot be written to", "give another folder")),
    Mistake(
        ["--model.compile=true", "--deepspeed.zero_stage=3"],
        ("model.compile: is not there under ZeRO 3", "set model.compile to false, or deepspeed.zero_stage to 2"),
    ),
    Mistake(
        ["--model.liger=on", "--evaluation.gradient_cosine=true", "--evaluation.every=5"],
        ("evaluation.gradient_cosine: goes backward twice", "set it to false"),
    ),
]

TOLD_AT_ONCE = [*FLAGS, *FILES, *PLACES]

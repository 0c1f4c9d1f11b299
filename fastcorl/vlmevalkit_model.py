"""A trained model for VLMEvalKit (open-compass/VLMEvalKit), answering with fastcorl's engine.

`vlmevalkit_model(path)` is an instance of VLMEvalKit's `vlmeval/vlm/base.py:BaseModel`; docs/benchmarks.md says how it
is registered. What it is compared with is `vlmeval/vlm/janus.py`, the wrapper of the published Janus: the same data
sets get prompts of their own, with the same words, and all images of a message are shown where they stand in it.

Nothing of VLMEvalKit is imported before a model is built.
"""

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from fastcorl.data import ImageError, decode_image
from fastcorl.errors import UserError
from fastcorl.model import PromptEncoder, load_policy
from fastcorl.records import Prompt
from fastcorl.rewards import extract_answer
from fastcorl.rollout import RolloutEngine, SamplingParams

MMVET_SYSTEM_PROMPT = (
    "You are a helpful assistant. Please answer truthfully and write out your thinking step by step to be sure you get "
    "the right answer."
)
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
FORMATS = ("checkpoint", "vlmevalkit")


class MessageError(UserError, RuntimeError):
    """A message that cannot be answered. Being a RuntimeError, VLMEvalKit goes on behind it where SKIP_ERR=1 is set."""


class JanusAnswers:
    """What `vlmevalkit_model` adds to VLMEvalKit's BaseModel; answers are greedy.

    Args:
        path: a Janus in the transformers format, as a run exports them.
        prompt_format: "checkpoint" puts questions as in training: the checkpoint's chat template and system prompt, and
            `templates`. "vlmevalkit" builds the text of `vlmeval/vlm/janus.py`, for scores beside published ones:
            roles "User" and "Assistant", no system prompt but MMVet's, an image directly before what follows it.
        templates: text with {question} in it by question type, MC for multiple choice and OE for everything else: what
            the run had as `data.templates`. A question in a template is not told to answer directly.
        extract_answer: hand on what is inside `<answer>`. An answer without the tags is handed on whole, with one
            warning; `untagged` counts them.
        max_new_tokens: longest answer; less where the model's context ends. 2048 is the published wrapper's.
        device: None is CUDA where there is one, in bfloat16; on a CPU the model runs in float32.
    """

    INSTALL_REQ = False
    INTERLEAVE = True

    def __init__(
        self,
        path: str | Path,
        *,
        prompt_format: str = "checkpoint",
        templates: Mapping[str, str] | None = None,
        extract_answer: bool = False,
        max_new_tokens: int = 2048,
        device: str | None = None,
    ):
        super().__init__()
        if prompt_format not in FORMATS:
            raise UserError(f"prompt_format {prompt_format!r}: must be one of {', '.join(FORMATS)}")
        if templates and prompt_format == "vlmevalkit":
            raise UserError("templates: are those of training; prompt_format vlmevalkit has none")
        self.prompt_format = prompt_format
        self.templates = {kind: _around_question(kind, template) for kind, template in (templates or {}).items()}
        self.extract_answer, self.max_new_tokens, self.untagged = extract_answer, max_new_tokens, 0
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
        policy = load_policy(path, dtype=dtype, device=device)
        policy.encoder = WrittenPrompts(policy.processor)
        self.engine = _ManyImages(policy, weight_version=0)

    def generate_inner(self, message: Sequence[dict[str, Any]], dataset: str | None = None) -> str:
        """The answer to `[{"type": "text" | "image", "value": text or file}, ...]`."""
        return self.chat_inner([{"role": "user", "content": message}], dataset)

    def chat_inner(self, message: Sequence[dict[str, Any]], dataset: str | None = None) -> str:
        """The answer to the last of `[{"role": "user" | "assistant", "content": [...]}, ...]`."""
        encoder = self.engine.policy.encoder
        items = [item for turn in message for item in turn["content"]]
        for item in items:
            if item["type"] not in ("text", "image"):
                raise MessageError(f"{dataset}: a message has a {item['type']}; the model takes text and images")
        images = [_load(item["value"]) for item in items if item["type"] == "image"]
        text = self.prompt_text(message, dataset)
        if text.count(encoder.image_token) != len(images):
            raise MessageError(f"{dataset}: a message holds {encoder.image_token} in its text")
        length = len(encoder.ask(text))
        room = self.engine.context - length
        if room < 1:
            raise MessageError(f"{dataset}: a message of {length} tokens; the model's context is {self.engine.context}")
        params = SamplingParams(temperature=0.0, max_new_tokens=min(self.max_new_tokens, room))
        rollout = self.engine.generate([Prompt("", "", images, text, "", "OE")], 1, params, draw=False)
        return self._handed_on(rollout.texts.answers[0])

    def prompt_text(self, turns: Sequence[dict[str, Any]], dataset: str | None) -> str:
        """The whole prompt as text, with one placeholder per image."""
        encoder = self.engine.policy.encoder
        if self.prompt_format == "checkpoint":
            around = self.templates.get(_question_type(dataset)) if self.templates else None
            return encoder.write([(turn["role"], _content(turn, around)) for turn in turns])
        system = MMVET_SYSTEM_PROMPT + "\n\n" if dataset is not None and "MMVet" in dataset else ""
        ends = ["\n\n", encoder.tokenizer.eos_token]
        written = [
            f"{turn['role'].capitalize()}: {_joined(turn['content'], encoder.image_token).strip()}{ends[index % 2]}"
            for index, turn in enumerate(turns)
        ]
        return f"{system}{''.join(written)}Assistant:"

    def use_custom_prompt(self, dataset: str) -> bool:
        """Whether VLMEvalKit is to call `build_prompt`: for yes-no and multiple-choice sets and MMVet."""
        from vlmeval.dataset import DATASET_TYPE

        return dataset == "MMVet" or DATASET_TYPE(dataset) in ("Y/N", "MCQ")

    def build_prompt(self, line: Mapping[str, Any], dataset: str) -> list[dict[str, str]]:
        """The message for a row of such a set: its images, then hint, question, options and what to answer with."""
        from vlmeval.dataset import DATASET_TYPE

        question, kind = line["question"], DATASET_TYPE(dataset)
        asked = _question_type(dataset) in self.templates
        if dataset == "MMVet":
            text = question
        elif kind == "Y/N":
            if dataset == "POPE":
                question = question.replace(" Please answer yes or no.", "")
            text = question if asked else f"{question}\nAnswer the question using a single word or phrase."
        else:
            options = [f"{letter}. {line[letter]}\n" for letter in LETTERS if _given(line, letter)]
            hint = f"Hint: {line['hint']}\n" if _given(line, "hint") else ""
            direct = "Answer with the option's letter from the given choices directly."
            end = f"\n{direct}" if options else "Answer the question directly. "
            text = f"{hint}{question}\n{''.join(options)}"
            text = text.rstrip() if asked else text + end
        # In "checkpoint" the chat template sets a question apart from its images.
        first = "\n" if self.prompt_format == "vlmevalkit" else ""
        images = [{"type": "image", "value": path} for path in self.dump_image(line, dataset)]
        return [*images, {"type": "text", "value": first + text}]

    def _handed_on(self, answer: str) -> str:
        if not self.extract_answer:
            return answer
        inside = extract_answer(answer)
        if inside is None:
            if not self.untagged:
                warnings.warn("an answer has no <answer> tags and is handed on whole", stacklevel=2)
            self.untagged += 1
            return answer
        return inside


def vlmevalkit_model(path: str | Path, **settings: Any) -> Any:
    """A model for VLMEvalKit's `supported_VLM`; `settings` are those of `JanusAnswers`."""
    from vlmeval.vlm.base import BaseModel

    return type("FastcorlJanus", (JanusAnswers, BaseModel), {})(path, **settings)


class WrittenPrompts(PromptEncoder):
    """Encodes prompts that are written out already."""

    @property
    def image_token(self) -> str:
        return self.processor.image_token

    def write(self, turns: Sequence[tuple[str, list[dict[str, str]]]]) -> str:
        """Turns (role, content) as the checkpoint's chat template and system prompt put them."""
        messages = [{"role": role, "content": content} for role, content in turns]
        chat = self.processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        return self._system_prompt() + chat

    def ask(self, question: str, question_type: str | None = None) -> list[int]:
        """`question` is a whole prompt, with one placeholder per image."""
        return self.tokenizer(self._expand_image(question))["input_ids"]


class _ManyImages(RolloutEngine):
    """Answers one prompt at a time, whose `image` is a list of any length."""

    def _vision_features(self, images: Sequence[list[Image.Image]]) -> Sequence[torch.Tensor | None]:
        """Features (k * T, hidden) of the prompt's k images behind one another."""
        (shown,) = images
        if not shown:
            return [None]
        return self.policy.vision_features(self.policy.preprocess(shown)).flatten(0, 1)[None]


def _question_type(dataset: str | None) -> str:
    from vlmeval.dataset import DATASET_TYPE

    return "MC" if dataset is not None and DATASET_TYPE(dataset).startswith("MCQ") else "OE"


def _around_question(kind: str, template: str) -> tuple[str, str]:
    """What a template of training puts before and after a question."""
    try:
        before, place, after = template.format(question="\0").partition("\0")
    except (LookupError, ValueError):
        place = after = "\0"
    if kind not in ("MC", "OE") or not place or "\0" in after:
        raise UserError(f"templates: {kind}: must be MC or OE, and the text must hold {{question}} once")
    return before, after


def _content(turn: Mapping[str, Any], around: tuple[str, str] | None) -> list[dict[str, str]]:
    """A turn for the chat template. What stands around a question begins behind the images that the turn begins with,
    as in training."""
    items = [
        {"type": "image"} if item["type"] == "image" else {"type": "text", "text": item["value"]}
        for item in turn["content"]
    ]
    texts = [item for item in items if item["type"] == "text"]
    if around is not None and turn["role"] == "user" and texts:
        texts[0]["text"] = around[0] + texts[0]["text"]
        texts[-1]["text"] += around[1]
    return items


def _joined(content: Sequence[Mapping[str, str]], image_token: str) -> str:
    return "".join(image_token if item["type"] == "image" else item["value"] for item in content)


def _given(line: Mapping[str, Any], name: str) -> bool:
    """Whether a row of VLMEvalKit's pandas table has a value there."""
    from pandas import isna

    return name in line and not isna(line[name])


def _load(path: str) -> Image.Image:
    try:
        return decode_image(Path(path).read_bytes())
    except (OSError, ImageError) as error:
        raise MessageError(f"{path}: cannot be shown to the model: {error}") from error

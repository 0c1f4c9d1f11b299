"""The model that VLMEvalKit asks, on a stand-in for the parts of VLMEvalKit that it meets.

Expected prompts are written out as `vlmeval/vlm/janus.py` and the original Janus processor build them.
"""

import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

import fastcorl.vlmevalkit_model as subject
from fastcorl.errors import UserError
from fastcorl.model import save_policy
from fastcorl.vlmevalkit_model import MMVET_SYSTEM_PROMPT, MessageError, vlmevalkit_model
from tests.helpers import SENTENCES, make_policy

DIRECT = "Answer with the option's letter from the given choices directly."
TEMPLATES = {"MC": "{question}\nThink, then give a letter.", "OE": "Look closely. {question}\nThink, then answer."}
TYPES = {"POPE": "Y/N", "MME": "Y/N", "MMStar": "MCQ", "MMMU_Pro": "MCQ_MMMU_Pro", "MMVet": "VQA", "MathVista": "VQA"}
LIMIT = 24


class BaseModel:
    """The calls that `vlmeval/inference.py` makes, with the signatures of `vlmeval/vlm/base.py`."""

    INTERLEAVE = False
    allowed_types = ["text", "image", "video"]

    def __init__(self):
        self.dump_image_func = None

    def use_custom_prompt(self, dataset):
        return False

    def build_prompt(self, line, dataset):
        raise NotImplementedError

    def set_dump_image(self, dump_image_func):
        self.dump_image_func = dump_image_func

    def dump_image(self, line, dataset):
        return self.dump_image_func(line)

    def generate_inner(self, message, dataset=None):
        raise NotImplementedError

    def generate(self, message, dataset=None):
        assert all(item["type"] in self.allowed_types for item in message)
        return self.generate_inner(message, dataset)

    def chat(self, messages, dataset=None):
        return self.chat_inner(messages, dataset=dataset)


@pytest.fixture(autouse=True)
def stand_in(monkeypatch):
    modules = {name: ModuleType(name) for name in ("vlmeval", "vlmeval.vlm", "vlmeval.vlm.base", "vlmeval.dataset")}
    modules["vlmeval.vlm.base"].BaseModel = BaseModel
    modules["vlmeval.dataset"].DATASET_TYPE = lambda dataset, *, default="MCQ": TYPES.get(dataset, default)
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    save_policy(make_policy(), folder)
    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder, generator = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    paths = [str(folder / f"{index}.png") for index in range(3)]
    for index, path in enumerate(paths):
        Image.fromarray(generator.integers(0, 256, (20 + 3 * index, 24, 3), dtype=np.uint8)).save(path)
    return paths


def make(folder, **settings):
    return vlmevalkit_model(folder, **{"max_new_tokens": LIMIT, "device": "cpu"} | settings)


def text(value):
    return {"type": "text", "value": value}


def image(path):
    return {"type": "image", "value": path}


def user(*items):
    return {"role": "user", "content": list(items)}


def prompt_of(model, line, dataset, paths):
    """The whole prompt of a row, by the calls of `vlmeval/inference.py:infer_data`."""
    model.set_dump_image(lambda line: paths)
    assert model.use_custom_prompt(dataset)
    message = model.build_prompt(pd.Series(line), dataset=dataset)
    assert [item["value"] for item in message if item["type"] == "image"] == paths
    return model.prompt_text([user(*message)], dataset)


QUESTIONS = [
    ("POPE", {"question": "Is there a 3? Please answer yes or no."}, 1),
    ("MME", {"question": "Is it red? Please answer yes or no."}, 1),
    ("MMStar", {"question": "which?", "A": "one", "B": 2, "C": float("nan"), "D": pd.NA, "hint": float("nan")}, 1),
    ("MMStar", {"question": "which?", "A": "one", "B": "two", "hint": "look left"}, 2),
    ("MMStar", {"question": "which?"}, 1),
    ("MMVet", {"question": "what is left of the 4?"}, 1),
]


def test_prompts_of_the_published_wrapper(folder, pictures):
    model = make(folder, prompt_format="vlmevalkit")
    expected = [
        "User: <image_placeholder>\nIs there a 3?\nAnswer the question using a single word or phrase.\n\nAssistant:",
        "User: <image_placeholder>\nIs it red? Please answer yes or no.\n"
        "Answer the question using a single word or phrase.\n\nAssistant:",
        f"User: <image_placeholder>\nwhich?\nA. one\nB. 2\n\n{DIRECT}\n\nAssistant:",
        "User: <image_placeholder><image_placeholder>\nHint: look left\nwhich?\nA. one\nB. two\n\n"
        f"{DIRECT}\n\nAssistant:",
        "User: <image_placeholder>\nwhich?\nAnswer the question directly.\n\nAssistant:",
        f"{MMVET_SYSTEM_PROMPT}\n\nUser: <image_placeholder>\nwhat is left of the 4?\n\nAssistant:",
    ]
    for (dataset, line, count), prompt in zip(QUESTIONS, expected, strict=True):
        assert prompt_of(model, line, dataset, pictures[:count]) == prompt
    assert not model.use_custom_prompt("MathVista")
    turns = [
        user(text("first "), image(pictures[0]), text(" then "), image(pictures[1]), text(" what? \n")),
        {"role": "assistant", "content": [text("a 3 ")]},
        user(text("and now?")),
    ]
    assert model.prompt_text(turns, None) == (
        "User: first <image_placeholder> then <image_placeholder> what?\n\n"
        "Assistant: a 3<｜end▁of▁sentence｜>User: and now?\n\nAssistant:"
    )


def test_prompts_of_the_checkpoint(folder, pictures):
    model = make(folder)
    expected = [
        "Is there a 3?\nAnswer the question using a single word or phrase.",
        "Is it red? Please answer yes or no.\nAnswer the question using a single word or phrase.",
        f"which?\nA. one\nB. 2\n\n{DIRECT}",
        f"<image_placeholder>\nHint: look left\nwhich?\nA. one\nB. two\n\n{DIRECT}",
        "which?\nAnswer the question directly. ",
        "what is left of the 4?",
    ]
    for (dataset, line, count), prompt in zip(QUESTIONS, expected, strict=True):
        whole = f"<|User|>: <image_placeholder>\n{prompt}\n\n<|Assistant|>:"
        assert prompt_of(model, line, dataset, pictures[:count]) == whole


def test_templates_of_training_replace_how_to_answer(folder, pictures):
    model, policy = make(folder, templates=TEMPLATES), make_policy()
    policy.encoder.templates = TEMPLATES
    asked = [
        ("Is there a 3?", "OE"),
        ("Is it red? Please answer yes or no.", "OE"),
        ("which?\nA. one\nB. 2", "MC"),
        (None, None),
        ("which?", "MC"),
        ("what is left of the 4?", "OE"),
    ]
    for (dataset, line, count), (question, kind) in zip(QUESTIONS, asked, strict=True):
        prompt = prompt_of(model, line, dataset, pictures[:count])
        if question is not None:
            assert model.engine.policy.encoder.ask(prompt) == policy.encoder.ask(question, kind)
    # A set with prompts of its own, its text in pieces.
    message = user(image(pictures[0]), text("see "), image(pictures[1]), text("which?"))
    assert model.prompt_text([message], "MMMU_Pro") == (
        "<|User|>: <image_placeholder>\nsee <image_placeholder>\nwhich?\nThink, then give a letter.\n\n<|Assistant|>:"
    )
    assert model.prompt_text([message], "MathVista").startswith("<|User|>: <image_placeholder>\nLook closely. see ")


def ask(model, message, monkeypatch):
    """The answer and what the engine sampled for it."""
    kept, generate = [], model.engine.generate

    def keep(*args, **kwargs):
        kept.append(generate(*args, **kwargs))
        return kept[0]

    with monkeypatch.context() as patch:
        patch.setattr(model.engine, "generate", keep)
        return model.generate(message), kept[0].texts


@torch.no_grad()
@pytest.mark.parametrize("count", [0, 1, 3])
@pytest.mark.parametrize("prompt_format", ["checkpoint", "vlmevalkit"])
def test_answers_are_those_of_transformers(folder, pictures, reference, monkeypatch, prompt_format, count):
    model = make(folder, prompt_format=prompt_format)
    processor = model.engine.policy.processor
    for _, question in SENTENCES:
        message = [item for path in pictures[:count] for item in (image(path), text("see"))] + [text(question)]
        shown = [Image.open(path) for path in pictures[:count]] or None
        inputs = processor(text=model.prompt_text([user(*message)], None), images=shown, return_tensors="pt")
        prompt = inputs["input_ids"]
        limits = {"do_sample": False, "max_new_tokens": LIMIT, "eos_token_id": model.engine.policy.encoder.eos_id}
        generated = reference.generate(**inputs, **limits)
        expected = generated[0, prompt.shape[1] :]
        answer, texts = ask(model, message, monkeypatch)
        assert answer == processor.tokenizer.decode(expected, skip_special_tokens=True).strip()
        assert torch.equal(texts.tokens[0], expected)
        # Random weights answer many messages alike; their probabilities tell them apart.
        pixels = inputs.get("pixel_values")
        logits = reference(input_ids=generated[:, :-1], pixel_values=pixels).logits[0, prompt.shape[1] - 1 :]
        log_probs = logits.log_softmax(-1).gather(1, expected[:, None])[:, 0]
        torch.testing.assert_close(texts.log_probs[0], log_probs, rtol=0, atol=1e-4)


def test_images_and_their_order_matter(folder, pictures, monkeypatch):
    model = make(folder)
    orders = [pictures, pictures[::-1], pictures[:2], pictures[:1], pictures[1:2], []]
    asked = [[image(path) for path in order] + [text("which digit?")] for order in orders]
    first = [float(ask(model, message, monkeypatch)[1].log_probs[0, 0]) for message in asked]
    assert all(abs(one - other) > 1e-3 for i, one in enumerate(first) for other in first[:i]), first


def test_chat_answers_the_last_turn(folder, pictures, monkeypatch):
    model = make(folder)
    answered = SimpleNamespace(texts=SimpleNamespace(answers=["so"]))
    turns = [user(image(pictures[0]), text("which digit?")), {"role": "assistant", "content": [text("3")]}]
    turns.append(user(text("is it red?")))
    assert model.prompt_text(turns, None) == (
        "<|User|>: <image_placeholder>\nwhich digit?\n\n<|Assistant|>: 3<｜end▁of▁sentence｜>"
        "<|User|>: is it red?\n\n<|Assistant|>:"
    )
    kept = []
    monkeypatch.setattr(model.engine, "generate", lambda prompts, *args, **kwargs: kept.append(prompts[0]) or answered)
    assert model.chat(turns) == "so"
    assert kept[0].question == model.prompt_text(turns, None) and len(kept[0].image) == 1


def test_the_tagged_answer_is_handed_on(folder, monkeypatch):
    model = make(folder, extract_answer=True)
    given = iter(["<think>so</think><answer> B </answer>", "B.", "<answer></answer>", "<answer>A"])
    generate = model.engine.generate

    def answered(*args, **kwargs):
        rollout = generate(*args, **kwargs)
        rollout.texts.answers = [next(given)]
        return rollout

    monkeypatch.setattr(model.engine, "generate", answered)
    assert model.generate([text("which?")]) == "B"
    with pytest.warns(UserWarning, match="no <answer> tags"):
        assert model.generate([text("which?")]) == "B."
    assert model.generate([text("which?")]) == "<answer></answer>"
    assert model.generate([text("which?")]) == "<answer>A"
    assert model.untagged == 3


def test_messages_that_cannot_be_answered_say_why(folder, pictures, tmp_path):
    model = make(folder)
    (tmp_path / "broken.png").write_bytes(b"\x89PNG")
    for message, why in (
        ([text("red " * 2000)], "MMStar: a message of .* tokens; the model's context is 512"),
        ([text("what is <image_placeholder>?")], "holds <image_placeholder> in its text"),
        ([{"type": "video", "value": "v.mp4"}], "has a video"),
        ([image(str(tmp_path / "broken.png"))], "broken.png: cannot be shown"),
        ([image(str(tmp_path / "none.png"))], "none.png: cannot be shown"),
    ):
        with pytest.raises(MessageError, match=why) as error:
            model.generate(message, dataset="MMStar")
        assert "\n" not in str(error.value)
    assert issubclass(MessageError, RuntimeError) and issubclass(MessageError, UserError)


def test_answers_end_with_the_context(folder, monkeypatch):
    model = make(folder)
    message = [text("red" + " 5" * 200)]
    while (room := 512 - len(model.engine.policy.encoder.ask(model.prompt_text([user(*message)], None)))) > 3:
        message[0]["value"] += " 5"
    assert room >= 1
    assert 1 <= int(ask(model, message, monkeypatch)[1].lengths[0]) <= room


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"prompt_format": "other"}, "prompt_format"),
        ({"templates": {"MC": "no place"}}, "templates: MC"),
        ({"templates": {"MC": "{question} {question}"}}, "templates: MC"),
        ({"templates": {"MC": "{question} {x}"}}, "templates: MC"),
        ({"templates": {"YN": "{question}"}}, "templates: YN"),
        ({"templates": TEMPLATES, "prompt_format": "vlmevalkit"}, "has none"),
    ],
)
def test_wrong_settings_are_one_line(folder, settings, why):
    with pytest.raises(UserError, match=why):
        make(folder, **settings)


def test_it_is_a_model_of_vlmevalkit_and_needs_none_to_be_imported(folder, monkeypatch):
    model = make(folder)
    assert isinstance(model, BaseModel) and model.INTERLEAVE
    assert not any(name.startswith("vlmeval") for name in vars(subject) if name != "vlmevalkit_model")
    for name in [name for name in sys.modules if name.partition(".")[0] == "vlmeval"]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError):
        make(folder)
    assert subject.JanusAnswers(folder, max_new_tokens=4, device="cpu").generate_inner([text("which?")]) is not None

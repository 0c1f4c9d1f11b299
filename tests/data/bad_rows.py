"""Kinds of rows that must never reach training, each with the column and the words it is reported with."""

import io
import json

from PIL import Image

from fastcorl.data import Needs, PromptLengths
from tests.data.examples import png, row


def encoded(kind="PNG", size=(8, 6), **options) -> bytes:
    buffer = io.BytesIO()
    Image.effect_noise(size, 90).convert("RGB").save(buffer, format=kind, **options)
    return buffer.getvalue()


def frames(kind) -> bytes:
    first, second = (Image.new("RGB", (4, 4), colour) for colour in ("red", "blue"))
    buffer = io.BytesIO()
    first.save(buffer, format=kind, save_all=True, append_images=[second])
    return buffer.getvalue()


def flipped(data: bytes, place: int) -> bytes:
    return data[:place] + bytes([data[place] ^ 0xFF]) + data[place + 1 :]


def image(data: bytes):
    return {"real_image": {"bytes": data, "path": None}}


def path(text: str):
    return {"real_image": {"bytes": None, "path": text}}


PNG = encoded(size=(64, 64))
JPEG = encoded("JPEG", (64, 64))
PLACEHOLDER = "<image_placeholder>"
TOO_LONG = "word " * 2000

# name: (changes of a good row, column, words); these can stand in parquet and in jsonl alike
ANYWHERE = {
    "caption empty": ({"prompt": ""}, "prompt", "is empty"),
    "caption blank": ({"prompt": " \n\t"}, "prompt", "is empty"),
    "caption null": ({"prompt": None}, "prompt", "must be text, got nothing"),
    "caption with NUL": ({"prompt": "a\0b"}, "prompt", "NUL"),
    "caption too long": ({"prompt": TOO_LONG}, "prompt", "tokens, data.max_prompt_tokens is 1024"),
    "caption with placeholder": ({"prompt": f"a {PLACEHOLDER}"}, "prompt", "which stands for an image"),
    "question empty": ({"qa_problem": ""}, "qa_problem", "is empty"),
    "question blank": ({"qa_problem": "  "}, "qa_problem", "is empty"),
    "question null": ({"qa_problem": None}, "qa_problem", "got nothing"),
    "question too long": ({"qa_problem": TOO_LONG}, "qa_problem", "tokens, data.max_prompt_tokens is 1024"),
    "question with placeholder": ({"qa_problem": f"{PLACEHOLDER}\nwhat?"}, "qa_problem", "which stands for an image"),
    "solution empty": ({"qa_solution": ""}, "qa_solution", "is empty"),
    "solution null": ({"qa_solution": None}, "qa_solution", "got nothing"),
    "solution without tags": ({"qa_solution": "3"}, "qa_solution", "has no <answer>"),
    "answer empty": ({"qa_solution": "<answer></answer>"}, "qa_solution", "has no <answer>"),
    "answer blank": ({"qa_solution": "<answer> \n</answer>"}, "qa_solution", "has no <answer>"),
    "answer not closed": ({"qa_solution": "<answer>3"}, "qa_solution", "has no <answer>"),
    "answer tags reversed": ({"qa_solution": "</answer>3<answer>"}, "qa_solution", "has no <answer>"),
    "type null": ({"qa_type": None}, "qa_type", "got nothing"),
    "type empty": ({"qa_type": ""}, "qa_type", "is empty"),
    "type in lower case": ({"qa_type": "mc"}, "qa_type", "must be one of MC, OE, got 'mc'"),
    "type unknown": ({"qa_type": "VQA"}, "qa_type", "must be one of MC, OE"),
    "similarity above 1": ({"pair_similarity": 1.5}, "pair_similarity", "from 0 to 1"),
    "similarity below 0": ({"pair_similarity": -0.1}, "pair_similarity", "from 0 to 1"),
    "similarity not a number": ({"pair_similarity": float("nan")}, "pair_similarity", "from 0 to 1"),
    "image null": ({"real_image": None}, "real_image", "missing"),
    "image empty": (image(b""), "real_image", "is not one of PNG"),
    "image of text": (image(b"not an image"), "real_image", "is not one of PNG"),
    "image is a page": (image(b"<!DOCTYPE html><html></html>"), "real_image", "is not one of PNG"),
    "image is SVG": (image(b'<svg xmlns="http://www.w3.org/2000/svg"/>'), "real_image", "is not one of PNG"),
    "image is GIF": (image(encoded("GIF")), "real_image", "is not one of PNG"),
    "image is BMP": (image(encoded("BMP")), "real_image", "is not one of PNG"),
    "image is TIFF": (image(encoded("TIFF")), "real_image", "is not one of PNG"),
    "PNG cut in its header": (image(PNG[:20]), "real_image", "does not open"),
    "PNG cut in its pixels": (image(PNG[: len(PNG) // 2]), "real_image", "does not decode"),
    "PNG with flipped bits": (image(flipped(PNG, 60)), "real_image", "does not decode"),
    "JPEG cut": (image(JPEG[: len(JPEG) // 2]), "real_image", "does not decode"),
    "WebP cut": (image(encoded("WEBP", (64, 64))[:80]), "real_image", "does not open"),
    "animated PNG": (image(frames("PNG")), "real_image", "is an animation"),
    "animated WebP": (image(frames("WEBP")), "real_image", "is an animation"),
    "too many pixels": (image(png((8000, 7000), "1")), "real_image", "has 8000x7000 pixels"),
    "decompression bomb": (image(png((20000, 20000), "1")), "real_image", "is too large"),
    "path absent": (path("absent.png"), "real_image", "is no file in the data's folder"),
    "path of a folder": (path("."), "real_image", "is no file in the data's folder"),
    "path out of the folder": (path("../secret.png"), "real_image", "leads out of the data's folder"),
    "path through a folder and out": (path("sub/../../secret.png"), "real_image", "leads out"),
    "absolute path": (path("/etc/hostname"), "real_image", "is an absolute path"),
    "link out": (path("link.png"), "real_image", "leads out of the data's folder"),
    "circle of links": (path("circle.png"), "real_image", "the data's folder"),
    "name too long": (path("a" * 5000), "real_image", "is no file in the data's folder"),
    "NUL in the path": (path("a\0.png"), "real_image", "is no path"),
    "path to a text file": (path("notes.png"), "real_image", "is not one of PNG"),
    "web address": (path("https://example.com/a.png"), "real_image", "is the address"),
    "bucket address": (path("s3://bucket/a.png"), "real_image", "is the address"),
    "file address": (path("file:///etc/hostname"), "real_image", "is the address"),
    "data address": (path("data:image/png;base64,AAAA"), "real_image", "is the address"),
}

# Parquet types its columns, so these stand in jsonl only. Text stands for the whole line.
JSONL_ONLY = {
    "caption a number": ({"prompt": 3}, "prompt", "must be text, got a int"),
    "caption a list": ({"prompt": ["a"]}, "prompt", "must be text, got a list"),
    "caption true": ({"prompt": True}, "prompt", "must be text, got a bool"),
    "caption with lone surrogate": ({"prompt": "a \ud800"}, "prompt", "is not valid Unicode"),
    "question a mapping": ({"qa_problem": {"a": 1}}, "qa_problem", "must be text, got a dict"),
    "question with lone surrogate": ({"qa_problem": "\udfff?"}, "qa_problem", "is not valid Unicode"),
    "solution a number": ({"qa_solution": 3.5}, "qa_solution", "must be text, got a float"),
    "type a list": ({"qa_type": ["MC"]}, "qa_type", "must be text, got a list"),
    "similarity text": ({"pair_similarity": "high"}, "pair_similarity", "from 0 to 1"),
    "similarity true": ({"pair_similarity": True}, "pair_similarity", "from 0 to 1"),
    "similarity infinite": ({"pair_similarity": float("inf")}, "pair_similarity", "from 0 to 1"),
    "image a number": ({"real_image": 3}, "real_image", "is no image but a int"),
    "image a list": ({"real_image": ["a.png"]}, "real_image", "is no image but a list"),
    "image a mapping": ({"real_image": {"url": "a.png"}}, "real_image", "is no image but a dict"),
    "line broken": ('{"prompt": "a red', "row", "line 5 is not valid JSON"),
    "line a list": (json.dumps(["a", "b"]), "row", "must be a mapping of columns, got a list"),
    "line a word": ("null", "row", "must be a mapping of columns, got a NoneType"),
    "line nested without end": ("[" * 200_000, "row", "is not valid JSON"),
    "row without a column": (
        json.dumps({k: v for k, v in row().items() if k != "real_image"}),
        "real_image",
        "missing",
    ),
}


def make_folder(folder) -> None:
    """What the paths above lead to."""
    (folder / "sub").mkdir(parents=True)
    (folder.parent / "secret.png").write_bytes(png())
    (folder / "link.png").symlink_to(folder.parent / "secret.png")
    (folder / "circle.png").symlink_to(folder / "circle.png")
    (folder / "notes.png").write_text("notes")


class Words:
    """A prompt encoder whose tokens are words, with three for an image."""

    image_id = -1

    class processor:
        num_image_tokens = 3
        image_token = PLACEHOLDER

    def draw(self, caption):
        return [self.image_id if word == PLACEHOLDER else len(word) for word in caption.split()]

    def ask(self, question, question_type=None):
        return [self.image_id] * 3 + self.draw(question)


def lengths() -> PromptLengths:
    """What a model of `Words` cannot take."""
    return PromptLengths(Words(), 1024, Needs())

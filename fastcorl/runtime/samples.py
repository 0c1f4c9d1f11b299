"""What a rollout sampled: a grid of drawings to look at, and a text file with the answers, which can be read back."""

import math
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from fastcorl.records import Rollout, Scores

SMALL_SIDE, LARGE_SIDE = 96, 192
GAP, MARGIN, LINE = 6, 10, 16
TITLE_LINES = 2
INDENT = "    "  # of answers in the text file
BACKGROUND, INK, FAINT, BEST, FRAME = (255, 255, 255), (25, 25, 25), (110, 110, 110), (0, 120, 60), (205, 205, 205)


@dataclass(frozen=True)
class SampleFile:
    """The samples of a step: a picture, and a text file of the same name."""

    global_step: int
    stage: str
    step: int
    picture: Path


@dataclass(frozen=True)
class SampledPrompt:
    """A prompt in a text file of samples, with its answers as (reward, answer)."""

    question: str
    solution: str
    answers: list[tuple[str, str]]


def save_samples(path_stem: str | Path, rollout: Rollout, scores: Scores, num_prompts: int) -> np.ndarray:
    """Write `<path_stem>.png` and `<path_stem>.txt` for the first prompts; returns the grid, (H, W, 3) uint8.

    Each row of the grid is a prompt: its caption, the real image, and its G drawings with their total rewards, the best
    in green; where nothing was drawn, the question and the answers instead.
    The text file has every answer and every reward part.
    """
    stem = Path(path_stem)
    stem.parent.mkdir(parents=True, exist_ok=True)
    count = min(num_prompts, len(rollout.prompts))
    grid = _grid(rollout, scores, count)
    Image.fromarray(grid).save(f"{stem}.png")
    Path(f"{stem}.txt").write_text(_text(rollout, scores, count), encoding="utf-8")
    return grid


def _grid(rollout: Rollout, scores: Scores, count: int) -> np.ndarray:
    side = _cell_side(rollout)
    font, title_font = ImageFont.load_default(12), ImageFont.load_default(14)
    width = 2 * MARGIN + (rollout.group_size + 1) * (side + GAP) + GAP
    prompts = rollout.prompts[:count]
    titles = [prompt.question if rollout.images is None else prompt.caption for prompt in prompts]
    titles = [_wrap(title, title_font, width - 2 * MARGIN)[:TITLE_LINES] for title in titles]
    heights = [(len(lines) + 1) * LINE + side + 2 * GAP + MARGIN for lines in titles]
    sheet = Image.new("RGB", (width, MARGIN + sum(heights)), BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    totals = scores.total.tolist()
    top = MARGIN
    for index, lines in enumerate(titles):
        for number, line in enumerate(lines):
            draw.text((MARGIN, top + number * LINE), line, INK, title_font)
        y = top + len(lines) * LINE + GAP
        _put(sheet, prompts[index].image.convert("RGB"), MARGIN, y, side)
        draw.text((MARGIN + side / 2, y + side + 2), "real", FAINT, font, anchor="ma")
        rows = range(index * rollout.group_size, (index + 1) * rollout.group_size)
        scored = {totals[row] for row in rows if not math.isnan(totals[row])}
        best = max(scored) if len(scored) > 1 else math.nan
        for place, row in enumerate(rows):
            x = MARGIN + side + 3 * GAP + place * (side + GAP)
            if rollout.images is not None:
                _put(sheet, _picture(rollout.images.pixels[row]), x, y, side)
            elif rollout.texts is not None:
                _write(draw, rollout.texts.answers[row], x, y, side, font)
            colour = BEST if totals[row] == best else INK
            draw.text((x + side / 2, y + side + 2), _number(totals[row]), colour, font, anchor="ma")
        top += heights[index]
    return np.asarray(sheet)


def _cell_side(rollout: Rollout) -> int:
    """Pixels per cell: small images grow by a whole factor to about 96, large ones shrink to 192 at most."""
    if rollout.images is None:
        return LARGE_SIDE
    size = max(rollout.images.pixels.shape[-2:])
    return size * max(1, round(SMALL_SIDE / size)) if size <= SMALL_SIDE else min(size, LARGE_SIDE)


def _picture(pixels: torch.Tensor) -> Image.Image:
    """(3, H, W) in [0, 1] as an image."""
    array = pixels.detach().float().nan_to_num().clamp(0, 1).mul(255).round().byte()
    return Image.fromarray(array.permute(1, 2, 0).cpu().numpy())


def _put(sheet: Image.Image, image: Image.Image, x: int, y: int, side: int) -> None:
    scale = side / max(image.size)
    method = Image.Resampling.NEAREST if scale >= 1 else Image.Resampling.BOX
    width, height = (max(1, round(length * scale)) for length in image.size)
    left, top = x + (side - width) // 2, y + (side - height) // 2
    sheet.paste(image.resize((width, height), method), (left, top))
    ImageDraw.Draw(sheet).rectangle((x - 1, y - 1, x + side, y + side), outline=FRAME)


def _write(draw: ImageDraw.ImageDraw, text: str, x: int, y: int, side: int, font: ImageFont.FreeTypeFont) -> None:
    draw.rectangle((x - 1, y - 1, x + side, y + side), outline=FRAME)
    lines = _wrap(text.replace("><", "> <"), font, side - 8)
    room = (side - 8) // (LINE - 1)
    for number, line in enumerate(lines[:room]):
        cut = number == room - 1 and len(lines) > room
        draw.text((x + 4, y + 4 + number * (LINE - 1)), line[:-1] + "…" if cut else line, INK, font)


def _wrap(text: str, font: ImageFont.FreeTypeFont, width: float) -> list[str]:
    """Lines of at most `width` pixels, broken at spaces where there are any."""
    lines = [""]
    for word in text.split() or [""]:
        joined = f"{lines[-1]} {word}".strip()
        if font.getlength(joined) <= width:
            lines[-1] = joined
            continue
        if lines[-1]:
            lines.append("")
        for letter in word:
            if lines[-1] and font.getlength(lines[-1] + letter) > width:
                lines.append("")
            lines[-1] += letter
    return lines


def _number(value: float) -> str:
    return "unscored" if math.isnan(value) else f"{value:.2f}"


def _text(rollout: Rollout, scores: Scores, count: int) -> str:
    totals = scores.total.tolist()
    parts = {name: values.tolist() for name, values in scores.parts.items()}
    lines = []
    for index, prompt in enumerate(rollout.prompts[:count]):
        lines += [f"=== {prompt.id} ({prompt.question_type})", f"caption:  {prompt.caption}"]
        lines += [f"question: {prompt.question}", f"solution: {prompt.solution}"]
        for row in range(index * rollout.group_size, (index + 1) * rollout.group_size):
            rewards = " ".join(f"{name} {_number(values[row])}" for name, values in parts.items())
            lines.append(f"[{row % rollout.group_size + 1}] reward {_number(totals[row])} ({rewards})")
            if rollout.texts is not None:
                cut = "" if rollout.texts.finished[row] else "  (cut at the length limit)"
                lines.append(f"{INDENT}{rollout.texts.answers[row]}{cut}")
        lines.append("")
    return "\n".join(lines)


def sample_files(folder: str | Path) -> list[SampleFile]:
    """The samples under a run's folder `samples/`, which are named `<global step>-<stage>-<step>`, oldest first."""
    found = []
    for picture in Path(folder).glob("*.png"):
        if name := re.fullmatch(r"(\d+)-(\w+)-(\d+)", picture.stem):
            found.append(SampleFile(int(name[1]), name[2], int(name[3]), picture))
    return sorted(found, key=lambda file: file.global_step)


def read_answers(path: str | Path) -> list[SampledPrompt]:
    """The prompts of a text file that `save_samples` wrote; none has answers where only drawings were sampled."""
    text = Path(path).read_text(encoding="utf-8", errors="replace")
    prompts = []
    for block in re.split(r"^=== ", text, flags=re.M)[1:]:
        head, *rows = re.split(r"^\[\d+\] reward (\S+) .*\n?", block, flags=re.M)
        asked = re.search(r"^question: (.*?)\nsolution: (.*)", head, flags=re.M | re.S)
        answers = [
            (reward, answer.strip())
            for reward, answer in zip(rows[::2], rows[1::2], strict=True)
            if answer.startswith(INDENT)
        ]
        prompts.append(SampledPrompt(asked[1] if asked else "", asked[2].strip() if asked else "", answers))
    return prompts

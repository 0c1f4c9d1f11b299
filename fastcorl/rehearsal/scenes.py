"""Pictures of a few coloured things, each with a caption like COCO's and a question."""

import io
import random
from collections.abc import Callable
from typing import NamedTuple

from PIL import Image, ImageDraw

COLOURS = {
    "red": (205, 40, 40),
    "blue": (45, 80, 200),
    "green": (40, 140, 60),
    "yellow": (240, 205, 50),
    "white": (245, 245, 240),
    "black": (25, 25, 30),
    "pink": (240, 130, 170),
    "brown": (120, 75, 40),
}
GROUNDS = {"grass": (110, 165, 80), "sand": (220, 200, 150), "snow": (228, 236, 242), "road": (125, 125, 130)}
SKY = (165, 200, 235)
SIZES = [(640, 480), (480, 640), (640, 427), (500, 375)]
COUNTS = {2: "two", 3: "three"}
QUALITY = 90

Box = tuple[int, int, int, int]
Colour = tuple[int, int, int]


def _ball(draw: ImageDraw.ImageDraw, box: Box, colour: Colour) -> None:
    draw.ellipse(box, colour)


def _box(draw: ImageDraw.ImageDraw, box: Box, colour: Colour) -> None:
    draw.rectangle(box, colour)


def _kite(draw: ImageDraw.ImageDraw, box: Box, colour: Colour) -> None:
    left, top, right, bottom = box
    middle = (left + right) // 2
    draw.polygon(
        [(middle, top), (right, (2 * top + bottom) // 3), (middle, bottom), (left, (2 * top + bottom) // 3)], colour
    )


def _tent(draw: ImageDraw.ImageDraw, box: Box, colour: Colour) -> None:
    left, top, right, bottom = box
    draw.polygon([((left + right) // 2, top), (right, bottom), (left, bottom)], colour)


def _sign(draw: ImageDraw.ImageDraw, box: Box, colour: Colour) -> None:
    left, top, right, bottom = box
    middle, waist = (left + right) // 2, (top + bottom) // 2
    draw.rectangle((middle - 4, waist, middle + 4, bottom), (90, 90, 90))
    draw.rectangle((left, top, right, waist), colour)


THINGS: dict[str, Callable[[ImageDraw.ImageDraw, Box, Colour], None]] = {
    "ball": _ball,
    "box": _box,
    "kite": _kite,
    "tent": _tent,
    "sign": _sign,
}


class Scene(NamedTuple):
    """`things` are (name, colour) from left to right, no name and no colour twice."""

    things: tuple[tuple[str, str], ...]
    ground: str
    size: tuple[int, int]


class Question(NamedTuple):
    problem: str
    solution: str


def make_scene(rng: random.Random) -> Scene:
    count = rng.choice(list(COUNTS))
    things = zip(rng.sample(list(THINGS), count), rng.sample(list(COLOURS), count), strict=True)
    return Scene(tuple(things), rng.choice(list(GROUNDS)), rng.choice(SIZES))


def draw(scene: Scene, rng: random.Random) -> bytes:
    """The picture as a JPEG file."""
    width, height = scene.size
    horizon = int(height * rng.uniform(0.4, 0.55))
    image = Image.new("RGB", scene.size, SKY)
    canvas = ImageDraw.Draw(image)
    canvas.rectangle((0, horizon, width, height), GROUNDS[scene.ground])
    cell = width // len(scene.things)
    for place, (name, colour) in enumerate(scene.things):
        side = int(cell * rng.uniform(0.5, 0.8))
        left = place * cell + rng.randint(0, cell - side)
        bottom = horizon + rng.randint(side // 3, height - horizon)
        THINGS[name](canvas, (left, bottom - side, left + side, bottom), COLOURS[colour])
    file = io.BytesIO()
    image.save(file, "JPEG", quality=QUALITY)
    return file.getvalue()


def caption(scene: Scene, rng: random.Random) -> str:
    named = [f"a {colour} {name}" for name, colour in scene.things]
    if len(named) == 2:
        listed = rng.choice(["{} next to {}", "{} and {}", "{} beside {}"]).format(*named)
    else:
        listed = f"{named[0]}, {named[1]} and {named[2]}"
    return f"{listed} on the {scene.ground}.".capitalize()


def ask(scene: Scene, rng: random.Random, kind: str) -> Question:
    """A question of type `kind`, MC with lettered options or OE, and its solution in CoRL's format."""
    name, colour = rng.choice(scene.things)
    problem, thought, answer = f"What colour is the {name}?", f"The {name} is {colour}.", colour
    if kind == "MC":
        options = rng.sample([other for other in COLOURS if other != colour], 3)
        options.insert(rng.randrange(4), colour)
        letters = dict(zip("ABCD", options, strict=True))
        problem += "".join(f"\n{letter}. {text}" for letter, text in letters.items())
        answer = next(letter for letter, text in letters.items() if text == colour)
    elif rng.random() < 0.3:
        answer = COUNTS[len(scene.things)]
        problem, thought = f"How many things are on the {scene.ground}?", f"There are {answer} things."
    elif rng.random() < 0.5:
        problem, thought, answer = f"Which thing is {colour}?", f"The {colour} thing is a {name}.", name
    return Question(problem, f"<think>{thought}</think><answer>{answer}</answer>")

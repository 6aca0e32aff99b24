"""Pictures of coloured shapes with captions, drawn: text-to-image data for trying out, in no file.

Every draw comes from one numpy generator; the same seed gives the same pixels. `evaluation/shapes.py` reads
such a picture back.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
SIZE = 32  # pixels a side
FINE = 2  # pixels are the mean of FINE x FINE points
RGB = {
    "red": (220, 40, 40),
    "green": (40, 170, 60),
    "blue": (40, 80, 220),
    "yellow": (240, 215, 50),
    "purple": (140, 50, 170),
    "orange": (245, 135, 30),
    "white": (245, 245, 245),
    "black": (20, 20, 20),
}
COLOURS = tuple(RGB)
PALETTE = np.array(list(RGB.values()), np.float32) / 127.5 - 1  # (colours, 3), in [-1, 1]
SHAPES = ("circle", "square", "triangle", "cross")  # what pre-training teaches a pipeline to draw
OTHERS = ("diamond", "star", "heart", "ring")  # what only its autoencoder and CLIP have seen
PATTERNS = ("striped", "dotted")  # so have these
GRAIN = 0.03  # standard deviation of the noise on each pixel


@dataclass(frozen=True)
class Figure:
    """What a picture shows: one or two shapes alike before a background.

    Attributes:
        colour: Of the shape.
        shape: One of `SHAPES` and `OTHERS`.
        background: Its colour.
        count: 1 or 2.
        size: "small", "big" or "" for any; of one shape.
        pattern: One of `PATTERNS`, or "".
        second: The pattern's colour, or "".
    """

    colour: str
    shape: str
    background: str
    count: int = 1
    size: str = ""
    pattern: str = ""
    second: str = ""

    @property
    def held_out(self) -> bool:
        """Whether pre-training leaves out colour, shape and background together; about 9 % are."""
        places = COLOURS.index(self.colour), (*SHAPES, *OTHERS).index(self.shape)
        return (places[0] * 7 + places[1] * 3 + COLOURS.index(self.background) * 5) % 11 == 0

    def caption(self, *, background: bool = True) -> str:
        """In words: "two small red squares on a blue background"."""
        colours = f"{self.colour} and {self.second}" if self.pattern else self.colour
        words = " ".join(word for word in (self.size, self.pattern, colours, self.shape) if word)
        named = f"two {plural(words)}" if self.count == 2 else f"{article(words)} {words}"
        return f"{named} {behind(self.background)}" if background else named


def article(words: str) -> str:
    """The indefinite one."""
    return "an" if words[0] in "aeiou" else "a"


def plural(noun: str) -> str:
    """Of a shape."""
    return noun + ("es" if noun.endswith("s") else "s")


def behind(colour: str) -> str:
    """The end of a caption that names the background."""
    return f"on {article(colour)} {colour} background"


def inside(shape: str, right: NDArray[np.float64], down: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Which points of the square [-1, 1]² lie in a shape.

    Args:
        shape: One of `SHAPES` and `OTHERS`.
        right: Their first coordinate, of any form.
        down: Their second, of the same form.
    """
    across, along = np.abs(right), np.abs(down)
    radius = right**2 + down**2
    if shape == "circle":
        return radius < 1
    if shape == "square":
        return np.maximum(across, along) < 0.88
    if shape == "triangle":
        return (down < 0.85) & (down > -1 + 1.9 * across)
    if shape == "cross":
        return ((across < 0.33) & (along < 1)) | ((along < 0.33) & (across < 1))
    if shape == "diamond":
        return across + along < 1
    if shape == "ring":
        return (radius < 1) & (radius > 0.3)
    if shape == "heart":
        x, y = right * 1.15, 0.1 - down * 1.15
        return (x * x + y * y - 0.72) ** 3 - 1.6 * x * x * y**3 < 0
    assert shape == "star", shape
    turn, inner = 2 * np.pi / 5, 0.42
    angle = np.abs((np.arctan2(right, -down) + turn / 2) % turn - turn / 2)
    # the edge from a tip at (1, 0) to the corner between two tips
    normal = inner * np.sin(turn / 2), 1 - inner * np.cos(turn / 2)
    return np.sqrt(radius) * (np.cos(angle) * normal[0] + np.sin(angle) * normal[1]) < normal[0]


_POINTS = (np.mgrid[0 : SIZE * FINE, 0 : SIZE * FINE] + 0.5) / FINE  # (2, fine, fine): down, right, in pixels


@dataclass(frozen=True)
class Placed:
    """One shape where it is drawn: colours (3,) in [-1, 1], centre and radius in pixels."""

    shape: str
    colour: Floats
    right: float
    down: float
    radius: float
    pattern: str = ""
    second: Floats | None = None


def draw(background: Floats, shapes: Sequence[Placed], rng: np.random.Generator) -> Floats:
    """A picture (3, SIZE, SIZE) in [-1, 1], with a little noise."""
    canvas = np.broadcast_to(background, (SIZE * FINE, SIZE * FINE, 3)).copy()
    for each in shapes:
        right, down = (_POINTS[1] - each.right) / each.radius, (_POINTS[0] - each.down) / each.radius
        within = inside(each.shape, right, down)
        canvas[within] = each.colour
        if each.pattern == "striped":
            canvas[within & (np.floor((down + 1) * 2.5 + 0.001) % 2 == 1)] = each.second
        elif each.pattern == "dotted":
            dots = ((right * 2.2) % 1 - 0.5) ** 2 + ((down * 2.2) % 1 - 0.5) ** 2 < 0.09
            canvas[within & dots] = each.second
    pixels = canvas.reshape(SIZE, FINE, SIZE, FINE, 3).mean((1, 3))
    pixels = pixels + rng.normal(0, GRAIN, pixels.shape).astype(np.float32)
    return np.clip(pixels, -1, 1).transpose(2, 0, 1).astype(np.float32)


def picture(figure: Figure, rng: np.random.Generator) -> Floats:
    """A picture (3, SIZE, SIZE) in [-1, 1] of what `figure` says, at a place and in tints of its own."""
    first = _tint(figure.colour, rng)
    second = _tint(figure.second, rng) if figure.second else None
    background = _tint(figure.background, rng)
    places = [
        Placed(figure.shape, first, *place, figure.pattern, second)
        for place in _places(figure.count, figure.size, rng)
    ]
    return draw(background, places, rng)


def _tint(colour: str, rng: np.random.Generator) -> Floats:
    tint = PALETTE[COLOURS.index(colour)] + rng.normal(0, 0.04, 3).astype(np.float32)
    return np.clip(tint, -1, 1)


def _places(count: int, size: str, rng: np.random.Generator) -> list[tuple[float, float, float]]:
    """(right, down, radius) of each shape, in pixels."""
    if count == 1:
        radius = rng.uniform(*{"small": (5.5, 7), "big": (11.5, 13.5), "": (7.5, 11)}[size])
        room = min(SIZE / 2 - radius - 1, 4.0)
        return [(SIZE / 2 + rng.uniform(-room, room), SIZE / 2 + rng.uniform(-room, room), radius)]
    radius, down = rng.uniform(6, 7), SIZE / 2 + rng.uniform(-4, 4)
    return [(at + rng.uniform(-0.8, 0.8), down, radius) for at in (8.3, 23.7)]


def any_figure(rng: np.random.Generator, *, wide: bool = False, held_out: bool | None = False) -> Figure:
    """A figure at random.

    Args:
        rng: Where it is drawn from.
        wide: Whether shapes and patterns that the pipeline has not seen may come.
        held_out: Whether it is of the combinations that are kept out; None: either.
    """
    while True:
        first, ground, second = (COLOURS[at] for at in rng.choice(len(COLOURS), 3, replace=False))
        shape = str(rng.choice([*SHAPES, *OTHERS] if wide else SHAPES))
        figure = Figure(first, shape, ground)
        if wide and rng.random() < 0.35:
            figure = replace(figure, pattern=str(rng.choice(PATTERNS)), second=second)
        if rng.random() < 0.25:
            figure = replace(figure, count=2)
        elif rng.random() < 0.2:
            figure = replace(figure, size=str(rng.choice(("small", "big"))))
        if held_out is None or figure.held_out == held_out:
            return figure


def like(figure: Figure, rng: np.random.Generator) -> Figure:
    """`figure` with one attribute changed: what a caption that is nearly right says."""
    while True:
        what = str(rng.choice(("colour", "background", "shape", "count")))
        if what == "count":
            changed = replace(figure, count=3 - figure.count, size="")
        elif what == "shape":
            known = SHAPES if figure.shape in SHAPES and not figure.pattern else (*SHAPES, *OTHERS)
            changed = replace(figure, shape=str(rng.choice(known)))
        else:
            taken = {figure.colour, figure.background, figure.second}
            free = [colour for colour in COLOURS if colour not in taken]
            changed = (
                replace(figure, colour=str(rng.choice(free)))
                if what == "colour"
                else replace(figure, background=str(rng.choice(free)))
            )
        if changed != figure:
            return changed


@dataclass(frozen=True)
class Subject:
    """One thing that the pipeline does not know, named by a word without a meaning.

    Attributes:
        name: The word.
        figure: What it looks like, before any background.
    """

    name: str
    figure: Figure

    def caption(self, background: str) -> str:
        """As its owner says it: "a sks square on a red background"."""
        return f"a {self.name} {self.figure.shape} {behind(background)}"

    def before(self, background: str) -> Figure:
        """The figure before a background."""
        return replace(self.figure, background=background)


SUBJECTS = (  # of one colour: of patterns a 32 x 32 picture shows too little for the pixel check
    Subject("sks", Figure("purple", "square", "")),
    Subject("zwx", Figure("white", "circle", "")),
    Subject("vrn", Figure("orange", "triangle", "")),
    Subject("qpl", Figure("green", "cross", "")),
    Subject("tuj", Figure("yellow", "heart", "")),
)


def backgrounds(subject: Subject) -> tuple[str, ...]:
    """The colours that a subject has not itself, seven; the last is kept for pictures that nobody trains on.

    The one before it is neither trained on nor scored: settings are chosen with prompts before that.
    """
    return tuple(c for c in COLOURS if c not in (subject.figure.colour, subject.figure.second))


def subject_pictures(split: str) -> list[tuple[Subject, str, Floats]]:
    """The bundled pictures, each with its subject and background.

    Args:
        split: "train": five of each subject, a background each. "test": two of each before the seventh.
    """
    found = []
    for number, subject in enumerate(SUBJECTS):
        colours = backgrounds(subject)
        for place, colour in enumerate(colours[:5] if split == "train" else colours[-1:] * 2):
            rng = np.random.default_rng([number, place, 0 if split == "train" else 1])
            found.append((subject, colour, picture(subject.before(colour), rng)))
    return found


_CAPTION = re.compile(
    rf"^(?:(?P<two>two)|an?) (?:(?P<size>small|big) )?(?:(?P<pattern>{'|'.join(PATTERNS)}) )?"
    rf"(?P<colour>{'|'.join(COLOURS)})(?: and (?P<second>{'|'.join(COLOURS)}))? "
    rf"(?P<shape>{'|'.join((*SHAPES, *OTHERS))})(?:e?s)? "
    rf"on an? (?P<background>{'|'.join(COLOURS)}) background$"
)


def figure_of(caption: str) -> Figure | None:
    """What a caption as `Figure.caption` writes it says; None of any other text."""
    found = _CAPTION.match(caption)
    if found is None:
        return None
    parts = {name: value or "" for name, value in found.groupdict().items() if name != "two"}
    figure = Figure(**parts, count=2 if found["two"] else 1)
    return figure if figure.caption() == caption else None

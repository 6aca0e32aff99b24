"""The pixel check: reads a picture of coloured shapes back, as far as `data/shapes.py` draws such.

A CLIP score can rise while the shape that was asked for is not there; this looks at the pixels alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from fedtune.data.shapes import COLOURS, OTHERS, PALETTE, SHAPES, Figure, Floats, inside

EVERY_SHAPE = (*SHAPES, *OTHERS)
SIDE = 24  # pixels of a template
FAR = 0.22  # squared distance from the background, a pixel, from which a pixel is of a shape
LEAST = 15  # pixels of a shape; less is noise
ALIKE = 0.7  # intersection over union with the best template from which on it is that shape
SECOND = 0.15  # of a shape's pixels, from which on a second colour is a pattern's


@dataclass(frozen=True)
class Seen:
    """What a picture shows by its pixels.

    Attributes:
        background: The colour nearest to the edge's median.
        count: How many shapes of about the largest one's size.
        colours: Of their pixels, the most frequent first, those of a share of `SECOND` or more.
        shape: The template nearest to the largest one; "" where none is.
        alike: Intersection over union with that template.
    """

    background: str
    count: int
    colours: tuple[str, ...]
    shape: str
    alike: float


def read(picture: Floats, shapes: Sequence[str] = EVERY_SHAPE) -> Seen:
    """What a picture (3, height, width) in [-1, 1] shows.

    Args:
        picture: Its pixels.
        shapes: Those that it may be.
    """
    pixels = picture.transpose(1, 2, 0)
    edge = np.median(np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]]), 0)
    background = _nearest(edge)
    found = [part for part in _components(((pixels - edge) ** 2).sum(2) > FAR) if part.sum() >= LEAST]
    if not found:
        return Seen(background, 0, (), "", 0.0)
    largest = max(found, key=lambda part: int(part.sum()))
    found = [part for part in found if part.sum() >= 0.4 * largest.sum()]
    colours = Counter(_nearest(pixel) for pixel in pixels[np.logical_or.reduce(found)])
    enough = SECOND * colours.total()
    outline = _fitted(largest)
    overlaps = {shape: _overlap(outline, _template(shape)) for shape in shapes}
    shape = max(overlaps, key=lambda name: overlaps[name])
    return Seen(
        background,
        len(found),
        tuple(colour for colour, pixels_of in colours.most_common() if pixels_of >= enough),
        shape if overlaps[shape] > ALIKE else "",
        overlaps[shape],
    )


def right(picture: Floats, figure: Figure, shapes: Sequence[str] = EVERY_SHAPE) -> dict[str, bool]:
    """Whether a picture (3, height, width) in [-1, 1] shows what `figure` says, by attribute.

    A pattern is right if both its colours are there and no third.
    """
    seen = read(picture, shapes)
    wanted = {figure.colour, figure.second} - {""}
    colours = set(seen.colours if figure.pattern else seen.colours[:1])
    return {
        "background": seen.background == figure.background,
        "colour": colours == wanted,
        "count": seen.count == figure.count,
        "shape": seen.shape == figure.shape,
    }


def _nearest(pixel: NDArray[np.floating]) -> str:
    return COLOURS[int(((PALETTE - pixel) ** 2).sum(1).argmin())]


@cache
def _template(shape: str) -> NDArray[np.bool_]:
    steps = (np.arange(200) + 0.5) / 100 - 1
    return _fitted(inside(shape, *np.meshgrid(steps, steps)))


def _fitted(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """What is inside a mask's bounding box, at SIDE x SIDE pixels."""
    rows, columns = np.where(mask)
    cut = mask[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
    steps = (np.arange(SIDE) + 0.5) / SIDE
    taken: NDArray[np.bool_] = cut[(steps * cut.shape[0]).astype(int)][:, (steps * cut.shape[1]).astype(int)]
    return taken


def _overlap(one: NDArray[np.bool_], other: NDArray[np.bool_]) -> float:
    return float((one & other).sum() / (one | other).sum())


def _components(mask: NDArray[np.bool_]) -> list[NDArray[np.bool_]]:
    """The connected parts of a mask, by edges."""
    left, parts = mask.copy(), []
    for start in zip(*np.where(mask), strict=True):
        if not left[start]:
            continue
        part, waiting = np.zeros_like(mask), [start]
        left[start] = False
        while waiting:
            row, column = waiting.pop()
            part[row, column] = True
            for at in ((row + 1, column), (row - 1, column), (row, column + 1), (row, column - 1)):
                if 0 <= at[0] < mask.shape[0] and 0 <= at[1] < mask.shape[1] and left[at]:
                    left[at] = False
                    waiting.append(at)
        parts.append(part)
    return parts

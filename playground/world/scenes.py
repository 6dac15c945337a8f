"""Owns what is in a picture (`Scene`) and how a scene that fits a caption is drawn at random.

Centres lie on the corners of the base model's 4-pixel patches, which makes the world learnable
in minutes. Owns no pixels (see `render`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from itertools import permutations

import numpy as np

from playground.world.captions import COLOURS, Spec, Thing

SIZE = 32
"""Width and height of a picture, in pixels."""
BACKGROUND = (40, 40, 40)
RGB = {
    "red": (230, 50, 50),
    "green": (50, 200, 60),
    "blue": (60, 90, 240),
    "yellow": (235, 215, 50),
    "magenta": (220, 60, 215),
    "cyan": (50, 215, 225),
}

_GRID = (8, 12, 16, 20, 24)
_RADIUS = {2: 5.0, 3: 4.0}
_MIN_GAP = 12
"""Between centres, along x or y: radius 5 leaves 2 px between shapes, so that none touch."""


@dataclass(frozen=True)
class Placed:
    """A coloured shape; x and y are the middle of its bounding box, in pixels."""

    shape: str
    colour: str
    x: float
    y: float
    radius: float


@dataclass(frozen=True)
class Scene:
    """One to three shapes that don't overlap, on a dark grey background."""

    objects: tuple[Placed, ...]

    @property
    def things(self) -> tuple[Thing, ...]:
        return tuple(Thing(placed.shape, placed.colour) for placed in self.objects)


def sample_scene(
    spec: Spec,
    rng: np.random.Generator,
    allowed: Callable[[tuple[Thing, ...]], bool] = lambda things: True,
) -> Scene:
    """A random scene that fits the caption, with everything it leaves open drawn at random.

    `allowed` judges the things once they all have colours: pretraining passes one that refuses
    held-out combinations, which a caption without colours would otherwise bring in.
    """
    things = _coloured(spec, rng)
    while not allowed(things):
        things = _coloured(spec, rng)
    places = _placements(len(things), spec.relation)
    place = places[rng.integers(len(places))]
    radius = _RADIUS.get(len(things)) or rng.uniform(5.0, 6.4)
    return Scene(
        tuple(
            Placed(thing.shape, thing.colour, float(x), float(y), float(radius))
            for thing, (x, y) in zip(things, place, strict=True)
        )
    )


def fits(scene: Scene, spec: Spec) -> bool:
    """Whether the scene is what the caption asks for: the truth that verdicts are held against."""
    if len(scene.objects) != len(spec.things):
        return False
    return any(
        all(_is_a(placed, thing) for placed, thing in zip(order, spec.things, strict=True))
        and (not spec.relation or _related(_centre(order[0]), _centre(order[1]), spec.relation))
        for order in permutations(scene.objects)
    )


def _is_a(placed: Placed, thing: Thing) -> bool:
    return placed.shape == thing.shape and thing.colour in ("", placed.colour)


def _centre(placed: Placed) -> tuple[float, float]:
    return placed.x, placed.y


def _coloured(spec: Spec, rng: np.random.Generator) -> tuple[Thing, ...]:
    return tuple(Thing(thing.shape, thing.colour or COLOURS[rng.integers(len(COLOURS))]) for thing in spec.things)


@lru_cache
def _placements(num: int, relation: str) -> list[tuple[tuple[int, int], ...]]:
    """Every way to put this many shapes on the grid, apart and in the relation."""
    cells = [(x, y) for x in _GRID for y in _GRID]
    return [
        cells
        for cells in permutations(cells, num)
        if _apart(cells) and (not relation or _related(cells[0], cells[1], relation))
    ]


def _apart(cells: tuple[tuple[int, int], ...]) -> bool:
    return all(max(abs(a[0] - b[0]), abs(a[1] - b[1])) >= _MIN_GAP for i, a in enumerate(cells) for b in cells[:i])


def _related(first: tuple[float, float], second: tuple[float, float], relation: str) -> bool:
    """Clearly so: the offset along the relation's axis exceeds the other by a grid cell."""
    dx, dy = second[0] - first[0], second[1] - first[1]
    along = {"left of": dx, "right of": -dx, "above": dy, "below": -dy}[relation]
    across = dy if relation in ("left of", "right of") else dx
    return along >= abs(across) + 4

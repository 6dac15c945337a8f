"""Owns the verdict: does a picture show what a caption asks for, and how much of it?

`look` finds the shapes in a picture without knowing the caption; `verify` compares them with
it. Strict: exactly the things asked for, each shape and colour right, the relation holds.
Dense: the mean of what is right, 1 if and only if strict. Both are deterministic.

How shapes are found: the median is the background; a pixel belongs to the colour its offset
from the background points to, if it covers half a pixel of it; 4-connected pixels of one colour
are an object; its shape is the one whose analytic template, at the measured centre and area,
overlaps it best.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import permutations

import numpy as np

from playground.world.captions import COLOURS, SHAPES, Spec, Thing
from playground.world.render import AREA, CENTROID_Y, coverage
from playground.world.scenes import BACKGROUND, RGB, SIZE

MIN_IOU = 0.75
"""Overlap with the best template below which an object has no shape."""
SHARP_IOU = 0.95
"""Below this an object may be blurred: templates with soft edges are tried as well."""
BLUR_SOFTNESS = 2.1
"""The edge of a shape blurred with a sigma of 0.8 px, as a linear ramp."""
MIN_AREA = 8
"""Pixels below which a spot counts as noise; the smallest shape has 32."""
MIN_COSINE = 0.9
"""Below this an object's colour is none of the six."""
MIN_COVERAGE = 0.5
"""Of the nearest colour, for a pixel to be part of an object."""
MIN_OFFSET = 3.0
"""Pixels along a relation's axis."""
UNKNOWN = "unknown"

_OFFSETS = np.array([np.subtract(RGB[colour], BACKGROUND) for colour in COLOURS], dtype=np.float32)
_NORMS = np.linalg.norm(_OFFSETS, axis=1)
_DIRECTIONS = _OFFSETS / _NORMS[:, None]
_ROW = (1 << SIZE) - 1
_NOT_FIRST_COLUMN = sum((_ROW >> 1) << (SIZE * row) for row in range(SIZE))
_NOT_LAST_COLUMN = sum((_ROW - 1) << (SIZE * row) for row in range(SIZE))
_ALL = (1 << SIZE * SIZE) - 1
_PIXEL = np.arange(SIZE) + 0.5


@dataclass(frozen=True)
class Found:
    """An object in a picture: x and y are its centre of mass, area is in pixels, `ious` follow SHAPES."""

    shape: str
    colour: str
    x: float
    y: float
    area: float
    ious: tuple[float, ...]


@dataclass(frozen=True)
class Verdict:
    """`reasons` say what is wrong, in words; empty if and only if strict."""

    strict: bool
    dense: float
    reasons: tuple[str, ...]
    found: tuple[Found, ...]


def verify(image: np.ndarray, spec: Spec) -> Verdict:
    """Judges a uint8 [32, 32, 3] picture by a caption."""
    return judge(look(image), spec)


def look(image: np.ndarray) -> tuple[Found, ...]:
    """Every object in the picture."""
    if image.shape != (SIZE, SIZE, 3) or image.dtype != np.uint8:
        raise ValueError(f"expected uint8 [32, 32, 3], got {image.dtype} {image.shape}")
    labels, covers = _label_pixels(image)
    return tuple(
        _measure(np.where(region & ((labels == label) | (labels < 0)), covers[label], 0.0), label)
        for label in np.unique(labels[labels >= 0]).tolist()
        for region in _regions(labels == label)
    )


def judge(found: tuple[Found, ...], spec: Spec) -> Verdict:
    """Compares objects with a caption; the matching that scores best counts."""
    things = spec.things
    num_slots = max(len(found), len(things))
    padded = [*found, *[None] * (num_slots - len(found))]
    # Pictures of noise hold dozens of objects: the largest few are enough to match against.
    padded = sorted(padded, key=lambda each: -each.area if each else 0)[: len(things) + 3]
    best_parts: list[float] = []
    best: tuple[Found | None, ...] = ()
    for match in permutations(padded, len(things)):
        parts = [_thing_score(each, thing) for each, thing in zip(match, things, strict=True)]
        if spec.relation:
            parts.append(_relation_score(match[0], match[1], spec.relation))
        if not best or sum(parts) > sum(best_parts):
            best, best_parts = match, parts
    surplus = abs(len(found) - len(things))
    parts = [*best_parts, max(0.0, 1.0 - surplus / len(things))]
    reasons = _reasons(best, found, spec)
    return Verdict(not reasons, float(sum(parts) / len(parts)), reasons, found)


def _label_pixels(image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Labels [32, 32] and, per label, how much of each pixel it covers [labels, 32, 32].

    A label is the index of a colour, or len(COLOURS) for an unknown one; -1 is background.
    """
    flat = image.reshape(-1, 3).astype(np.float32)
    offsets = flat - np.median(flat, axis=0)
    along = _DIRECTIONS @ offsets.T
    norms = np.sqrt(np.einsum("ij,ij->i", offsets, offsets))
    nearest = along.argmax(axis=0)
    cosines = along.max(axis=0) / np.maximum(norms, 1e-6)
    labels = np.where(cosines >= MIN_COSINE, nearest, len(COLOURS))
    labels[norms < MIN_COVERAGE * _NORMS[nearest]] = -1
    covers = np.vstack((along / _NORMS[:, None], norms / _NORMS[nearest]))
    return labels.reshape(SIZE, SIZE), covers.clip(0.0, 1.0).reshape(-1, SIZE, SIZE)


def _regions(mask: np.ndarray) -> list[np.ndarray]:
    """The 4-connected parts of at least MIN_AREA pixels, each with the pixels round it.

    Parts are flooded as one integer of 1,024 bits: ten times faster than a loop over pixels.
    """
    left = int.from_bytes(np.packbits(mask).tobytes(), "big")
    regions = []
    while left:
        part, grown = 0, left & -left
        while grown != part:
            part = grown
            grown = (_spread_sideways(part) | part << SIZE | part >> SIZE) & left
        left &= ~part
        if part.bit_count() >= MIN_AREA:
            row = _spread_sideways(part)
            region = (row | row << SIZE | row >> SIZE) & _ALL
            packed = np.frombuffer(region.to_bytes(SIZE * SIZE // 8, "big"), np.uint8)
            regions.append(np.unpackbits(packed).reshape(SIZE, SIZE).view(bool))
    return regions


def _spread_sideways(bits: int) -> int:
    return bits | (bits << 1 & _NOT_LAST_COLUMN) | (bits >> 1 & _NOT_FIRST_COLUMN)


def _measure(cover: np.ndarray, label: int) -> Found:
    """The object that covers so much of each pixel [32, 32]."""
    columns, rows = cover.sum(axis=0), cover.sum(axis=1)
    area = float(columns.sum())
    x, y = float(columns @ _PIXEL) / area, float(rows @ _PIXEL) / area
    xs, ys = np.flatnonzero(columns), np.flatnonzero(rows)
    # A margin of 3 px round the object's box holds all of any template of its area.
    left, right = max(xs[0] - 3, 0), min(xs[-1] + 4, SIZE)
    top, bottom = max(ys[0] - 3, 0), min(ys[-1] + 4, SIZE)
    crop = cover[top:bottom, left:right]
    pixels = (_PIXEL[None, left:right], _PIXEL[top:bottom, None])
    ious = tuple(_iou(crop, area, shape, pixels, x, y, 1.0) for shape in SHAPES)
    if max(ious) < SHARP_IOU:
        soft = tuple(_iou(crop, area, shape, pixels, x, y, BLUR_SOFTNESS) for shape in SHAPES)
        ious = max(ious, soft, key=max)
    best = max(range(len(SHAPES)), key=ious.__getitem__)
    shape = SHAPES[best] if ious[best] >= MIN_IOU else UNKNOWN
    return Found(shape, (*COLOURS, UNKNOWN)[label], x, y, area, ious)


def _iou(
    crop: np.ndarray,
    area: float,
    shape: str,
    pixels: tuple[np.ndarray, np.ndarray],
    x: float,
    y: float,
    softness: float,
) -> float:
    radius = (area / AREA[shape]) ** 0.5
    template = coverage(shape, *pixels, x, y - CENTROID_Y[shape] * radius, radius, softness)
    shared = float(np.minimum(crop, template).sum())
    return shared / (area + float(template.sum()) - shared)


def _fits(found: Found | None, thing: Thing) -> bool:
    return (
        found is not None
        and found.shape == thing.shape
        and (found.colour == thing.colour if thing.colour else found.colour != UNKNOWN)
    )


def _thing_score(found: Found | None, thing: Thing) -> float:
    """Half for the colour, half for the shape; part of the latter for one that is close to it."""
    if found is None:
        return 0.0
    colour = found.colour == thing.colour if thing.colour else found.colour != UNKNOWN
    if found.shape == thing.shape:
        return 0.5 * colour + 0.5
    return 0.5 * colour + 0.25 * found.ious[SHAPES.index(thing.shape)]


def _relation_score(first: Found | None, second: Found | None, relation: str) -> float:
    return float(first is not None and second is not None and _holds(first, second, relation))


def _holds(first: Found, second: Found, relation: str) -> bool:
    """At most one of the four relations holds between two objects."""
    dx, dy = second.x - first.x, second.y - first.y
    along = {"left of": dx, "right of": -dx, "above": dy, "below": -dy}[relation]
    across = dy if relation in ("left of", "right of") else dx
    return along >= MIN_OFFSET and along > abs(across)


def _reasons(match: tuple[Found | None, ...], found: tuple[Found, ...], spec: Spec) -> tuple[str, ...]:
    reasons = []
    if len(found) != len(spec.things):
        reasons.append(f"{len(found)} objects, not {len(spec.things)}")
    for each, thing in zip(match, spec.things, strict=True):
        if not _fits(each, thing):
            seen = f"a {each.colour} {each.shape}" if each else "nothing"
            reasons.append(f"{seen} where a {thing.text} should be")
    if spec.relation and not _relation_score(match[0], match[1], spec.relation):
        reasons.append(f"the first is not {spec.relation} the second")
    return tuple(reasons)

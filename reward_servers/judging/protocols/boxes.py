"""Boxes with scores and one score for the layout, as a map over the image (SRUM).

W = 1/2 everywhere; inside a box W = max(W, (score + 1) / 2); then W <- W (layout + 1) / 2. The published code takes a
missing layout for 0; here an answer without one is undecided, like any other that lacks what was asked for.
Does not own: the loss weighted by the map (the learner).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from reward_servers.judging.judge import Judge
from reward_servers.judging.protocols.base import Protocol, bounded, quoted
from reward_servers.judging.question import Picture, Question, Undecided
from reward_servers.judging.reading import json_object, number, short_text

_MAX_BOXES = 64
_TASK = """This image was asked for with the text: "{prompt}"
List every object of the text, and every object in the image that does not belong there. Give each its bounding box \
[x0, y0, x1, y1] in {unit} and a score from -1 (wrong or badly drawn) to 1 (right and well drawn). Then score the \
layout of the whole from -1 to 1. Answer with one JSON object."""


@dataclass(frozen=True)
class Box:
    """x0 < x1 and y0 < y1 as shares of the image in [0,1]; score in [-1,1]."""

    name: str
    x0: float
    y0: float
    x1: float
    y1: float
    score: float


@dataclass(frozen=True)
class Regions:
    """What the judge found. layout in [-1,1]."""

    boxes: tuple[Box, ...]
    layout: float

    def map(self, height: int, width: int, signed: bool = False) -> np.ndarray:
        """float32 [height,width] in [0,1]; signed: in [-1,1], 0 where no box is, W = score * layout's factor."""
        grid = np.full((height, width), -np.inf if signed else 0.5, np.float32)
        for box in self.boxes:
            rows = slice(int(np.floor(box.y0 * height)), max(int(np.ceil(box.y1 * height)), 1))
            columns = slice(int(np.floor(box.x0 * width)), max(int(np.ceil(box.x1 * width)), 1))
            value = box.score if signed else (box.score + 1) / 2
            grid[rows, columns] = np.maximum(grid[rows, columns], value)
        return np.where(np.isinf(grid), np.float32(0), grid) * np.float32((self.layout + 1) / 2)


class Boxes(Protocol):
    """thousandths: the model counts in thousandths of width and height (Qwen-VL), not in pixels."""

    name = "boxes"
    paper = "SRUM: Fine-Grained Self-Rewarding for Unified Multimodal Models (2510.12784)"

    def __init__(self, thousandths: bool = False, max_tokens: int = 1024, max_text: int | None = None) -> None:
        self.thousandths, self.max_tokens, self.max_text = thousandths, max_tokens, max_text

    async def ask(self, judge: Judge, prompt: str, picture: Picture) -> Regions:
        """The regions of one picture. Raises Undecided or AttemptFailed."""
        unit = "thousandths of the image" if self.thousandths else f"pixels ({picture.width} x {picture.height})"
        text = _TASK.replace("{unit}", unit).replace("{prompt}", quoted(prompt))
        question = Question((picture, text), self.label, self.max_tokens, schema=bounded(SCHEMA, self.max_text))
        size = (1000.0, 1000.0) if self.thousandths else (float(picture.width), float(picture.height))
        return read_regions(json_object(await self._ask(judge, question)), size)


_ITEM: dict[str, Any] = {
    "type": "object",
    "properties": {
        "object": {"type": "string"},
        "box": {"type": "array", "items": {"type": "number"}, "minItems": 4, "maxItems": 4},
        "score": {"type": "number", "minimum": -1, "maximum": 1},
    },
    "required": ["object", "box", "score"],
    "additionalProperties": False,
}
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "objects": {"type": "array", "items": _ITEM, "maxItems": _MAX_BOXES},
        "layout": {"type": "number", "minimum": -1, "maximum": 1},
    },
    "required": ["objects", "layout"],
    "additionalProperties": False,
}


def read_regions(answer: dict[str, Any], size: tuple[float, float]) -> Regions:
    """The regions in an answer. size: (width, height) its numbers are counted in.

    Boxes are cut to the image; empty and outside ones are left out, as in the published code; if that leaves none of
    those given, or anything else is malformed, Undecided.
    """
    listed = answer.get("objects")
    if not isinstance(listed, list) or len(listed) > _MAX_BOXES:
        raise Undecided("no list of objects")
    boxes = [box for entry in listed if (box := _read_box(entry, size)) is not None]
    if listed and not boxes:
        raise Undecided("every box is empty or outside the image")
    return Regions(tuple(boxes), _score(answer.get("layout")))


def _read_box(entry: Any, size: tuple[float, float]) -> Box | None:
    if not isinstance(entry, dict):
        raise Undecided("an object that is none")
    corners = entry.get("box")
    if not isinstance(corners, list) or len(corners) != 4:
        raise Undecided("a box without four numbers")
    x0, y0, x1, y1 = (number(corner, -1e6, 1e6) for corner in corners)
    x0, x1 = (min(max(x / size[0], 0.0), 1.0) for x in (x0, x1))
    y0, y1 = (min(max(y / size[1], 0.0), 1.0) for y in (y0, y1))
    score = _score(entry.get("score"))
    return Box(short_text(entry.get("object", ""), 100), x0, y0, x1, y1, score) if x0 < x1 and y0 < y1 else None


def _score(value: Any) -> float:
    """In [-1,1]: half a point beyond would be a quarter of the scale, so here nothing is brought back."""
    if isinstance(value, int | float) and not isinstance(value, bool) and not -1 <= value <= 1:
        raise Undecided("a score outside [-1, 1]")
    return number(value, -1.0, 1.0)

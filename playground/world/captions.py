"""Owns what a caption asks for (`Spec`) and the small grammar between a Spec and its English.

The kinds are GenEval's tasks, plus `position_attribute` (both at once). Owns no pictures
(see `scenes`, `render`) and no verdicts (see `verify`).

Grammar, in at most eight words:

    a [colour] shape                                     single, colour
    two|three [colour] shapes                            counting
    a [colour] shape and a [colour] shape                two, attribute
    a [colour] shape RELATION a [colour] shape           position, position_attribute
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

SHAPES = ("circle", "square", "triangle", "cross")
COLOURS = ("red", "green", "blue", "yellow", "magenta", "cyan")
RELATIONS = ("left of", "right of", "above", "below")
KINDS = ("single", "colour", "two", "counting", "position", "attribute", "position_attribute")
COUNTS = {2: "two", 3: "three"}
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}

_PLURALS = {"circle": "circles", "square": "squares", "triangle": "triangles", "cross": "crosses"}
_SINGULARS = {plural: shape for shape, plural in _PLURALS.items()}

WORDS = (
    *("a", "and", "left", "right", "of", "above", "below"),
    *COUNTS.values(),
    *SHAPES,
    *_PLURALS.values(),
    *COLOURS,
)
"""Every word a caption can hold: the tokenizer's vocabulary."""


@dataclass(frozen=True, order=True)
class Thing:
    """A shape as a caption names it; an empty colour means that any will do."""

    shape: str
    colour: str = ""

    @property
    def text(self) -> str:
        return f"{self.colour} {self.shape}".lstrip()


@dataclass(frozen=True)
class Spec:
    """What a caption asks for: exactly these things in the picture, and nothing else.

    Example: Spec("position", (Thing("circle", "red"), Thing("square")), relation="left of")
    reads "a red circle left of a square". Only counting has a `count` above 1, of its one thing.
    """

    kind: str
    objects: tuple[Thing, ...]
    relation: str = ""
    count: int = 1

    def __post_init__(self) -> None:
        problem = _problem(self)
        if problem:
            raise ValueError(f"no such caption: {problem}")

    @property
    def text(self) -> str:
        if self.kind == "counting":
            (thing,) = self.objects
            words = (COUNTS[self.count], thing.colour, _PLURALS[thing.shape])
            return " ".join(word for word in words if word)
        return f" {self.relation or 'and'} ".join(f"a {thing.text}" for thing in self.objects)

    @property
    def things(self) -> tuple[Thing, ...]:
        """Every thing that must be in the picture, one entry for each."""
        return self.objects * self.count

    def to_metadata(self) -> dict[str, Any]:
        """A JSON-able form; `from_metadata` reads it back."""
        return {
            "kind": self.kind,
            "objects": [{"shape": thing.shape, "colour": thing.colour} for thing in self.objects],
            "relation": self.relation,
            "count": self.count,
        }

    @classmethod
    def from_metadata(cls, metadata: dict[str, Any]) -> Spec:
        objects = tuple(Thing(entry["shape"], entry["colour"]) for entry in metadata["objects"])
        return cls(metadata["kind"], objects, metadata["relation"], metadata["count"])


def kind_of(objects: tuple[Thing, ...], relation: str, count: int) -> str:
    """The one kind that a well-formed set of things belongs to."""
    if count > 1:
        return "counting"
    if len(objects) == 1:
        return "colour" if objects[0].colour else "single"
    all_coloured = all(thing.colour for thing in objects)
    if relation:
        return "position_attribute" if all_coloured else "position"
    return "attribute" if all_coloured else "two"


def parse_caption(text: str) -> Spec:
    """The Spec whose text this is; ValueError for anything else."""
    words = text.split()
    for relation in ("and", *RELATIONS):
        parts = text.split(f" {relation} ")
        if len(parts) == 2:
            relation = "" if relation == "and" else relation
            return _spec((_parse_single(parts[0]), _parse_single(parts[1])), relation)
    if words and words[0] in COUNTS.values():
        count = next(number for number, word in COUNTS.items() if word == words[0])
        *colour, plural = words[1:] or [""]
        return _spec((Thing(_SINGULARS.get(plural, ""), " ".join(colour)),), "", count)
    return _spec((_parse_single(text),), "")


def _parse_single(text: str) -> Thing:
    article, *colour, shape = text.split() if len(text.split()) >= 2 else ["", ""]
    if article != "a":
        raise ValueError(f"no such caption: expected 'a [colour] shape', got {text!r}")
    return Thing(shape, " ".join(colour))


def _spec(objects: tuple[Thing, ...], relation: str, count: int = 1) -> Spec:
    return Spec(kind_of(objects, relation, count), objects, relation, count)


def _problem(spec: Spec) -> str:
    """Why this is no caption, or an empty string."""
    if any(thing.shape not in SHAPES for thing in spec.objects):
        return f"shapes are {SHAPES}"
    if any(thing.colour not in ("", *COLOURS) for thing in spec.objects):
        return f"colours are {COLOURS}, or empty"
    if spec.relation not in ("", *RELATIONS):
        return f"relations are {RELATIONS}, or empty"
    if len(spec.objects) not in (1, 2) or (spec.count > 1 and len(spec.objects) != 1):
        return "it names one thing, a number of one thing, or two things"
    if spec.count not in (1, *COUNTS) or (spec.relation and len(spec.objects) != 2):
        return f"counts are 1, {tuple(COUNTS)}; a relation needs two things"
    if len(spec.objects) == 2 and not _tellable(*spec.objects):
        return "two things must differ in what both captions name"
    if spec.kind != kind_of(spec.objects, spec.relation, spec.count):
        return f"kind {spec.kind!r} does not fit what it names"
    return ""


def _tellable(first: Thing, second: Thing) -> bool:
    """Two of one shape need two colours; else "a circle" could be either of them."""
    if first.shape != second.shape:
        return True
    return bool(first.colour and second.colour) and first.colour != second.colour

"""GenEval's rules (arXiv 2310.11513): from detected objects and one prompt's metadata to a verdict. numpy only.

metadata as in GenEval's evaluation_metadata.jsonl: tag (one of the six tasks), include [{class, count, color?,
position?: [relation, index of an earlier clause]}], exclude [{class, count}]. Detection and colours are handed in.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from contracts.config.scorers import GenevalOptions

TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
ALIASES = {"computer mouse": "mouse", "tv remote": "remote", "computer keyboard": "keyboard"}  # GenEval -> COCO


@dataclass(frozen=True)
class Detected:
    """One object: class name, confidence, box (x0, y0, x1, y1) in pixels, bool mask [H,W] or None."""

    name: str
    score: float
    box: tuple[float, float, float, float]
    mask: np.ndarray | None = None


Colouring = Callable[[Sequence[Detected], str], list[str]]


@dataclass(frozen=True)
class Verdict:
    """correct: every clause holds; fraction: share of clauses that hold; right, wrong: the objects that made it so."""

    correct: bool
    fraction: float
    reasons: tuple[str, ...]
    right: tuple[Detected, ...] = ()
    wrong: tuple[Detected, ...] = ()


@dataclass
class _Tally:
    held: list[bool] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)
    right: list[Detected] = field(default_factory=list)
    wrong: list[Detected] = field(default_factory=list)

    def clause(self, problem: str, objects: Sequence[Detected], wrong: Sequence[Detected]) -> None:
        """One clause: held when there is no problem. wrong: those of its objects that are to blame."""
        self.held.append(not problem)
        self.wrong.extend(wrong)
        self.right.extend(one for one in objects if not any(one is other for other in wrong))
        if problem:
            self.reasons.append(problem)


def kept_objects(found: Sequence[Detected], tag: str, options: GenevalOptions) -> dict[str, list[Detected]]:
    """Objects that count, by class, best first: above the task's threshold, at most max_objects, not overlapping."""
    threshold = options.counting_threshold if tag == "counting" else options.threshold
    classes: dict[str, list[Detected]] = {}
    for one in sorted(found, key=lambda one: -one.score):
        if one.score > threshold:
            classes.setdefault(one.name, []).append(one)
    return {name: _apart(objects[: options.max_objects], options.max_overlap) for name, objects in classes.items()}


def check_metadata(metadata: Mapping[str, Any], known: Sequence[str]) -> None:
    """Raises ValueError for what is not GenEval's format, and for classes and colours nobody can find."""
    if metadata.get("tag") not in TASKS:
        raise ValueError(f"metadata['tag'] is {metadata.get('tag')!r}, not one of {', '.join(TASKS)}")
    clauses = [*(metadata.get("include") or []), *(metadata.get("exclude") or [])]
    if not metadata.get("include") or not all(isinstance(clause, dict) for clause in clauses):
        raise ValueError("metadata['include'] must list clauses like {'class': 'dog', 'count': 1}")
    for index, clause in enumerate(clauses):
        name, count = clause.get("class"), clause.get("count")
        if not isinstance(name, str) or coco_name(name) not in known:
            raise ValueError(f"the detector knows no class {name!r}")
        if not isinstance(count, int) or isinstance(count, bool) or count < 1:
            raise ValueError(f"clause {index} of the metadata has count {count!r}, not a whole number from 1")
        if "color" in clause and clause["color"] not in COLOURS:
            raise ValueError(f"clause {index} asks for {clause['color']!r}, not one of {', '.join(COLOURS)}")
        if "position" in clause:
            _check_position(clause["position"], index)


def judge(
    objects: Mapping[str, Sequence[Detected]], metadata: Mapping[str, Any], colours: Colouring, share: float
) -> Verdict:
    """The verdict. share: position_threshold. Colour and position are asked of the most confident objects only."""
    tally = _Tally()
    groups: list[Sequence[Detected] | None] = []
    for clause in metadata["include"]:
        name, count = clause["class"], clause["count"]
        found = list(objects.get(coco_name(name), []))[:count]
        problem, wrong = _included(clause, found, groups, colours, share)
        tally.clause(problem, found, wrong)
        groups.append(None if problem else found)
    for clause in metadata.get("exclude") or []:
        name, count = clause["class"], clause["count"]
        present = list(objects.get(coco_name(name), []))
        too_many = len(present) >= count
        problem = f"expected fewer than {count} {name}, found {len(present)}" if too_many else ""
        tally.clause(problem, [], present[count - 1 :] if too_many else [])
    right = tuple(one for one in tally.right if not any(one is other for other in tally.wrong))
    return Verdict(all(tally.held), float(np.mean(tally.held)), tuple(tally.reasons), right, tuple(tally.wrong))


def coco_name(name: str) -> str:
    return ALIASES.get(name, name)


def relations(box: Sequence[float], other: Sequence[float], share: float) -> set[str]:
    """Where `box` lies seen from `other`: centres further apart than `share` of both sizes, by main directions."""
    first, second = np.asarray(box, float).reshape(2, 2), np.asarray(other, float).reshape(2, 2)
    offset = first.mean(axis=0) - second.mean(axis=0)
    sizes = np.abs(first[1] - first[0]) + np.abs(second[1] - second[0])
    beyond = np.maximum(np.abs(offset) - share * sizes, 0) * np.sign(offset)
    if (np.abs(beyond) < 1e-3).all():
        return set()
    across, down = beyond / np.linalg.norm(offset)
    named = {"left of": across < -0.5, "right of": across > 0.5, "above": down < -0.5, "below": down > 0.5}
    return {name for name, holds in named.items() if holds}


def overlap(box: Sequence[float], other: Sequence[float]) -> float:
    """Intersection over union of boxes in whole pixels, both edges included."""

    def area(x0: float, y0: float, x1: float, y1: float) -> float:
        return max(x1 - x0 + 1, 0) * max(y1 - y0 + 1, 0)

    shared = area(max(box[0], other[0]), max(box[1], other[1]), min(box[2], other[2]), min(box[3], other[3]))
    union = area(*box) + area(*other) - shared
    return shared / union if union else 0.0


def _included(
    clause: Mapping[str, Any], found: list[Detected], groups: Sequence[Sequence[Detected] | None],
    colours: Colouring, share: float,
) -> tuple[str, list[Detected]]:  # fmt: skip
    """(what is wrong with a clause of `include`, or ''; the objects to blame: none when some are missing)."""
    name, count = clause["class"], clause["count"]
    if len(found) < count:
        return f"expected at least {count} {name}, found {len(found)}", []
    if "color" in clause:
        seen = colours(found, name)
        others = [one for one, colour in zip(found, seen, strict=True) if colour != clause["color"]]
        if others:
            return f"expected {count} {clause['color']} {name}, found {', '.join(seen)}", others
    if "position" in clause:
        relation, target = clause["position"]
        for one, other in itertools.product(found, groups[target] or []):
            seen_relations = relations(one.box, other.box, share)
            if relation not in seen_relations:
                where = " and ".join(sorted(seen_relations)) or "neither side of"
                return f"expected {name} {relation} its target, found it {where}", [one]
        if groups[target] is None:
            return f"nothing for {name} to be {relation}", []
    return "", []


def _apart(objects: Sequence[Detected], most: float) -> list[Detected]:
    kept: list[Detected] = []
    for one in objects:
        if most == 1 or all(overlap(other.box, one.box) < most for other in kept):
            kept.append(one)
    return kept


def _check_position(position: Any, index: int) -> None:
    right = isinstance(position, list | tuple) and len(position) == 2
    if not right or position[0] not in ("left of", "right of", "above", "below") or position[1] not in range(index):
        raise ValueError(f"clause {index} has position {position!r}, not [relation, index of an earlier clause]")

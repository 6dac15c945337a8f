"""Owns what the playground's small judge is taught: pictures, questions about them, and the verifier's answers.

Pictures are right, spoilt, empty, or painted by the base; captions are right ones and ones wrong by one attribute, all
of the train split: one that was only ever wrong in training would be learnt as wrong. Owns no network (see `fit_vlm`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import permutations, product

import numpy as np

from playground.train.fit_scorer import Painted, spoil
from playground.world.captions import RELATIONS, Spec, Thing, kind_of
from playground.world.prompts import allowed_in_train, specs_by_kind
from playground.world.reliability import wrong_by_one
from playground.world.render import render
from playground.world.scenes import sample_scene
from playground.world.verify import UNKNOWN, Found, judge, look

QUESTIONS = 4
"""Asked about each picture, half of them with the answer yes where the picture allows it."""
_CELL = 4.0
_MOST_DESCRIBED = 4


@dataclass(frozen=True)
class Lesson:
    """A picture uint8 [32,32,3], captions asked about it, the verifier's verdicts, and what it sees, in words."""

    picture: np.ndarray
    captions: tuple[str, ...]
    verdicts: tuple[bool, ...]
    description: str


def draw(painted: Painted | None, rng: np.random.Generator) -> Lesson:
    """One lesson."""
    spec, kind = _random_spec(rng), rng.random()
    if kind < 0.03:
        picture = _empty(rng)
    elif kind < 0.25 and painted is not None:
        index = int(rng.integers(len(painted.specs)))
        picture, spec = painted.pictures[index], painted.specs[index]
    else:
        picture = render(sample_scene(spec, rng, allowed_in_train))
        if kind > 0.85:
            picture = spoil(picture, rng).astype(np.uint8)
    found = look(picture)
    asked = _questions(found, spec, rng)
    verdicts = tuple(judge(found, each).strict for each in asked)
    return Lesson(picture, tuple(each.text for each in asked), verdicts, describe(found))


def describe(found: Sequence[Found]) -> str:
    """Colour, shape, column and row (in cells of 4 pixels) of the largest objects, from left to right."""
    largest = sorted(found, key=lambda each: -each.area)[:_MOST_DESCRIBED]
    cells = sorted((round(each.x / _CELL), round(each.y / _CELL), each.colour, each.shape) for each in largest)
    return "".join(f" {colour} {shape} {column} {row}" for column, row, colour, shape in cells)


def right_captions(found: Sequence[Found], rng: np.random.Generator) -> Iterator[Spec]:
    """Captions of the train split that the verifier accepts, each once, in random order."""
    candidates = list(_candidates(found))
    for index in rng.permutation(len(candidates)):
        spec = candidates[index]
        if allowed_in_train(spec.things) and judge(tuple(found), spec).strict:
            yield spec


def _candidates(found: Sequence[Found]) -> Iterator[Spec]:
    """Captions that name as many things as were found, of these shapes, with or without their colours."""
    if not 1 <= len(found) <= 3 or any(UNKNOWN in (each.shape, each.colour) for each in found):
        return
    things = [Thing(each.shape, each.colour) for each in found]
    if len(set(things)) == 1 or (len(things) > 1 and len({thing.shape for thing in things}) == 1):
        for thing in dict.fromkeys((things[0], replace(things[0], colour=""))):
            yield Spec(kind_of((thing,), "", len(things)), (thing,), "", len(things))
    if len(things) == 2:
        for order in permutations(things):
            named = product(*((thing, replace(thing, colour="")) for thing in order))
            for objects, relation in product(named, ("", *RELATIONS)):
                try:
                    yield Spec(kind_of(objects, relation, 1), objects, relation)
                except ValueError:
                    continue  # two things that no caption can tell apart


def _questions(found: tuple[Found, ...], spec: Spec, rng: np.random.Generator) -> list[Spec]:
    """The caption itself, right ones up to a half, ones wrong by one attribute, now and then any other."""
    asked = [spec]
    num_right = int(judge(found, spec).strict)
    for right in right_captions(found, rng):
        if num_right >= QUESTIONS // 2:
            break
        if right != spec:
            asked.append(right)
            num_right += 1
    wrong = [each for each in wrong_by_one(asked[-1]) if allowed_in_train(each.things)]
    if rng.random() < 0.2 or not wrong:
        asked.append(_random_spec(rng))
    while len(asked) < QUESTIONS:
        asked.append(wrong[rng.integers(len(wrong))] if wrong else _random_spec(rng))
    return asked[:QUESTIONS]


def _random_spec(rng: np.random.Generator) -> Spec:
    by_kind = list(specs_by_kind("train").values())
    of_kind = by_kind[rng.integers(len(by_kind))]
    return of_kind[rng.integers(len(of_kind))]


def _empty(rng: np.random.Generator) -> np.ndarray:
    """One colour, one grey, or noise."""
    if rng.random() < 0.3:
        return rng.integers(0, 256, (32, 32, 3)).astype(np.uint8)
    level = rng.integers(0, 256, 3) if rng.random() < 0.5 else rng.integers(0, 256)
    return np.full((32, 32, 3), level, np.uint8)

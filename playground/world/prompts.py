"""Owns which captions exist, who may see them, and in what order they come.

Splits go by *combination*: the things a caption names, without order, kind or relation. So "a
red circle left of a blue square" and "a blue square and a red circle" are always in one split,
and a combination held out is held out in every kind. Single things are all in train.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from functools import cache, lru_cache
from itertools import permutations

import numpy as np

from playground.world.captions import (
    COLOURS,
    COUNTS,
    KINDS,
    RELATIONS,
    SHAPES,
    Spec,
    Thing,
    kind_of,
)

SPLITS = ("train", "validation", "test")
_SALT = "salon-playground-71"
_ONE_IN = 12


def combination(things: tuple[Thing, ...]) -> str:
    """What a split goes by, e.g. "blue square + red circle"."""
    return " + ".join(sorted(thing.text for thing in things))


@cache
def split_of(things: tuple[Thing, ...]) -> str:
    """The split of these things; `spec.things` for a caption's."""
    if len(things) == 1:
        return "train"
    digest = hashlib.sha256(f"{_SALT}:{combination(things)}".encode()).digest()
    return {0: "validation", 1: "test"}.get(int.from_bytes(digest[:8], "big") % _ONE_IN, "train")


def allowed_in_train(things: tuple[Thing, ...]) -> bool:
    """For `sample_scene`: keeps held-out combinations out of pictures made for training."""
    return split_of(things) == "train"


@lru_cache
def all_specs() -> tuple[Spec, ...]:
    """Every caption there is, once."""
    plain = [Thing(shape) for shape in SHAPES]
    coloured = [Thing(shape, colour) for colour in COLOURS for shape in SHAPES]
    specs = [_spec((thing,)) for thing in plain + coloured]
    specs += [_spec((thing,), count=count) for thing in plain + coloured for count in COUNTS]
    for first, second in permutations(plain + coloured, 2):
        same_shape = first.shape == second.shape
        if same_shape and not (first.colour and second.colour):
            continue  # "a red circle and a circle": which is which?
        specs += [_spec((first, second), relation) for relation in ("", *RELATIONS)]
    return tuple(specs)


@lru_cache
def specs_by_kind(split: str) -> dict[str, tuple[Spec, ...]]:
    """The split's captions under their kinds; kinds without any are left out."""
    if split not in SPLITS:
        raise ValueError(f"no such split: {split!r}; there are {SPLITS}")
    grouped = {
        kind: tuple(spec for spec in all_specs() if spec.kind == kind and split_of(spec.things) == split)
        for kind in KINDS
    }
    return {kind: specs for kind, specs in grouped.items() if specs}


class PromptStream:
    """An endless stream of captions; item i depends on i alone.

    `kinds`: which kinds there are in it, all by default and each equally often; a mapping says how often, relative to
    each other. `position` is the index of the next item: set it to go on where another stream stopped.
    """

    def __init__(self, split: str, seed: int, kinds: Sequence[str] | Mapping[str, float] | None = None) -> None:
        grouped = specs_by_kind(split)
        unknown = sorted(set(kinds or ()) - set(grouped))
        if unknown:
            raise ValueError(f"{split} has no captions of kind {', '.join(unknown)}; it has {', '.join(grouped)}")
        self._split = split
        self._seed = seed
        self._by_kind = tuple(specs for kind, specs in grouped.items() if kinds is None or kind in kinds)
        self._shares = _shares([kinds[kind] for kind in grouped if kind in kinds] if isinstance(kinds, Mapping) else [])
        self.position = 0

    def __iter__(self) -> PromptStream:
        return self

    def __next__(self) -> Spec:
        spec = self.at(self.position)
        self.position += 1
        return spec

    def at(self, position: int) -> Spec:
        """The item at a position, which stays where it is."""
        rng = np.random.default_rng((self._seed, SPLITS.index(self._split), position))
        shares = self._shares
        kind = rng.integers(len(self._by_kind)) if shares is None else rng.choice(len(shares), p=shares)
        specs = self._by_kind[kind]
        return specs[rng.integers(len(specs))]

    def state(self) -> dict[str, int]:
        return {"position": self.position}


def _shares(weights: Sequence[float]) -> np.ndarray | None:
    """Probabilities; None for no weights. Raises ValueError for weights that are none."""
    if not weights:
        return None
    given = np.asarray(weights, dtype=float)
    if not (np.isfinite(given).all() and (given >= 0).all() and given.sum() > 0):
        raise ValueError(f"kinds cannot come {list(weights)} times as often; give positive numbers")
    return given / given.sum()


def prompt_stream(split: str, seed: int, kinds: Sequence[str] | Mapping[str, float] | None = None) -> PromptStream:
    """The seeded stream of a split's captions, of some kinds alone, or of some more often, if asked.

    Raises ValueError for an unknown kind, or weights that are no numbers from 0 up.
    """
    return PromptStream(split, seed, kinds)


def held_out_prompts(split: str, n: int, seed: int) -> list[Spec]:
    """n captions for evaluation: kinds in turn, each kind's captions all used before any repeats."""
    rng = np.random.default_rng((seed, SPLITS.index(split), 1))
    by_kind = specs_by_kind(split)
    kinds = list(by_kind)
    shuffled: dict[str, list[Spec]] = {kind: [] for kind in kinds}
    chosen = []
    for i in range(n):
        kind = kinds[i % len(kinds)]
        if not shuffled[kind]:
            shuffled[kind] = [by_kind[kind][j] for j in rng.permutation(len(by_kind[kind]))]
        chosen.append(shuffled[kind].pop())
    return chosen


def _spec(objects: tuple[Thing, ...], relation: str = "", count: int = 1) -> Spec:
    return Spec(kind_of(objects, relation, count), objects, relation, count)

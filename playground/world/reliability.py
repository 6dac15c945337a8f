"""Owns the measurement of the verifier against the truth, and the ways to spoil what it sees.

    python -m playground.world.reliability

prints how often it refuses a right caption and accepts one that is wrong by one attribute, on
clean, noisy and blurred pictures. The scorer's training uses the same captions and pictures.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from playground.world.captions import COLOURS, COUNTS, RELATIONS, SHAPES, Spec, Thing, kind_of
from playground.world.prompts import all_specs
from playground.world.render import render
from playground.world.scenes import fits, sample_scene
from playground.world.verify import verify

Degrade = Callable[[np.ndarray, np.random.Generator], np.ndarray]


def wrong_by_one(spec: Spec) -> tuple[Spec, ...]:
    """Every caption with one colour, shape, relation or count changed, or two colours exchanged.

    Some may still fit a given scene ("a circle and a red square" for "a red circle and a
    square", if the square is red as well): ask `scenes.fits`.
    """
    wrong = [replace(spec, relation=each) for each in RELATIONS if spec.relation]
    wrong += [replace(spec, count=each) for each in COUNTS if spec.count > 1]
    candidates = []
    for i, thing in enumerate(spec.objects):
        changed = [Thing(shape, thing.colour) for shape in SHAPES]
        changed += [Thing(thing.shape, colour) for colour in COLOURS if thing.colour]
        candidates += [(*spec.objects[:i], each, *spec.objects[i + 1 :]) for each in changed]
    if len(spec.objects) == 2:
        first, second = spec.objects
        candidates.append((Thing(first.shape, second.colour), Thing(second.shape, first.colour)))
    for objects in candidates:
        try:
            kind = kind_of(objects, spec.relation, spec.count)
            wrong.append(Spec(kind, objects, spec.relation, spec.count))
        except ValueError:
            continue  # two things that no caption can tell apart
    return tuple(dict.fromkeys(each for each in wrong if each != spec))


def untouched(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return image


def noisy(image: np.ndarray, rng: np.random.Generator, sigma: float = 0.10) -> np.ndarray:
    """Gaussian noise; sigma is a fraction of the full range."""
    return (image + rng.normal(0.0, 255 * sigma, image.shape)).clip(0, 255).astype(np.uint8)


def blurred(image: np.ndarray, rng: np.random.Generator, sigma: float = 0.8) -> np.ndarray:
    """A Gaussian blur; sigma is in pixels."""
    reach = 4
    kernel = np.exp(-(np.arange(-reach, reach + 1) ** 2) / (2 * sigma**2))
    kernel /= kernel.sum()
    padded = np.pad(image.astype(float), ((reach, reach), (reach, reach), (0, 0)), mode="edge")
    height, width = image.shape[:2]
    rows = sum(weight * padded[i : i + height] for i, weight in enumerate(kernel))
    both = sum(weight * rows[:, i : i + width] for i, weight in enumerate(kernel))
    return (both + 0.5).astype(np.uint8)


DEGRADATIONS: dict[str, Degrade] = {"clean": untouched, "noise 0.10": noisy, "blur 0.8 px": blurred}


@dataclass(frozen=True)
class ErrorRates:
    """`refused`: share of right captions judged wrong; `accepted`: of wrong ones judged right."""

    refused: float
    accepted: float
    num_pairs: int
    milliseconds: float


def error_rates(degrade: Degrade, num_scenes: int, seed: int) -> ErrorRates:
    """Judges each scene's picture by its own caption and by one that is wrong by one attribute."""
    rng = np.random.default_rng(seed)
    specs = all_specs()
    by_kind = {kind: [spec for spec in specs if spec.kind == kind] for kind in _kinds(specs)}
    refused = accepted = 0
    seconds = 0.0
    for i in range(num_scenes):
        kind = list(by_kind)[i % len(by_kind)]
        spec = by_kind[kind][rng.integers(len(by_kind[kind]))]
        scene = sample_scene(spec, rng)
        wrong = [each for each in wrong_by_one(spec) if not fits(scene, each)]
        image = degrade(render(scene), rng)
        started = time.perf_counter()
        refused += not verify(image, spec).strict
        accepted += verify(image, wrong[rng.integers(len(wrong))]).strict
        seconds += time.perf_counter() - started
    return ErrorRates(refused / num_scenes, accepted / num_scenes, 2 * num_scenes, seconds / num_scenes * 500)


def _kinds(specs: tuple[Spec, ...]) -> list[str]:
    return list(dict.fromkeys(spec.kind for spec in specs))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scenes", type=int, default=5_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    for name, degrade in DEGRADATIONS.items():
        rates = error_rates(degrade, args.scenes, args.seed)
        print(
            f"{name:12} refused {rates.refused:.2%} accepted {rates.accepted:.2%} "
            f"of {rates.num_pairs} pairs, {rates.milliseconds:.2f} ms an image"
        )


if __name__ == "__main__":
    main()

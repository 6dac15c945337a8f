"""Preferences read from JSONL, their strengths, held-out prompts, and the pairs of each epoch. Numpy and PIL only.

A prompt stands in one split, whatever its pairs, decided by its digest alone: adding data moves none. Labels of
held-out pairs are never turned nor softened. Order and cross-prompt partners of an epoch follow from the seed, so that
a resumed training sees what it would have seen. Does not own: the loss.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from contracts.errors import ConfigError
from reward_servers.training.config import ItemsConfig, LabelConfig, TrainingConfig


@dataclass(frozen=True)
class Sample:
    """One image of a prompt."""

    prompt: str
    image: Path


@dataclass(frozen=True)
class Pair:
    """A preference. strength: mu, log-odds that `chosen` is better (None: unknown); tie: neither is better."""

    chosen: Sample
    rejected: Sample
    strength: float | None = None
    tie: bool = False


@dataclass(frozen=True)
class Target:
    """What the loss asks of a pair: probability that `chosen` is better, and the margin it must lead by."""

    pair: Pair
    probability: float
    margin: float


@dataclass(frozen=True)
class Split:
    """Pairs, and single images that passed and failed."""

    pairs: tuple[Pair, ...]
    passed: tuple[Sample, ...] = ()
    failed: tuple[Sample, ...] = ()

    def samples(self) -> list[Sample]:
        """Every image once."""
        of_pairs = [sample for pair in self.pairs for sample in (pair.chosen, pair.rejected)]
        return list(dict.fromkeys([*of_pairs, *self.passed, *self.failed]))


def read_splits(config: TrainingConfig) -> tuple[Split, Split]:
    """(train, held out). Raises ConfigError naming the file and line of what cannot be read, or an empty split."""
    pairs = list(_pairs(Path(config.pairs))) if config.pairs else []
    items = list(_items(config.items)) if config.items else []
    splits = []
    for held_out in (False, True):
        mine = [p for p in pairs if is_held_out(p.chosen.prompt, config.held_out_fraction) == held_out]
        images = [(s, ok) for s, ok in items if is_held_out(s.prompt, config.held_out_fraction) == held_out]
        splits.append(
            Split(tuple(mine), tuple(s for s, ok in images if ok), tuple(s for s, ok in images if not ok))
        )  # fmt: skip
    for split, name in zip(splits, ("training", "held-out"), strict=True):
        decided = any(not pair.tie for pair in split.pairs) or (split.passed and split.failed)
        if not decided:
            raise ConfigError(
                "pairs, held_out_fraction", f"the {name} split has no preference in it",
                "give more prompts, or another held_out_fraction",
            )  # fmt: skip
    return splits[0], splits[1]


def is_held_out(prompt: str, fraction: float) -> bool:
    """Whether a prompt is measured and never trained on: by its digest alone."""
    digest = hashlib.blake2b(prompt.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") / 2**64 < fraction


def vote_strength(votes_for: float, votes_against: float) -> float:
    """mu: log-odds of a vote, with half a vote added on each side so that a unanimous one stays finite."""
    return math.log((votes_for + 0.5) / (votes_against + 0.5))


def flip_weakest(pairs: Sequence[Pair], share: float) -> list[Pair]:
    """The pairs with the labels of the `share` of lowest strength turned, as far as that strength is below 0.

    Ties and pairs of unknown strength stay. Secrets of RLHF II (2401.06080): a clearly negative mu is a wrong label.
    """
    known = [i for i, pair in enumerate(pairs) if pair.strength is not None and not pair.tie]
    weakest = sorted(known, key=lambda i: (pairs[i].strength, i))[: int(share * len(known))]
    turned = {i for i in weakest if (pairs[i].strength or 0.0) < 0}
    return [_turned(pair) if i in turned else pair for i, pair in enumerate(pairs)]


def target_of(pair: Pair, label: LabelConfig) -> Target:
    """What the loss asks of one training pair."""
    if pair.tie:
        return Target(pair, 0.5, 0.0)
    probability = {"hard": 1.0, "smooth": 1.0 - label.smoothing, "soft": 1.0}[label.kind]
    if label.kind == "soft" and pair.strength is not None:
        probability = 1 / (1 + math.exp(-pair.strength))
    margin = {"none": 0.0, "fixed": label.margin_size, "strength": label.margin_size * (pair.strength or 0.0)}
    return Target(pair, probability, margin[label.margin])


def cross_prompt_pairs(split: Split, items: ItemsConfig, seed: int, epoch: int) -> list[Pair]:
    """Pairs of single images for one epoch: each passed one against failed ones and tied with passed ones.

    Any prompts (SoliReward, 2512.22170); two failed ones are never tied, which was found to hurt.
    """
    rng = np.random.default_rng([seed, epoch, 1])
    pairs = []
    for index, winner in enumerate(split.passed):
        losers = rng.permutation(len(split.failed))[: items.wins_per_item]
        pairs += [Pair(winner, split.failed[i]) for i in losers]
        others = [i for i in rng.permutation(len(split.passed)).tolist() if i != index][: items.ties_per_item]
        pairs += [Pair(winner, split.passed[i], tie=True) for i in others]
    return pairs


def batches(split: Split, config: TrainingConfig, first_step: int) -> Iterator[list[Target]]:
    """Batches of targets without end, from step `first_step` (0: the first); every epoch in an order of its own."""
    epoch, number = 0, 0
    pairs = flip_weakest(split.pairs, config.label.flip_share)
    while True:
        mine = [*pairs, *(cross_prompt_pairs(split, config.items, config.seed, epoch) if config.items else [])]
        order = np.random.default_rng([config.seed, epoch, 0]).permutation(len(mine))
        for start in range(0, len(mine), config.batch_size):
            if number >= first_step:
                yield [target_of(mine[i], config.label) for i in order[start : start + config.batch_size]]
            number += 1
        epoch += 1


def read_image(path: Path, max_pixels: int) -> np.ndarray:
    """uint8 [H,W,3]. Raises ConfigError for what is no image or too large (checked before it is decoded)."""
    try:
        with Image.open(path) as image:
            if image.width * image.height > max_pixels:
                raise ConfigError(str(path), f"has {image.width * image.height} pixels, more than {max_pixels}",
                                  "make it smaller, or raise max_pixels")  # fmt: skip
            return np.asarray(image.convert("RGB"))
    except OSError as error:
        raise ConfigError(str(path), f"is no readable image ({error})") from error


def read_samples(path: Path) -> list[Sample]:
    """Reference images from JSONL lines with prompt and image."""
    return [_sample(row, "image", path, where) for row, where in _rows(path)]


def _pairs(path: Path) -> Iterator[Pair]:
    for row, where in _rows(path):
        chosen, rejected = _sample(row, "chosen", path, where), _sample(row, "rejected", path, where)
        yield Pair(chosen, rejected, _strength(row, where), _flag(row, "tie", where, False))


def _items(items: ItemsConfig) -> Iterator[tuple[Sample, bool]]:
    path = Path(items.path)
    for row, where in _rows(path):
        yield _sample(row, "image", path, where), _flag(row, "passed", where, None)


def _strength(row: Mapping[str, Any], where: str) -> float | None:
    votes, strength = row.get("votes"), row.get("strength")
    if votes is not None:
        if not isinstance(votes, list) or len(votes) != 2 or any(not _is_number(v) or v < 0 for v in votes):
            raise ConfigError(where, f"votes must be [for, against], not {votes!r}")
        return vote_strength(*votes)
    if strength is not None and (not _is_number(strength) or not math.isfinite(strength)):
        raise ConfigError(where, f"strength must be a number, not {strength!r}")
    return None if strength is None else float(strength)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _flag(row: Mapping[str, Any], name: str, where: str, default: bool | None) -> bool:
    value = row.get(name, default)
    if not isinstance(value, bool):
        raise ConfigError(where, f"{name} must be true or false, not {value!r}")
    return value


def _sample(row: Mapping[str, Any], key: str, path: Path, where: str) -> Sample:
    """Images are found from the file's own folder. A pair across prompts may give rejected_prompt."""
    prompt = row.get("rejected_prompt", row.get("prompt")) if key == "rejected" else row.get("prompt")
    if not isinstance(prompt, str) or not isinstance(row.get(key), str):
        raise ConfigError(where, f"needs the texts prompt and {key}")
    image = path.parent / row[key]
    if not image.is_file():
        raise ConfigError(where, f"{image} is not there", "paths are relative to the JSONL file")
    return Sample(prompt, image)


def _rows(path: Path) -> Iterator[tuple[Mapping[str, Any], str]]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(str(path), f"cannot be read ({error})", "give the path of a JSONL file") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ConfigError(where, f"is no JSON ({error.msg})") from error
        if not isinstance(row, dict):
            raise ConfigError(where, "is no JSON object")
        yield row, where


def _turned(pair: Pair) -> Pair:
    strength = None if pair.strength is None else -pair.strength
    return replace(pair, chosen=pair.rejected, rejected=pair.chosen, strength=strength)

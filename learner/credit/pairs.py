"""Preference pairs of a group: best against worst, second best against second worst, and so on.

Ties are skipped, never broken at random: a random label is noise with full weight. Does not own: the loss (dpo.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Pairing:
    """How pairs are formed. min_margin: reward gap a pair needs (a gap of 0 never suffices)."""

    min_margin: float = 0.0
    pairs_per_group: int = 1


def pairing_of(objective: Any) -> Pairing:
    """The pairing of an objective's configuration section; own objectives may give it among their options."""
    options = getattr(objective, "options", {})
    return Pairing(
        min_margin=getattr(objective, "min_margin", options.get("min_margin", 0.0)),
        pairs_per_group=getattr(objective, "pairs_per_group", options.get("pairs_per_group", 1)),
    )


def best_against_worst(rewards: np.ndarray, pairing: Pairing) -> list[tuple[int, int]]:
    """(winner, loser) sample indices of one group's rewards [G] (NaN: invalid), the widest gap first.

    At most pairs_per_group, each sample in one pair. Equal rewards keep sample order, so the pairs are the same on
    every machine.
    """
    valid = np.flatnonzero(np.isfinite(rewards))
    order = valid[np.argsort(-rewards[valid], kind="stable")]
    pairs = []
    for rank in range(min(pairing.pairs_per_group, len(order) // 2)):
        winner, loser = int(order[rank]), int(order[len(order) - 1 - rank])
        margin = rewards[winner] - rewards[loser]
        if margin <= 0 or margin < pairing.min_margin:
            break
        pairs.append((winner, loser))
    return pairs

"""How good a reward model is on prompts it never saw: accuracy, calibration, ties, passed against failed. Numpy only.

A probability of preference is sigmoid(r_chosen - r_rejected). Calibration bins the winner's probability, 1/2 to 1.
Does not own: where rewards come from.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

BINS = 10


@dataclass(frozen=True)
class Bin:
    """Pairs whose winner was given a probability between low and high."""

    low: float
    high: float
    pairs: int
    confidence: float
    accuracy: float


@dataclass(frozen=True)
class Evaluation:
    """Held-out figures. Those of pairs are None without decided pairs, tie_gap without ties, auroc without items.

    accuracy: an equal pair counts one half; calibration_error: expected, weighted by pairs; brier: mean (1 - p)^2;
    tie_gap: mean |r - r'| of tied pairs; auroc: P(a passed image's reward exceeds a failed one's).
    """

    pairs: int
    accuracy: float | None
    loss: float | None
    brier: float | None
    calibration_error: float | None
    bins: tuple[Bin, ...]
    tie_gap: float | None
    auroc: float | None
    reward_mean: float
    reward_std: float

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def evaluate(
    differences: np.ndarray, ties: np.ndarray, passed: np.ndarray, failed: np.ndarray, rewards: np.ndarray
) -> Evaluation:  # fmt: skip
    """differences [B]: chosen minus rejected of decided pairs; ties [T]: of tied ones; passed, failed, rewards: rewards
    of single images and of every held-out image."""
    d = np.asarray(differences, np.float64)
    some = len(d) > 0
    bins = reliability(d)
    return Evaluation(
        pairs=len(d),
        accuracy=float(np.mean((d > 0) + 0.5 * (d == 0))) if some else None,
        loss=float(np.logaddexp(0, -d).mean()) if some else None,
        brier=float(((1 - sigmoid(d)) ** 2).mean()) if some else None,
        calibration_error=sum(b.pairs * abs(b.accuracy - b.confidence) for b in bins) / len(d) if some else None,
        bins=bins,
        tie_gap=float(np.abs(ties).mean()) if len(ties) else None,
        auroc=auroc(passed, failed) if len(passed) and len(failed) else None,
        reward_mean=float(np.mean(rewards)),
        reward_std=float(np.std(rewards)),
    )


def reliability(differences: np.ndarray) -> tuple[Bin, ...]:
    """Bins with pairs in them, of the probability given to whichever image the model prefers."""
    confidence, right = sigmoid(np.abs(differences)), (differences > 0) + 0.5 * (differences == 0)
    edges = np.linspace(0.5, 1.0, BINS + 1)
    places = np.clip(np.digitize(confidence, edges) - 1, 0, BINS - 1)
    return tuple(
        Bin(float(edges[i]), float(edges[i + 1]), int(mine.sum()), float(confidence[mine].mean()),
            float(right[mine].mean()))
        for i in range(BINS)
        if (mine := places == i).any()
    )  # fmt: skip


def auroc(passed: np.ndarray, failed: np.ndarray) -> float:
    """Probability that a passed one is above a failed one, an equal pair one half."""
    above = np.asarray(passed)[:, None] - np.asarray(failed)[None, :]
    return float(((above > 0) + 0.5 * (above == 0)).mean())


def sigmoid(x: np.ndarray) -> np.ndarray:
    """Without overflow."""
    return 0.5 * (1 + np.tanh(np.asarray(x, np.float64) / 2))

"""A wished intensity of brightness or detail as a reward (AttriCtrl): score = -mean |u* - u(x)|.

u(x) is the rank of the measure among a frozen calibration set, (rank - 1/2) / n in the paper: the share below, ties
counted half. u* comes from the prompt: metadata['intensity'] = {"brightness": 0.7}. Does not own: the measures.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from contracts.config.scorers import AttriCtrlTargetOptions
from contracts.errors import ConfigError
from contracts.scores import ScoreTable
from reward_servers.scorers.attrictrl import MEASURES, PAPER
from reward_servers.scorers.base import ScoreBatch, declared
from reward_servers.scorers.parts.model_scorer import OptionScorer


class AttriCtrlTarget(OptionScorer[AttriCtrlTargetOptions]):
    """Score in [-1,0]; an image whose prompt asks for nothing, or for what is not calibrated, fails."""

    declares = declared("attrictrl_target")
    name = "attrictrl_target"
    paper = PAPER
    value_range = (-1.0, 0.0)

    def load(self) -> None:
        self._calibration = read_calibration(Path(self.options.calibration))

    def canary(self) -> ScoreBatch:
        batch = super().canary()
        return ScoreBatch(batch.images, batch.prompts, ({"intensity": {next(iter(self._calibration)): 0.5}},))

    def score(self, batch: ScoreBatch) -> ScoreTable:
        return self.table(np.array([self._one(*row) for row in zip(batch.images, batch.metadata, strict=True)]))

    def _one(self, image: np.ndarray, metadata: dict[str, Any]) -> float:
        asked = metadata.get("intensity")
        if not isinstance(asked, dict) or not asked:
            raise ValueError("metadata['intensity'] must be an object {measure: intensity in [0,1]}")
        misses = []
        for name, wanted in asked.items():
            if name not in self._calibration or not isinstance(wanted, int | float) or not 0 <= wanted <= 1:
                known = ", ".join(self._calibration)
                raise ValueError(f"metadata['intensity']: {name!r} = {wanted!r}; calibrated are {known}, within 0 to 1")
            misses.append(abs(wanted - intensity(self._calibration[name], MEASURES[name](image))))
        return -float(np.mean(misses))


def intensity(calibration: np.ndarray, value: float) -> float:
    """u in [0,1]: the share of a sorted calibration set below `value`, ties counted half."""
    below, upto = np.searchsorted(calibration, value, "left"), np.searchsorted(calibration, value, "right")
    return float((below + upto) / 2 / len(calibration))


def read_calibration(path: Path) -> dict[str, np.ndarray]:
    """{measure: sorted values}. Raises ConfigError."""
    way_out = 'a JSON file like {"brightness": [0.1, 0.4, ...]}'
    try:
        read = {name: np.sort(np.asarray(values, np.float64)) for name, values in json.loads(path.read_text()).items()}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ConfigError("calibration", f"{path} cannot be read: {error}", way_out) from error
    for name, values in read.items():
        if name not in MEASURES or values.ndim != 1 or not len(values) or not np.isfinite(values).all():
            raise ConfigError(
                "calibration", f"{name!r} in {path} is not a list of numbers of {' or '.join(MEASURES)}", way_out
            )
    if not read:
        raise ConfigError("calibration", f"{path} holds no measure", way_out)
    return read

"""Reward hacking as it shows from outside: the reward that is trained on rises, and a scorer that is not falls.

Gao et al. (2210.10760): under optimisation of a proxy its score goes on rising after the true one has begun to fall.
Both changes are measured in their own standard errors, not in points: scorers have scales of their own, and what
matters is whether a change stands out from what prompts and seeds make of a step.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean, variance
from typing import Any

from contracts.config.guards import HeldOutDivergenceConfig
from learner.guards.base import WELL, Guard, Row, Verdict, mean_score, measured


class HeldOutDivergence(Guard[HeldOutDivergenceConfig]):
    """Acts while the reward has risen by more than `rise` and the held-out score fallen by more than `fall` standard
    errors from the older to the newer half of the newest `window` steps.

    A step that lacks one of the two, or where one is not finite, is left out: the window goes on after it.
    """

    def __init__(self, config: HeldOutDivergenceConfig) -> None:
        super().__init__(config)
        self._pairs: list[tuple[float, float]] = []

    def see(self, row: Row) -> Verdict:
        config = self.config
        reward = measured(row, "reward") if config.reward is None else mean_score(row, config.reward)
        held_out = mean_score(row, config.held_out)
        if reward is not None and held_out is not None:
            self._pairs = [*self._pairs, (reward, held_out)][-config.window :]
        if len(self._pairs) < config.window:
            return WELL
        (risen, its_error), (changed, error) = (change(values) for values in zip(*self._pairs, strict=True))
        if risen > config.rise * its_error and -changed > config.fall * error:
            return self.alarm(
                f"over {config.window} steps {config.reward or 'the reward'} rose by {risen:.4g} (standard error "
                f"{its_error:.2g}) while {config.held_out}, held out, fell by {-changed:.4g} ({error:.2g})"
            )
        return WELL

    def state(self) -> dict[str, Any]:
        watched = {"reward": self.config.reward, "held_out": self.config.held_out}
        return {**watched, "pairs": [list(pair) for pair in self._pairs]}

    def restore(self, state: Mapping[str, Any]) -> None:
        if (state["reward"], state["held_out"]) == (self.config.reward, self.config.held_out):
            self._pairs = [(reward, held_out) for reward, held_out in state["pairs"]][-self.config.window :]


def change(values: Sequence[float]) -> tuple[float, float]:
    """(mean of the newer half minus mean of the older, its standard error) of an even number of steps' means.

    Welch's standard error from the spread of steps within each half, sqrt(s1^2/n + s2^2/n). A trend within the halves
    widens it, so it errs on the side of silence: a line without noise is n sqrt(6 / (n + 1)) of them, n = half.
    """
    half = len(values) // 2
    older, newer = values[:half], values[half:]
    return fmean(newer) - fmean(older), math.sqrt((variance(older) + variance(newer)) / half)

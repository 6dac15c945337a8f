"""Advantages count less where the scorers are unsure: Ctrl-U (2410.11236) and PrefPaint (2410.21966).

The reward is the weighted sum; its standard deviation is s_i = sqrt(sum_k w_k^2 s_ik^2) from the tables' uncertainties.
variance: weight exp(-s_i^2 / Var_batch(R)), the black-box form of Ctrl-U's exp(-u). bound: clip(exp(b - a s_i)), as
PrefPaint weighs by the width of the reward's confidence bound. Weights of a group average to 1 (normalise), so that the
learning rate keeps its meaning; equal uncertainty gives the plain weighted sum. A value without an uncertainty, and one
that is missing, is taken to be as sure as the group's mean: to have failed must not make a sample surer than others.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from contracts.config.aggregation import UncertaintyConfig
from contracts.errors import ScoringError
from learner.credit.aggregation.base import Aggregation
from learner.credit.aggregation.columns import GroupScores, Settled, sum_terms
from learner.credit.aggregation.statistics import spread
from learner.types import Aggregated


class Uncertainty(Aggregation[UncertaintyConfig]):
    """Stateless; the variance form measures rewards over the batch."""

    def aggregate(self, batch: Mapping[int, GroupScores], step: int) -> Aggregated:
        settled = {group_id: scores.weighted(("point",)) for group_id, scores in batch.items()}
        rewards = {group_id: sum_terms(group) for group_id, group in settled.items()}
        everything = np.concatenate([r.totals()[r.valid] for r in rewards.values()] or [np.zeros(0)])
        scale = spread(everything)
        weighted, seen = {}, []
        for group_id, group in settled.items():
            deviation = _deviation(group)
            weighted[group_id] = replace(rewards[group_id], scale=self._weights(deviation, group.counted, scale))
            seen.append(deviation[group.counted])
        metrics = {"score_uncertainty": float(np.concatenate(seen).mean())} if any(map(len, seen)) else {}
        return Aggregated(weighted, metrics)

    def _weights(self, deviation: np.ndarray, counted: np.ndarray, scale: float) -> np.ndarray:
        """float64 [G], 0 where a sample does not count."""
        weights = np.zeros(len(counted))
        if not counted.any():
            return weights
        s = deviation[counted]
        if self.config.form == "bound":
            raw = np.clip(np.exp(self.config.intercept - self.config.slope * s), self.config.low, self.config.high)
        else:
            exponent = (s / scale) ** 2 if scale > 0 else np.zeros(len(s))
            # Only ratios matter once normalised, so the smallest exponent is taken out before exp underflows.
            finite = np.isfinite(exponent).any()
            raw = np.exp(-(exponent - exponent.min() if self.config.normalise and finite else exponent))
        total = raw.sum()
        weights[counted] = raw * len(raw) / total if self.config.normalise and total > 0 else raw
        return weights


def _deviation(group: Settled) -> np.ndarray:
    """Standard deviation of each sample's weighted sum, float64 [G].

    Raises ScoringError when every scorer answered and none said how sure it is; one that failed might have said it.
    """
    answered = [column for column in group.columns if column.among(group.counted).any()]
    if len(answered) == len(group.columns) > 0 and all(column.uncertainty is None for column in answered):
        names = ", ".join(column.name for column in group.columns)
        raise ScoringError(
            f"credit.aggregation.name=uncertainty: no table says how sure it is ({names}). Use a scorer whose table "
            "has `uncertainty`, or credit.aggregation.name=weighted_sum"
        )
    variance = np.zeros(len(group.counted))
    for column in group.columns:
        if column.uncertainty is not None:
            known = column.among(group.counted) & ~np.isnan(column.uncertainty)
            neutral = float((column.uncertainty[known] ** 2).mean()) if known.any() else 0.0
            variance += column.weight**2 * np.where(known, column.uncertainty**2, neutral)
    return np.sqrt(variance)

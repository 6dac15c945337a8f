"""Constrained RLHF (2310.04373): a Lagrange multiplier holds each reward at the point where it stops being useful.

A = (N - sum_i mu_i) A_anchor + sum_i mu_i A_i, with A_i the reward centred within its group over its standard deviation
in the batch, and mu = tanh(lambda) (hold at the threshold, may push down), sigmoid(lambda) (push up to it) or
max(lambda, 0). Dual: once a learner step lambda descends sum_i mu_i (J_i - theta_i), J_i the mean score, with momentum.
The anchor is the paper's -KL reward: a named column, or none, when the objective's kl_beta pulls back. Without either
pull scores and multipliers circle each other for ever, so `validate` refuses that.
State: lambda, velocity and mean score of each column.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from contracts.config.aggregation import ConstrainedConfig
from learner.credit.aggregation.base import Aggregation
from learner.credit.aggregation.columns import Column, GroupScores, Settled, sum_terms
from learner.credit.aggregation.statistics import prefixed, spread
from learner.types import Aggregated, Rewards


@dataclass
class Dual:
    """One constraint. lam: before squashing; score: smoothed mean of the column, None before the first."""

    lam: float
    velocity: float = 0.0
    score: float | None = None


class Constrained(Aggregation[ConstrainedConfig]):
    """Keeps one Dual a threshold, in the order of the configuration."""

    def __init__(self, config: ConstrainedConfig) -> None:
        super().__init__(config)
        self.duals = {name: Dual(config.initial) for name in config.thresholds}

    def multiplier(self, name: str) -> float:
        """mu of one threshold."""
        lam = self.duals[name].lam
        if self.config.multiplier == "tanh":
            return float(np.tanh(lam))
        return float(1 / (1 + np.exp(-lam))) if self.config.multiplier == "sigmoid" else max(lam, 0.0)

    def aggregate(self, batch: Mapping[int, GroupScores], step: int) -> Aggregated:
        """The advantages' multipliers are those the last step ended with; this batch moves them for the next."""
        settled = {group_id: scores.named(*self._names()) for group_id, scores in batch.items()}
        multipliers = {name: self.multiplier(name) for name in self.duals}
        rewards = self._combined(settled, [*multipliers.values(), len(multipliers) - sum(multipliers.values())])
        self._observe(settled)
        return Aggregated(rewards, prefixed("multiplier", multipliers))

    def look_ahead(self, scores: GroupScores) -> Rewards:
        """Every column counts, in falling weights, so that opposite ones do not cancel.

        With multipliers still at 0 no group would hold a signal, and without groups nothing would ever move them.
        """
        return self._combined({0: scores.named(*self._names())}, [1 / (i + 1) for i in range(len(self._names()))])[0]

    def _names(self) -> list[str]:
        return [*self.config.thresholds, *([self.config.anchor] if self.config.anchor else [])]

    def _combined(self, settled: Mapping[int, Settled], weights: Sequence[float]) -> dict[int, Rewards]:
        """Normalised columns, summed with these weights in the order of _names()."""
        scales = [
            self._scale([group.columns[i] for group in settled.values()], settled) for i in range(len(self._names()))
        ]
        return {
            group_id: sum_terms(Settled(
                tuple(
                    replace(column, weight=weight, values=_centred(column, group.counted) / scale)
                    for column, weight, scale in zip(group.columns, weights, scales, strict=False)
                ), group.counted,
            ))
            for group_id, group in settled.items()
        }  # fmt: skip

    def update(self, scores: Mapping[str, float]) -> None:
        """One dual step from mean scores J by threshold name: lambda goes down where J exceeds its threshold."""
        for name, score in scores.items():
            dual, decay = self.duals[name], self.config.smoothing
            dual.score = score if dual.score is None else decay * dual.score + (1 - decay) * score
            gradient = self._slope(dual.lam) * (dual.score - self.config.thresholds[name])
            dual.velocity = self.config.momentum * dual.velocity + gradient
            dual.lam -= self.config.lr * dual.velocity
            if self.config.multiplier == "clamp":
                dual.lam = max(dual.lam, 0.0)

    def _slope(self, lam: float) -> float:
        """d mu / d lambda; 1 for the clamped form, which is projected instead, or it could never leave 0."""
        if self.config.multiplier == "tanh":
            return float(1 - np.tanh(lam) ** 2)
        squashed = 1 / (1 + np.exp(-lam))
        return float(squashed * (1 - squashed)) if self.config.multiplier == "sigmoid" else 1.0

    def _scale(self, columns: list[Column], settled: Mapping[int, Settled]) -> float:
        centred = [_centred(c, g.counted)[c.among(g.counted)] for c, g in zip(columns, settled.values(), strict=True)]
        return spread(np.concatenate(centred or [np.zeros(0)])) + self.config.eps

    def _observe(self, settled: Mapping[int, Settled]) -> None:
        """Mean scores of the batch; a column that nobody answered leaves its multiplier where it is."""
        positions = {name: index for index, name in enumerate(self.duals)}
        values = {
            name: np.concatenate([g.columns[i].values[g.columns[i].among(g.counted)] for g in settled.values()])
            for name, i in positions.items()
        }
        self.update({name: float(scores.mean()) for name, scores in values.items() if len(scores)})

    def state_dict(self) -> dict[str, Any]:
        return {name: asdict(dual) for name, dual in self.duals.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Thresholds that are new since the state was written start afresh; others that are gone are dropped."""
        fresh = {name: Dual(self.config.initial) for name in self.duals}
        self.duals = fresh | {name: Dual(**dual) for name, dual in state.items() if name in fresh}


def _centred(column: Column, counted: np.ndarray) -> np.ndarray:
    have = column.among(counted)
    if spread(column.values[have]) == 0.0:
        return np.zeros(len(have))
    return np.where(have, column.values - column.values[have].mean(), 0.0)

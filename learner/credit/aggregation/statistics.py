"""Statistics that several rules take of columns, over the samples that count alone. Owns no rule.

`Running` is what a rule remembers of past batches; the rule owns it and writes it into its state.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from learner.credit.aggregation.columns import Column, Settled


@dataclass(frozen=True)
class Running:
    """Mean and variance over batches, the older ones decayed. weight: of all batches seen, the last counting 1."""

    weight: float = 0.0
    mean: float = 0.0
    variance: float = 0.0

    @property
    def std(self) -> float:
        """Standard deviation; 0 before the first batch."""
        return float(np.sqrt(self.variance))

    def after(self, values: np.ndarray, decay: float) -> Running:
        """With one more batch of at least one value; `decay` is what the past keeps of its weight."""
        weight = decay * self.weight + 1.0
        new = 1.0 / weight
        gap = float(values.mean()) - self.mean
        variance = (1 - new) * self.variance + new * spread(values) ** 2 + new * (1 - new) * gap**2
        return Running(weight, self.mean + new * gap, variance)


def spread(values: np.ndarray, ddof: int = 0) -> float:
    """Standard deviation; exactly 0 for fewer than two values or equal ones (the mean of equals may miss them)."""
    if len(values) < 2 or values.min() == values.max():
        return 0.0
    return float(values.std(ddof=ddof))


def standardised(values: np.ndarray, have: np.ndarray, eps: float, ddof: int = 0) -> np.ndarray:
    """(values - mean) / (std + eps) over the samples in `have`; 0 elsewhere and where all are equal. float64 [G]."""
    scale = spread(values[have], ddof)
    if scale == 0.0:
        return np.zeros(len(values))
    return np.where(have, (values - values[have].mean()) / (scale + eps), 0.0)


def over_batch(batch: Iterable[Settled]) -> dict[str, np.ndarray]:
    """Column name -> its values over every group's samples that count and have it, in claim order."""
    parts: dict[str, list[np.ndarray]] = {}
    for group in batch:
        for column in group.columns:
            parts.setdefault(column.name, []).append(column.values[column.among(group.counted)])
    return {name: np.concatenate(values) for name, values in parts.items()}


def filled(column: Column, counted: np.ndarray) -> np.ndarray | None:
    """The column with the group's mean where it is missing, so that it tells such a sample from no other.

    float64 [G]; None when no sample that counts has it.
    """
    have = column.among(counted)
    if not have.any():
        return None
    return np.where(have, column.values, column.values[have].mean())


def prefixed(prefix: str, values: Mapping[str, float]) -> dict[str, float]:
    """Metrics by column: `prefix/scorer/column`."""
    return {f"{prefix}/{name}": float(value) for name, value in values.items()}

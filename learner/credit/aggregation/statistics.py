"""Statistics that several rules take of columns, over the samples that count alone. Owns no rule and no state."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from learner.credit.aggregation.columns import Column, Settled


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

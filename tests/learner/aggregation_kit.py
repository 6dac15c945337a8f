"""What the tests of aggregation share: tables and scorers in few words, and one working configuration a rule."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from pydantic import TypeAdapter

from contracts.config.aggregation import AggregationConfig
from contracts.config.objectives import CreditConfig
from contracts.config.scoring import ScorerConfig
from contracts.scores import Outcome, ScoreTable, point_table
from learner.credit.aggregation.base import Aggregation, make_aggregation
from learner.credit.aggregation.columns import GroupScores, group_scores
from learner.credit.group import GroupAdvantage
from learner.types import CreditBatch, Rewards

STEPS = (0, 2, 3)

RULES: dict[str, dict[str, Any]] = {
    "weighted_sum": {},
    "gdpo": {},
    "pareto": {},
    "constrained": {"thresholds": {"a": 0.4, "b": 0.6}, "anchor": "a", "initial": 0.3},
    "base_and_bonus": {"base": "a", "bonus": ["b"], "base_range": [0, 1], "bonus_range": [0, 1]},
    "log_tame": {},
    "gates": {"order": [{"column": "a", "above": 0.5}, {"column": "b", "weight": 0.5}]},
    "trust": {"outcome": "a", "judge": "b"},
    "confidence_mix": {"model": "a", "rule": "b", "confidence": "b"},
    "win_rate": {},
    "uncertainty": {},
    "directional": {"plus": "a", "minus": "b"},
    "ppr_renorm": {"outcome": "a", "process": "b"},
}
"""Each rule over two scorers `a` and `b` of one column; ppr_renorm's `b` answers steps."""


_ADAPTER: TypeAdapter[Any] = TypeAdapter(AggregationConfig)


def rule(name: str, **settings: Any) -> Aggregation[Any]:
    """A rule with fresh state."""
    return make_aggregation(_ADAPTER.validate_python({"name": name, **settings}))


def scorer(name: str, required: bool = True, weight: float | None = None, column: str = "x") -> ScorerConfig:
    return ScorerConfig(
        name=name, function="m:f", required=required, weights={} if weight is None else {column: weight}
    )  # fmt: skip


def point(name: str, values: Sequence[float], uncertainty: Sequence[float] | None = None) -> ScoreTable:
    """A table of one column x; NaN is a failed score."""
    sure = {} if uncertainty is None else {"uncertainty": np.array(uncertainty, np.float32)[:, None]}
    return point_table(name, "1", ("x",), np.array(values, np.float32), **sure)


def pairs(name: str, wins: np.ndarray) -> ScoreTable:
    """A pair table [G,G,1]; NaN is an undecided pair."""
    wins = np.array(wins, np.float32)[:, :, None]
    outcomes = np.where(np.isnan(wins), Outcome.UNDECIDED, Outcome.OK).astype(np.uint8)
    return ScoreTable(name, "1", ("x",), wins, outcomes, "pair")


def steps(name: str, values: np.ndarray, ids: Sequence[int]) -> ScoreTable:
    """A step table [G,1,S] from [G,S]; a row with a NaN failed."""
    values = np.array(values, np.float32)[:, None, :]
    outcomes = np.where(np.isfinite(values).all(2), Outcome.OK, Outcome.FAILED).astype(np.uint8)
    return ScoreTable(name, "1", ("x",), values, outcomes, "step", step_ids=tuple(ids))


def scores(*tables: ScoreTable, jury: Sequence[ScorerConfig] | None = None, size: int | None = None) -> GroupScores:
    """One group's scores; every scorer required and of weight 1 unless `jury` says otherwise."""
    jury = [scorer(table.scorer) for table in tables] if jury is None else jury
    return group_scores({table.scorer: table for table in tables}, jury, size, STEPS)


def rewards(aggregation: Aggregation[Any], *groups: GroupScores, step: int = 1) -> list[Rewards]:
    """What the rule makes of a batch of these groups."""
    batch = dict(enumerate(groups))
    return list(aggregation.aggregate(batch, step).rewards.values())


def advantages(of: Sequence[Rewards], std: str = "none") -> list[np.ndarray]:
    """Group-relative advantages of a batch."""
    entry = GroupAdvantage(CreditConfig.model_validate({"std": std}), None)
    return list(entry.advantages(CreditBatch(dict(enumerate(of)))).advantages.values())


def group_for(name: str, a: np.ndarray, b: np.ndarray, jury: Sequence[ScorerConfig] | None = None) -> GroupScores:
    """A group that the rule `name` of RULES can read, from two rows of numbers [G] (NaN: failed)."""
    uncertain = np.abs(a) + 0.1 if name == "uncertainty" else None
    second = steps("b", np.stack([b, b / 2, b], axis=1), STEPS) if name == "ppr_renorm" else point("b", list(b))
    return scores(point("a", list(a), uncertain), second, jury=jury, size=len(a))


def without(group: GroupScores, sample: int) -> GroupScores:
    """The group as if the sample had never been painted."""
    return replace(group, size=group.size - 1, tables={n: _drop(t, sample) for n, t in group.tables.items()})


def permuted(group: GroupScores, order: Sequence[int]) -> GroupScores:
    """The same samples in another order."""
    return replace(group, tables={name: _take(table, list(order)) for name, table in group.tables.items()})


def _drop(table: ScoreTable, sample: int) -> ScoreTable:
    return _take(table, [i for i in range(table.num_images) if i != sample])


def _take(table: ScoreTable, order: list[int]) -> ScoreTable:
    def rows(array: np.ndarray) -> np.ndarray:
        return array[np.ix_(order, order)] if table.kind == "pair" else array[order]

    uncertainty = None if table.uncertainty is None else rows(table.uncertainty)
    return replace(table, values=rows(table.values), outcomes=rows(table.outcomes), uncertainty=uncertainty)


def totals(of: Rewards) -> np.ndarray:
    """Everything a rule says of each sample, side by side: NaN where invalid."""
    parts: list[np.ndarray] = [of.totals()[:, None]]
    if of.scale is not None:
        parts.append(of.scale[:, None])
    if of.steps is not None:
        parts.append(of.steps)
    return np.concatenate(parts, axis=1)

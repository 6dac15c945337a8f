"""Score tables of one group to one reward a sample.

A sample without a *required* score is invalid. A missing *optional* score contributes nothing: each optional column
is centred over the samples that have it and is 0 elsewhere, so it never counts as a zero score nor as a full bonus.
Invariant (law 4): what is said of a sample that failed never changes what the others receive.
Also owns the filter before the claim. Does not own: advantages (group.py, gae.py), pairs (pairs.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from contracts.config.scoring import RewardConfig, ScorerConfig
from contracts.declarations import ObjectiveNeeds
from contracts.errors import ScoringError
from contracts.scores import ScoreTable
from contracts.wire import DiscardReason
from learner.credit.pairs import best_against_worst, pairing_of
from learner.types import Rewards


@dataclass(frozen=True)
class _Term:
    """One weighted column of one scorer. values float64 [G], valid bool [G]."""

    weight: float
    required: bool
    values: np.ndarray
    valid: np.ndarray


def combine(
    tables: Mapping[str, ScoreTable], scorers: Sequence[ScorerConfig], group_size: int | None = None
) -> Rewards:
    """Weighted sum over the columns that count: values and optional float64 [G], valid bool [G].

    tables: by scorer name, each of one group [G,K]; a scorer without a table has failed for the whole group.
    group_size: G, needed only when tables may be empty. A sample without any score at all is invalid even when every
    scorer is optional. Raises ScoringError for a table that is not `point` or lacks a weighted column.
    """
    size = _group_size(tables, group_size)
    terms = [term for scorer in scorers if not scorer.held_out for term in _terms(scorer, tables, size)]
    required = [term for term in terms if term.required]
    optional = [term for term in terms if not term.required]
    valid = np.zeros(size, bool) if not terms else np.logical_or.reduce([term.valid for term in terms])
    values = np.zeros(size)
    for term in required:
        valid &= term.valid
        values += term.weight * np.where(term.valid, term.values, 0.0)
    bonus = np.zeros(size)
    for term in optional:
        bonus += term.weight * _centred(term, valid)
    return Rewards(np.where(valid, values, np.nan), valid, np.where(valid, bonus, 0.0))


def filter_group(
    rewards: Rewards, reward: RewardConfig, objective: Any = None, needs: ObjectiveNeeds | None = None
) -> DiscardReason | None:
    """Why a scored group is never trained, or None when it may be claimed.

    Decided before the claim, so that a step has exactly its groups. A constant group is no signal for group-relative
    advantages; a critic still learns from it (A = R - V), so it stays when the objective has one. Objectives on pairs
    need a strict preference instead.
    """
    needs = needs or ObjectiveNeeds()
    if int(rewards.valid.sum()) < reward.min_valid:
        return DiscardReason.TOO_FEW_VALID
    if needs.unit == "pair":
        return None if best_against_worst(rewards.totals(), pairing_of(objective)) else DiscardReason.NO_PAIR
    relative = not (needs.critic or needs.reward_gradient)
    if reward.drop_zero_variance and relative and _constant(rewards):
        return DiscardReason.ZERO_VARIANCE
    return None


def _constant(rewards: Rewards) -> bool:
    values = rewards.totals()[rewards.valid]
    return bool(values.min() == values.max())


def _group_size(tables: Mapping[str, ScoreTable], group_size: int | None) -> int:
    sizes = {table.num_images for table in tables.values()} | ({group_size} if group_size is not None else set())
    if len(sizes) != 1:
        raise ScoringError(f"the tables of a group disagree on its size: {sorted(sizes)}")
    return int(sizes.pop())


def _terms(scorer: ScorerConfig, tables: Mapping[str, ScoreTable], size: int) -> Iterator[_Term]:
    table = tables.get(scorer.name)
    if table is None:
        yield _Term(0.0, scorer.required, np.zeros(size), np.zeros(size, bool))
        return
    if table.kind != "point":
        raise ScoringError(
            f"scorer {scorer.name!r} answers a {table.kind} table; rewards are combined from point tables"
        )
    for column, weight in (scorer.weights or {table.columns[0]: 1.0}).items():
        if column not in table.columns:
            raise ScoringError(f"scorer {scorer.name!r} has no column {column!r}; it has {', '.join(table.columns)}")
        values, valid = table.column(column)
        yield _Term(weight, scorer.required, values.astype(np.float64), valid)


def _centred(term: _Term, among: np.ndarray) -> np.ndarray:
    """term.values minus their mean over the samples that count and have it; 0 elsewhere."""
    have = term.valid & among
    if not have.any():
        return np.zeros(len(have))
    return np.where(have, term.values - term.values[have].mean(), 0.0)

"""Reads the columns that count from a group's score tables, and sums terms with their validity.

A sample without a *required* score is invalid. A missing *optional* score contributes nothing: an optional term is
centred over the samples that have it and is 0 elsewhere, so it never counts as a zero score nor as a full bonus.
Invariant (law 4): what is said of a sample that failed never changes what the others receive; statistics are taken
over the samples that count alone. Pair tables become win rates here. Does not own: any rule.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from contracts.config.scoring import ScorerConfig
from contracts.errors import ScoringError
from contracts.scores import ScoreTable, TableKind
from learner.types import Rewards


@dataclass(frozen=True)
class Column:
    """One column of one scorer over a group, or what a rule made of columns.

    values float64 [G] (pair tables before `settled`: [G,G], P(row beats column); step tables: [G,S]), arbitrary where
    invalid; valid bool [G] ([G,G]); uncertainty float64 [G], standard deviations, or None; name: scorer/column.
    """

    name: str
    weight: float
    required: bool
    values: np.ndarray
    valid: np.ndarray
    uncertainty: np.ndarray | None = None
    step_ids: tuple[int, ...] = ()

    def among(self, counted: np.ndarray) -> np.ndarray:
        """bool [G]: the samples that count and have this value."""
        return self.valid & counted


@dataclass(frozen=True)
class Settled:
    """Columns of one group, each [G] (step columns [G,S]), and the samples that count: valid for every required one."""

    columns: tuple[Column, ...]
    counted: np.ndarray


@dataclass(frozen=True)
class GroupScores:
    """What the jury said of one group of `size` samples. steps: its recorded stochastic steps."""

    size: int
    tables: Mapping[str, ScoreTable]
    scorers: tuple[ScorerConfig, ...]
    steps: tuple[int, ...] = ()

    def weighted(self, kinds: Sequence[TableKind] = ("point", "pair")) -> Settled:
        """Every column that counts, with its weight: those of scorers that train.

        Raises ScoringError for a table of another kind or one that lacks a weighted column.
        """
        training = [scorer for scorer in self.scorers if not scorer.held_out]
        return settle([column for scorer in training for column in self._of(scorer, kinds)], self.size)

    def named(self, *names: str, kinds: Sequence[TableKind] = ("point", "pair")) -> Settled:
        """The columns of these names, `scorer` or `scorer/column`, in this order, with weight 1."""
        return settle([self._one(name, kinds) for name in names], self.size)

    def _of(self, scorer: ScorerConfig, kinds: Sequence[TableKind]) -> Iterator[Column]:
        table = self.tables.get(scorer.name)
        if table is None:
            yield self._nothing(scorer, 0.0, scorer.name)
            return
        for column, weight in (scorer.weights or {table.columns[0]: 1.0}).items():
            yield _read(table, scorer, column, weight, kinds)

    def _one(self, name: str, kinds: Sequence[TableKind]) -> Column:
        scorer_name, _, column = name.partition("/")
        scorer = next((s for s in self.scorers if s.name == scorer_name), None)
        if scorer is None:
            known = ", ".join(s.name for s in self.scorers)
            raise ScoringError(f"credit.aggregation names {name!r}, but no scorer is called that; there are {known}")
        table = self.tables.get(scorer_name)
        if table is None:
            return self._nothing(scorer, 1.0, name)
        return _read(table, scorer, column or table.columns[0], 1.0, kinds)

    def _nothing(self, scorer: ScorerConfig, weight: float, name: str) -> Column:
        """A scorer without a table has failed for the whole group."""
        return Column(name, weight, scorer.required, np.zeros(self.size), np.zeros(self.size, bool))


def group_scores(
    tables: Mapping[str, ScoreTable],
    scorers: Sequence[ScorerConfig],
    group_size: int | None = None,
    steps: Sequence[int] = (),
) -> GroupScores:
    """Tables of one group, checked for size. group_size: G, needed only when tables may be empty."""
    sizes = {table.num_images for table in tables.values()} | ({group_size} if group_size is not None else set())
    if len(sizes) != 1:
        raise ScoringError(f"the tables of a group disagree on its size: {sorted(sizes)}")
    return GroupScores(int(sizes.pop()), tables, tuple(scorers), tuple(steps))


def settle(columns: Sequence[Column], size: int) -> Settled:
    """Which samples count, and win rates of pair columns over those alone.

    A sample that loses its last valid comparison because its opponents do not count stops counting too, so this goes
    round until nothing changes.
    """
    counted = np.ones(size, bool)
    while True:
        reduced = [_win_rate(column, counted) if _is_pairs(column) else column for column in columns]
        now = counted & _counted(reduced, size)
        if (now == counted).all():
            return Settled(tuple(reduced), counted)
        counted = now


def sum_terms(settled: Settled) -> Rewards:
    """The weighted sum of columns: required ones as they are, optional ones centred over the samples that have them.

    values and optional float64 [G], valid bool [G]. A sample without any score at all is invalid even when every
    column is optional.
    """
    valid = settled.counted
    values, bonus = np.zeros(len(valid)), np.zeros(len(valid))
    for term in settled.columns:
        if term.required:
            values += term.weight * np.where(term.valid, term.values, 0.0)
    for term in settled.columns:
        if not term.required:
            bonus += term.weight * _centred(term, valid)
    return Rewards(np.where(valid, values, np.nan), valid, np.where(valid, bonus, 0.0))


def composed(name: str, parts: Sequence[Column], values: np.ndarray, weight: float = 1.0) -> Column:
    """A term made of several columns: it is there where all parts are, and required when all are."""
    valid = np.logical_and.reduce([part.valid for part in parts])
    return Column(name, weight, all(part.required for part in parts), values, valid)


def win_rates(wins: np.ndarray, valid: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Share of its comparisons that each sample wins (Pref-GRPO, 2508.20751): rates and validity, both [G].

    wins [G,G]: P(row beats column), valid [G,G]. A pair judged in both orders is averaged over them, which takes the
    judge's order bias out and makes the rates sum to G/2; a pair that was not decided is left out, not called a tie.
    """
    wins, valid = np.asarray(wins, np.float64), np.array(valid, bool)
    np.fill_diagonal(valid, False)
    known = np.where(valid, wins, 0.0) + np.where(valid.T, 1.0 - wins.T, 0.0)
    times = valid.astype(np.float64) + valid.T
    compared = times > 0
    duels = np.where(compared, known / np.maximum(times, 1.0), 0.0)
    number = compared.sum(1)
    return duels.sum(1) / np.maximum(number, 1), number > 0


def _read(
    table: ScoreTable, scorer: ScorerConfig, column: str, weight: float, kinds: Sequence[TableKind]
) -> Column:  # fmt: skip
    if table.kind not in kinds:
        raise ScoringError(
            f"scorer {scorer.name!r} answers a {table.kind} table; this rule of credit.aggregation reads "
            f"{' and '.join(kinds)} tables"
        )
    if column not in table.columns:
        raise ScoringError(f"scorer {scorer.name!r} has no column {column!r}; it has {', '.join(table.columns)}")
    index, name = table.columns.index(column), f"{scorer.name}/{column}"
    if table.kind == "pair":
        values, valid = table.values[:, :, index], table.valid()[:, :, index]
    else:
        values, valid = table.values[:, index], table.valid()[:, index]
    uncertainty = None
    if table.uncertainty is not None and table.kind == "point":
        uncertainty = table.uncertainty[:, index].astype(np.float64)
    return Column(name, weight, scorer.required, values.astype(np.float64), valid, uncertainty, table.step_ids)


def _is_pairs(column: Column) -> bool:
    return column.valid.ndim == 2


def _win_rate(column: Column, counted: np.ndarray) -> Column:
    rates, valid = win_rates(column.values, column.valid & counted[:, None] & counted[None, :])
    return replace(column, values=rates, valid=valid)


def _counted(columns: Sequence[Column], size: int) -> np.ndarray:
    counted = np.logical_or.reduce([column.valid for column in columns]) if columns else np.zeros(size, bool)
    for column in columns:
        if column.required:
            counted = counted & column.valid
    return counted


def _centred(term: Column, counted: np.ndarray) -> np.ndarray:
    """term.values minus their mean over the samples that count and have it; 0 elsewhere."""
    have = term.among(counted)
    if not have.any():
        return np.zeros(len(have))
    return np.where(have, term.values - term.values[have].mean(), 0.0)

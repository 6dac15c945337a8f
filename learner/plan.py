"""From credit to optimizer steps: which rows each rank takes together, in which order, and what it divides by.

Numpy and the standard library only; a pure function of its arguments, the same in the cluster and in the in-process
loop (law 2). Invariants: within an epoch every valid row stands in exactly one micro-batch with weight 1, every other
row weighs 0; all ranks of an update have equally many micro-batches; rows, weights and denominators of an update do
not depend on the number of ranks.

Objectives that replay recorded states keep the micro-batches in which the group was painted, invalid rows included
with weight 0: only then is the ratio exactly 1 at zero updates (law 1). Does not own: loading rows (batching.py).
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

import numpy as np

from contracts.config import RunConfig
from contracts.declarations import ObjectiveNeeds
from contracts.seeds import Stream, derive_seed
from contracts.wire import GroupHeader, MicroBatchPlan, Row, UpdatePlan
from learner.credit.pairs import best_against_worst, pairing_of
from learner.types import Credit

Item = TypeVar("Item")

SAMPLES_PER_KEY = 1 << 20
"""noise_key = group_id * SAMPLES_PER_KEY + sample: unique in the run, whatever batch a sample is trained in."""


def plan_updates(
    headers: Mapping[int, GroupHeader],
    valid: Mapping[int, np.ndarray],
    credit: Credit,
    needs: ObjectiveNeeds,
    config: RunConfig,
    step: int,
    *,
    single: bool = False,
) -> list[UpdatePlan]:
    """The optimizer steps of one claimed batch, in order; empty when no row is valid.

    headers: the claimed groups in claim order; valid: bool [G] by group id; credit.rewards is read for pairs.
    single: one plan over all groups in claim order, for the pass that computes critic values before credit.
    Updates within an epoch split the seeded shuffle of micro-batches as evenly as it goes; when there are fewer
    micro-batches than learner.updates_per_step, there are fewer updates.
    """
    micro_batches = _micro_batches(headers, valid, credit, needs, config)
    if not micro_batches:
        return []
    ranks = config.learner.ranks
    if single:
        return [_update(micro_batches, ranks, needs)]
    plans = []
    for epoch in range(config.learner.epochs):
        order = _shuffled(micro_batches, derive_seed(config.seed, Stream.SHUFFLE, step, epoch))
        plans += [_update(part, ranks, needs) for part in _split(order, config.learner.updates_per_step)]
    return plans


def noise_key(group_id: int, sample: int) -> int:
    """The key of a sample's training noise and times."""
    return group_id * SAMPLES_PER_KEY + sample


def _micro_batches(
    headers: Mapping[int, GroupHeader],
    valid: Mapping[int, np.ndarray],
    credit: Credit,
    needs: ObjectiveNeeds,
    config: RunConfig,
) -> list[MicroBatchPlan]:
    size = config.learner_micro_batch
    if needs.unit == "pair":
        return _pair_batches(headers, credit, config)
    if needs.states:
        return [batch for header in headers.values() for batch in _as_painted(header, valid[header.group_id], config)]
    rows = [
        _row(group_id, int(sample), 1.0) for group_id in headers for sample in np.flatnonzero(valid[group_id])
    ]  # fmt: skip
    return [MicroBatchPlan(rows=tuple(part)) for part in _chunks(rows, size)]


def _as_painted(header: GroupHeader, valid: np.ndarray, config: RunConfig) -> Iterable[MicroBatchPlan]:
    """The group in the micro-batches it was painted in, unless the configuration asks for another size."""
    rows = [_row(header.group_id, sample, float(valid[sample])) for sample in range(header.group_size)]
    start = 0
    for size in _composition(header, config):
        part = rows[start : start + size]
        start += size
        if any(row.weight for row in part):
            yield MicroBatchPlan(rows=tuple(part))


def _composition(header: GroupHeader, config: RunConfig) -> list[int]:
    asked = config.learner.micro_batch
    if header.micro_batches and (asked is None or asked == config.rollout.micro_batch):
        return list(header.micro_batches)
    return [len(part) for part in _chunks(range(header.group_size), config.learner_micro_batch)]


def _pair_batches(
    headers: Mapping[int, GroupHeader], credit: Credit, config: RunConfig
) -> list[MicroBatchPlan]:  # fmt: skip
    pairing = pairing_of(config.objective)
    pairs = []
    for group_id in headers:
        for winner, loser in best_against_worst(credit.rewards[group_id], pairing):
            key = noise_key(group_id, winner)
            pairs.append((_row(group_id, winner, 1.0, key), _row(group_id, loser, 1.0, key)))
    return [
        MicroBatchPlan(rows=(*(winner for winner, _ in part), *(loser for _, loser in part)))
        for part in _chunks(pairs, max(1, config.learner_micro_batch // 2))
    ]


def _row(group_id: int, sample: int, weight: float, key: int | None = None) -> Row:
    return Row(
        group=group_id, sample=sample, weight=weight, noise_key=noise_key(group_id, sample) if key is None else key
    )


def _update(micro_batches: Sequence[MicroBatchPlan], ranks: int, needs: ObjectiveNeeds) -> UpdatePlan:
    """Dealt to the ranks in turn; short ranks repeat the first micro-batch with weight 0."""
    padding = _weightless(micro_batches[0])
    missing = -len(micro_batches) % ranks
    padded = [*micro_batches, *[padding] * missing]
    total = sum(row.weight for batch in micro_batches for row in batch.rows)
    if needs.unit == "pair":
        total /= 2
    return UpdatePlan(
        ranks=tuple(tuple(padded[rank::ranks]) for rank in range(ranks)), global_weight=total if total > 0 else 1.0
    )


def _weightless(batch: MicroBatchPlan) -> MicroBatchPlan:
    return MicroBatchPlan(rows=tuple(row.model_copy(update={"weight": 0.0}) for row in batch.rows))


def _shuffled(items: Sequence[Item], seed: int) -> list[Item]:
    shuffled = list(items)
    random.Random(seed).shuffle(shuffled)
    return shuffled


def _split(items: Sequence[Item], parts: int) -> list[Sequence[Item]]:
    parts = min(parts, len(items))
    bounds = [round(i * len(items) / parts) for i in range(parts + 1)]
    return [items[a:b] for a, b in itertools.pairwise(bounds)]


def _chunks(items: Sequence[Item], size: int) -> list[Sequence[Item]]:
    return [items[start : start + size] for start in range(0, len(items), size)]

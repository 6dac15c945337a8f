"""A run that only discards ends with its reasons, whatever they are; one that trains or may train goes on."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.context import RunContext
from cluster.fruitless import Fruitless
from contracts.errors import ScoringError
from contracts.wire import DiscardReason
from tests.cluster.loop_house import admit_and_lease, config_of, context_of, receipt_of

LIMIT = 4


@pytest.fixture
def context(tmp_path: Path) -> RunContext:
    return context_of(config_of(tmp_path, reward={"max_fruitless": LIMIT}), tmp_path, {})


def discard(context: RunContext, reason: DiscardReason) -> None:
    context.ledger.discard(context.admission.admit(context.source), reason)


def make_ready(context: RunContext) -> int:
    task = admit_and_lease(context)
    context.ledger.generated(receipt_of(task))
    attempt = context.ledger.lease_scoring(task.group_id, 60)
    assert attempt is not None
    context.ledger.scored(task.group_id, attempt, {})
    return task.group_id


def test_paintings_that_always_fail_end_the_run(context: RunContext) -> None:
    fruitless = Fruitless(context)
    for number in range(LIMIT):
        assert context.failure is None, number
        task = admit_and_lease(context)
        for _ in range(context.config.rollout.max_attempts):
            context.ledger.give_back(task.group_id, task.attempt)
            task = context.ledger.lease_generating("actor-0", 60) or task
        fruitless.check()
    assert isinstance(context.failure, ScoringError)
    assert "4 groups in a row were discarded (attempts 4)" in str(context.failure)
    assert "paint_failed" in str(context.failure)


def test_reasons_are_counted_together_and_the_most_frequent_is_named_first(context: RunContext) -> None:
    fruitless = Fruitless(context)
    for reason in (DiscardReason.LATE, DiscardReason.ZERO_VARIANCE, DiscardReason.ZERO_VARIANCE, DiscardReason.STALE):
        discard(context, reason)
    fruitless.check()
    assert "(zero_variance 2, late 1, stale 1)" in str(context.failure)


def test_a_step_begins_the_count_anew_and_a_group_that_is_ready_buys_as_many_again(context: RunContext) -> None:
    fruitless = Fruitless(context)
    first = [make_ready(context)]
    for _ in range(2 * LIMIT - 1):
        discard(context, DiscardReason.ZERO_VARIANCE)
        fruitless.check()
    assert context.failure is None
    claimed = context.ledger.claim(2) or context.ledger.claim(2, "ready")
    assert claimed is None, first
    first.append(make_ready(context))
    assert context.ledger.claim(2) == first
    context.ledger.trained(first, 1, 0)
    context.ledger.published(1, 1)
    fruitless.check()
    for _ in range(LIMIT - 1):
        discard(context, DiscardReason.ZERO_VARIANCE)
        fruitless.check()
    assert context.failure is None
    discard(context, DiscardReason.ZERO_VARIANCE)
    fruitless.check()
    assert context.failure is not None

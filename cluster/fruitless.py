"""Ends a run that discards group after group and trains none: it would paint for ever.

Counted by the ledger, so every discard counts, whatever its reason and whoever discarded: a reward without a signal, a
painting or scoring that fails again and again, groups that come too late. Does not own: discarding.
"""

from __future__ import annotations

from cluster.context import RunContext
from contracts.errors import ScoringError
from contracts.wire import DiscardReason, GroupState

_HINTS = {
    DiscardReason.ZERO_VARIANCE: "the reward tells no image of a group from another",
    DiscardReason.NO_PAIR: "the reward prefers no image of a group to another",
    DiscardReason.ATTEMPTS: "painting or scoring fails again and again; events.jsonl says why (paint_failed, "
    "paint_lost, scoring_lost)",
    DiscardReason.LATE: "groups take longer than pipeline.late_s",
    DiscardReason.STALE: "actors paint with weights older than pipeline.max_staleness allows",
}


class Fruitless:
    """Discards since the last learner step against reward.max_fruitless."""

    def __init__(self, context: RunContext) -> None:
        self.context = context
        self._step = -1
        self._before: dict[str, int] = {}

    def check(self) -> None:
        """Stop the run when too many groups were discarded; each group that waits to be trained buys as many again."""
        books = self.context.ledger.books()
        if books.trained_steps != self._step:
            first, self._step = self._step < 0, books.trained_steps
            self._before = {} if first else dict(books.groups_discarded_by_reason)
        since = {
            DiscardReason(reason): number - self._before.get(reason, 0)
            for reason, number in books.groups_discarded_by_reason.items()
            if number > self._before.get(reason, 0)
        }
        promising = books.groups[GroupState.READY.value] + books.groups[GroupState.CLAIMED.value]
        if sum(since.values()) >= self.context.config.reward.max_fruitless * (1 + promising):
            self.context.stop(_nothing_to_learn(since))


def _nothing_to_learn(since: dict[DiscardReason, int]) -> ScoringError:
    by_number = sorted(since.items(), key=lambda item: -item[1])
    reasons = ", ".join(f"{reason.value} {number}" for reason, number in by_number)
    hints = "; ".join(f"{reason.value}: {_HINTS[reason]}" for reason, _ in by_number if reason in _HINTS)
    return ScoringError(
        f"{sum(since.values())} groups in a row were discarded ({reasons}), so there is nothing to learn from. "
        f"{hints[:1].upper()}{hints[1:]}. The run stops instead of painting for nothing; reward.max_fruitless sets how "
        "long it tries"
    )

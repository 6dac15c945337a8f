"""Takes painted groups to the jury and books what it says: ready, or discarded with a reason.

Invariant: every generated group ends its scoring lease as ready or discarded; a dispatcher that dies costs a repeated
request, never a score. A run whose groups are all discarded stops and says why.
Does not own: the requests (scoring.py), rewards (learner/credit).
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
from ray.exceptions import RayActorError, RayTaskError

from cluster.context import RunContext
from cluster.step import discard_reason, group_rewards, unscored_tables
from contracts.errors import ScoringError, StaleLease
from contracts.scores import Outcome, ScoreTable
from contracts.wire import DiscardReason, Source, Span


class ScoringLoop:
    """One coroutine a group in scoring."""

    def __init__(self, context: RunContext, dispatcher: Any) -> None:
        self.context, self.dispatcher = context, dispatcher
        self.tasks: set[asyncio.Task[None]] = set()
        self.unscored = 0  # groups in a row without enough valid scores
        self.fruitless: Counter[DiscardReason] = Counter()  # groups in a row that were discarded, by reason

    async def submit(self, group_id: int, vault: str) -> None:
        """Begin scoring a generated group; returns at once."""
        task = asyncio.create_task(self._score(group_id, vault))
        self.tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self.tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            self.context.stop(task.exception())

    async def _score(self, group_id: int, vault: str) -> None:
        ledger, lease_s = self.context.ledger, self.context.config.reward.lease_s
        while not self.context.stopping:
            attempt = ledger.lease_scoring(group_id, lease_s)
            if attempt is None:
                return  # it was discarded meanwhile
            try:
                tables, spans = await asyncio.wait_for(self._tables(group_id, vault), lease_s)
            except (RayActorError, RayTaskError, TimeoutError) as error:
                self.context.telemetry.event("scoring_lost", group=group_id, error=type(error).__name__)
                if str(ledger.give_back(group_id, attempt)) == "discarded":
                    return
                await asyncio.sleep(0.5)
                continue
            self._book(group_id, attempt, tables, spans)
            return

    async def _tables(self, group_id: int, vault: str) -> tuple[dict[str, ScoreTable], dict[str, Span]]:
        header = self.context.groups[group_id].header
        if header.source is not Source.ACTORS:
            return unscored_tables(header), {}
        return await self.dispatcher.score_group.remote(vault, group_id)

    def _book(self, group_id: int, attempt: int, tables: dict[str, ScoreTable], spans: Mapping[str, Span]) -> None:
        scored = self.context.groups[group_id]
        scored.tables, scored.rewards = tables, group_rewards(scored.header, tables, self.context.config)
        self._export(group_id, tables, spans)
        reason = discard_reason(scored.header, scored.rewards, self.context.config)
        rewards = {"values": scored.rewards.values, "valid": scored.rewards.valid, "optional": scored.rewards.optional}
        try:
            self.context.ledger.scored(group_id, attempt, tables, rewards, discard_as=reason)
        except StaleLease:
            self.context.telemetry.event("late_score", group=group_id, attempt=attempt)
            return
        self._stop_if_hopeless(reason, tables)
        if reason is not None:
            self._count_discarded(group_id, scored.header.group_size, reason)
        self.context.bell.ring()

    def _stop_if_hopeless(self, reason: DiscardReason | None, tables: Mapping[str, ScoreTable]) -> None:
        """A run that discards group after group would paint for ever without one learner step."""
        limits = self.context.config.reward
        self.unscored = self.unscored + 1 if reason is DiscardReason.TOO_FEW_VALID else 0
        if reason is None:
            self.fruitless.clear()
        else:
            self.fruitless[reason] += 1
        if self.unscored >= limits.max_unscored:
            self.context.stop(self._jury_failed(tables))
        elif self.fruitless.total() >= limits.max_fruitless:
            self.context.stop(self._nothing_to_learn())

    def _nothing_to_learn(self) -> ScoringError:
        reasons = ", ".join(f"{reason.value} {number}" for reason, number in self.fruitless.most_common())
        return ScoringError(
            f"{self.fruitless.total()} groups in a row were discarded ({reasons}), so there is nothing to learn from: "
            "zero_variance and no_pair mean that the reward tells no image of a group from another. The run stops "
            "instead of painting for nothing; reward.max_fruitless sets how long it tries"
        )

    def _jury_failed(self, tables: Mapping[str, ScoreTable]) -> ScoringError:
        """What to tell the user when no group gets enough valid scores: who fails, and what it says."""
        failing = [
            f"{name} ({next((reason for reason in table.reasons if reason), 'no reason given')})"
            for name, table in tables.items()
            if not table.valid().any()
        ]
        return ScoringError(
            f"{self.unscored} groups in a row had fewer than {self.context.config.reward.min_valid} valid samples; "
            f"failing scorers: {', '.join(failing) or 'none alone'}. The run stops instead of painting for nothing"
        )

    def _count_discarded(self, group_id: int, images: int, reason: DiscardReason) -> None:
        self.context.telemetry.count("salon_images_discarded_total", images, reason=reason.value)
        self.context.forget([group_id])

    def _export(self, group_id: int, tables: Mapping[str, ScoreTable], spans: Mapping[str, Span]) -> None:
        telemetry = self.context.telemetry
        telemetry.spans(spans.values(), group=group_id)
        for name, span in spans.items():
            telemetry.observe("salon_score_seconds", span.seconds, scorer=name)
        for name, table in tables.items():
            for outcome in Outcome:
                number = int(np.sum(table.outcomes == outcome))
                if number:
                    telemetry.count("salon_score_outcomes_total", number, scorer=name, outcome=outcome.name.lower())

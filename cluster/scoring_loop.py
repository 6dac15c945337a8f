"""Takes painted groups to the jury and books what it says: ready, or discarded with a reason.

Invariant: every generated group ends its scoring lease as ready or discarded; a dispatcher that dies costs a repeated
request, never a score. A run whose groups are all discarded stops and says why.
Does not own: the requests (scoring.py), rewards (learner/credit).
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

import numpy as np
from ray.exceptions import RayError, RayTaskError

from cluster.awake import within
from cluster.context import RunContext
from cluster.deaths import ActorGone
from cluster.fruitless import Fruitless
from cluster.refs import root_cause, value
from cluster.step import discard_reason, group_rewards, unscored_tables
from contracts.errors import NotStored, ScoringError, StaleLease, StorageError, VersionChanged
from contracts.scores import Outcome, ScoreTable
from contracts.spans import wall_clock
from contracts.wire import DiscardReason, GroupState, Source, Span

DISPATCHER_ATTEMPTS = 120
"""Questions to a dispatcher that died before the next attempt to score is made all the same."""


class ScoringLoop:
    """One coroutine a group in scoring."""

    def __init__(self, context: RunContext, dispatcher: Any) -> None:
        self.context, self.dispatcher = context, dispatcher
        self.tasks: set[asyncio.Task[None]] = set()
        self.unscored = 0  # groups in a row without enough valid scores
        self.fruitless = Fruitless(context)
        self.unkept = self.told = False  # versions that manifest.json lacks, and whether an event says so

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
            online = self.context.online
            since = {} if online is None else online.mark()
            asked = wall_clock()
            try:
                tables, spans = await within(self._tables(group_id, vault), lease_s)
                if online is not None and (stale := online.stale(tables, since)):
                    raise ScoringError(f"scored by a version that is not in use: {', '.join(stale)}")
            except (*ActorGone, RayTaskError, TimeoutError, ScoringError) as error:
                if await self._lost(group_id, vault, attempt, error):
                    return
                continue
            if self._versions_accepted(tables):
                self._trace(group_id, asked, spans)
                self._book(group_id, attempt, tables, spans)
            return

    async def _lost(self, group_id: int, vault: str, attempt: int, error: Exception) -> bool:
        """Give the lease back and say whether the group has left scoring: its bytes are gone, or it was discarded."""
        cause, context = root_cause(error), self.context
        if isinstance(cause, NotStored):
            if context.ledger.row(group_id).attempt == attempt:
                context.lost(group_id, str(cause))
            return True
        context.telemetry.event("scoring_lost", group=group_id, error=f"{type(cause).__name__}: {cause}"[:300])
        if context.ledger.give_back(group_id, attempt) is GroupState.DISCARDED:
            images = context.ledger.row(group_id).painted
            self._count_discarded(group_id, images, DiscardReason.ATTEMPTS)
            self.fruitless.check()
            return True
        if isinstance(error, ActorGone):
            await self.dispatcher_is_back()
        await asyncio.sleep(0.5)
        return False

    async def dispatcher_is_back(self) -> None:
        """Wait for the dispatcher that Ray starts again, so that its death counts once for a group in scoring."""
        for _ in range(DISPATCHER_ATTEMPTS):
            try:
                await asyncio.wait_for(value(self.dispatcher.ready.remote()), 10)
                return
            except (RayError, TimeoutError):
                await asyncio.sleep(0.5)

    def _versions_accepted(self, tables: Mapping[str, ScoreTable]) -> bool:
        """Record the version each scorer answers with; False when one changed and the run is to stop for it.

        The group's lease is then taken back at the resume, and it is scored again.
        """
        known, context = self.context.scorer_versions, self.context
        learning = () if context.online is None else context.online.models  # theirs change, and are told of elsewhere
        found = {
            name: table.version
            for name, table in tables.items()
            if table.version and table.valid().any() and name not in learning
        }
        changed = {name: version for name, version in found.items() if known.get(name, version) != version}
        for name, version in changed.items():
            context.telemetry.event("scorer_version_changed", scorer=name, before=known[name], now=version)
        if changed and context.config.reward.on_version_change == "stop":
            told = ", ".join(f"{name} from {known[name]} to {version}" for name, version in changed.items())
            context.stop(
                VersionChanged(
                    f"a scorer's version changed within the run: {told}. Bring the old version back and resume, or "
                    "resume with reward.on_version_change=continue"
                )
            )
            return False
        if changed or not found.keys() <= known.keys():
            known.update(found)
            self.unkept = True
        if self.unkept:
            self._keep_versions()
        return True

    def _keep_versions(self) -> None:
        """Write the versions down; where there is no room for it, again with the next group."""
        try:
            self.context.folder.update_manifest(scorer_versions=self.context.scorer_versions)
            self.unkept = self.told = False
        except StorageError as error:
            if not self.told:
                self.context.telemetry.event("versions_not_kept", error=str(error))
            self.told = True

    async def _tables(self, group_id: int, vault: str) -> tuple[dict[str, ScoreTable], dict[str, Span]]:
        header = self.context.groups[group_id].header
        if header.source is not Source.ACTORS:
            return unscored_tables(header), {}
        return await self.dispatcher.score_group.remote(vault, group_id)

    def _book(self, group_id: int, attempt: int, tables: dict[str, ScoreTable], spans: Mapping[str, Span]) -> None:
        scored = self.context.groups[group_id]
        scored.tables, scored.rewards = tables, group_rewards(scored.header, tables, self.context.config)
        self._export(tables, spans)
        reason = discard_reason(scored.header, scored.rewards, self.context.config)
        rewards = {"values": scored.rewards.values, "valid": scored.rewards.valid, "optional": scored.rewards.optional}
        try:
            self.context.ledger.scored(group_id, attempt, tables, rewards, discard_as=reason)
        except StaleLease:
            self.context.telemetry.event("late_score", group=group_id, attempt=attempt)
            return
        if self.context.online is not None and scored.header.source is Source.ACTORS:
            self.context.online.offer(scored.header, str(self.context.ledger.row(group_id).vault))
        self._stop_if_hopeless(reason, tables)
        if reason is not None:
            self._count_discarded(group_id, scored.header.group_size, reason)
        self.context.bell.ring()

    def _stop_if_hopeless(self, reason: DiscardReason | None, tables: Mapping[str, ScoreTable]) -> None:
        """A run that discards group after group would paint for ever without one learner step."""
        self.unscored = self.unscored + 1 if reason is DiscardReason.TOO_FEW_VALID else 0
        if self.unscored >= self.context.config.reward.max_unscored:
            self.context.stop(self._jury_failed(tables))
        elif reason is not None:
            self.fruitless.check()

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

    def _trace(self, group_id: int, asked: float, spans: Mapping[str, Span]) -> None:
        """What the scorers took, and around it the dispatcher: with the reading from the vault and the ways."""
        if spans:
            whole = Span(lane="dispatcher", name="score group", start=asked, seconds=wall_clock() - asked)
            self.context.telemetry.spans((whole, *spans.values()), group=group_id)

    def _export(self, tables: Mapping[str, ScoreTable], spans: Mapping[str, Span]) -> None:
        telemetry = self.context.telemetry
        for name, span in spans.items():
            telemetry.observe("salon_score_seconds", span.seconds, scorer=name)
        for name, table in tables.items():
            for outcome in Outcome:
                number = int(np.sum(table.outcomes == outcome))
                if number:
                    telemetry.count("salon_score_outcomes_total", number, scorer=name, outcome=outcome.name.lower())

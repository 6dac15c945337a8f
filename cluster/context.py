"""What the loops of one run share: configuration, books, weights, telemetry, and a way to wake each other.

Does not own: any decision. The loops (rollout_loop, scoring_loop, learner_loop) read and change the run through this.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from contracts.config import RunConfig
from contracts.scores import ScoreTable
from contracts.wire import DiscardReason, GroupHeader
from learner.types import Rewards

if TYPE_CHECKING:
    from cluster.admission import Admission
    from cluster.ledger import Ledger
    from cluster.online import OnlineModels
    from cluster.run_folder import RunFolder
    from cluster.telemetry import Telemetry
    from cluster.weights import WeightStore


class Bell:
    """Wakes every loop that waits for the state of the run to change."""

    def __init__(self) -> None:
        self._event = asyncio.Event()

    def ring(self) -> None:
        """Something changed: a group moved, weights were published, the run is stopping."""
        self._event.set()
        self._event = asyncio.Event()

    async def wait_until(self, condition: Callable[[], bool], poll_s: float = 0.5) -> None:
        """Return when condition() holds; it is looked at after every ring and at least every poll_s seconds."""
        while not condition():
            try:
                await asyncio.wait_for(self._event.wait(), poll_s)
            except TimeoutError:
                continue


@dataclass
class Scored:
    """What is kept in memory of a group between painting and its update; all of it can be read back."""

    header: GroupHeader
    tables: dict[str, ScoreTable] = field(default_factory=dict)
    rewards: Rewards | None = None


@dataclass
class RunContext:
    """The run."""

    config: RunConfig
    folder: RunFolder
    ledger: Ledger
    admission: Admission
    store: WeightStore
    telemetry: Telemetry
    source: Any  # the prompt source
    vaults: dict[str, Any]
    bell: Bell = field(default_factory=Bell)
    groups: dict[int, Scored] = field(default_factory=dict)
    step: int = 0  # learner steps finished
    stopping: bool = False
    failure: BaseException | None = None
    train_started: float | None = None
    waiting_for_room: set[tuple[int, int]] = field(default_factory=set)  # (group id, attempt): painted, vault full
    room_wanted: bool = False  # the learner is to save a state now, which frees what it covers
    learner_waits: bool = False  # for groups to claim
    trained_before: float = 0.0  # seconds of training before this process took the run over
    before: dict[str, Any] | None = None  # the evaluation before training, as summary.json has it
    score: float | None = None  # accuracy of the latest evaluation in mid-run, and the step it measured
    scored_step: int | None = None
    online: OnlineModels | None = None  # reward models that learn beside the run
    scorer_versions: dict[str, str] = field(default_factory=dict)  # as first seen in this run, or accepted since

    def vault(self, name: str | None) -> Any:
        """A vault's handle; a group that was painted always names one."""
        assert name is not None, "the group has no vault: it was never painted"
        return self.vaults[name]

    def stop(self, failure: BaseException | None = None) -> None:
        """Ask every loop to end; the first failure is kept."""
        if failure is not None and self.failure is None:
            self.failure = failure
        self.stopping = True
        self.bell.ring()

    def train_seconds(self) -> float:
        """Seconds of training so far, also before a resume."""
        if self.train_started is None:
            return self.trained_before
        return self.trained_before + time.monotonic() - self.train_started

    def reached_end(self) -> bool:
        """Whether a limit of `stop` is reached."""
        stop = self.config.stop
        if stop.steps is not None and self.step >= stop.steps:
            return True
        return stop.seconds is not None and self.train_seconds() >= stop.seconds

    def share_done(self) -> float:
        """Progress towards the nearest limit, 0 to 1."""
        stop = self.config.stop
        shares = [0.0]
        if stop.steps is not None:
            shares.append(self.step / stop.steps)
        if stop.seconds is not None:
            shares.append(self.train_seconds() / stop.seconds)
        return min(1.0, max(shares))

    def lost(self, group_id: int, why: str) -> None:
        """A vault no longer has a group's bytes: the group is painted again, with the same seeds."""
        row = self.ledger.row(group_id)
        self.ledger.lost(group_id)
        self.forget([group_id])
        self.telemetry.count("salon_images_discarded_total", row.painted, reason=DiscardReason.LOST.value)
        self.telemetry.event("group_lost", group=group_id, vault=row.vault, why=why)
        self.bell.ring()

    def forget(self, group_ids: list[int]) -> None:
        """Drop what is in memory of groups that left the run."""
        for group_id in group_ids:
            self.groups.pop(group_id, None)

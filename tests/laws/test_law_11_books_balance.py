"""Law 11: painted = trained + discarded + alive at every instant, from the ledger; admission neither deadlocks nor
exceeds the staleness bound under random durations, discards, crashes and roll-backs.

A simulated run on a simulated clock: actors, jury and learner take random times, hang, fail and repeat themselves;
groups are discarded; vaults lose bytes; the controller is reopened from its file; the learner goes back to its last
state. After *every* transition the books are compared with an account kept here, independently of the ledger.
"""

from __future__ import annotations

import heapq
import itertools
import random
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cluster.admission import AdmissionRule
from cluster.ledger import Ledger
from contracts.errors import LedgerError, StaleLease
from contracts.wire import DiscardReason, GroupState, PaintReceipt, PromptSpec, PromptTask

LEASE_S = 5.0
LATE_S = 40.0
MAX_EVENTS = 20_000


@dataclass(frozen=True)
class World:
    """What a simulated run is like. Rates are probabilities a task; faults are the number of each kind in the run."""

    seed: int
    groups_per_step: int = 3
    max_staleness: int = 1
    group_size: int = 4
    num_actors: int = 3
    order: str = "admission"
    steps: int = 8
    hang_rate: float = 0.1
    fail_rate: float = 0.1
    discard_rate: float = 0.2
    repeat_rate: float = 0.1
    crashes: int = 2
    rollbacks: int = 2
    losses: int = 2
    lates: int = 4
    rule: type[AdmissionRule] = AdmissionRule


class Simulation:
    """One run. Every transition goes through `_do`, which checks the law."""

    def __init__(self, world: World, folder: Path) -> None:
        self.world, self.path, self.random = world, folder / "ledger.sqlite", random.Random(world.seed)
        self.time, self.events, self.sequence = 1e9, [], itertools.count()
        self.rule = world.rule(world.groups_per_step, world.max_staleness)
        self.painting: set[tuple[int, int]] = set()  # (group, attempt) an actor is busy with
        self.learner_busy, self.learner_life, self.state_step = False, 0, 0
        self.painted = self.high_water = 0
        self.rolled_back = False
        self.ledger = self._open()
        self._do(self.ledger.published, 0, 0)
        self._plan_faults()

    def run(self) -> None:
        for _ in range(MAX_EVENTS):
            if self.ledger.trained_steps >= self.world.steps:
                break
            self._act()
            self._next_event()
        else:
            pytest.fail(f"no end after {MAX_EVENTS} events: {self.ledger.books()}")
        self._do(self.ledger.discard_alive, DiscardReason.RUN_END)
        assert self.ledger.books().alive == 0
        self.ledger.close()

    # ---- the law -------------------------------------------------------------------------------------------------

    def _do(self, transition: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        try:
            return transition(*arguments, **options)
        finally:
            self._check()

    def _check(self) -> None:
        world, books = self.world, self.ledger.books()
        assert books.balanced, books
        assert books.painted == self.painted
        assert books.trained == self.ledger.trained_steps * world.groups_per_step * world.group_size
        self.high_water = max(self.high_water, books.published)
        revived = (self.high_water - books.published) * world.groups_per_step
        assert books.live_groups <= (world.max_staleness + 1) * world.groups_per_step + revived, "live bound"
        if world.order == "admission":
            assert (books.max_staleness_seen or 0) <= world.max_staleness, "staleness bound"
            if not self.rolled_back:
                assert DiscardReason.STALE not in books.groups_discarded_by_reason, "a group was painted too stale"

    def _check_order(self, claimed: list[int]) -> None:
        """Nothing that is not discarded was overtaken."""
        assert len(claimed) == self.world.groups_per_step
        if self.world.order == "admission":
            older = [row for row in self.ledger.rows() if row.group_id < max(claimed) and row.group_id not in claimed]
            assert all(row.state in (GroupState.TRAINED, GroupState.DISCARDED) for row in older), "overtaken"

    # ---- what happens by itself ----------------------------------------------------------------------------------

    def _act(self) -> None:
        """Everything that can be begun now is begun."""
        while self.rule.may_admit(self.ledger.live):
            position = self.ledger.next_position()
            self._do(self.ledger.admit, PromptSpec(text=str(position)), position, self.world.group_size)
        while len(self.painting) < self.world.num_actors and (
            task := self._do(self.ledger.lease_generating, "actor", LEASE_S)
        ):
            self._paint(task)
        while (group_id := self.ledger.next_to_score()) is not None:
            self._score(group_id, self._do(self.ledger.lease_scoring, group_id, LEASE_S))
        if not self.learner_busy:
            self._train()

    def _paint(self, task: PromptTask) -> None:
        assert task.min_version <= self.ledger.published_version, "a task waits for weights that do not exist"
        self.painting.add((task.group_id, task.attempt))
        version = self.random.randint(task.min_version, self.ledger.published_version)  # any that is allowed
        receipt = PaintReceipt(
            group_id=task.group_id, attempt=task.attempt, weight_version=version, vault="v", num_bytes=1,
            paint_seconds=0.1, store_seconds=0.1,
        )  # fmt: skip
        self._later(self._duration(), lambda: self._painted(receipt))

    def _painted(self, receipt: PaintReceipt) -> None:
        self.painting.discard((receipt.group_id, receipt.attempt))
        if self.random.random() < self.world.fail_rate:
            self._do(self.ledger.give_back, receipt.group_id, receipt.attempt)
            return
        row = self.ledger.row(receipt.group_id)
        current = row.state is GroupState.GENERATING and row.attempt == receipt.attempt
        if not current or receipt.weight_version > self.ledger.trained_steps:
            with pytest.raises(StaleLease):
                self._do(self.ledger.generated, receipt)
            return
        self.painted += self.world.group_size
        self._do(self.ledger.generated, receipt)
        if self.random.random() < self.world.repeat_rate:
            self._do(self.ledger.generated, receipt)

    def _score(self, group_id: int, attempt: int) -> None:
        def finish() -> None:
            row = self.ledger.row(group_id)
            if row.state is not GroupState.SCORING or row.attempt != attempt:
                with pytest.raises(StaleLease):
                    self._do(self.ledger.scored, group_id, attempt, {})
                return
            unfit = self.random.random() < self.world.discard_rate
            at_once = unfit and self.random.random() < 0.5
            self._do(
                self.ledger.scored, group_id, attempt, {}, discard_as=DiscardReason.ZERO_VARIANCE if at_once else None
            )
            if unfit and not at_once:
                self._do(self.ledger.discard, group_id, DiscardReason.TOO_FEW_VALID, attempt)

        self._later(self._duration(), finish)

    def _train(self) -> None:
        claimed = self._do(self.ledger.claim, self.world.groups_per_step, self.world.order, 3 * LEASE_S)
        if claimed is None:
            if self.rule.may_admit(self.ledger.live):  # looking for a claim discarded stale groups: there is room again
                self._act()
            return
        self._check_order(claimed)
        self.learner_busy, life = True, self.learner_life

        def finish() -> None:
            if life != self.learner_life:
                return  # that learner is dead
            self.learner_busy = False
            step = self.ledger.trained_steps + 1
            try:
                staleness = self._do(self.ledger.trained, claimed, step, step - 1)
            except StaleLease:  # it took longer than its claim: its update must not count
                self._roll_back()
                return
            assert all(value >= 0 for value in staleness)
            self._later(self.random.uniform(0, 2), lambda: self._publish(step, life))

        self._later(self._duration() * self.random.choice([1, 1, 3]), finish)

    def _publish(self, step: int, life: int) -> None:
        if life != self.learner_life or step <= self.ledger.published_version:
            return
        self._do(self.ledger.published, step, step)
        if self.random.random() < 0.3:  # a state is saved
            self.state_step = step
            self._do(self.ledger.covered, step)

    # ---- faults --------------------------------------------------------------------------------------------------

    def _plan_faults(self) -> None:
        world = self.world
        kinds = (
            (self._crash, world.crashes), (self._roll_back, world.rollbacks), (self._lose, world.losses),
            (lambda: self._do(self.ledger.discard_late, LATE_S * self.random.random()), world.lates),
        )  # fmt: skip
        for fault, number in kinds:
            for _ in range(number):
                self._later(self.random.uniform(0, 4.0 * world.steps), fault)

    def _crash(self) -> None:
        """The controller dies and comes back; often the learner with it. Results under way arrive all the same."""
        self.ledger.close()
        self.ledger = self._open()
        self._do(self.ledger.recover)
        self.learner_life += 1
        self.learner_busy = False
        self._roll_back(self.state_step if self.random.random() < 0.5 else self.ledger.trained_steps)

    def _roll_back(self, to_step: int | None = None) -> None:
        """The learner is rebuilt from its last state, now and then an older one, which it publishes at once."""
        if to_step is None:
            if self.random.random() < 0.25:
                self.state_step = self.random.randint(0, self.state_step)  # bytes of the steps since may be freed
            to_step = self.state_step
        self.learner_life += 1
        self.learner_busy = False
        self.rolled_back |= to_step < self.ledger.trained_steps
        self._do(self.ledger.rollback, to_step)
        self._do(self.ledger.published, to_step, to_step)

    def _lose(self) -> None:
        """A vault's disk loses one group, whatever it is doing."""
        group_id = self.random.choice(self.ledger.rows()).group_id
        try:
            self._do(self.ledger.lost, group_id)
        except LedgerError:
            assert self.ledger.row(group_id).state not in (GroupState.GENERATED, GroupState.SCORING, GroupState.READY)

    # ---- time ----------------------------------------------------------------------------------------------------

    def _duration(self) -> float:
        if self.random.random() < self.world.hang_rate:
            return self.random.choice([LEASE_S * 1.5, LEASE_S * 20])  # late, or as good as never
        return self.random.expovariate(1.0)

    def _later(self, seconds: float, action: Callable[[], None]) -> None:
        heapq.heappush(self.events, (self.time + seconds, next(self.sequence), action))

    def _next_event(self) -> None:
        """Move the clock to whatever comes first: a result, a fault, or the end of a lease."""
        deadline = self.ledger.next_deadline()
        if deadline is not None and (not self.events or deadline <= self.events[0][0]):
            self.time = max(self.time, deadline)
            self._do(self.ledger.expire_leases)
            # a new actor takes the place of each hung one
            self.painting = {held for held in self.painting if self.ledger.row(held[0]).attempt == held[1]}
            return
        assert self.events, f"deadlock: nothing can happen any more, {self.ledger.books()}"
        self.time, _, action = heapq.heappop(self.events)
        action()

    def _open(self) -> Ledger:
        ledger = Ledger(self.path, now=lambda: self.time)
        ledger.govern(self.rule, max_attempts=3)
        return ledger


def simulate(world: World) -> None:
    with tempfile.TemporaryDirectory() as folder:
        Simulation(world, Path(folder)).run()


rates = st.sampled_from([0.0, 0.1, 0.4])
worlds = st.builds(
    World,
    seed=st.integers(0, 2**32),
    groups_per_step=st.integers(1, 4),
    max_staleness=st.integers(0, 3),
    group_size=st.integers(1, 4),
    num_actors=st.integers(1, 6),
    order=st.sampled_from(["admission", "admission", "ready"]),
    steps=st.integers(1, 8),
    hang_rate=rates,
    fail_rate=rates,
    discard_rate=rates,
    crashes=st.integers(0, 3),
    rollbacks=st.integers(0, 3),
    losses=st.integers(0, 3),
    lates=st.integers(0, 6),
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(worlds)
def test_law_11_holds_in_random_runs(world: World) -> None:
    simulate(world)


@pytest.mark.parametrize("seed", range(4))
def test_law_11_holds_in_a_long_hard_run(seed: int) -> None:
    simulate(
        World(seed=seed, max_staleness=seed % 3, steps=25, crashes=8, rollbacks=8, losses=8, lates=15, hang_rate=0.2)
    )


class TooGenerous(AdmissionRule):
    """Allows weights one version older than the bound."""

    def min_version(self, published: int, live_before: int) -> int:
        return max(0, super().min_version(published, live_before) - 1)


class TooEager(AdmissionRule):
    """Admits one group too many."""

    def may_admit(self, live: int) -> bool:
        return live <= self.capacity


class TooStrict(AdmissionRule):
    """Asks for weights that exist only after the group itself was trained."""

    def min_version(self, published: int, live_before: int) -> int:
        return super().min_version(published, live_before) + self.max_staleness + 1


@pytest.mark.parametrize(
    ("rule", "found"), [(TooGenerous, "too stale"), (TooEager, "live bound"), (TooStrict, "deadlock")]
)
def test_the_simulation_finds_a_wrong_rule(rule: type[AdmissionRule], found: str) -> None:
    world = World(seed=0, crashes=0, rollbacks=0, losses=0, lates=0, hang_rate=0.0, rule=rule)
    with pytest.raises(AssertionError, match=found):
        simulate(world)

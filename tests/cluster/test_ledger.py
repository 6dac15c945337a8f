"""The ledger's transitions: fencing, leases, claims, roll-backs, and what may be asked of it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from cluster.admission import AdmissionRule
from cluster.ledger import Ledger, LedgerReader
from contracts.errors import LedgerError, StaleLease
from contracts.scores import point_table
from contracts.wire import DiscardReason, GroupState, PaintReceipt, PromptSpec, PromptTask, Source

G = 4


class Clock:
    """Time that moves when told."""

    def __init__(self) -> None:
        self.seconds = 1000.0

    def __call__(self) -> float:
        return self.seconds


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def ledger(tmp_path: Path, clock: Clock) -> Iterator[Ledger]:
    opened = Ledger(tmp_path / "ledger.sqlite", now=clock)
    opened.govern(AdmissionRule(groups_per_step=2, max_staleness=1), max_attempts=3)
    opened.published(0, 0)
    yield opened
    opened.close()


def admit(ledger: Ledger, number: int = 1, source: Source = Source.ACTORS) -> list[int]:
    return [
        ledger.admit(PromptSpec(text=f"prompt {i}"), ledger.next_position(), G, source=source) for i in range(number)
    ]


def receipt(task: PromptTask, version: int | None = None) -> PaintReceipt:
    return PaintReceipt(
        group_id=task.group_id, attempt=task.attempt, weight_version=task.min_version if version is None else version,
        vault="vault-0", num_bytes=100, paint_seconds=1.5, store_seconds=0.1, actor="actor-0",
    )  # fmt: skip


def lease(ledger: Ledger, lease_s: float = 10.0) -> PromptTask:
    task = ledger.lease_generating("actor-0", lease_s)
    assert task is not None
    return task


def paint(ledger: Ledger, version: int | None = None) -> int:
    task = lease(ledger)
    ledger.generated(receipt(task, version))
    return task.group_id


def make_ready(ledger: Ledger, version: int | None = None) -> int:
    group_id = paint(ledger, version)
    score(ledger, group_id)
    return group_id


def score(ledger: Ledger, group_id: int) -> None:
    attempt = ledger.lease_scoring(group_id, 10.0)
    assert attempt is not None
    ledger.scored(group_id, attempt, {"judge": point_table("judge", "1", ["score"], np.arange(float(G)))})


def train_step(ledger: Ledger) -> list[int]:
    """Admit, paint, score, claim, train and publish one step."""
    while ledger.live < 4:
        admit(ledger)
    while ledger.next_to_generate() is not None:
        make_ready(ledger)
    claimed = ledger.claim(2)
    assert claimed is not None
    step = ledger.trained_steps + 1
    ledger.trained(claimed, step, step - 1)
    ledger.published(step, step)
    return claimed


def test_a_group_lives_from_admission_to_published_weights(ledger: Ledger) -> None:
    admit(ledger, 2)
    task = lease(ledger)
    assert (task.group_id, task.attempt, task.min_version, task.group_size) == (0, 0, 0, G)
    assert task.prompt.text == "prompt 0"
    assert ledger.generated(receipt(task)) is GroupState.GENERATED
    assert ledger.books().alive == ledger.books().painted == G
    score(ledger, 0)
    make_ready(ledger)
    assert ledger.claim(2) == [0, 1]
    assert ledger.claimed() == [0, 1]
    assert ledger.trained([0, 1], 1, 0) == [0, 0]
    assert ledger.live == 2  # until the weights are published
    ledger.published(1, 1)
    assert ledger.live == 0
    books = ledger.books()
    assert (books.painted, books.trained, books.alive, books.discarded) == (2 * G, 2 * G, 0, 0)
    assert (books.groups_trained, books.max_staleness_seen, books.published) == (2, 0, 1)
    row = ledger.row(0)
    assert (row.step, row.staleness, row.weight_version, row.vault, row.paint_seconds) == (1, 0, 0, "vault-0", 1.5)


def test_scores_and_rewards_are_kept_as_they_were(ledger: Ledger) -> None:
    admit(ledger)
    group_id = paint(ledger)
    table = point_table("judge", "v2", ["a", "b"], np.array([[1.0, np.nan]] * G), reasons=["fine"] * G)
    attempt = ledger.lease_scoring(group_id, 10.0)
    assert attempt is not None
    assert ledger.tables(group_id) == {}
    ledger.scored(group_id, attempt, {"judge": table}, {"values": np.array([0.5, np.nan]), "valid": [True, False]})
    kept = ledger.tables(group_id)["judge"]
    np.testing.assert_array_equal(kept.values, table.values)
    np.testing.assert_array_equal(kept.outcomes, table.outcomes)
    assert (kept.version, kept.reasons) == ("v2", table.reasons)
    assert ledger.rewards(group_id) == {"values": [0.5, None], "valid": [True, False]}


def test_the_result_of_an_expired_lease_is_refused(ledger: Ledger, clock: Clock) -> None:
    admit(ledger)
    slow = lease(ledger)
    clock.seconds += 11
    assert ledger.next_deadline() == 1010.0
    assert ledger.expire_leases() == [(0, GroupState.GENERATING)]
    quick = lease(ledger)
    assert quick.attempt == slow.attempt + 1
    with pytest.raises(StaleLease):
        ledger.generated(receipt(slow))
    assert ledger.generated(receipt(quick)) is GroupState.GENERATED
    with pytest.raises(StaleLease):
        ledger.generated(receipt(slow))
    assert ledger.books().painted == G
    assert ledger.books().refused == 2 * G


def test_a_result_just_past_its_deadline_counts_while_nobody_took_the_lease_back(ledger: Ledger, clock: Clock) -> None:
    admit(ledger)
    task = lease(ledger)
    clock.seconds += 11
    assert ledger.generated(receipt(task)) is GroupState.GENERATED


def test_delivering_a_result_twice_changes_nothing(ledger: Ledger) -> None:
    admit(ledger)
    task = lease(ledger)
    ledger.generated(receipt(task))
    assert ledger.generated(receipt(task)) is GroupState.GENERATED
    attempt = ledger.lease_scoring(0, 10.0)
    assert attempt is not None
    assert ledger.scored(0, attempt, {}) is GroupState.READY
    assert ledger.scored(0, attempt, {}) is GroupState.READY
    assert ledger.generated(receipt(task)) is GroupState.READY
    assert ledger.books().painted == G
    assert ledger.books().refused == 0


def test_a_group_that_keeps_failing_is_discarded(ledger: Ledger, clock: Clock) -> None:
    admit(ledger)
    assert ledger.give_back(0, lease(ledger).attempt) is GroupState.ADMITTED
    clock.seconds += 20
    task = lease(ledger)
    clock.seconds += 20
    ledger.expire_leases()
    assert ledger.give_back(0, task.attempt) is GroupState.ADMITTED  # that lease has ended already: no third failure
    assert ledger.give_back(0, lease(ledger).attempt) is GroupState.DISCARDED
    assert ledger.row(0).reason is DiscardReason.ATTEMPTS
    assert ledger.books().groups_discarded_by_reason == {"attempts": 1}
    assert ledger.books().discarded_by_reason == {}  # nothing was painted


def test_painting_and_scoring_have_their_own_attempts(ledger: Ledger) -> None:
    admit(ledger)
    for _ in range(2):
        ledger.give_back(0, lease(ledger).attempt)
    paint(ledger)
    for _ in range(2):
        attempt = ledger.lease_scoring(0, 10.0)
        assert attempt is not None
        assert ledger.give_back(0, attempt) is GroupState.GENERATED
    attempt = ledger.lease_scoring(0, 10.0)
    assert attempt is not None
    assert ledger.give_back(0, attempt) is GroupState.DISCARDED
    assert ledger.books().discarded_by_reason == {"attempts": G}


def test_a_younger_ready_group_never_overtakes(ledger: Ledger) -> None:
    admit(ledger, 3)
    oldest = lease(ledger)
    make_ready(ledger)
    make_ready(ledger)
    assert ledger.claim(2) is None
    assert ledger.claim(2, order="ready") == [1, 2]
    ledger.release_claim()
    ledger.generated(receipt(oldest))
    score(ledger, 0)
    assert ledger.claim(2) == [0, 1]


def test_a_discarded_group_makes_way(ledger: Ledger) -> None:
    admit(ledger, 3)
    for _ in range(3):
        make_ready(ledger)
    ledger.discard(0, DiscardReason.ZERO_VARIANCE)
    assert ledger.claim(2) == [1, 2]
    with pytest.raises(StaleLease):
        ledger.discard(0, DiscardReason.ZERO_VARIANCE)


def test_a_claim_is_exactly_one_step_and_trained_whole(ledger: Ledger) -> None:
    admit(ledger, 4)
    for _ in range(4):
        make_ready(ledger)
    with pytest.raises(LedgerError, match="one claim of 2"):
        ledger.claim(3)
    assert ledger.claim(2) == [0, 1]
    with pytest.raises(LedgerError, match="train or release"):
        ledger.claim(2)
    with pytest.raises(LedgerError, match="trained whole"):
        ledger.trained([0], 1, 0)
    with pytest.raises(LedgerError, match="claimed"):
        ledger.discard(0, DiscardReason.NO_PAIR)
    with pytest.raises(LedgerError, match="does not follow"):
        ledger.trained([0, 1], 2, 1)
    with pytest.raises(StaleLease):
        ledger.trained([0, 2], 1, 0)
    assert ledger.release_claim() == [0, 1]
    with pytest.raises(StaleLease):
        ledger.trained([0, 1], 1, 0)


def test_an_expired_claim_goes_back_as_a_whole_and_costs_no_attempt(ledger: Ledger, clock: Clock) -> None:
    admit(ledger, 2)
    make_ready(ledger)
    make_ready(ledger)
    for _ in range(5):
        assert ledger.claim(2, lease_s=10.0) == [0, 1]
        clock.seconds += 5
        ledger.renew_claim(10.0)
        clock.seconds += 9
        assert ledger.expire_leases() == []
        clock.seconds += 2
        assert ledger.expire_leases() == [(0, GroupState.CLAIMED), (1, GroupState.CLAIMED)]
    assert [row.state for row in ledger.rows()] == [GroupState.READY] * 2


def test_admission_stops_at_the_bound(ledger: Ledger) -> None:
    admit(ledger, 4)
    with pytest.raises(LedgerError, match="bound is 4"):
        admit(ledger)
    ledger.discard(2, DiscardReason.TOO_FEW_VALID)
    assert admit(ledger) == [4]
    assert [row.position for row in ledger.rows()] == [0, 1, 2, 3, 4]


def test_the_lowest_weight_version_follows_the_step_a_group_is_for(ledger: Ledger) -> None:
    train_step(ledger)  # four admitted, two of them trained; version 1 is out
    admit(ledger, 2)
    task = lease(ledger)
    assert task.min_version == 1  # for step 3, which trains version 2; one step of staleness is allowed
    with pytest.raises(LedgerError):
        ledger.published(2, 2)
    assert ledger.generated(receipt(task, version=0)) is GroupState.DISCARDED
    assert ledger.row(task.group_id).reason is DiscardReason.STALE
    assert ledger.books().balanced


def test_late_is_what_keeps_the_next_claim_waiting(ledger: Ledger, clock: Clock) -> None:
    admit(ledger, 4)
    lease(ledger)  # group 0 hangs
    make_ready(ledger)
    paint(ledger)  # group 2 waits for its scores; it is not needed for the next claim yet
    clock.seconds += 50
    assert ledger.discard_late(100) == []
    assert ledger.discard_late(40) == [(0, 0), (2, G), (3, 0)]  # each made the next one part of the next claim
    assert ledger.row(1).state is GroupState.READY
    assert ledger.books().discarded_by_reason == {"late": G}


def test_a_roll_back_makes_groups_ready_again(ledger: Ledger) -> None:
    first, second = train_step(ledger), train_step(ledger)
    assert ledger.covered(1) == first
    assert ledger.rollback(1) == second
    assert [ledger.row(group_id).state for group_id in second] == [GroupState.READY] * 2
    assert (ledger.trained_steps, ledger.published_version) == (1, 1)
    books = ledger.books()
    assert books.balanced
    assert (books.trained, books.groups["trained"]) == (2 * G, 2)
    ledger.published(1, 1)
    assert ledger.claim(2) == second
    assert ledger.trained(second, 2, 1) == [1, 1]
    assert ledger.covered(1) == []
    assert ledger.covered(2) == second


def test_a_roll_back_behind_freed_bytes_paints_again(ledger: Ledger) -> None:
    first = train_step(ledger)
    ledger.covered(1)
    ledger.rollback(0)
    assert [ledger.row(group_id).state for group_id in first] == [GroupState.ADMITTED] * 2
    assert ledger.books().discarded_by_reason == {"lost": 2 * G}
    assert ledger.books().balanced
    assert lease(ledger).min_version == 0


def test_weights_that_were_rolled_back_paint_nothing_more(ledger: Ledger) -> None:
    train_step(ledger)
    train_step(ledger)
    admit(ledger)
    task = lease(ledger)
    ledger.rollback(1)
    with pytest.raises(StaleLease, match="rolled back"):
        ledger.generated(receipt(task, version=2))
    row = ledger.row(task.group_id)
    assert (row.state, row.attempt, row.failures) == (GroupState.ADMITTED, task.attempt + 1, 0)


def test_a_group_pulled_forward_past_its_own_weights_is_discarded(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.sqlite")
    ledger.govern(AdmissionRule(groups_per_step=1, max_staleness=0), max_attempts=3)
    for step in (1, 2):
        admit(ledger)
        make_ready(ledger)
        ledger.trained(ledger.claim(1) or [], step, step - 1)
        ledger.published(step, step)
    admit(ledger)
    assert make_ready(ledger) == 2
    ledger.rollback(0)
    assert ledger.claim(1) == [0]
    ledger.trained([0], 1, 0)
    ledger.published(1, 1)
    ledger.discard(1, DiscardReason.TOO_FEW_VALID)
    assert ledger.claim(1) is None  # group 2 was painted by version 2, which the step after 1 cannot be trained from
    assert ledger.row(2).reason is DiscardReason.STALE
    ledger.close()


def test_lost_bytes_are_painted_again(ledger: Ledger) -> None:
    admit(ledger, 2)
    make_ready(ledger)
    ledger.lost(0)
    books = ledger.books()
    assert (books.painted, books.discarded_by_reason, books.alive, books.balanced) == (G, {"lost": G}, 0, True)
    assert ledger.tables(0) == {}
    make_ready(ledger)
    assert ledger.books().painted == 2 * G
    with pytest.raises(LedgerError):
        ledger.lost(1)


def test_the_learners_own_images_count_when_they_are_trained(ledger: Ledger) -> None:
    admit(ledger, 2, Source.LEARNER)
    make_ready(ledger)
    make_ready(ledger)
    assert ledger.books().painted == 0
    assert ledger.trained(ledger.claim(2) or [], 1, 0) == [0, 0]
    assert ledger.books().painted == ledger.books().trained == 2 * G
    ledger.rollback(0)
    assert (ledger.books().alive, ledger.books().balanced) == (2 * G, True)
    ledger.trained(ledger.claim(2) or [], 1, 0)
    assert ledger.books().painted == 2 * G


def test_the_end_of_a_run_leaves_nothing_alive(ledger: Ledger) -> None:
    admit(ledger, 4)
    for _ in range(3):
        make_ready(ledger)
    ledger.claim(2)
    assert ledger.discard_alive(DiscardReason.RUN_END) == [(0, G), (1, G), (2, G), (3, 0)]
    books = ledger.books()
    assert (books.alive, books.live_groups, books.discarded_by_reason) == (0, 0, {"run_end": 3 * G})
    assert books.alive_by_state["claimed"] == 0
    assert ledger.covered(0) == [0, 1, 2]
    assert ledger.covered(0) == []


def test_rows_and_journal_can_be_filtered(ledger: Ledger) -> None:
    train_step(ledger)
    ledger.discard(2, DiscardReason.NO_PAIR)
    assert [row.group_id for row in ledger.rows(step=1)] == [0, 1]
    assert [row.group_id for row in ledger.rows(state=GroupState.READY)] == [3]
    assert [row.group_id for row in ledger.rows(reason=DiscardReason.NO_PAIR)] == [2]
    assert [row.group_id for row in ledger.rows(since=1, limit=2)] == [1, 2]
    events = [event.event for event in ledger.journal(2)]
    assert events == ["admitted", "generating", "generated", "scoring", "ready", "discarded"]
    assert len(ledger.journal(limit=3)) == 3
    with pytest.raises(LedgerError):
        ledger.row(99)


def test_a_reader_sees_a_running_ledger_and_cannot_write(ledger: Ledger) -> None:
    admit(ledger)
    reader = LedgerReader(ledger.path)
    assert reader.books().groups["admitted"] == 1
    admit(ledger)
    assert reader.live == 2
    assert reader.prompt(0).text == "prompt 0"
    assert not hasattr(reader, "admit")
    reader.close()


def test_there_is_one_writer(ledger: Ledger) -> None:
    with pytest.raises(LedgerError, match="already running"):
        Ledger(ledger.path)


def test_what_is_no_ledger_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LedgerError, match="no ledger"):
        LedgerReader(tmp_path / "none.sqlite")
    garbage = tmp_path / "garbage.sqlite"
    garbage.write_bytes(b"not a database" * 1000)
    with pytest.raises(LedgerError, match="not a readable ledger"):
        Ledger(garbage)
    with pytest.raises(LedgerError, match="not a readable ledger"):
        LedgerReader(garbage)

"""The plan of a step: every valid row once an epoch, ranks equal, nothing dependent on their number."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from contracts.config import RunConfig
from contracts.declarations import ObjectiveNeeds
from contracts.wire import GroupHeader, PromptSpec
from learner.plan import noise_key, plan_updates
from learner.types import Credit

STATES = ObjectiveNeeds(states=True, log_probs=True)
CLEAN = ObjectiveNeeds(clean=True)
PAIRS = ObjectiveNeeds(unit="pair", clean=True)


def config(micro_batch=4, group_size=8, objective="grpo", **learner) -> RunConfig:
    return RunConfig.model_validate(
        {
            "name": "t", "model": {"path": "x"}, "scorers": [{"name": "s", "function": "m:f"}], "stop": {"steps": 1},
            "objective": {"name": objective} if isinstance(objective, str) else objective, "learner": learner,
            "rollout": {"group_size": group_size, "micro_batch": micro_batch},
        }
    )  # fmt: skip


def header(group_id, size, micro_batches) -> GroupHeader:
    return GroupHeader(
        group_id=group_id, attempt=0, prompt=PromptSpec(text="x"), group_size=size, weight_version=0, prompt_digest="d",
        micro_batches=micro_batches,
    )  # fmt: skip


def chunks(size, micro):
    return [min(micro, size - start) for start in range(0, size, micro)]


def plan(valid, needs, run, step=0, rewards=None, **more):
    headers = {g: header(g, len(v), chunks(len(v), run.rollout.micro_batch)) for g, v in valid.items()}
    valid = {g: np.array(v, bool) for g, v in valid.items()}
    return plan_updates(headers, valid, Credit({}, rewards=rewards or {}), needs, run, step, **more)


def rows_of(update):
    return [row for rank in update.ranks for batch in rank for row in batch.rows]


def weighted(update):
    return Counter((row.group, row.sample) for row in rows_of(update) if row.weight)


VALID = st.dictionaries(
    st.integers(0, 50), st.lists(st.booleans(), min_size=1, max_size=9), min_size=1, max_size=5
)  # fmt: skip


@settings(max_examples=200, deadline=None)
@given(
    valid=VALID, ranks=st.integers(1, 4), updates=st.integers(1, 4), epochs=st.integers(1, 3), micro=st.integers(1, 8),
    needs=st.sampled_from([STATES, CLEAN]), step=st.integers(0, 3),
)  # fmt: skip
def test_every_valid_row_once_an_epoch_ranks_equal_and_independent_of_their_number(
    valid, ranks, updates, epochs, micro, needs, step
):
    run = config(micro, ranks=ranks, updates_per_step=updates, epochs=epochs)
    plans = plan(valid, needs, run, step)
    expected = Counter((g, i) for g, flags in valid.items() for i, flag in enumerate(flags) if flag)
    if not expected:
        assert plans == []
        return
    assert len(plans) % epochs == 0
    per_epoch = len(plans) // epochs
    assert 1 <= per_epoch <= updates
    for epoch in range(epochs):
        part = plans[epoch * per_epoch : (epoch + 1) * per_epoch]
        assert sum((weighted(update) for update in part), Counter()) == expected
    for update in plans:
        assert len({len(rank) for rank in update.ranks}) == 1
        assert len(update.ranks) == ranks
        assert update.global_weight == sum(weighted(update).values())
    alone = plan(valid, needs, config(micro, ranks=1, updates_per_step=updates, epochs=epochs), step)
    assert [weighted(u) for u in alone] == [weighted(u) for u in plans]
    assert [u.global_weight for u in alone] == [u.global_weight for u in plans]


def test_recorded_states_keep_the_composition_they_were_painted_in():
    plans = plan({3: [1, 0, 1, 1, 1, 0, 0, 0, 0, 0]}, STATES, config(4, 10))
    batches = sorted([row.sample for row in batch.rows] for batch in plans[0].ranks[0])
    assert batches == [[0, 1, 2, 3], [4, 5, 6, 7]]  # the third held no valid row
    weights = {row.sample: row.weight for row in rows_of(plans[0])}
    assert weights == {0: 1, 1: 0, 2: 1, 3: 1, 4: 1, 5: 0, 6: 0, 7: 0}


def test_another_learner_micro_batch_regroups_within_the_group_only():
    run = config(4, 5)
    run = run.model_copy(update={"learner": run.learner.model_copy(update={"micro_batch": 2})})
    plans = plan({0: [1] * 5, 1: [1] * 5}, STATES, run)
    assert len(plans[0].ranks[0]) == 6
    for batch in plans[0].ranks[0]:
        assert len({row.group for row in batch.rows}) == 1
        assert len(batch.rows) <= 2


def test_rows_without_states_are_packed_across_groups_without_invalid_ones():
    plans = plan({0: [1, 0, 1], 1: [1, 1, 0]}, CLEAN, config(4))
    assert [[(r.group, r.sample) for r in b.rows] for b in plans[0].ranks[0]] == [[(0, 0), (0, 2), (1, 0), (1, 1)]]


def test_padding_repeats_rows_without_weight():
    update = plan({0: [1] * 4, 1: [1] * 4, 2: [1] * 4}, STATES, config(4, 4, ranks=2))[0]
    assert [len(rank) for rank in update.ranks] == [2, 2]
    assert sum(row.weight == 0 for row in rows_of(update)) == 4
    assert update.global_weight == 12


def test_updates_split_as_evenly_as_it_goes():
    plans = plan({g: [1] * 4 for g in range(7)}, STATES, config(4, 4, updates_per_step=3))
    assert sorted(u.global_weight for u in plans) == [8, 8, 12]


def test_shuffle_is_seeded_by_step_and_epoch():
    run = config(2, 8, epochs=2)
    valid = {g: [1] * 8 for g in range(4)}
    order = [[b.rows[0] for b in u.ranks[0]] for u in plan(valid, STATES, run, step=1)]
    assert order == [[b.rows[0] for b in u.ranks[0]] for u in plan(valid, STATES, run, step=1)]
    assert order[0] != order[1]
    assert order[0] != [b.rows[0] for b in plan(valid, STATES, run, step=2)[0].ranks[0]]


def test_single_plan_takes_every_group_in_claim_order():
    plans = plan({5: [1] * 4, 2: [1] * 4}, STATES, config(4, 4, updates_per_step=2, epochs=3), single=True)
    assert [batch.rows[0].group for batch in plans[0].ranks[0]] == [5, 2]
    assert len(plans) == 1


def test_pairs_stand_winners_first_share_keys_and_count_once():
    run = config(4, 4, objective={"name": "dpo", "pairs_per_group": 2})
    rewards = {0: np.array([0.0, 3.0, 1.0, np.nan]), 1: np.array([1.0, 0.0]), 2: np.array([1.0, 1.0])}
    valid = {g: list(np.isfinite(r)) for g, r in rewards.items()}
    update = plan(valid, PAIRS, run, rewards=rewards)[0]
    (batch,) = update.ranks[0]
    assert [(r.group, r.sample) for r in batch.rows] == [(0, 1), (1, 0), (0, 0), (1, 1)]
    assert [r.noise_key for r in batch.rows[:2]] == [r.noise_key for r in batch.rows[2:]]
    assert batch.rows[0].noise_key == noise_key(0, 1)
    assert update.global_weight == 2


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_pairs_do_not_depend_on_ranks(ranks):
    rng = np.random.default_rng(0)
    rewards = {g: rng.normal(size=4) for g in range(5)}
    valid = {g: [1] * 4 for g in rewards}
    run = config(2, 4, objective="dpo", ranks=ranks)
    update = plan(valid, PAIRS, run, rewards=rewards)[0]
    assert sum(weighted(update).values()) == 10
    assert update.global_weight == 5
    for batch in (b for rank in update.ranks for b in rank):
        winner, loser = batch.rows
        assert (winner.sample, loser.sample) == (rewards[winner.group].argmax(), rewards[loser.group].argmin())

"""What every aggregation rule owes, whatever its formula: permutation, validity (law 4), determinism, state as JSON."""

from __future__ import annotations

import json

import numpy as np
import pytest
from aggregation_kit import RULES, advantages, group_for, permuted, rewards, rule, scorer, scores, totals, without
from hypothesis import given, settings
from hypothesis import strategies as st

from contracts import registry
from contracts.declarations import AggregationNeeds
from contracts.errors import ConfigError
from contracts.metrics import STEP_METRICS
from learner.credit.run_credit import RunCredit

unit = st.floats(0, 1, width=32)
groups = st.integers(2, 6).flatmap(
    lambda size: st.tuples(*[st.lists(unit, min_size=size, max_size=size) for _ in range(2)])
)
EACH = pytest.mark.parametrize("name", list(RULES))
FEW = settings(max_examples=15, deadline=None)


def make(name: str):
    return rule(name, **RULES[name])


def of(name: str, group, jury=None):
    return group_for(name, np.array(group[0]), np.array(group[1]), jury)


def test_every_rule_of_the_registry_is_held_to_these_laws() -> None:
    assert registry.names("aggregation") == list(RULES)
    for entry in registry.entries("aggregation"):
        assert isinstance(entry.declares, AggregationNeeds)
        assert entry.name == "weighted_sum" or entry.slugs


@EACH
@FEW
@given(batch=st.lists(groups, min_size=1, max_size=3), seed=st.integers(0, 9))
def test_samples_and_groups_have_no_order(name: str, batch, seed: int) -> None:
    plain = [of(name, group) for group in batch]
    orders = [np.random.default_rng(seed + i).permutation(len(group[0])).tolist() for i, group in enumerate(batch)]
    shuffled = [permuted(group, order) for group, order in zip(plain, orders, strict=True)]
    first, second = rewards(make(name), *plain), rewards(make(name), *reversed(shuffled))
    for one, other, order in zip(first, reversed(second), orders, strict=True):
        np.testing.assert_allclose(totals(one)[order], totals(other), rtol=1e-7, atol=1e-9)


@EACH
@FEW
@given(group=groups, neighbour=groups, lost=st.integers(0, 5), by_a=st.booleans())
def test_a_sample_that_lost_a_required_score_is_invalid_and_leaves_the_others_alone(
    name: str, group, neighbour, lost: int, by_a: bool
) -> None:
    lost %= len(group[0])
    broken = [list(row) for row in group]
    broken[0 if by_a else 1][lost] = np.nan
    failed, beside = rewards(make(name), of(name, broken), of(name, neighbour))
    alone, _ = rewards(make(name), without(of(name, group), lost), of(name, neighbour))
    assert not failed.valid[lost]
    assert np.isnan(failed.values[lost])
    others = [i for i in range(len(group[0])) if i != lost]
    np.testing.assert_array_equal(totals(failed)[others], totals(alone))
    both = advantages([failed, beside], "global"), advantages([alone, beside], "global")
    np.testing.assert_array_equal(both[0][0][others], both[1][0])
    np.testing.assert_array_equal(both[0][1], both[1][1])
    assert both[0][0][lost] == 0


OPTIONAL = ("weighted_sum", "gdpo", "pareto", "log_tame", "gates", "trust", "win_rate", "uncertainty")


@pytest.mark.parametrize("name", OPTIONAL)
@FEW
@given(group=groups, lost=st.integers(0, 5))
def test_a_missing_optional_score_contributes_zero_after_centring(name: str, group, lost: int) -> None:
    lost %= len(group[0])
    jury = [scorer("a"), scorer("b", required=False)]
    broken = (group[0], [np.nan if i == lost else value for i, value in enumerate(group[1])])
    (got,) = rewards(make(name), of(name, broken, jury))
    (without_b,) = rewards(make(name), of(name, (group[0], [np.nan] * len(group[0])), jury))
    assert got.valid.all()
    if name != "log_tame":  # whose other columns decide together which of them is tamed
        np.testing.assert_allclose(got.values, without_b.values, atol=1e-12)
    shut_at = {"gates": 0.5, "trust": np.nextafter(0.2, 0)}  # what lies behind it is 0, scored or not
    closed = group[0][lost] <= shut_at.get(name, -1)
    assert closed or got.optional[lost] == 0
    assert abs(got.optional.sum()) < 1e-6


@pytest.mark.parametrize("name", [name for name in RULES if name != "directional"])  # both its columns are required
def test_an_optional_scorer_that_answers_nothing_tells_no_sample_from_another(name: str) -> None:
    jury = [scorer("a"), scorer("b", required=False)]
    values = np.array([0.1, 0.6, 0.9, 0.6])
    (got,) = rewards(make(name), scores(*[t for t in of(name, (values, values)).tables.values() if t.scorer == "a"],
                                        jury=jury, size=4))  # fmt: skip
    assert got.valid.all()
    assert got.totals()[1] == got.totals()[3]
    assert (np.diff(got.totals()[[0, 1, 2]]) >= 0).all()
    assert np.isfinite(totals(got)).all()


@EACH
def test_a_group_without_scores_is_invalid_and_harms_no_other(name: str) -> None:
    values = np.array([0.1, 0.6, 0.9])
    nothing = np.full(3, np.nan)
    empty, full = rewards(make(name), of(name, (nothing, nothing)), of(name, (values, values[::-1])))
    (alone,) = rewards(make(name), of(name, (values, values[::-1])))
    assert not empty.valid.any()
    np.testing.assert_array_equal(totals(full), totals(alone))


@EACH
def test_state_goes_through_json_and_gives_the_same_next_step(name: str) -> None:
    rng = np.random.default_rng(5)
    batches = [[of(name, rng.random((2, 4))) for _ in range(2)] for _ in range(4)]
    one = RunCredit(make(name), _Nothing())
    for number, batch in enumerate(batches[:3]):
        one.aggregate(dict(enumerate(batch)), number + 1)
    text = json.dumps(one.state_dict())
    two = RunCredit(make(name), _Nothing())
    two.load_state_dict(json.loads(text))
    last = dict(enumerate(batches[3]))
    first, second = one.aggregate(last, 4), two.aggregate(last, 4)
    for group_id, expected in first.rewards.items():
        np.testing.assert_array_equal(totals(expected), totals(second.rewards[group_id]))
    assert first.metrics == second.metrics
    assert all(np.isfinite(list(first.metrics.values())))
    assert one.state_dict() == two.state_dict()


@EACH
def test_it_measures_what_the_catalogue_says(name: str) -> None:
    """A name that ends in / stands for one a column."""
    rows = [0.1, 0.9, 0.6], [0.2, 0.8, 0.4]
    metrics = make(name).aggregate({0: of(name, rows)}, 1).metrics
    measured = {metric.split("/")[0] + "/" * ("/" in metric) for metric in metrics}
    assert measured == set(STEP_METRICS.get(("aggregation", name), ()))


def test_the_state_of_one_rule_is_not_taken_for_anothers() -> None:
    written = RunCredit(make("constrained"), _Nothing()).state_dict()
    with pytest.raises(ConfigError, match="cannot go on from the state of constrained"):
        RunCredit(make("gdpo"), _Nothing()).load_state_dict(written)
    RunCredit(make("gdpo"), _Nothing()).load_state_dict(RunCredit(make("win_rate"), _Nothing()).state_dict())


def test_a_run_of_before_there_was_state_begins_with_a_fresh_one() -> None:
    fresh = RunCredit(make("constrained"), _Nothing())
    before = fresh.state_dict()
    fresh.load_state_dict({})
    assert fresh.state_dict() == before


class _Nothing:
    """An advantage entry without state."""

    def state_dict(self):
        return {}

    def load_state_dict(self, state) -> None:
        assert state == {}

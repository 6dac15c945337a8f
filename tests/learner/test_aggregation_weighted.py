"""Aggregation rules over weighted columns, against the closed forms of their papers (catalogue *Check*)."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from aggregation_kit import advantages, pairs, point, rewards, rule, scorer, scores
from hypothesis import given, settings
from hypothesis import strategies as st

from contracts.errors import ScoringError
from learner.credit.aggregation.columns import win_rates
from learner.credit.aggregation.pareto import non_dominated

FEW = settings(max_examples=25, deadline=None)
rows = st.integers(2, 6).flatmap(
    lambda size: st.tuples(*[st.lists(st.floats(0, 1, width=32), min_size=size, max_size=size) for _ in range(2)])
)


def two(a, b):
    return scores(point("a", a), point("b", b))


# ---- gdpo ----------------------------------------------------------------------------------------------------------


def test_gdpo_tells_apart_what_the_sum_collapses():
    """Groups {(0,0),(0,1)} and {(0,0),(1,1)}: the normalised sum gives both +-0.707, GDPO +-0.707 and +-1.414."""
    easy, both = two([0, 0], [0, 1]), two([0, 1], [0, 1])
    got = [of.totals() for of in rewards(rule("gdpo"), easy, both)]
    np.testing.assert_allclose(got[0], [-0.7071, 0.7071], atol=2e-4)
    np.testing.assert_allclose(got[1], [-1.4142, 1.4142], atol=4e-4)
    total = [of.totals() for of in rewards(rule("weighted_sum"), easy, both)]
    grpo = [(t - t.mean()) / t.std(ddof=1) for t in total]
    np.testing.assert_allclose(grpo[0], grpo[1])


def test_gdpo_has_23_distinct_advantages_where_the_sum_has_15():
    """All patterns of two binary rewards over G = 4."""
    patterns = list(itertools.product([0, 1], repeat=4))
    batch = [two(a, b) for a in patterns for b in patterns]

    def distinct(values):
        return len(np.unique(np.round(np.concatenate(values), 6) + 0.0))

    def normalised(total):
        return (total - total.mean()) / total.std(ddof=1) if total.std() else total * 0

    sums = [normalised(of.totals()) for of in rewards(rule("weighted_sum"), *batch)]
    assert distinct(sums) == 15
    assert distinct([of.totals() for of in rewards(rule("gdpo", eps=1e-12), *batch)]) == 23


@FEW
@given(group=rows, scale=st.floats(0.5, 100), shift=st.floats(-5, 5))
def test_gdpo_does_not_see_a_rewards_scale_nor_shift(group, scale, shift):
    a, b = np.round(np.array(group), 2)  # gaps far above eps and float32
    plain, moved = (rewards(rule("gdpo", eps=1e-9), two(x, b))[0].totals() for x in (a, scale * a + shift))
    np.testing.assert_allclose(plain, moved, atol=1e-3)


def test_gdpo_of_one_reward_is_proportional_to_grpo_and_a_constant_one_adds_nothing():
    values = [0.1, 0.5, 0.9, 0.2]
    one, with_constant = rewards(rule("gdpo"), scores(point("a", values)), two(values, [3.3] * 4))
    centred = np.array(values) - np.mean(values)
    np.testing.assert_allclose(one.totals() / centred, one.totals()[0] / centred[0], rtol=1e-5)
    np.testing.assert_allclose(one.totals(), with_constant.totals())


def test_gdpo_whitened_over_the_batch():
    batch = [two([0, 0], [0, 1]), two([0, 1], [0, 1])]
    sums = np.concatenate([of.totals() for of in rewards(rule("gdpo"), *batch)])
    got = np.concatenate(advantages(rewards(rule("gdpo"), *batch), "global"))
    np.testing.assert_allclose(got, sums / (sums.std() + 1e-4), atol=1e-12)


def test_gdpo_condition_counts_the_easy_reward_only_where_the_hard_one_is_reached():
    condition = {"column": "b", "on": "a/x", "at_least": 0.5}
    (got,) = rewards(rule("gdpo", conditions=[condition]), two([0, 0, 1, 1], [1, 0, 1, 0]))
    (as_if,) = rewards(rule("gdpo"), two([0, 0, 1, 1], [0, 0, 1, 0]))
    np.testing.assert_array_equal(got.totals(), as_if.totals())
    with pytest.raises(ScoringError, match="names 'c'"):
        rewards(rule("gdpo", conditions=[condition | {"on": "c"}]), two([0, 1], [0, 1]))


# ---- pareto --------------------------------------------------------------------------------------------------------

grid = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=8)


@FEW
@given(points=grid)
def test_the_front_is_kept_by_increasing_maps_and_by_samples_it_dominates(points):
    values = np.array(points, np.float64)
    front = non_dominated(values)
    assert front.any()
    np.testing.assert_array_equal(front, non_dominated(np.stack([np.exp(values[:, 0]), values[:, 1] ** 3], axis=1)))
    more = np.concatenate([values, values[front][:1] - 1])
    np.testing.assert_array_equal(non_dominated(more), [*front, False])
    brute = [not any((p >= q).all() and (p > q).any() for p in values) for q in values]
    np.testing.assert_array_equal(front, brute)


def test_one_reward_keeps_the_best_alone_and_equal_samples_keep_each_other():
    np.testing.assert_array_equal(non_dominated(np.array([[1.0], [3.0], [2.0]])), [False, True, False])
    np.testing.assert_array_equal(non_dominated(np.array([[1.0, 2.0], [1.0, 2.0], [0.0, 2.0]])), [True, True, False])


def test_the_front_is_averaged_over_itself_and_the_rest_weighs_nothing():
    group = two([0.9, 0.1, 0.5, 0.4], [0.1, 0.9, 0.5, 0.4])  # the last is dominated by the third
    (got,) = rewards(rule("pareto"), group)
    np.testing.assert_allclose(got.scale, [4 / 3, 4 / 3, 4 / 3, 0])
    (a,) = advantages([got])
    z = [(np.array(v) - np.mean(v)) / (np.std(v) + 1e-4) for v in ([0.9, 0.1, 0.5, 0.4], [0.1, 0.9, 0.5, 0.4])]
    np.testing.assert_allclose(a, got.scale * (z[0] + z[1]), atol=1e-6)


def test_a_lower_is_better_reward_and_a_batch_wide_front():
    jury = [scorer("a"), scorer("b", weight=-1.0)]
    (got,) = rewards(rule("pareto"), scores(point("a", [1, 1, 0]), point("b", [5, 3, 4]), jury=jury))
    np.testing.assert_allclose(got.scale, [0, 3, 0])
    first, second = rewards(rule("pareto", scope="batch"), two([1, 0], [1, 0]), two([0.5, 0.2], [2, 0.1]))
    np.testing.assert_allclose(first.scale, [2, 0])
    np.testing.assert_allclose(second.scale, [2, 0])


# ---- log tame ------------------------------------------------------------------------------------------------------


def test_only_rewards_of_great_variability_are_tamed():
    steady, wild = [0.8, 0.9, 1.0], [0.0, 1.0, 30.0]
    (got,) = rewards(rule("log_tame"), two(steady, wild))
    np.testing.assert_allclose(got.totals(), np.array(steady) + np.log1p(wild), rtol=1e-6)
    (alone,) = rewards(rule("log_tame"), scores(point("a", wild)))
    np.testing.assert_allclose(alone.totals(), wild)
    (equal,) = rewards(rule("log_tame"), two(wild, wild))
    np.testing.assert_allclose(equal.totals(), 2 * np.array(wild))
    (by_number,) = rewards(rule("log_tame", threshold=0.01), two(steady, wild))
    np.testing.assert_allclose(by_number.totals(), np.log1p(steady) + np.log1p(wild), rtol=1e-6)


def test_a_reward_of_ten_times_the_variability_takes_a_smaller_share_of_the_sums_variance():
    """Share of Var(R) = cov(R_k, R) / Var(R): 1 / 1.01 in the sum; tamed, its deviation is log(2.5 / 1.5) / 2."""
    steady = 1 + 0.05 * np.array([-1, 1, -1, 1])
    wild = 1 + 0.5 * np.array([-1, -1, 1, 1])

    def share(name):
        (got,) = rewards(rule(name), two(steady, wild))
        return np.cov(got.totals() - steady, got.totals(), ddof=0)[0, 1] / got.totals().var()

    tamed = np.log(2.5 / 1.5) ** 2 / 4
    assert share("weighted_sum") == pytest.approx(1 / 1.01, rel=1e-5)
    assert share("log_tame") == pytest.approx(tamed / (tamed + 0.05**2), rel=1e-5)
    assert share("log_tame") < share("weighted_sum")


@FEW
@given(values=st.lists(st.floats(0, 100, width=32), min_size=2, max_size=6))
def test_taming_keeps_the_order(values):
    (got,) = rewards(rule("log_tame", threshold=0.0), scores(point("a", values)))
    order = np.argsort(np.array(values, np.float32), kind="stable")
    assert (np.diff(got.totals()[order]) >= 0).all()


def test_a_negative_reward_is_refused_with_the_way_out_and_an_offset_helps():
    with pytest.raises(ScoringError, match=r"a/x answered -2.*offsets\['a/x'\]"):
        rewards(rule("log_tame"), two([-2, 1], [0.5, 0.5]))
    (got,) = rewards(rule("log_tame", offsets={"a": 2.0}), two([-2, 1], [0.5, 0.6]))
    assert got.totals()[0] == pytest.approx(np.log1p(0.0) + 0.5, abs=1e-6)


# ---- win rate ------------------------------------------------------------------------------------------------------

NAN = np.nan


def test_win_rates_sum_to_half_the_group_and_are_evenly_spread_for_a_transitive_judge():
    wins = np.triu(np.ones((5, 5)), 1) + np.diag([NAN] * 5)  # 0 beats 1 beats 2 ...; both orders said
    (got,) = rewards(rule("win_rate"), scores(pairs("a", wins)))
    np.testing.assert_allclose(got.totals(), [1, 0.75, 0.5, 0.25, 0])
    assert got.totals().sum() == 2.5
    (ties,) = rewards(rule("win_rate"), scores(pairs("a", np.full((3, 3), 0.5))))
    np.testing.assert_allclose(ties.totals(), 0.5)
    assert (advantages([ties], "group")[0] == 0).all()


@FEW
@given(st.integers(2, 6).flatmap(lambda n: st.lists(st.floats(0, 1), min_size=n * n, max_size=n * n)))
def test_any_judges_win_rates_sum_to_half_the_group(flat):
    size = int(np.sqrt(len(flat)))
    rates, valid = win_rates(np.array(flat).reshape(size, size), np.ones((size, size), bool))
    assert valid.all()
    assert rates.sum() == pytest.approx(size / 2)


def test_two_orders_that_contradict_each_other_are_a_tie_and_one_order_is_enough():
    position_bias = np.array([[NAN, 1.0], [1.0, NAN]])  # whoever is shown first wins
    np.testing.assert_allclose(win_rates(position_bias, np.isfinite(position_bias))[0], [0.5, 0.5])
    once = np.array([[NAN, 0.9], [NAN, NAN]])
    np.testing.assert_allclose(win_rates(once, np.isfinite(once))[0], [0.9, 0.1])


def test_an_undecided_pair_is_left_out_and_a_sample_never_compared_is_invalid():
    wins = np.array([[NAN, 1, NAN], [0, NAN, NAN], [NAN, NAN, NAN]])
    (got,) = rewards(rule("win_rate"), scores(pairs("a", wins)))
    np.testing.assert_array_equal(got.valid, [True, True, False])
    np.testing.assert_array_equal(got.values, [1, 0, NAN])


def test_a_sample_that_another_scorer_failed_is_no_opponent():
    """Left with the loser of the pair (0, 1) alone, what it lost to the failed sample does not count."""
    wins = np.array([[NAN, 1, 0], [0, NAN, 0], [1, 1, NAN]])
    (got,) = rewards(rule("win_rate"), scores(pairs("a", wins), point("b", [1, 1, NAN])))
    np.testing.assert_allclose(got.totals()[:2], [1 + 0.5, 0 + 0.5])
    assert not got.valid[2]


def test_points_are_compared_with_each_other_so_that_tiny_gaps_are_no_big_advantage():
    (got,) = rewards(rule("win_rate"), scores(point("a", [0.1, 0.9, 0.5])))
    np.testing.assert_allclose(got.totals(), [0, 1, 0.5])
    (tied,) = rewards(rule("win_rate", tie_margin=0.02), scores(point("a", [0.50, 0.51, 0.49])))
    np.testing.assert_allclose(tied.totals(), 0.5)


def test_the_illusory_advantage_of_point_scores():
    """A gap of 1e-2 earns within 2 % of a gap of 1 under the normalised sum; -17 % at 1e-3, -67 % at 1e-4 (eps)."""

    def advantage(gap):
        values = np.array([0, 0, 0, gap])
        return ((values - values.mean()) / (values.std(ddof=1) + 1e-4))[3]

    assert advantage(1e-2) / advantage(1) == pytest.approx(0.981, abs=2e-3)
    assert advantage(1e-3) / advantage(1) == pytest.approx(0.83, abs=5e-3)
    assert advantage(1e-4) / advantage(1) == pytest.approx(0.33, abs=5e-3)
    wins = rewards(rule("win_rate", tie_margin=0.02), scores(point("a", [0, 0, 0, 1e-2])))
    assert (advantages(wins, "group")[0] == 0).all()


# ---- uncertainty ---------------------------------------------------------------------------------------------------


def unsure(values, deviations, **settings_):
    return rewards(rule("uncertainty", **settings_), scores(point("a", values, deviations)))[0]


@pytest.mark.parametrize("form", ["variance", "bound"])
def test_equal_uncertainty_is_the_plain_sum_and_weights_average_to_one(form):
    same = unsure([1, 2, 4], [0.3] * 3, form=form)
    np.testing.assert_allclose(same.scale, 1)
    np.testing.assert_array_equal(same.totals(), [1, 2, 4])
    mixed_ = unsure([1, 2, 4], [0.1, 8, 20], form=form)
    assert mixed_.scale.mean() == pytest.approx(1)
    assert (np.diff(mixed_.scale) <= 0).all()
    assert mixed_.scale[0] > mixed_.scale[2]


def test_ctrl_u_weights_in_closed_form():
    values, deviations = np.array([1.0, 2.0, 4.0]), np.array([0.0, 1.0, 2.0])
    raw = np.exp(-(deviations**2) / values.var())
    np.testing.assert_allclose(unsure(values, deviations, normalise=False).scale, raw, rtol=1e-6)
    np.testing.assert_allclose(unsure(values, deviations).scale, raw / raw.mean(), rtol=1e-6)
    far = unsure(values, [0.0, 1e6, 1e8])
    np.testing.assert_allclose(far.scale, [3, 0, 0], atol=1e-12)


def test_prefpaint_weights_in_closed_form():
    """exp(0.7) = 2.0138: the upper clip never binds, the lower one from b = 14 on."""
    got = unsure([1, 2, 4], [0.0, 10.0, 14.0001], form="bound", normalise=False).scale
    np.testing.assert_allclose(got, [2.0138, np.exp(0.2), 1.0], rtol=1e-4)
    (a,) = advantages([unsure([1, 2, 4], [0.0, 10.0, 100.0], form="bound")])
    assert np.sign(a).tolist() == [-1, -1, 1]


def test_variances_add_over_columns_and_a_missing_one_is_as_sure_as_the_group():
    jury = [scorer("a", weight=2.0), scorer("b")]
    tables = point("a", [0, 1, 2], [0.1, 0.2, 0.3]), point("b", [0, 0, 0], [0.3, 0.2, 0.1])
    (got,) = rewards(rule("uncertainty", normalise=False), scores(*tables, jury=jury))
    variance = 4 * np.array([0.01, 0.04, 0.09]) + np.array([0.09, 0.04, 0.01])
    np.testing.assert_allclose(got.scale, np.exp(-variance / np.var([0, 2, 4])), rtol=1e-5)
    part = unsure([0, 1, 2], [0.2, np.nan, 0.2])
    np.testing.assert_allclose(part.scale, 1)
    with pytest.raises(ScoringError, match="no table says how sure it is"):
        rewards(rule("uncertainty"), scores(point("a", [0, 1])))

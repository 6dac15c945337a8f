"""What a failed score does to the sample and to its neighbours, rule by rule: never a bonus, never a number."""

from __future__ import annotations

import numpy as np
import pytest
from aggregation_kit import RULES, advantages, group_for, point, rewards, rule, scorer, scores, totals
from hypothesis import given, settings
from hypothesis import strategies as st

from learner.credit.aggregation.base import Aggregation
from learner.credit.aggregation.columns import GroupScores
from learner.credit.aggregation.pareto import non_dominated

NAN = np.nan
FEW = settings(max_examples=60, deadline=None)

some = st.one_of(st.just(NAN), st.integers(0, 3).map(float))
tables = st.lists(st.tuples(some, some, some), min_size=1, max_size=6).map(lambda rows: np.array(rows, np.float64))
"""Rows of three scores, any of them missing."""


def optional(values: np.ndarray) -> GroupScores:
    """One group of three optional scorers."""
    names = "abc"[: values.shape[1]]
    jury = [scorer(name, required=False) for name in names]
    return scores(*[point(name, list(values[:, i])) for i, name in enumerate(names)], jury=jury)


# ---- pareto --------------------------------------------------------------------------------------------------------


def weights_of(values: np.ndarray) -> np.ndarray:
    (got,) = rewards(rule("pareto"), optional(values))
    assert got.scale is not None
    return got.scale


def test_a_sample_that_lacks_a_reward_is_dominated_by_one_that_has_all() -> None:
    complete = np.array([[0.6, 0.0], [0.5, 1.0], [0.4, 0.9]])
    np.testing.assert_allclose(weights_of(complete), [1.5, 1.5, 0])
    failed = complete.copy()
    failed[0, 1] = NAN
    np.testing.assert_allclose(weights_of(failed), [0, 3, 0])


def test_a_reward_that_nobody_has_counts_for_nobody() -> None:
    nothing = np.array([[0.6, NAN], [0.5, NAN], [0.6, NAN]])
    np.testing.assert_allclose(weights_of(nothing), [1.5, 0, 1.5])


def test_three_samples_that_each_lack_another_reward_leave_a_front() -> None:
    """Compared in the rewards both have, each of them beats the next: no front at all."""
    circle = np.array([[NAN, 1.0, 0.0], [0.0, NAN, 1.0], [1.0, 0.0, NAN]])
    np.testing.assert_allclose(weights_of(circle), [1, 1, 1])
    with_one_less = np.concatenate([circle, [[NAN, 3.0, NAN]]])
    np.testing.assert_allclose(weights_of(with_one_less), [4 / 3, 4 / 3, 4 / 3, 0])


@FEW
@given(values=tables, row=st.integers(0, 5), column=st.integers(0, 2))
def test_there_is_always_a_front_and_a_failure_never_raises_the_weight_of_who_failed(values, row, column) -> None:
    row %= len(values)
    before, counted = weights_of(values), np.isfinite(values).any(1)
    assert np.isfinite(before).all()
    assert before.sum() == counted.sum() or np.isclose(before.sum(), counted.sum())
    failed = values.copy()
    failed[row, column] = NAN
    assert weights_of(failed)[row] <= before[row] + 1e-12


def after_a_step() -> Aggregation:
    """A rule that has seen a batch."""
    pareto = rule("pareto")
    rewards(pareto, optional(np.array([[0.0, 1.0, 2.0], [3.0, 0.5, 1.0], [1.0, 1.0, 0.0]])))
    return pareto


@FEW
@given(values=tables, lower=st.integers(0, 5), gaps=st.tuples(*[st.integers(0, 2)] * 3))
def test_a_dominated_sample_changes_nothing_in_the_signal_of_the_others(values, lower, gaps) -> None:
    """The update is the mean over samples of advantage times score function, so it is each sample's share of it."""
    worse = values[lower % len(values)] - np.array(gaps)
    more = np.concatenate([values, worse[None]])
    if np.isnan(worse).all() or non_dominated(more)[-1]:
        return
    (plain,), (joined,) = (advantages(rewards(after_a_step(), optional(group))) for group in (values, more))
    number = np.isfinite(values).any(1).sum()
    np.testing.assert_allclose(joined[:-1] / (number + 1), plain / number, atol=1e-12)
    assert joined[-1] == 0


def test_the_front_is_measured_by_the_runs_past_and_the_first_batch_by_itself() -> None:
    pareto = rule("pareto", decay=0.5)
    (first,) = rewards(pareto, scores(point("a", [0.0, 2.0])))
    np.testing.assert_allclose(first.totals(), [-1, 1], atol=1e-3)
    (second,) = rewards(pareto, scores(point("a", [4.0, 6.0])))
    np.testing.assert_allclose(second.totals(), [3, 5], rtol=1e-3)
    (a,) = advantages([second])
    np.testing.assert_allclose(a, [0, 10], rtol=1e-3)
    past = pareto.past["a/x"]
    assert np.isclose(past.mean, (0.5 * 1 + 5) / 1.5)
    assert np.isclose(past.variance, (0.5 * 2 + 26) / 1.5 - past.mean**2)


# ---- every rule ----------------------------------------------------------------------------------------------------

HALF_OPTIONAL = [scorer("a"), scorer("b", required=False)]
maybe = st.one_of(st.just(NAN), st.floats(0, 1, width=32))
patterns = st.integers(1, 5).flatmap(lambda size: st.tuples(*[st.lists(maybe, min_size=size, max_size=size)] * 2))


@pytest.mark.parametrize("name", list(RULES))
@settings(max_examples=25, deadline=None)
@given(batch=st.lists(patterns, min_size=1, max_size=2))
def test_no_pattern_of_failures_makes_a_number_that_is_none(name, batch) -> None:
    jury = None if name == "directional" else HALF_OPTIONAL  # both its columns are required
    groups = [group_for(name, np.array(a), np.array(b), jury) for a, b in batch]
    with np.errstate(divide="raise", over="raise"):
        for (a, _), got in zip(batch, rewards(rule(name, **RULES[name]), *groups), strict=True):
            assert np.isfinite(totals(got)[got.valid]).all()
            assert got.scale is None or (got.scale >= 0).all()
            assert not got.valid[np.isnan(a)].any()


@pytest.mark.parametrize("name", ["weighted_sum", "gdpo", "base_and_bonus", "gates", "win_rate"])
@settings(max_examples=25, deadline=None)
@given(group=st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=2, max_size=6))
def test_to_have_failed_is_no_better_than_the_best_score_and_no_worse_than_the_worst(name, group) -> None:
    a, b = np.array(group).T / 4

    def signal(said: float) -> float:
        of = group_for(name, a, np.concatenate([[said], b[1:]]), HALF_OPTIONAL)
        return float(advantages(rewards(rule(name, **RULES[name]), of))[0][0])

    assert signal(0.0) - 1e-6 <= signal(NAN) <= signal(1.0) + 1e-6


# ---- gdpo ----------------------------------------------------------------------------------------------------------


def conditioned(a, b) -> list[float]:
    jury = [scorer(name, required=False) for name in "ab"]
    conditions = [{"column": "b", "on": "a", "at_least": 0.5}]
    (got,) = rewards(rule("gdpo", conditions=conditions), scores(point("a", a), point("b", b), jury=jury))
    assert got.valid.all()
    return list(got.totals())


def test_a_conditioned_score_that_failed_where_it_does_not_count_pays_nothing() -> None:
    assert conditioned([1, 1, 0], [0.2, 0.9, NAN]) == conditioned([1, 1, 0], [0.2, 0.9, 0.5])


def test_an_optional_condition_that_failed_drops_nobody() -> None:
    jury = [scorer("a", required=False), scorer("b")]
    conditions = [{"column": "b", "on": "a", "at_least": 0.5}]
    group = scores(point("a", [1, 0, NAN]), point("b", [0.2, 0.9, 0.9]), jury=jury)
    (got,) = rewards(rule("gdpo", conditions=conditions), group)
    assert got.valid.all()
    assert got.totals()[2] == 0
    lost = scores(point("a", [1, 0, 0]), point("b", [0.2, 0.9, NAN]), jury=jury)
    assert rewards(rule("gdpo", conditions=conditions), lost)[0].valid.tolist() == [True, True, False]


# ---- base and bonus ------------------------------------------------------------------------------------------------


def qualities(*bonuses) -> np.ndarray:
    """What is paid for bonuses by themselves: a full base, and only the bonus counts."""
    names = "bcd"[: len(bonuses)]
    jury = [scorer("a"), *(scorer(name, required=False) for name in names)]
    told = [point(name, values) for name, values in zip(names, bonuses, strict=True)]
    unit = {"base_range": [0, 1], "bonus_range": [0, 1], "base_share": 0.0, "bonus_share": 1.0}
    group = scores(point("a", [1.0] * len(bonuses[0])), *told, jury=jury)
    return rewards(rule("base_and_bonus", base="a", bonus=list(names), **unit), group)[0].totals()


def test_of_two_bonuses_the_one_that_failed_does_not_leave_the_other_to_pay_in_full() -> None:
    """With the means of columns in its place sample 0 would get 0.9, as much as the best, for having failed."""
    first, second = [0.9, 0.1, 0.1, 0.9], [NAN, 0.9, 0.9, 0.9]
    np.testing.assert_allclose(qualities(first, second), [1.1 / 3, 0.1, 0.1, 0.9], atol=1e-7)
    np.testing.assert_allclose(qualities([0.2, 0.5, 0.9, 0.9], second)[0], 0.2, atol=1e-7)
    np.testing.assert_allclose(qualities([0.2, 0.6], [NAN, NAN]), [0.2, 0.6], atol=1e-7)
    np.testing.assert_allclose(qualities([0.2, NAN], [NAN, 0.6]), 0)


# ---- log tame ------------------------------------------------------------------------------------------------------


def test_a_column_that_nobody_answered_lowers_no_threshold() -> None:
    wild = [0.0, 1.0, 30.0]
    (got,) = rewards(rule("log_tame"), scores(point("a", wild), point("b", [NAN] * 3), jury=HALF_OPTIONAL))
    np.testing.assert_allclose(got.totals(), wild)
    answered, lost = scores(point("a", wild)), scores(jury=[scorer("a")], size=3)
    (got, _) = rewards(rule("log_tame"), answered, lost)
    np.testing.assert_allclose(got.totals(), wild)


# ---- trust ---------------------------------------------------------------------------------------------------------


def test_a_judge_that_failed_on_a_failure_lifts_it_no_higher_than_one_that_answered() -> None:
    def signal(said: float) -> np.ndarray:
        group = scores(point("a", [1, 0.3, 0.1]), point("b", [0.9, 0.5, said]), jury=HALF_OPTIONAL)
        return advantages(rewards(rule("trust", outcome="a", judge="b"), group))[0]

    np.testing.assert_allclose(signal(NAN), signal(0.4), atol=1e-12)


# ---- confidence mix ------------------------------------------------------------------------------------------------


def test_a_rule_that_failed_on_one_sample_is_worth_the_groups_mean_and_not_the_model() -> None:
    jury = [scorer("a"), scorer("b", required=False), scorer("c", required=False)]
    mix = {"model": "a", "rule": "b", "confidence": "c"}
    group = scores(point("a", [1, 2, 3]), point("b", [0, 0.3, NAN]), point("c", [1, 1, 1]), jury=jury)
    np.testing.assert_allclose(rewards(rule("confidence_mix", **mix), group)[0].totals(), [0, 0.3, 0.15], atol=1e-7)
    half = scores(point("a", [1, 1, 1]), point("b", [0, 1, 0.4]), point("c", [0.5, 0.5, NAN]), jury=jury)
    np.testing.assert_allclose(rewards(rule("confidence_mix", **mix), half)[0].totals()[2], 0.25 + 0.5 * 0.5, atol=1e-7)


# ---- uncertainty ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["variance", "bound"])
def test_a_missing_value_makes_a_sample_no_surer_than_the_others(form) -> None:
    jury = [scorer("a"), scorer("b", required=False)]
    group = scores(point("a", [0, 1, 2]), point("b", [0.1, 0.2, NAN], [0.4, 0.4, NAN]), jury=jury)
    np.testing.assert_allclose(rewards(rule("uncertainty", form=form), group)[0].scale, 1)


def test_a_group_that_lost_the_scorer_that_says_how_sure_it_is_trains_on() -> None:
    jury = [scorer("a"), scorer("b", required=False)]
    whole = scores(point("a", [0, 1]), point("b", [1, 2], [0.1, 0.4]), jury=jury)
    lost = scores(point("a", [0, 1]), jury=jury)
    _, got = rewards(rule("uncertainty"), whole, lost)
    np.testing.assert_allclose(got.scale, 1)
    np.testing.assert_allclose(got.totals(), [0, 1])

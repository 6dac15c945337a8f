"""What a failed score does to the sample and to its neighbours, rule by rule: never a bonus, never a number."""

from __future__ import annotations

import numpy as np
from aggregation_kit import advantages, point, rewards, rule, scorer, scores
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

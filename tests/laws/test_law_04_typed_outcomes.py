"""Law 4: a score is a typed outcome. Failing 1 of G leaves the other G-1 advantages equal to those of the group
without it: for required and optional scorers, for every outcome, for every scope of the standard deviation.
"""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from contracts.config.objectives import CreditConfig
from contracts.config.scoring import RewardConfig, ScorerConfig
from contracts.scores import Outcome, ScoreTable, point_table
from contracts.wire import DiscardReason
from learner.credit.gae import GAE
from learner.credit.group import GroupAdvantage
from learner.credit.rewards import combine, filter_group
from learner.types import CreditBatch

STDS = ["global", "group", "none"]
FAILURES = [Outcome.FAILED, Outcome.TIMED_OUT, Outcome.UNDECIDED]
REQUIRED = ScorerConfig(name="jury", function="m:f", weights={"a": 1.0, "b": 0.5})
OPTIONAL = ScorerConfig(name="extra", function="m:f", weights={"a": 2.0}, required=False)
G, FAILED = 5, 2
OTHERS = np.array([i for i in range(G) if i != FAILED])


def table(scorer: ScorerConfig, seed: int, size: int = G) -> ScoreTable:
    return point_table(scorer.name, "1", ("a", "b"), np.random.default_rng(seed).normal(size=(size, 2)))


def failing(of: ScoreTable, sample: int, outcome: Outcome, column: int) -> ScoreTable:
    values, outcomes = of.values.copy(), of.outcomes.copy()
    values[sample, column], outcomes[sample, column] = np.nan, outcome
    return replace(of, values=values, outcomes=outcomes)


def without(of: ScoreTable, sample: int) -> ScoreTable:
    return replace(of, values=np.delete(of.values, sample, 0), outcomes=np.delete(of.outcomes, sample, 0))


def advantages(std: str, *groups) -> dict[int, np.ndarray]:
    entry = GroupAdvantage(CreditConfig(std=std), SimpleNamespace())
    return dict(entry.advantages(CreditBatch(dict(enumerate(groups)))).advantages)


@pytest.mark.parametrize("std", STDS)
@pytest.mark.parametrize("outcome", FAILURES)
@pytest.mark.parametrize("column", [0, 1])
def test_a_failed_required_score_leaves_the_others_as_without_the_sample(std, outcome, column):
    scores, neighbour = table(REQUIRED, 0), combine({"jury": table(REQUIRED, 1)}, [REQUIRED])
    with_failure = combine({"jury": failing(scores, FAILED, outcome, column)}, [REQUIRED])
    got = advantages(std, with_failure, neighbour)
    expected = advantages(std, combine({"jury": without(scores, FAILED)}, [REQUIRED]), neighbour)
    np.testing.assert_array_equal(got[0][OTHERS], expected[0])
    np.testing.assert_array_equal(got[1], expected[1])
    assert got[0][FAILED] == 0
    assert not with_failure.valid[FAILED]
    assert np.isnan(with_failure.values[FAILED])


@pytest.mark.parametrize("std", STDS)
@pytest.mark.parametrize("outcome", FAILURES)
def test_a_failed_score_of_an_all_optional_jury_leaves_the_others_as_without_the_sample(std, outcome):
    scores, neighbour = table(OPTIONAL, 0), combine({"extra": table(OPTIONAL, 1)}, [OPTIONAL])
    got = advantages(std, combine({"extra": failing(scores, FAILED, outcome, 0)}, [OPTIONAL]), neighbour)
    expected = advantages(std, combine({"extra": without(scores, FAILED)}, [OPTIONAL]), neighbour)
    np.testing.assert_array_equal(got[0][OTHERS], expected[0])
    np.testing.assert_array_equal(got[1], expected[1])
    assert got[0][FAILED] == 0


def test_a_failed_optional_score_beside_a_required_one_costs_only_its_own_contribution():
    """The sample keeps what the required scorer said; the optional part of the others is that of the group without."""
    required, optional = table(REQUIRED, 0), table(OPTIONAL, 1)
    jury = [REQUIRED, OPTIONAL]
    got = combine({"jury": required, "extra": failing(optional, FAILED, Outcome.TIMED_OUT, 0)}, jury)
    assert got.valid.all()
    assert got.optional[FAILED] == 0
    alone = combine({"jury": without(required, FAILED), "extra": without(optional, FAILED)}, jury)
    np.testing.assert_array_equal(got.optional[OTHERS], alone.optional)
    np.testing.assert_array_equal(got.values, combine({"jury": required}, [REQUIRED]).values)
    unscaled = advantages("none", got)[0]
    required_part = got.values - got.values.mean()
    np.testing.assert_allclose(unscaled, required_part + got.optional, atol=1e-12)
    assert unscaled[FAILED] == pytest.approx(required_part[FAILED])


def test_a_missing_optional_score_is_neither_the_worst_nor_the_best():
    optional = point_table("extra", "1", ("a", "b"), np.array([[10.0, 0], [20.0, 0], [30.0, 0]]))
    got = advantages("none", combine({"extra": failing(optional, 2, Outcome.FAILED, 0)}, [OPTIONAL]))[0]
    np.testing.assert_allclose(got, [-10.0, 10.0, 0.0])


def test_an_optional_scorer_that_answers_nothing_changes_nothing():
    required = table(REQUIRED, 0)
    np.testing.assert_array_equal(
        advantages("global", combine({"jury": required}, [REQUIRED, OPTIONAL]))[0],
        advantages("global", combine({"jury": required}, [REQUIRED]))[0],
    )


@pytest.mark.parametrize("normalise", [True, False])
def test_gae_leaves_the_other_samples_as_without_the_failed_one(normalise):
    scores, values = table(REQUIRED, 0), np.random.default_rng(2).normal(size=(G, 3))
    entry = GAE(CreditConfig(normalise=normalise), SimpleNamespace(gamma=0.9, lam=0.8))
    failed = combine({"jury": failing(scores, FAILED, Outcome.FAILED, 0)}, [REQUIRED])
    got = entry.advantages(CreditBatch({0: failed}, {0: values}))
    alone = combine({"jury": without(scores, FAILED)}, [REQUIRED])
    expected = entry.advantages(CreditBatch({0: alone}, {0: np.delete(values, FAILED, 0)}))
    np.testing.assert_array_equal(got.advantages[0][OTHERS], expected.advantages[0])
    assert (got.advantages[0][FAILED] == 0).all()
    assert got.metrics["explained_variance"] == expected.metrics["explained_variance"]


def test_a_group_that_lost_too_many_samples_is_discarded_as_such():
    scores = table(REQUIRED, 0)
    for sample in range(G - 1):
        scores = failing(scores, sample, Outcome.TIMED_OUT, 0)
    assert filter_group(combine({"jury": scores}, [REQUIRED]), RewardConfig(min_valid=2)) == DiscardReason.TOO_FEW_VALID


def test_nan_in_a_raw_table_is_a_failure_not_a_score():
    raw = np.random.default_rng(0).normal(size=(G, 2))
    raw[FAILED, 0] = np.nan
    got = combine({"jury": point_table("jury", "1", ("a", "b"), raw)}, [REQUIRED])
    assert list(np.flatnonzero(~got.valid)) == [FAILED]

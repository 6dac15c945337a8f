"""Combining score tables into rewards, the filter before the claim, preference pairs."""

from __future__ import annotations

import numpy as np
import pytest

from contracts.config.objectives import CustomObjective, DPOConfig
from contracts.config.scoring import RewardConfig, ScorerConfig
from contracts.declarations import ObjectiveNeeds
from contracts.errors import ScoringError
from contracts.registry import resolve
from contracts.scores import ScoreTable, point_table
from contracts.wire import DiscardReason
from learner.credit.pairs import Pairing, best_against_worst, pairing_of
from learner.credit.rewards import combine, filter_group
from learner.types import Rewards


def scorer(name, **fields):
    return ScorerConfig(name=name, function="m:f", **fields)


def rewards(*values, valid=None):
    array = np.array(values, np.float64)
    return Rewards(array, np.isfinite(array) if valid is None else np.array(valid), np.zeros(len(array)))


def test_weighted_sum_over_scorers_and_columns_leaves_held_out_ones_out():
    tables = {
        "a": point_table("a", "1", ("x", "y"), np.array([[1.0, 10], [2, 20]])),
        "b": point_table("b", "1", ("z",), np.array([[100.0], [200]])),
        "judge": point_table("judge", "1", ("strict",), np.array([[1e6], [1e6]])),
    }
    jury = [scorer("a", weights={"x": 1.0, "y": -2.0}), scorer("b"), scorer("judge", held_out=True)]
    np.testing.assert_allclose(combine(tables, jury).values, [1 - 20 + 100, 2 - 40 + 200])


def test_no_weights_means_the_first_column():
    table = point_table("a", "1", ("x", "y"), np.array([[1.0, 10], [2, 20]]))
    np.testing.assert_allclose(combine({"a": table}, [scorer("a")]).values, [1, 2])


def test_a_required_scorer_without_a_table_makes_every_sample_invalid():
    table = point_table("a", "1", ("x",), np.array([[1.0], [2]]))
    assert not combine({"a": table}, [scorer("a"), scorer("b")]).valid.any()


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        ({"a": point_table("a", "1", ("other",), np.zeros((2, 1)))}, "no column 'x'"),
        ({"a": ScoreTable("a", "1", ("x",), np.zeros((2, 1, 3)), np.zeros((2, 1), np.uint8), "step")}, "step table"),
        ({"a": point_table("a", "1", ("x",), np.zeros((2, 1))), "b": point_table("b", "1", ("x",), np.zeros((3, 1)))},
         "disagree on its size"),
        ({}, "disagree on its size"),
    ],
)  # fmt: skip
def test_tables_that_cannot_be_combined_are_told(tables, message):
    with pytest.raises(ScoringError, match=message):
        combine(tables, [scorer("a", weights={"x": 1.0})])


def test_filter_names_the_reason():
    rule = RewardConfig(min_valid=2)
    assert filter_group(rewards(1, 2, np.nan), rule) is None
    assert filter_group(rewards(1, 1, np.nan), rule) == DiscardReason.ZERO_VARIANCE
    assert filter_group(rewards(0.1, 0.1, 0.1), rule) == DiscardReason.ZERO_VARIANCE
    assert filter_group(rewards(1, np.nan, np.nan), rule) == DiscardReason.TOO_FEW_VALID
    assert filter_group(rewards(1, 1), RewardConfig(drop_zero_variance=False)) is None


def test_a_constant_group_is_kept_for_a_critic():
    assert filter_group(rewards(1, 1), RewardConfig(), needs=ObjectiveNeeds(critic=True)) is None


def test_pair_objectives_need_a_strict_preference_of_some_margin():
    needs = resolve("objective", "dpo").declares
    assert filter_group(rewards(1, 1, 1), RewardConfig(), DPOConfig(), needs) == DiscardReason.NO_PAIR
    assert filter_group(rewards(1, 1.4), RewardConfig(), DPOConfig(min_margin=0.5), needs) == DiscardReason.NO_PAIR
    assert filter_group(rewards(1, 1.6), RewardConfig(), DPOConfig(min_margin=0.5), needs) is None


def test_pairs_go_from_the_widest_gap_inwards_and_stop_at_ties_and_margins():
    values = np.array([0.5, np.nan, 3.0, -1.0, 0.5, 2.0])
    assert best_against_worst(values, Pairing()) == [(2, 3)]
    assert best_against_worst(values, Pairing(pairs_per_group=9)) == [(2, 3), (5, 4)]
    assert best_against_worst(values, Pairing(min_margin=2.0, pairs_per_group=9)) == [(2, 3)]
    assert best_against_worst(np.array([1.0, 1.0]), Pairing()) == []
    assert best_against_worst(np.array([np.nan, 1.0]), Pairing()) == []


def test_own_objectives_give_their_pairing_among_their_options():
    own = CustomObjective(name="my:Own", options={"min_margin": 0.3, "pairs_per_group": 2})
    assert pairing_of(own) == Pairing(0.3, 2)

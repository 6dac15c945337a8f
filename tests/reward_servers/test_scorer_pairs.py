"""Comparisons of a group: both orders, undecided answers, few pairs and the Bradley-Terry fit that fills them up."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import httpx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from reward_helpers import pictures, served
from scorer_models import ask

from contracts.declarations import ScorerGives
from contracts.scores import Outcome, ScorerInfo
from reward_servers.isolation import score_isolated
from reward_servers.scorers.base import ScoreBatch
from reward_servers.scorers.pairwise import PairwiseScorer, bradley_terry, choose_pairs


class Referee(PairwiseScorer):
    """Prefers the larger first pixel with P = sigmoid(gap / 10), and the first place by `bias`; 50 is beyond it."""

    declares = ScorerGives(kind="pair", columns=("wins",))
    name = "referee"

    def __init__(self, bias: float = 0.0, pairs: int | None = None) -> None:
        self.bias, self.pairs = bias, pairs
        self.asked: list[tuple[int, int]] = []

    def compare(self, batch: ScoreBatch, ordered: Sequence[tuple[int, int]]) -> np.ndarray:
        self.asked = list(ordered)
        worth = batch.images[:, 0, 0, 0].astype(float)
        answers = [1 / (1 + np.exp((worth[j] - worth[i]) / 10)) + self.bias for i, j in ordered]
        unknown = [50 in (worth[i], worth[j]) for i, j in ordered]
        return np.where(unknown, np.nan, np.clip(answers, 0, 1))


def group(*worths: int) -> np.ndarray:
    images = pictures(len(worths))
    images[:, 0, 0, 0] = worths
    return images


def preferences(worths: Sequence[int]) -> np.ndarray:
    w = np.array(worths, float)
    return 1 / (1 + np.exp((w[None] - w[:, None]) / 10))


def test_every_pair_is_asked_in_both_orders_and_the_liking_for_a_place_cancels() -> None:
    worths = (100, 104, 108, 97)
    biased = Referee(bias=0.05)
    table = ask(biased, group(*worths), ["p"] * 4)
    assert sorted(biased.asked) == sorted(itertools.permutations(range(4), 2))
    off = ~np.eye(4, dtype=bool)
    np.testing.assert_allclose(table.values[..., 0][off], preferences(worths)[off], atol=1e-6)
    np.testing.assert_allclose((table.values + table.values.swapaxes(0, 1))[..., 0][off], 1.0, atol=1e-6)
    rates = np.nanmean(table.values[..., 0], axis=1)
    assert rates.sum() == pytest.approx(4 / 2), "win rates of a group sum to G/2 (pref-grpo)"
    assert table.uncertainty is None


def test_an_order_that_decides_is_told() -> None:
    table = ask(Referee(bias=0.3), group(100, 101, 160), ["p"] * 3)
    assert table.reasons[0] == "the order decided 1 of its comparisons"
    assert table.reasons[2] == ""
    assert table.values[0, 1, 0] == pytest.approx(preferences((100, 101))[0, 1], abs=1e-6)


def test_what_nobody_could_say_is_undecided_and_costs_the_others_nothing() -> None:
    table = ask(Referee(), group(100, 50, 125), ["p"] * 3)
    assert (table.outcomes[1, [0, 2], 0] == Outcome.UNDECIDED).all()
    assert (table.outcomes[[0, 2], 1, 0] == Outcome.UNDECIDED).all()
    assert np.isnan(table.values[1]).all()
    assert table.values[0, 2, 0] == pytest.approx(preferences((100, 125))[0, 1], abs=1e-6)


def test_few_pairs_cost_few_calls_and_the_fit_fills_in_the_rest_with_its_doubt() -> None:
    worths = (100, 104, 111, 120, 108, 96)
    few = Referee(pairs=8)
    table = ask(few, group(*worths), ["p"] * 6)
    assert len(few.asked) == 16, "2k calls instead of G(G-1) = 30"
    truth, off = preferences(worths), ~np.eye(6, dtype=bool)
    assert table.valid()[..., 0][off].all()
    assert np.abs(table.values[..., 0] - truth)[off].max() < 0.1
    order = np.argsort(np.nanmean(table.values[..., 0], axis=1))
    np.testing.assert_array_equal(order, np.argsort(worths))
    assert table.uncertainty is not None
    assert (table.uncertainty[..., 0][off] > 0).all()


def test_a_group_too_small_or_pairs_too_few_fail_as_a_whole() -> None:
    alone = score_isolated(Referee(), ScoreBatch(group(100), ("p",), ({},)))
    assert (alone.outcomes == Outcome.FAILED).sum() + (alone.outcomes == Outcome.UNDECIDED).sum() == 1
    table = score_isolated(Referee(pairs=3), ScoreBatch(group(*range(100, 106)), ("p",) * 6, ({},) * 6))
    off = ~np.eye(6, dtype=bool)
    assert (table.outcomes[..., 0][off] == Outcome.FAILED).all()
    assert "at least 5 are needed" in table.reasons[0]


@given(st.integers(2, 9), st.integers(1, 40), st.text(max_size=3))
def test_chosen_pairs_connect_everyone_once(num: int, pairs: int, seed: str) -> None:
    every = num * (num - 1) // 2
    if pairs < min(num - 1, every):
        with pytest.raises(ValueError, match="at least"):
            choose_pairs(num, pairs, seed)
        return
    chosen = choose_pairs(num, pairs, seed)
    assert chosen == choose_pairs(num, pairs, seed)
    assert len(set(chosen)) == len(chosen) == min(pairs, every)
    assert all(0 <= i < j < num for i, j in chosen)
    reached = {0}
    for _ in range(num):
        reached |= {other for i, j in chosen if i in reached or j in reached for other in (i, j)}
    assert reached == set(range(num))


def test_the_fit_is_the_maximum_of_its_likelihood() -> None:
    """By the definition: no small change of any strength does better. And its limits: ties, sure winners, islands."""
    rng = np.random.default_rng(0)
    wins = np.full((5, 5), np.nan)
    for i, j in choose_pairs(5, 7, "x"):
        wins[i, j] = rng.uniform()
        wins[j, i] = 1 - wins[i, j]
    chance, _ = bradley_terry(wins)
    strength = np.log(chance[:, 0] / (1 - chance[:, 0]))
    strength[0] = 0
    strength -= strength.mean()  # the prior fixes the level that pairs leave open

    def objective(theta: np.ndarray) -> float:
        p = 1 / (1 + np.exp(theta[None] - theta[:, None]))
        asked = np.isfinite(wins)
        likelihood = np.where(asked, np.nan_to_num(wins) * np.log(p) + (1 - np.nan_to_num(wins)) * np.log(1 - p), 0)
        return float(likelihood.sum() / 2 - 0.005 * (theta**2).sum())

    best = objective(strength)
    for _ in range(50):
        assert objective(strength + rng.normal(0, 1e-2, 5)) < best
    ties = np.where(np.eye(3, dtype=bool), np.nan, 0.5)
    np.testing.assert_allclose(bradley_terry(ties)[0][~np.eye(3, dtype=bool)], 0.5)
    sure = np.array([[np.nan, 1.0], [0.0, np.nan]])
    assert 0.9 < bradley_terry(sure)[0][0, 1] < 1
    islands = np.full((4, 4), np.nan)
    islands[0, 1] = islands[1, 0] = islands[2, 3] = islands[3, 2] = 0.5
    assert np.isnan(bradley_terry(islands)[0][0, 2:]).all()
    assert bradley_terry(islands)[0][0, 1] == 0.5


@pytest.mark.parametrize(("pairs", "told"), [(None, "all"), (3, 3)])
def test_a_server_tells_how_many_pairs_it_asks(pairs: int | None, told: int | str) -> None:
    """So that a run's plan can say what a step costs."""
    with served(Referee(pairs=pairs)) as server:
        info = ScorerInfo.model_validate_json(httpx.get(f"{server.url}/v1/info").content)
    assert (info.kind, info.whole_group, info.pairs) == ("pair", True, told)

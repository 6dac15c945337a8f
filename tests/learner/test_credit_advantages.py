"""Group-relative advantages and GAE against closed forms (catalogue C, grpo and ddpo-ppo)."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from contracts.config.objectives import CreditConfig
from learner.credit.gae import GAE, gae
from learner.credit.group import GroupAdvantage
from learner.types import CreditBatch, Rewards


def rewards(values, valid=None):
    values = np.array(values, np.float64)
    valid = np.ones(len(values), bool) if valid is None else np.array(valid)
    return Rewards(np.where(valid, values, np.nan), valid, np.zeros(len(values)))


def advantages(std, *groups):
    entry = GroupAdvantage(CreditConfig(std=std), SimpleNamespace())
    return entry.advantages(CreditBatch(dict(enumerate(groups)))).advantages


def test_two_samples_two_apart_are_almost_plus_and_minus_one():
    np.testing.assert_allclose(advantages("group", rewards([0, 2]))[0], [-1 / 1.0001, 1 / 1.0001], atol=1e-15)


def test_global_std_is_the_population_estimator_over_the_batch():
    got = advantages("global", rewards([0.0, 1.0]), rewards([5.0, 5.0, 8.0]))
    std = np.std([0, 1, 5, 5, 8])
    np.testing.assert_allclose(got[0], np.array([-0.5, 0.5]) / (std + 1e-4))
    np.testing.assert_allclose(got[1], np.array([-1, -1, 2]) / (std + 1e-4))


def test_without_std_the_centred_rewards_remain():
    np.testing.assert_allclose(advantages("none", rewards([1.0, 4.0]))[0], [-1.5, 1.5])


@pytest.mark.parametrize("std", ["global", "group", "none"])
def test_a_constant_group_is_exactly_zero(std):
    assert (advantages(std, rewards([0.1] * 3), rewards([0.0, 7.0]))[0] == 0.0).all()


@settings(max_examples=100, deadline=None)
@given(
    groups=st.lists(st.lists(st.floats(-100, 100), min_size=2, max_size=6), min_size=1, max_size=4),
    std=st.sampled_from(["global", "group", "none"]),
)
def test_advantages_sum_to_zero_and_permute_with_their_groups(groups, std):
    forward = advantages(std, *[rewards(g) for g in groups])
    backward = advantages(std, *[rewards(g[::-1]) for g in reversed(groups)])
    for index, group in enumerate(groups):
        assert abs(forward[index].sum()) <= 1e-9 * max(1.0, np.abs(forward[index]).max())
        np.testing.assert_allclose(forward[index], backward[len(groups) - 1 - index][::-1], rtol=1e-6, atol=1e-6)
        assert len(forward[index]) == len(group)


def test_float_noise_is_no_signal():
    assert np.abs(advantages("group", rewards([0.3, 0.3 + 1e-9, 0.3 - 1e-9, 0.3]))[0]).max() < 2e-5


def test_metrics_describe_the_valid_rewards():
    entry = GroupAdvantage(CreditConfig(), SimpleNamespace())
    credit = entry.advantages(CreditBatch({0: rewards([1, 3, 9], [True, True, False]), 1: rewards([2.0, 2.0])}))
    assert credit.metrics["reward"] == 2.0
    assert credit.metrics["valid_fraction"] == 0.8
    assert credit.metrics["constant_group_fraction"] == 0.5
    np.testing.assert_array_equal(credit.rewards[0], [1, 3, np.nan])


R = np.array([1.0, -2.0])
V = np.array([[0.3, -0.1, 0.7], [1.0, 2.0, -1.0]])


def test_lam_one_is_reward_minus_value():
    np.testing.assert_allclose(gae(R, V, 1.0, 1.0), R[:, None] - V, atol=1e-15)


def test_lam_zero_telescopes():
    got = gae(R, V, 1.0, 0.0)
    np.testing.assert_allclose(got.sum(1), R - V[:, 0], atol=1e-15)
    np.testing.assert_allclose(got[:, 0], V[:, 1] - V[:, 0])


def test_zero_values_give_the_reward_at_every_step():
    np.testing.assert_allclose(gae(R, np.zeros((2, 3)), 1.0, 1.0), np.repeat(R[:, None], 3, axis=1))


def test_two_step_decision_process_in_closed_form():
    """V = (v0, v1), reward r at the end: A_1 = r - v1, A_0 = gamma v1 - v0 + gamma lam A_1."""
    gamma, lam, v0, v1, r = 0.9, 0.7, 0.4, -0.2, 2.0
    got = gae(np.array([r]), np.array([[v0, v1]]), gamma, lam)[0]
    last = r - v1
    np.testing.assert_allclose(got, [gamma * v1 - v0 + gamma * lam * last, last])


def test_true_values_leave_no_advantage_on_average_and_perfect_ones_none():
    """Two steps, a fair coin at each, reward = number of heads: V_0 = 1, V_1 = heads so far + 1/2."""
    first, second = np.array([0, 0, 1, 1.0]), np.array([0, 1, 0, 1.0])
    values = np.stack([np.ones(4), first + 0.5], axis=1)
    got = gae(first + second, values, 1.0, 0.95)
    np.testing.assert_allclose(got.mean(0), 0, atol=1e-15)
    np.testing.assert_allclose(got[:, 1], second - 0.5)
    np.testing.assert_allclose(got[:, 0], first - 0.5 + 0.95 * (second - 0.5))


def entry(normalise=False, gamma=1.0, lam=1.0):
    return GAE(CreditConfig(normalise=normalise), SimpleNamespace(gamma=gamma, lam=lam))


def test_returns_are_advantages_plus_values_before_whitening():
    credit = entry(normalise=True).advantages(CreditBatch({0: rewards(R)}, {0: V}))
    np.testing.assert_allclose(credit.returns[0], np.repeat(R[:, None], 3, axis=1))
    np.testing.assert_array_equal(credit.old_values[0], V)
    flat = credit.advantages[0].ravel()
    assert flat.mean() == pytest.approx(0, abs=1e-12)
    assert flat.std() == pytest.approx(1, abs=1e-3)


def test_explained_variance_is_one_for_the_truth_zero_for_a_constant_and_negative_for_worse():
    terminal = rewards([0.0, 1.0, 2.0])
    for values, expected in [([0.0, 1.0, 2.0], 1.0), ([5.0, 5.0, 5.0], 0.0), ([2.0, 1.0, 0.0], -3.0)]:
        batch = CreditBatch({0: terminal}, {0: np.repeat(np.array(values)[:, None], 2, axis=1)})
        assert entry().advantages(batch).metrics["explained_variance"] == pytest.approx(expected)


def test_discount_reaches_the_monte_carlo_returns():
    values = np.array([[0.25, 0.5, 1.0], [0.5, 1.0, 2.0]])
    credit = entry(gamma=0.5).advantages(CreditBatch({0: rewards([1.0, 2.0])}, {0: values}))
    assert credit.metrics["explained_variance"] == pytest.approx(1.0)
    np.testing.assert_allclose(credit.advantages[0], 0, atol=1e-15)

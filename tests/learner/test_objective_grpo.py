"""Clipped policy gradient on recorded steps against its identities (catalogue C, grpo and decoupled-tis)."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from objective_kit import SAMPLER, batch_loss, context, gradient, job, nudge, painted, part, toy_policy, with_prepass

from contracts.config.objectives import GRPOConfig
from learner.objectives.base import ModelHandle
from learner.objectives.clipped_ratio import clipped_surrogate, gaussian_kl, kl_estimate
from learner.objectives.grpo import GRPO


def make(policy, sampler=SAMPLER, dtype="fp32", **fields):
    return GRPO(GRPOConfig(**fields), context(policy, sampler, dtype=dtype)), ModelHandle(policy)


def log_probs(objective, model, batch):
    return objective.replay(model, batch, slice(0, len(batch.step_indices))).log_prob_sum


def mean_metric(loss_sum, name):
    total, weight = loss_sum.metrics[name]
    return float(total / weight)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_gradient_at_ratio_one_is_advantage_times_score(reduction):
    policy = toy_policy()
    objective, model = make(policy, reduction=reduction)
    batch = painted(policy, advantage=torch.tensor([0.5, -2.0, 3.0, 0.1]))
    got = gradient(batch_loss(objective, model, batch, divisor=4), policy.module)
    dims = objective.context.dims if reduction == "mean" else 1
    reference = -(batch.advantage[:, None] * log_probs(objective, model, batch)).mean() / dims
    torch.testing.assert_close(got, gradient(reference, policy.module), rtol=1e-5, atol=1e-8)


def test_ratio_is_exactly_one_before_the_first_update():
    policy = toy_policy()
    objective, model = make(policy)
    loss_sum = objective.loss(model, painted(policy), 0)
    assert mean_metric(loss_sum, "ratio_deviation") == 0.0
    assert mean_metric(loss_sum, "log_prob_mismatch") == 0.0
    assert mean_metric(loss_sum, "clip_fraction") == 0.0


def test_loss_is_minus_the_sum_of_advantages_at_ratio_one_and_clips_them():
    policy = toy_policy()
    objective, model = make(policy, advantage_clip=2.0)
    batch = painted(policy, advantage=torch.tensor([9.0, 1.0, -1.0, -9.0]), weight=torch.tensor([1.0, 1.0, 1.0, 0.0]))
    assert batch_loss(objective, model, batch).item() == pytest.approx(-(2.0 + 1.0 - 1.0))


def test_rows_add_up_over_any_split_into_micro_batches():
    policy = toy_policy()
    objective, model = make(policy, kl_beta=0.1)
    batch = with_prepass(objective, model, painted(policy), "ref")
    nudge(policy.module, 0.01)
    whole = gradient(batch_loss(objective, model, batch), policy.module)
    pieces = sum(
        gradient(batch_loss(objective, model, part(batch, rows)), policy.module) for rows in (slice(0, 1), slice(1, 4))
    )
    torch.testing.assert_close(whole, pieces, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("steps_per_forward", [2, 3, 4, 9])
def test_steps_per_forward_changes_nothing_but_the_number_of_passes(steps_per_forward):
    policy = toy_policy()
    one, model = make(policy, kl_beta=0.1)
    many, _ = make(policy, kl_beta=0.1, steps_per_forward=steps_per_forward)
    batch = with_prepass(one, model, painted(policy), None, "ref")
    assert one.num_passes(batch) == 4
    assert many.num_passes(batch) == math.ceil(4 / steps_per_forward)
    nudge(policy.module, 0.01)
    expected, got = (gradient(batch_loss(o, model, batch), policy.module) for o in (one, many))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)


def test_recomputed_proximal_of_the_painting_weights_is_plain_ppo():
    policy = toy_policy()
    objective, model = make(policy)
    plain, recomputed = painted(policy), with_prepass(objective, model, painted(policy), None)
    assert float(recomputed.prepass["proximal_drift"].abs().max()) == 0.0
    nudge(policy.module, 1e-3)
    assert batch_loss(objective, model, plain).item() == batch_loss(objective, model, recomputed).item()


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_gradient_at_the_proximal_policy_is_weighted_by_the_importance_ratio(reduction):
    policy = toy_policy()
    objective, model = make(policy, reduction=reduction, drift_limit_nats=1e9)
    batch = painted(policy)
    nudge(policy.module, 3e-3)
    with_prepass(objective, model, batch, None)
    dims = objective.context.dims if reduction == "mean" else 1
    current = log_probs(objective, model, batch)
    weight = ((current.detach() - batch.log_prob_sum) / dims).exp().clamp(max=2.0)
    assert float((weight - 1).abs().max()) > 1e-4
    reference = -(weight * batch.advantage[:, None] * current).mean() / dims
    got = gradient(batch_loss(objective, model, batch, divisor=4), policy.module)
    torch.testing.assert_close(got, gradient(reference, policy.module), rtol=1e-4, atol=1e-7)


def test_weight_times_ratio_is_the_ratio_to_the_behaviour_policy():
    policy = toy_policy()
    objective, model = make(policy, drift_limit_nats=1e9, clip_range=1e6)
    batch = painted(policy)
    nudge(policy.module, 1e-3)
    with_prepass(objective, model, batch, None)
    nudge(policy.module, 1e-3, seed=2)
    ratio = ((log_probs(objective, model, batch) - batch.log_prob_sum) / objective.context.dims).exp()
    expected = -(batch.advantage[:, None] * ratio).mean(1).sum().detach()
    assert batch_loss(objective, model, batch).item() == pytest.approx(float(expected), rel=1e-5)


def test_drift_in_nats_is_the_closed_form_and_masks_above_the_limit():
    policy = toy_policy()
    objective, model = make(policy)
    batch = painted(policy)
    nudge(policy.module, 0.02)
    now = objective.replay(model, batch, slice(0, 4))
    with_prepass(objective, model, batch, None)
    expected = (now.mean - batch.means).double().square().flatten(2).sum(2) / (2 * now.std.double() ** 2)
    torch.testing.assert_close(batch.prepass["proximal_drift"], expected.detach())
    limit = expected.median().item()
    masked, _ = make(policy, drift_limit_nats=limit)
    kept = expected <= limit
    assert 0 < int(kept.sum()) < kept.numel()
    share = sum(mean_metric(masked.loss(model, batch, p), "kept_fraction") for p in range(4)) / 4
    assert share == pytest.approx(float(kept.double().mean()))
    weight = ((now.log_prob_sum - batch.log_prob_sum) / objective.context.dims).exp()
    expected_loss = -(kept * weight * batch.advantage[:, None]).mean(1).sum().detach()
    assert batch_loss(masked, model, batch).item() == pytest.approx(float(expected_loss), rel=1e-5)


def test_without_recomputing_only_stale_rows_are_masked():
    policy = toy_policy()
    objective, model = make(policy, old_log_prob="rollout", drift_limit_nats=1e-9)
    batch = painted(policy, staleness=torch.tensor([0, 1, 0, 2]))
    nudge(policy.module, 0.01)
    assert mean_metric(objective.loss(model, batch, 0), "kept_fraction") == 0.5
    fresh = mean_metric(objective.loss(model, replace(batch, staleness=torch.zeros(4)), 0), "kept_fraction")
    assert fresh == 1.0


def test_kl_estimate_is_unbiased_and_never_negative():
    torch.manual_seed(0)
    mean, other, std = torch.zeros(1, 1, 3), torch.tensor([[[0.2, -0.1, 0.3]]]), torch.tensor([[0.8]])
    exact = float(gaussian_kl(mean, other, std))
    points = std * torch.randn(200_000, 3)
    behaviour = -(points - mean[0]).square().sum(1) / (2 * std[0] ** 2)
    policy = -(points - other[0]).square().sum(1) / (2 * std[0] ** 2)
    estimates = kl_estimate(policy, behaviour)
    assert float(estimates.min()) >= 0
    assert float(estimates.mean()) == pytest.approx(exact, rel=0.02)
    assert float(kl_estimate(policy, policy).abs().max()) == 0


def test_kl_forms_differ_by_the_step_length_and_vanish_at_the_reference():
    policy = toy_policy()
    (sd, model), (true, _) = make(policy, kl_beta=1.0), make(policy, kl_beta=1.0, kl_form="gaussian")
    batch = with_prepass(sd, model, painted(policy), "ref")
    assert mean_metric(sd.loss(model, batch, 1), "kl") == 0
    nudge(policy.module, 0.02)
    for p in range(4):
        step = float(batch.sigmas[p] - batch.sigmas[p + 1])
        ratio = mean_metric(sd.loss(model, batch, p), "kl") / mean_metric(true.loss(model, batch, p), "kl")
        assert ratio == pytest.approx(step, rel=1e-6)
    now = true.replay(model, batch, slice(0, 1))
    per_dim = (now.mean - batch.means[:, :1]).square().mean((2, 3, 4)) / (2 * now.std**2)
    assert mean_metric(true.loss(model, batch, 0), "kl") == pytest.approx(float(per_dim.mean()), rel=1e-4)


def test_advantages_by_step_reach_their_own_step():
    policy = toy_policy()
    objective, model = make(policy)
    by_step = torch.randn(4, 4, generator=torch.Generator().manual_seed(0))
    batch = painted(policy, advantage=by_step)
    for p in range(4):
        assert objective.loss(model, batch, p).loss.item() == pytest.approx(float(-by_step[:, p].sum()), rel=1e-5)


@pytest.mark.parametrize(
    ("log_ratio", "advantage", "expected"),
    [(0.5, 1.0, -1.2), (0.5, -1.0, math.exp(0.5)), (-0.5, 1.0, -math.exp(-0.5)), (-0.5, -1.0, 0.8)],
)
def test_clip_binds_only_where_it_lowers_the_objective(log_ratio, advantage, expected):
    loss, _ = clipped_surrogate(torch.tensor([[log_ratio]]), torch.tensor([[advantage]]), 0.2)
    assert float(loss) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("fields", "dtype", "painted_by", "expected"),
    [
        ({}, "fp32", 5, ()),
        ({}, "fp32", 4, (None,)),
        ({}, "bf16", 5, (None,)),
        ({"old_log_prob": "rollout"}, "bf16", 4, ()),
        ({"old_log_prob": "recompute", "kl_beta": 0.1}, "fp32", 5, (None, "ref")),
    ],
)
def test_prepasses_follow_precision_staleness_and_kl(fields, dtype, painted_by, expected):
    objective, _ = make(toy_policy(), dtype=dtype, **fields)
    assert objective.prepasses(job(version=5, painted_by=painted_by)) == expected


def test_effective_sample_size_of_equal_and_of_one_dominant_weight():
    objective, _ = make(toy_policy())
    assert objective.finish_metrics({"_weight": 1.0, "_weight_square": 1.0}) == {"effective_sample_size": 1.0}
    one_of_four = objective.finish_metrics({"_weight": 0.25, "_weight_square": 0.25, "kl": 2.0})
    assert one_of_four == {"effective_sample_size": 0.25, "kl": 2.0}


def test_guidance_and_windows_replay_at_ratio_one():
    policy = toy_policy()
    sampler = SAMPLER.model_copy(update={"guidance_scale": 3.0, "window": None})
    objective, model = make(policy, sampler)
    assert mean_metric(objective.loss(model, painted(policy, sampler=sampler), 2), "ratio_deviation") == 0.0

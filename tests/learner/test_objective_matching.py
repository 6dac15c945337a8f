"""The forward-process family, nft and dpo: its identities and the one reference gradient (catalogue C, section 5)."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from objective_kit import (
    SAMPLER,
    batch_loss,
    context,
    embeddings,
    gradient,
    job,
    nudge,
    painted,
    part,
    toy_policy,
    with_prepass,
)

from contracts.config.objectives import DPOConfig, NFTConfig
from learner.objectives.base import ModelHandle
from learner.objectives.dpo import DPO
from learner.objectives.draws import MIN_TIME, grid_times, logit_normal_times, noise, uniform_times
from learner.objectives.matching import Noised, mean_square, velocity
from learner.objectives.nft import ERROR_FLOOR, NFT, error_ratio, implicit_losses, old_decay, optimality, push_kept
from learner.plan import noise_key


def nft(policy, **fields):
    return NFT(NFTConfig(**fields), context(policy)), ModelHandle(policy)


def dpo(policy, **fields):
    return DPO(DPOConfig(**fields), context(policy)), ModelHandle(policy)


def pair_batch(policy, num_pairs=2, **fields):
    """[winners; losers] with keys shared within a pair."""
    keys = tuple(noise_key(g, 0) for g in range(num_pairs)) * 2
    cond = embeddings(num_pairs)
    return painted(policy, 2 * num_pairs, cond=cond.join(cond), noise_keys=keys, **fields)


def at_all(policy, objective, model, batch):
    """At theta = old = ref: the prepasses under the very weights that train."""
    return with_prepass(objective, model, batch, *objective.prepasses(job()))


# -- draws


def test_each_row_visits_each_rollout_level_but_the_last_once():
    batch = painted(toy_policy())
    drawn = torch.stack([grid_times(batch, 7, draw) for draw in range(4)], dim=1)
    levels = batch.sigmas[:-2].sort().values
    for row in drawn:
        torch.testing.assert_close(row.sort().values, levels)
    assert len({tuple(row.tolist()) for row in drawn}) > 1


@pytest.mark.parametrize("draw_of", [noise, grid_times, uniform_times, logit_normal_times])
def test_draws_depend_on_the_key_alone(draw_of):
    batch = painted(toy_policy())
    whole = draw_of(batch, 7, 1)
    torch.testing.assert_close(draw_of(part(batch, slice(2, 4)), 7, 1), whole[2:], rtol=0, atol=0)
    shared = replace(batch, noise_keys=(5, 6, 5, 6))
    torch.testing.assert_close(draw_of(shared, 7, 1)[:2], draw_of(shared, 7, 1)[2:], rtol=0, atol=0)


def test_noise_and_free_times_differ_by_step_draw_seed_and_key():
    batch = painted(toy_policy())
    for draw_of in (noise, uniform_times, logit_normal_times):
        first = draw_of(batch, 7, 0)
        assert len({float(x.flatten()[0]) for x in first}) == 4
        for other in (draw_of(batch, 7, 1), draw_of(batch, 8, 0), draw_of(replace(batch, step=4), 7, 0)):
            assert not torch.equal(first, other)


def test_times_have_the_stated_distribution():
    batch = replace(painted(toy_policy(), 1), noise_keys=tuple(range(2000)))
    uniform, logit = uniform_times(batch, 7, 0), logit_normal_times(batch, 7, 0)
    assert float(uniform.min()) >= MIN_TIME
    assert float(uniform.max()) <= 1
    assert float(uniform.mean()) == pytest.approx(0.5, abs=0.03)
    assert float(uniform.std()) == pytest.approx(1 / math.sqrt(12), abs=0.02)
    scores = torch.logit(logit.double())
    assert float(scores.mean()) == pytest.approx(0, abs=0.08)
    assert float(scores.std()) == pytest.approx(1, abs=0.08)


# -- nft


@pytest.mark.parametrize("b", [0.1, 0.5, 1.0, 2.0])
def test_nft_gradient_at_the_old_policy_is_the_reference_gradient_for_any_b(b):
    """mean(omega A mse_v) with omega = t^2 / w, hence also mean(A mse_x0 / w)."""
    policy = toy_policy()
    objective, model = nft(policy, beta=b, kl_beta=0.0)
    batch = at_all(policy, objective, model, painted(policy, advantage=torch.tensor([0.7, -1.5, 4.0, -0.2])))
    assert objective.num_passes(batch) == 4
    reference, by_x0 = 0.0, 0.0
    for draw in range(4):
        noised = objective.noised(batch, draw)
        v = velocity(model, batch, noised)
        t = noised.s.double()
        error = (noised.x - t.float().view(-1, 1, 1, 1) * v - batch.clean).double()
        weight = error.detach().abs().flatten(1).mean(1)
        advantage = batch.advantage.double()
        reference = reference + (advantage * t**2 / weight * mean_square(v, noised.target)).sum() / 4
        by_x0 = by_x0 + (advantage * error.square().flatten(1).mean(1) / weight).sum() / 4
    got = gradient(batch_loss(objective, model, batch), policy.module)
    torch.testing.assert_close(got, gradient(reference, policy.module), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(got, gradient(by_x0, policy.module), rtol=1e-4, atol=1e-6)


def test_nft_without_advantage_has_no_gradient_at_the_old_policy():
    policy = toy_policy()
    objective, model = nft(policy)
    batch = at_all(policy, objective, model, painted(policy, advantage=torch.zeros(4)))
    assert float(gradient(batch_loss(objective, model, batch), policy.module).abs().max()) < 1e-7


@pytest.mark.parametrize(
    ("advantage", "expected"), [(0.0, 0.5), (5.0, 1.0), (-5.0, 0.0), (50.0, 1.0), (1.0, 0.6), (-2.5, 0.25)]
)
def test_nft_optimality_is_the_clipped_advantage_on_zero_to_one(advantage, expected):
    assert float(optimality(torch.tensor([advantage]), 5.0)) == pytest.approx(expected)


def test_nft_loss_is_its_formula():
    policy = toy_policy()
    b, clip, kl = 0.5, 2.0, 0.3
    objective, model = nft(policy, beta=b, advantage_clip=clip, kl_beta=kl)
    batch = at_all(policy, objective, model, painted(policy, weight=torch.tensor([1.0, 0.0, 1.0, 1.0])))
    nudge(policy.module, 0.05)
    noised = objective.noised(batch, 2)
    v, old = velocity(model, batch, noised).double().detach(), batch.prepass["old"][:, 2].double()
    x, x0, t = noised.x.double(), batch.clean.double(), noised.s.double().view(-1, 1, 1, 1)
    expected = 0.0
    for i, r in zip((0, 2, 3), (0.75, 0.75, 0.25), strict=True):
        plus = x[i] - t[i] * (b * v[i] + (1 - b) * old[i]) - x0[i]
        minus = x[i] - t[i] * ((1 + b) * old[i] - b * v[i]) - x0[i]
        losses = [float(e.square().mean() / e.abs().mean().clamp(min=1e-5)) for e in (plus, minus)]
        expected += clip * (r * losses[0] + (1 - r) * losses[1]) / b + kl * float((v[i] - old[i]).square().mean())
    assert objective.loss(model, batch, 2).loss.item() == pytest.approx(expected, rel=1e-5)


def test_nft_minimiser_of_the_unweighted_loss_is_old_plus_two_over_b():
    """argmin_v E[r |v+ - y|^2 + (1-r) |v- - y|^2] = v_old + (2/b) E[r] (v_pos - v_old): its gradient is 0."""
    torch.manual_seed(0)
    targets, r, b = torch.randn(64, dtype=torch.float64), torch.rand(64, dtype=torch.float64), 0.7
    old = targets.mean()
    v = (old + 2 / b * r.mean() * ((r * targets).sum() / r.sum() - old)).requires_grad_()
    plus, minus = b * v + (1 - b) * old, (1 + b) * old - b * v
    loss = (r * (plus - targets) ** 2 + (1 - r) * (minus - targets) ** 2).mean()
    (slope,) = torch.autograd.grad(loss, v)
    assert abs(float(slope)) < 1e-12


# -- nft's push limit


@pytest.mark.parametrize(("ratio", "kept"), [(0.0, 1.0), (1.0, 1.0), (2.0, 0.5), (2.5, 0.25), (3.0, 0.0), (50.0, 0.0)])
def test_the_push_away_fades_between_the_reference_s_error_and_the_limit(ratio, kept):
    assert float(push_kept(torch.tensor([ratio]), 3.0)) == pytest.approx(kept)


def test_the_error_ratio_is_the_old_policy_s_error_over_the_reference_s():
    torch.manual_seed(2)
    old, ref, clean, eps = torch.randn(4, 2, 1, 2, 2)
    found = error_ratio(old, ref, Noised.of(clean, torch.tensor([0.3, 0.8]), eps))
    for i in range(2):
        target = eps[i] - clean[i]
        expected = float((old[i] - target).square().mean()) / (float((ref[i] - target).square().mean()) + ERROR_FLOOR)
        assert float(found[i]) == pytest.approx(expected, rel=1e-5)


def limited_batch(policy, objective, model, old_error):
    """Rows with advantages of both signs whose old policy misses the target by old_error times the reference's miss."""
    batch = at_all(policy, objective, model, painted(policy, advantage=torch.tensor([0.7, -0.5, 0.9, -0.2])))
    target = objective.noised(batch, 0).target
    return replace(batch, prepass={"old": (target + old_error)[:, None], "ref": (target + 1.0)[:, None]})


def test_nft_pushes_no_further_than_its_limit_and_goes_on_pulling():
    """Beyond the limit the loss is that of the batch without its bad samples' advantages; below 1 the published."""
    policy = toy_policy()
    fields = {"kl_beta": 0.0, "draws": 1, "advantage_clip": 1.0, "beta": 0.5}
    (limited, model), (free, _) = nft(policy, push_limit=3.0, **fields), nft(policy, **fields)
    for old_error, free_advantage in ((10.0, [0.7, 0.0, 0.9, 0.0]), (0.9, [0.7, -0.5, 0.9, -0.2])):
        batch = limited_batch(policy, limited, model, old_error)
        same = replace(batch, advantage=torch.tensor(free_advantage))
        found = limited.loss(model, batch, 0)
        torch.testing.assert_close(found.loss, free.loss(model, same, 0).loss)
        assert metric(found, "push_kept") == pytest.approx(1.0 if old_error < 1 else 0.0)
        assert metric(found, "error_ratio") == pytest.approx(old_error**2 / (1 + ERROR_FLOOR), rel=1e-5)


def test_nft_at_the_reference_is_the_published_loss_whatever_the_limit():
    policy = toy_policy()
    (limited, model), (free, _) = nft(policy, push_limit=1.5, kl_beta=0.0), nft(policy, kl_beta=0.0)
    batch = at_all(policy, limited, model, painted(policy))
    for draw in range(limited.num_passes(batch)):
        torch.testing.assert_close(limited.loss(model, batch, draw).loss, free.loss(model, batch, draw).loss)


def test_a_push_limit_must_leave_room_above_the_reference():
    with pytest.raises(ValueError, match="push_limit"):
        NFTConfig(push_limit=1.0)


def metric(found, name):
    total, weight = found.metrics[name]
    return float(total / weight)


def test_nft_self_normalised_error_is_finite_where_the_prediction_is_exact():
    clean = torch.randn(2, 1, 2, 2)
    noised = Noised.of(clean, torch.tensor([0.5, 1e-3]), torch.zeros_like(clean))
    v = noised.target.clone().requires_grad_()
    positive, negative = implicit_losses(v, noised.target, noised, clean, 1.0)
    (positive.sum() + negative.sum()).backward()
    assert torch.isfinite(v.grad).all()
    assert float(positive.detach().max()) < 1e-6


@pytest.mark.parametrize(
    ("schedule", "step", "expected"),
    [((75, 0.0075, 0.999), 74, 0.0), ((75, 0.0075, 0.999), 175, 0.75), ((75, 0.0075, 0.999), 209, 0.999),
     ((0, 0.0, 0.0), 10, 0.0), ((0, 0.001, 0.5), 100, 0.1), ((0, 0.001, 0.5), 900, 0.5)],
)  # fmt: skip
def test_old_decay_schedules(schedule, step, expected):
    assert old_decay(step, *schedule) == pytest.approx(expected)
    flat, rate, hold = schedule
    objective, _ = nft(toy_policy(), decay_flat=flat, decay_rate=rate, decay_hold=hold)
    assert objective.snapshot_decay("old", step) == pytest.approx(expected)
    assert objective.snapshot_decay("ref", step) is None


def test_nft_asks_for_the_reference_only_with_a_kl_term_or_a_push_limit():
    assert nft(toy_policy(), kl_beta=0.0)[0].prepasses(job()) == ("old",)
    for fields in ({"kl_beta": 1e-4}, {"kl_beta": 0.0, "push_limit": 3.0}):
        assert nft(toy_policy(), **fields)[0].prepasses(job()) == ("old", "ref")


def test_nft_draws_set_the_number_of_passes_and_take_distinct_levels():
    policy = toy_policy()
    objective, _ = nft(policy, draws=3)
    batch = painted(policy)
    assert objective.num_passes(batch) == 3
    assert len({float(objective.noised(batch, p).s[0]) for p in range(3)}) == 3


def test_nft_noise_per_group_is_shared_within_it_and_not_between_groups():
    policy = toy_policy()
    batch = painted(policy)
    rows = tuple(row.model_copy(update={"group": i // 2}) for i, row in enumerate(batch.rows))
    batch = replace(batch, rows=rows, clean=batch.clean[:1].expand_as(batch.clean))
    shared = nft(policy, noise_per="group", draws=2)[0]
    for draw in range(2):
        drawn = shared.noised(batch, draw)
        assert torch.equal(drawn.x[0], drawn.x[1])
        assert not torch.equal(drawn.x[0], drawn.x[2])
    own = nft(policy, draws=2)[0].noised(batch, 0)
    assert not torch.equal(own.x[0], own.x[1])


def test_nft_noise_per_group_takes_what_samples_share_out_of_the_gradient():
    """Equal samples with opposite advantages teach nothing: with shared noise exactly, else on average only."""
    policy = toy_policy()
    batch = painted(policy)
    batch = replace(batch, clean=batch.clean[:1].expand_as(batch.clean).clone())  # advantages 1, -1, 1, -1
    norms = {}
    for noise_per in ("group", "sample"):
        objective, model = nft(policy, noise_per=noise_per, kl_beta=0.0, draws=1)
        ready = at_all(policy, objective, model, batch)
        norms[noise_per] = gradient(batch_loss(objective, model, ready), policy.module).norm()
    assert norms["group"] < 1e-6
    assert norms["sample"] > 1e-3


def test_nft_interpolated_times_reach_every_step_of_the_rollout_down_to_zero():
    policy, draws = toy_policy(), 3
    batch = painted(policy)
    objective = nft(policy, time_grid="interpolated", draws=draws)[0]
    levels = batch.sigmas
    strata = interpolated_strata(levels, draws)
    seen = []
    for step in range(60):
        for draw in range(draws):
            times = objective.noised(replace(batch, step=step), draw).s
            assert ((times >= strata[draw + 1] - 1e-6) & (times <= strata[draw] + 1e-6)).all()
            seen.append(times)
    counts = torch.bucketize(torch.cat(seen), levels[1:-1].flip(0)).bincount(minlength=len(levels) - 1)
    assert (counts / counts.sum() - 1 / (len(levels) - 1)).abs().max() < 0.05


def interpolated_strata(levels, draws):
    """The times between which each draw lies, the first the noisiest."""
    places = torch.arange(draws + 1) / draws * (len(levels) - 1)
    steps = places.long().clamp(max=len(levels) - 2)
    return torch.lerp(levels[steps], levels[steps + 1], places - steps)


# -- dpo


@pytest.mark.parametrize("beta", [2.0, 100.0, 2000.0])
def test_dpo_at_the_reference_is_ln_2_with_the_reference_gradient(beta):
    """omega = beta/4 on a pair with A = +1, -1."""
    policy = toy_policy()
    objective, model = dpo(policy, beta=beta, draws=2)
    batch = at_all(policy, objective, model, pair_batch(policy))
    loss = batch_loss(objective, model, batch, divisor=2)
    assert loss.item() == pytest.approx(math.log(2), rel=1e-6)
    errors = sum(objective.errors(model, batch, draw) for draw in range(2)) / 2
    reference = 0.25 * beta * (errors[:2] - errors[2:]).mean()
    torch.testing.assert_close(
        gradient(loss, policy.module), gradient(reference, policy.module), rtol=1e-4, atol=1e-6 * beta
    )


def test_dpo_loss_is_its_formula_and_swapping_the_pair_flips_the_margin():
    policy = toy_policy()
    objective, model = dpo(policy, beta=10.0)
    batch = at_all(policy, objective, model, pair_batch(policy))
    nudge(policy.module, 0.05)
    excess = (objective.errors(model, batch, 0) - batch.prepass["ref_errors"][:, 0]).detach()
    margin = -5.0 * (excess[:2] - excess[2:])
    loss_sum = objective.loss(model, batch, 0)
    assert loss_sum.loss.item() == pytest.approx(float(torch.log1p((-margin).exp()).sum()), rel=1e-6)
    order = torch.tensor([2, 3, 0, 1])
    swapped = replace(batch, clean=batch.clean[order], prepass={"ref_errors": batch.prepass["ref_errors"][order]})
    margins = [objective.loss(model, b, 0).metrics["implicit_margin"][0] for b in (batch, swapped)]
    torch.testing.assert_close(margins[0], -margins[1])
    accuracy = loss_sum.metrics["implicit_accuracy"]
    assert float(accuracy[0] / accuracy[1]) == float((margin > 0).double().mean())


def test_dpo_of_two_equal_images_has_no_gradient_because_noise_is_shared():
    policy = toy_policy()
    objective, model = dpo(policy)
    batch = pair_batch(policy)
    same = replace(batch, clean=torch.cat([batch.clean[:2], batch.clean[:2]]))
    same = at_all(policy, objective, model, same)
    assert float(gradient(batch_loss(objective, model, same), policy.module).abs().max()) < 1e-3
    unshared = replace(same, noise_keys=(0, 1, 2, 3), prepass={})
    unshared = at_all(policy, objective, model, unshared)
    assert float(gradient(batch_loss(objective, model, unshared), policy.module).abs().max()) > 1.0


def test_dpo_ignores_what_both_errors_share_and_pairs_without_weight():
    policy = toy_policy()
    objective, model = dpo(policy, beta=10.0)
    batch = at_all(policy, objective, model, pair_batch(policy))
    nudge(policy.module, 0.05)
    before = objective.loss(model, batch, 0).loss.item()
    shifted = replace(batch, prepass={"ref_errors": batch.prepass["ref_errors"] + 0.3})
    assert objective.loss(model, shifted, 0).loss.item() == pytest.approx(before, rel=1e-6)
    halves = [
        objective.loss(model, replace(batch, weight=torch.tensor(w)), 0).loss.item()
        for w in ([1.0, 0.0, 1.0, 0.0], [0.0, 1.0, 0.0, 1.0])
    ]
    assert sum(halves) == pytest.approx(before, rel=1e-6)


@pytest.mark.parametrize("make", [nft, dpo])
def test_rows_add_up_over_any_split_into_micro_batches(make):
    policy = toy_policy()
    objective, model = make(policy)
    batch = at_all(policy, objective, model, pair_batch(policy))
    nudge(policy.module, 0.01)
    whole = gradient(batch_loss(objective, model, batch), policy.module)
    pairs = [part(batch, slice(first, None, 2)) for first in (0, 1)]
    pieces = sum(gradient(batch_loss(objective, model, pair), policy.module) for pair in pairs)
    torch.testing.assert_close(whole, pieces, rtol=1e-3, atol=1e-4)


def test_unguided_training_ignores_the_negative_branch():
    policy = toy_policy()
    objective, model = nft(policy)
    guided = SAMPLER.model_copy(update={"guidance_scale": 4.0})
    batch = at_all(policy, objective, model, painted(policy, sampler=guided))
    without = replace(batch, uncond=None, guidance_scale=1.0)
    assert batch_loss(objective, model, batch).item() == batch_loss(objective, model, without).item()

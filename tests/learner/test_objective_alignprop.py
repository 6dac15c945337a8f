"""AlignProp against finite differences on a scalar linear denoiser (catalogue A, alignprop)."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from objective_kit import ToyPolicy, batch_loss, context, gradient
from torch import nn

from contracts.config.objectives import AlignPropConfig
from contracts.config.rollout import SamplerConfig
from contracts.scores import Outcome, ScoreTable
from contracts.seeds import Stream, derive_seed
from contracts.wire import PromptSpec, Row
from learner.objectives.alignprop import AlignProp, draw_truncation, read_table, to_uint8
from learner.objectives.base import ModelHandle
from learner.types import MicroBatch
from policy.rollout import paint_with_gradient
from policy.types import EmbeddingBatch

T = 3
SAMPLER = SamplerConfig(name="ode", steps=T, shift=1.0)
SLOPE = 0.4  # dR/dimage of the linear reward


class Scalar(nn.Module):
    """v = a x + b s, one number in, one out."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.tensor(0.3)), nn.Parameter(torch.tensor(-0.2))

    def forward(self, hidden_states: Any, timestep: Any, **_: Any) -> Any:
        return (self.a * hidden_states + self.b * timestep.view(-1, 1, 1, 1) / 1000,)


class ScalarPolicy(ToyPolicy):
    def decode_differentiable(self, latents):
        return (0.5 + 0.05 * latents).expand(-1, 3, -1, -1)


def scalar_policy() -> ScalarPolicy:
    return ScalarPolicy(Scalar(), latent_shape=(1, 1, 1))


def scorer(gradient_value=SLOPE, fail=(), nan_gradient=()):
    """R = slope * sum of pixels; some samples fail."""

    def score(images, prompts, metadata):
        assert images.dtype == np.uint8
        assert len(prompts) == len(metadata) == len(images)
        values = gradient_value * images.astype(np.float32).sum((1, 2, 3))[:, None] / 255
        outcomes = np.zeros_like(values, np.uint8)
        gradients = np.full((*images.shape[:3], 3), gradient_value, np.float32)
        for i in fail:
            outcomes[i], values[i], gradients[i] = Outcome.TIMED_OUT, np.nan, np.nan
        for i in nan_gradient:
            gradients[i, 0, 0, 0] = np.nan
        return ScoreTable("r", "1", ("score",), values, outcomes, gradients=gradients)

    return score


def batch(num=2, **fields) -> MicroBatch:
    rows = tuple(Row(group=4, sample=i, weight=1.0, noise_key=i) for i in range(num))
    return MicroBatch(
        cond=EmbeddingBatch(torch.zeros(num, 1, 1), torch.zeros(num, 3)), uncond=None, guidance_scale=1.0,
        weight=fields.pop("weight", torch.ones(num)), advantage=torch.zeros(num), noise_keys=tuple(range(num)), step=0,
        sigmas=torch.linspace(1, 0, T + 1), step_indices=(), staleness=torch.zeros(num), rows=rows,
        prompts=(PromptSpec(text="x", metadata={"k": 1}),) * num, **fields,
    )  # fmt: skip


def make(policy, score=None, **fields):
    objective = AlignProp(AlignPropConfig(**fields), context(policy, SAMPLER, score_gradient=score or scorer()))
    return objective, ModelHandle(policy)


def by_hand(policy, seeds, truncation, detached=None):
    """Sum of images' rewards as a plain loop; velocities before `truncation` come from `detached` when given."""
    total, recorded = 0.0, []
    a, b = policy.module.a.item(), policy.module.b.item()
    for i, seed in enumerate(seeds):
        x = float(torch.randn(1, generator=torch.Generator().manual_seed(seed)))
        for k in range(T):
            s, s_next = 1 - k / T, 1 - (k + 1) / T
            v = a * x + b * s if detached is None or k >= truncation else detached[i][k]
            recorded.append(v)
            x += v * (s_next - s)
        total += SLOPE * 3 * (0.5 + 0.05 * x)
    return total, np.array(recorded).reshape(len(seeds), T)


@pytest.mark.parametrize("truncation", [0, 1, 2])
@pytest.mark.parametrize("checkpoint", [True, False])
def test_gradient_is_that_of_finite_differences_with_early_outputs_held_fixed(truncation, checkpoint, monkeypatch):
    policy = scalar_policy()
    objective, model = make(policy, checkpoint=checkpoint, loss_coeff=2.0)
    monkeypatch.setattr(objective, "truncation", lambda _batch: truncation)
    seeds = objective.init_seeds(batch())
    got = gradient(batch_loss(objective, model, batch()), policy.module)
    _, fixed = by_hand(policy, seeds, truncation)
    differences, h = [], 1e-4
    for parameter in (policy.module.a, policy.module.b):
        sides = []
        for sign in (1, -1):
            with torch.no_grad():
                parameter += sign * h
            sides.append(by_hand(policy, seeds, truncation, fixed)[0])
            with torch.no_grad():
                parameter -= sign * h
        differences.append(-2.0 * (sides[0] - sides[1]) / (2 * h))
    np.testing.assert_allclose(got.numpy(), differences, rtol=2e-3, atol=1e-5)


def test_truncation_at_the_last_step_leaves_the_last_call_alone():
    policy = scalar_policy()

    def paint(truncation, checkpoint=False):
        return paint_with_gradient(
            policy, batch().cond, None, SAMPLER, [1, 2], truncation, checkpoint, module=policy.module
        ).sum()  # fmt: skip

    full, last = gradient(paint(0), policy.module), gradient(paint(T - 1), policy.module)
    assert not torch.allclose(full, last)
    _, velocities = by_hand(policy, [1, 2], 0)
    noise = [float(torch.randn(1, generator=torch.Generator().manual_seed(seed))) for seed in (1, 2)]
    x_before_last = sum(x - velocity[:-1].sum() / T for x, velocity in zip(noise, velocities, strict=True))
    torch.testing.assert_close(last, torch.tensor([-float(x_before_last) / T, -2 * (1 / T) / T]), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(gradient(paint(0, checkpoint=True), policy.module), full, rtol=0, atol=0)


def test_a_failed_score_contributes_nothing_and_the_rest_is_as_without_it():
    policy = scalar_policy()
    (whole, model), (failing, _), (nan, _) = (
        make(policy, score) for score in (scorer(), scorer(fail=[1]), scorer(nan_gradient=[1]))
    )
    for objective in (failing, nan):
        got = gradient(batch_loss(objective, model, batch(3)), policy.module)
        masked = gradient(batch_loss(whole, model, batch(3, weight=torch.tensor([1.0, 0.0, 1.0]))), policy.module)
        torch.testing.assert_close(got, masked, rtol=1e-6, atol=1e-9)
        failed, num = objective.loss(model, batch(3), 0).metrics["failed_fraction"]
        assert float(failed / num) == pytest.approx(1 / 3)
    everything, _ = make(policy, scorer(fail=[0, 1, 2]))
    loss_sum = everything.loss(model, batch(3), 0)
    assert loss_sum.loss.item() == 0
    assert float(loss_sum.metrics["reward"][1]) == 0


def test_a_table_without_gradients_is_a_failure_of_every_sample():
    images = torch.rand(2, 3, 4, 4)
    table = ScoreTable("r", "1", ("score",), np.ones((2, 1), np.float32), np.zeros((2, 1), np.uint8))
    values, gradients, valid = read_table(table, images)
    assert not valid.any()
    assert float(values.abs().max() + gradients.abs().max()) == 0


def test_gradients_keep_their_place_between_layouts():
    images = torch.rand(2, 3, 4, 5)
    gradients = np.random.default_rng(0).normal(size=(2, 4, 5, 3)).astype(np.float32)
    table = ScoreTable("r", "1", ("s",), np.ones((2, 1), np.float32), np.zeros((2, 1), np.uint8), gradients=gradients)
    np.testing.assert_array_equal(read_table(table, images)[1].permute(0, 2, 3, 1).numpy(), gradients)
    np.testing.assert_array_equal(to_uint8(images)[1, 2, 3], (images[1, :, 2, 3] * 255).round().numpy())


def test_one_ascent_raises_the_reward():
    policy = scalar_policy()
    objective, model = make(policy, truncation="uniform", loss_coeff=1.0)
    rewards = []
    for _ in range(6):
        loss_sum = objective.loss(model, batch(8), 0)
        rewards.append(float(loss_sum.metrics["reward"][0]))
        step = gradient(loss_sum.loss, policy.module)
        with torch.no_grad():
            policy.module.a -= step[0]
            policy.module.b -= step[1]
    assert rewards[-1] > rewards[0]


def test_truncation_is_seeded_fixed_or_within_its_range():
    rand = AlignPropConfig()
    drawn = [draw_truncation(rand, 50, seed) for seed in range(400)]
    assert drawn == [draw_truncation(rand, 50, seed) for seed in range(400)]
    assert min(drawn) >= 1
    assert max(drawn) < 50
    assert np.mean(drawn) == pytest.approx(41, abs=0.8)
    assert draw_truncation(AlignPropConfig(truncation="fixed"), 50, 0) == 49
    uniform = {draw_truncation(AlignPropConfig(truncation="uniform"), 4, seed) for seed in range(100)}
    assert uniform == {0, 1, 2, 3}
    assert {draw_truncation(rand, 1, seed) for seed in range(5)} == {0}
    assert draw_truncation(AlignPropConfig(truncation_mean=0.99, truncation_std=0.0), 2, 0) == 1


def test_initial_noise_is_that_of_the_group_and_sample():
    objective, _ = make(scalar_policy())
    assert objective.init_seeds(batch(2)) == [derive_seed(7, Stream.INIT_NOISE, 4, i) for i in range(2)]

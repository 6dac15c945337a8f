"""PPO: the value loss, what its gradient reaches, and a critic that learns (catalogue C, ddpo-ppo)."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from objective_kit import SAMPLER, batch_loss, context, embeddings, gradient, nudge, painted, toy_policy

from contracts.config.objectives import CreditConfig, GRPOConfig, PPOConfig
from learner.credit.gae import GAE
from learner.critic import CriticHandle, PolicyWithCritic, build_critic, split_state
from learner.objectives.base import ModelHandle
from learner.objectives.grpo import GRPO
from learner.objectives.ppo import PPO
from learner.types import CreditBatch, Rewards

TRUNKS = ["shared", "separate"]


def make(policy, sampler=SAMPLER, **fields):
    config = PPOConfig(**fields)
    joint = build_critic(policy, config, run_seed=0, pooled_dim=3)
    return PPO(config, context(policy, sampler)), CriticHandle(policy, joint, config), joint


def with_targets(objective, model, batch, reward=None):
    """A batch with values as the learner's value pass yields them, and Monte Carlo returns of `reward`."""
    with torch.no_grad():
        old = objective.values(model, batch).double()
    reward = batch.advantage if reward is None else reward
    return replace(batch, old_values=old, returns=reward.double()[:, None].expand_as(old).clone())


def metric(loss_sum, name):
    total, weight = loss_sum.metrics[name]
    return float(total / weight)


@pytest.mark.parametrize("trunk", TRUNKS)
def test_policy_part_is_the_clipped_policy_gradient(trunk):
    policy = toy_policy()
    objective, model, _ = make(policy, trunk=trunk, value_coef=0.0)
    batch = with_targets(objective, model, painted(policy, advantage=torch.randn(4, 4)), reward=torch.ones(4))
    nudge(policy.module, 1e-3)
    plain = GRPO(GRPOConfig(), context(policy))
    assert batch_loss(objective, model, batch).item() == batch_loss(plain, ModelHandle(policy), batch).item()


@pytest.mark.parametrize("trunk", TRUNKS)
def test_the_critic_starts_at_zero_and_leaves_the_ratio_at_one(trunk):
    policy = toy_policy()
    objective, model, _ = make(policy, trunk=trunk)
    batch = with_targets(objective, model, painted(policy))
    assert batch.old_values.shape == (4, 4)
    assert float(batch.old_values.abs().max()) == 0
    loss_sum = objective.loss(model, batch, 0)
    assert metric(loss_sum, "ratio_deviation") == 0
    assert metric(loss_sum, "value_loss") == 0.5


def test_value_loss_is_clipped_around_the_old_values():
    policy = toy_policy()
    objective, _, _ = make(policy, value_clip=0.2)
    batch = replace(
        painted(policy), old_values=torch.zeros(4, 4), returns=torch.tensor([1.0, 1.0, -1.0, 0.1])[:, None].expand(4, 4)
    )
    values = torch.tensor([[0.9], [0.1], [0.5], [0.0]])
    loss_sum = objective._value_loss(values, batch, slice(0, 1))
    # beyond the clip and nearer: the clipped error (0.8) counts; within: its own; beyond and away: the larger one
    expected = 0.5 * (0.8**2 + 0.9**2 + 1.5**2 + 0.1**2)
    assert loss_sum.loss.item() == pytest.approx(expected, rel=1e-5)
    assert metric(loss_sum, "value_clip_fraction") == 0.5
    free, _, _ = make(policy, value_clip=None)
    assert free._value_loss(values, batch, slice(0, 1)).loss.item() == pytest.approx(
        0.5 * (0.1**2 + 0.9**2 + 1.5**2 + 0.1**2), rel=1e-5
    )


@pytest.mark.parametrize(("trunk", "trunk_gradient", "reaches"), [
    ("shared", False, False), ("shared", True, True), ("separate", False, False),
])  # fmt: skip
def test_value_loss_reaches_the_trunk_only_when_asked(trunk, trunk_gradient, reaches):
    policy = toy_policy()
    objective, model, joint = make(policy, trunk=trunk, trunk_gradient=trunk_gradient)
    nudge(joint.critic, 0.1)
    batch = with_targets(objective, model, painted(policy, advantage=torch.zeros(4)), reward=torch.ones(4))
    loss = batch_loss(objective, model, batch)
    assert (float(gradient(loss, policy.module).abs().max()) > 0) is reaches
    assert float(gradient(loss, joint.critic).abs().max()) > 0


@pytest.mark.parametrize("trunk", TRUNKS)
def test_policy_loss_never_reaches_the_critic(trunk):
    policy = toy_policy()
    objective, model, joint = make(policy, trunk=trunk, value_coef=0.0, trunk_gradient=True)
    nudge(joint.critic, 0.1)
    batch = with_targets(objective, model, painted(policy))
    assert float(gradient(batch_loss(objective, model, batch), joint.critic).abs().max()) == 0


@pytest.mark.parametrize("trunk", TRUNKS)
@pytest.mark.parametrize("steps_per_forward", [2, 4])
def test_values_and_loss_do_not_depend_on_steps_per_forward(trunk, steps_per_forward):
    policy = toy_policy()
    one, model, joint = make(policy, trunk=trunk)
    many = PPO(PPOConfig(trunk=trunk, steps_per_forward=steps_per_forward), context(policy))
    nudge(joint.critic, 0.1)
    batch = with_targets(one, model, painted(policy))
    with torch.no_grad():
        torch.testing.assert_close(many.values(model, batch), one.values(model, batch), rtol=1e-5, atol=1e-6)
    nudge(policy.module, 0.01)
    losses = [batch_loss(o, model, batch).item() for o in (one, many)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.parametrize("trunk", TRUNKS)
def test_values_in_the_loss_are_those_of_the_value_pass_under_guidance_too(trunk):
    policy = toy_policy()
    guided = SAMPLER.model_copy(update={"guidance_scale": 3.0})
    objective, model, joint = make(policy, guided, trunk=trunk)
    nudge(joint.critic, 0.1)
    batch = with_targets(objective, model, painted(policy, sampler=guided))
    for p in range(4):
        loss_sum = objective.loss(model, batch, p)
        assert metric(loss_sum, "value") == pytest.approx(float(batch.old_values[:, p].mean()), rel=1e-5)
        assert metric(loss_sum, "value_clip_fraction") < 1e-9


@pytest.mark.parametrize("trunk", TRUNKS)
def test_velocity_and_value_are_the_two_alone(trunk):
    policy = toy_policy()
    _, model, joint = make(policy, trunk=trunk)
    nudge(joint.critic, 0.1)
    x, s, cond = torch.randn(3, *policy.latent_shape), torch.tensor([1.0, 0.5, 0.2]), embeddings(3)
    velocity, values = model.velocity_and_value(x, s, cond)
    torch.testing.assert_close(velocity, policy.velocity(x, s, cond), rtol=0, atol=0)
    torch.testing.assert_close(values, model.value(x, s, cond), rtol=0, atol=0)
    assert len({round(float(v), 6) for v in values}) == 3


@pytest.mark.parametrize("trunk", TRUNKS)
def test_a_critic_that_learns_raises_the_explained_variance(trunk):
    """Rewards that the prompt decides: values can explain nearly all of their variance."""
    policy = toy_policy()
    objective, model, joint = make(policy, trunk=trunk, value_clip=None)
    cond = embeddings(16)
    reward = cond.pooled[:, 0]
    batch = with_targets(objective, model, painted(policy, 16, cond=cond, advantage=torch.zeros(16)), reward)
    optimizer = torch.optim.AdamW(joint.critic_parameters().values(), lr=1e-2)
    before = explained_variance(objective, model, batch, reward)
    for _ in range(60):
        optimizer.zero_grad()
        (batch_loss(objective, model, batch, divisor=16)).backward()
        optimizer.step()
    assert before == pytest.approx(0, abs=1e-6)
    assert explained_variance(objective, model, batch, reward) > 0.8


def explained_variance(objective, model, batch, reward):
    with torch.no_grad():
        values = objective.values(model, batch).numpy()
    given = Rewards(reward.double().numpy(), np.ones(len(values), bool), np.zeros(len(values)))
    entry = GAE(CreditConfig(), SimpleNamespace(gamma=1.0, lam=0.95))
    return entry.advantages(CreditBatch({0: given}, {0: values})).metrics["explained_variance"]


@pytest.mark.parametrize("trunk", TRUNKS)
def test_the_critic_is_equal_wherever_it_is_built_and_named_apart_from_the_policy(trunk):
    policy = toy_policy()
    config = PPOConfig(trunk=trunk)
    state = torch.random.get_rng_state()
    first = build_critic(policy, config, run_seed=3, pooled_dim=3)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(99)
    second = build_critic(policy, config, run_seed=3, pooled_dim=3)
    for name, parameter in first.critic_parameters().items():
        torch.testing.assert_close(parameter, second.critic_parameters()[name], rtol=0, atol=0)
    joint = {"norm": torch.zeros(1)} | dict(first.critic_parameters())
    of_policy, of_critic = split_state(joint)
    assert list(of_policy) == ["norm"]
    assert list(of_critic) == list(first.critic_parameters())


def test_the_joint_module_registers_each_parameter_once():
    policy = toy_policy()
    joint = build_critic(policy, PPOConfig(), run_seed=0, pooled_dim=3)
    assert isinstance(joint, PolicyWithCritic)
    total = sum(p.numel() for p in joint.parameters())
    parts = sum(p.numel() for p in policy.module.parameters()) + sum(p.numel() for p in joint.critic.parameters())
    assert total == parts
    assert {name.split(".")[0] for name, _ in joint.named_parameters()} == {"network", "critic"}

"""The contract every objective and credit entry keeps, over the whole registry, on the miniature model."""

from __future__ import annotations

import sys
from dataclasses import replace
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from objective_kit import batch_loss, embeddings, job, painted, with_prepass

from contracts import registry
from contracts.config import RunConfig
from contracts.config.objectives import CreditConfig
from contracts.errors import ConfigError
from contracts.metrics import STEP_METRICS
from contracts.needs import objective_needs
from contracts.scores import point_table
from learner.credit.base import CreditEntry
from learner.critic import CriticHandle, build_critic
from learner.objectives.base import ModelHandle, Objective, make_objective
from learner.objectives.grpo import GRPO
from learner.plan import noise_key
from learner.types import CreditBatch, Rewards
from policy.policy import Policy

OBJECTIVES = registry.names("objective")
DISTANCE = 1e-2
"""Length of the test's one step down the gradient, whose scale differs by orders between objectives."""
CREDITS = registry.names("credit")


def run_config(folder, objective, **more) -> RunConfig:
    return RunConfig.model_validate(
        {
            "name": "t", "seed": 7, "model": {"path": str(folder), "device": "cpu"}, "stop": {"steps": 1},
            "scorers": [{"name": "s", "function": "m:f"}], "sampler": {"steps": 3},
            "objective": {"name": objective} if isinstance(objective, str) else objective, **more,
        }
    )  # fmt: skip


def bright(images, prompts, metadata):
    """R = mean brightness, with its gradient."""
    pixels = images.astype(np.float32) / 255
    gradients = np.full(images.shape, 1 / images[0].size, np.float32)
    return point_table("s", "1", ("score",), pixels.mean((1, 2, 3)), gradients=gradients)


@pytest.fixture(scope="module")
def policy(tiny_model_folder):
    torch.set_num_threads(1)
    return Policy.load(run_config(tiny_model_folder, "grpo").model, seed=0, trainable=True)


@pytest.fixture
def fresh(policy):
    """The policy, put back to its first weights afterwards."""
    before = {name: p.detach().clone() for name, p in policy.trainable().items()}
    yield policy
    with torch.no_grad():
        for name, p in policy.trainable().items():
            p.copy_(before[name])


def prepared(name, policy, folder):
    """(objective, model, batch) with everything the objective declares to need."""
    config = run_config(folder, name)
    objective = make_objective(config, policy, bright)
    model: ModelHandle = ModelHandle(policy)
    if objective.declares.critic:
        model = CriticHandle(policy, build_critic(policy, config.objective, config.seed), config.objective)
    prompts = [policy.encode_prompt(text) for text in ("a red circle", "a blue square")]
    cond = type(embeddings(1)).stack(prompts, "cpu", torch.float32)
    cond = cond.join(cond)  # [a, b, a, b]: as pairs, prompt by prompt
    batch = painted(policy, 4, config.sampler, cond)
    if objective.declares.unit == "pair":
        batch = replace(batch, noise_keys=tuple(noise_key(g, 0) for g in (0, 1, 0, 1)))
    if objective.declares.critic:
        with torch.no_grad():
            old = objective.values(model, batch)
        batch = replace(batch, old_values=old, returns=torch.ones_like(old))
    return objective, model, with_prepass(objective, model, batch, *objective.prepasses(job()))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_one_update_changes_weights_and_lowers_the_loss(name, fresh, tiny_model_folder):
    objective, model, batch = prepared(name, fresh, tiny_model_folder)
    before = {n: p.detach().clone() for n, p in fresh.trainable().items()}
    first = batch_loss(objective, model, batch, divisor=4)
    first.backward()
    parameters = list(fresh.trainable().values())
    norm = torch.nn.utils.clip_grad_norm_(parameters, float("inf"))
    with torch.no_grad():
        for parameter in parameters:
            if parameter.grad is not None:
                parameter -= DISTANCE / norm * parameter.grad
            parameter.grad = None
    second = batch_loss(objective, model, batch, divisor=4)
    moved = [n for n, p in fresh.trainable().items() if not torch.equal(p, before[n])]
    assert len(moved) > 0.5 * len(before)
    assert second.item() < first.item()


@pytest.mark.parametrize("name", OBJECTIVES)
def test_loss_is_a_weighted_sum_and_metrics_are_sums_with_weights(name, fresh, tiny_model_folder):
    objective, model, batch = prepared(name, fresh, tiny_model_folder)
    one, two, none = (objective.loss(model, replace(batch, weight=w * batch.weight), 0) for w in (1, 2, 0))
    assert one.loss.shape == ()
    assert one.loss.dtype == torch.float32
    assert two.loss.item() == pytest.approx(2 * one.loss.item(), rel=1e-5)
    assert none.loss.item() == 0
    assert one.metrics
    for metric, (total, weight) in one.metrics.items():
        assert torch.isfinite(total), metric
        assert not total.requires_grad, metric
        assert 0 <= float(weight) <= 4 * len(batch.step_indices), metric
        assert float(none.metrics[metric][1]) == 0, metric
    means = {m: float(total / weight) for m, (total, weight) in one.metrics.items() if weight > 0}
    assert all(np.isfinite(value) for value in objective.finish_metrics(means).values())


@pytest.mark.parametrize("name", OBJECTIVES)
def test_it_measures_what_the_catalogue_says(name, fresh, tiny_model_folder):
    """All of it, so that a guard of a metric that is listed can speak, and one of any other is refused."""
    with_kl = {"kl_beta": 0.1} if name in ("grpo", "ppo", "nft") else {}
    objective, model, batch = prepared({"name": name, **with_kl}, fresh, tiny_model_folder)
    pairs = objective.loss(model, batch, 0).metrics
    means = {metric: float(total / weight) for metric, (total, weight) in pairs.items() if weight > 0}
    assert set(objective.finish_metrics(means)) == set(STEP_METRICS["objective", name])


@pytest.mark.parametrize("name", OBJECTIVES)
def test_prepass_outputs_have_rows_first_and_no_gradient(name, fresh, tiny_model_folder):
    objective, _, batch = prepared(name, fresh, tiny_model_folder)
    assert bool(batch.prepass) == bool(objective.prepasses(job()))
    for key, value in batch.prepass.items():
        assert value.shape[0] == 4, key
        assert not value.requires_grad, key


@pytest.mark.parametrize("name", OBJECTIVES)
def test_prepasses_ask_only_for_snapshots_that_the_run_keeps(name, fresh, tiny_model_folder):
    config = run_config(tiny_model_folder, name)
    kept = objective_needs(config).snapshots
    objective = make_objective(config, fresh, bright)
    assert {snapshot for snapshot in objective.prepasses(job(1, 0)) if snapshot} <= set(kept)
    assert objective.declares == registry.resolve("objective", name).declares


def test_a_kl_term_adds_the_reference_and_staleness_the_means(tiny_model_folder):
    plain = run_config(tiny_model_folder, "grpo", pipeline={"max_staleness": 0})
    assert objective_needs(plain).snapshots == ()
    assert not objective_needs(plain).means
    assert objective_needs(run_config(tiny_model_folder, "grpo", pipeline={"max_staleness": 1})).means
    with_kl = run_config(tiny_model_folder, {"name": "grpo", "kl_beta": 0.1}, pipeline={"max_staleness": 0})
    assert objective_needs(with_kl).snapshots == ("ref",)
    assert objective_needs(run_config(tiny_model_folder, {"name": "nft", "kl_beta": 0.0})).snapshots == ("old",)
    assert objective_needs(run_config(tiny_model_folder, "nft")).snapshots == ("old", "ref")
    limited = run_config(tiny_model_folder, {"name": "nft", "kl_beta": 0.0, "push_limit": 3.0})
    assert objective_needs(limited).snapshots == ("old", "ref")
    bf16 = run_config(tiny_model_folder, "grpo", pipeline={"max_staleness": 0})
    bf16 = bf16.model_copy(update={"model": bf16.model.model_copy(update={"dtype": "bf16"})})
    assert objective_needs(bf16).means


class Softer(GRPO):
    """An own objective: a built-in one with a change of its own."""

    def loss(self, model, batch, p):
        result = super().loss(model, batch, p)
        return replace(result, loss=0.5 * result.loss)


def test_an_own_objective_inherits_needs_and_fields(fresh, tiny_model_folder, monkeypatch):
    module = ModuleType("own_objective")
    module.Softer = Softer
    monkeypatch.setitem(sys.modules, "own_objective", module)
    section = {"name": "own_objective:Softer", "options": {"clip_range": 0.3, "kl_beta": 0.1}}
    config = run_config(tiny_model_folder, section)
    assert objective_needs(config).states
    assert objective_needs(config).snapshots == ("ref",)
    objective = make_objective(config, fresh)
    assert objective.config.clip_range == 0.3
    assert objective.prepasses(job()) == ("ref",)
    with pytest.raises(ConfigError, match=r"objective.options.clip_rnge"):
        make_objective(run_config(tiny_model_folder, {**section, "options": {"clip_rnge": 0.3}}), fresh)


def test_base_defaults_suit_a_one_pass_objective_without_prepass():
    class Nothing(Objective):
        def loss(self, model, batch, p):
            raise NotImplementedError

    objective = Nothing(SimpleNamespace(), SimpleNamespace())
    assert objective.num_passes(SimpleNamespace()) == 1
    assert objective.prepasses(job()) == ()
    assert objective.prepass(None, None, None) == {}
    assert objective.snapshot_decay("ref", 10) is None


@pytest.mark.parametrize("name", CREDITS)
def test_credit_entries_yield_the_shape_they_declare_zero_where_invalid(name):
    entry = next(e for e in registry.entries("credit") if e.name == name)
    credit_entry = registry.resolve("credit", name).load()(CreditConfig(), SimpleNamespace(gamma=1.0, lam=0.95))
    assert isinstance(credit_entry, CreditEntry)
    valid = np.array([True, False, True, True])
    given = {g: Rewards(np.where(valid, [1.0, 9.0, 2.0, 4.0], np.nan) + g, valid, np.zeros(4)) for g in (3, 8)}
    values = {g: np.zeros((4, 3)) for g in given}
    credit = credit_entry.advantages(CreditBatch(given, values if entry.declares.needs_values else {}))
    assert set(credit.metrics) == set(STEP_METRICS["credit", name])
    shape = (4, 3) if entry.declares.shape == "step" else (4,)
    assert list(credit.advantages) == [3, 8]
    for advantages in credit.advantages.values():
        assert advantages.shape == shape
        assert np.isfinite(advantages).all()
        assert (advantages[1] == 0).all()
        assert (advantages[3] > advantages[0]).all()
    for group, rewards in credit.rewards.items():
        np.testing.assert_array_equal(rewards, given[group].totals())
    credit_entry.load_state_dict(credit_entry.state_dict())
    again = credit_entry.advantages(CreditBatch(given, values if entry.declares.needs_values else {}))
    np.testing.assert_array_equal(again.advantages[3], credit.advantages[3])

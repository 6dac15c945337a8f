"""The engines in one process: schedule, the bare loop's numbers, masters, refusals. ZeRO is in test_engine_ranks.py.

About 8 s.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from contracts.config.learner import OptimizerConfig
from contracts.errors import ConfigError
from learner.engines.base import ParamGroup, lr_scale_at
from learner.engines.deepspeed import (
    DeepSpeedEngine,
    DeepSpeedUnavailable,
    check_stage,
    deepspeed_usable,
)
from learner.engines.plain import PlainEngine, _buckets

CONFIG = OptimizerConfig(lr=1e-2, weight_decay=0.1, clip_grad_norm=0.5)


def small_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.GELU(), nn.Linear(7, 3))


def group_of(net: nn.Module) -> list[ParamGroup]:
    return [ParamGroup("policy", dict(net.named_parameters()))]


def batches(num: int) -> torch.Tensor:
    return torch.randn(num, 4, 5, generator=torch.Generator().manual_seed(1))


def weights(net: nn.Module) -> dict[str, torch.Tensor]:
    return {name: param.detach().clone() for name, param in net.named_parameters()}


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def test_plain_takes_the_steps_of_the_bare_loop() -> None:
    net, bare = small_net(), small_net()
    engine = PlainEngine(net, group_of(net), CONFIG)
    optimizer = torch.optim.AdamW(bare.parameters(), lr=1e-2, weight_decay=0.1, foreach=True)
    for first, second in batches(6).split(2)[0:3]:
        norms = []
        for module, backward in ((engine.module, engine.backward), (bare, torch.Tensor.backward)):
            for batch in (first, second):
                backward(module(batch).square().mean())
        norms = [engine.step().grad_norm, float(nn.utils.clip_grad_norm_(bare.parameters(), 0.5))]
        optimizer.step()
        optimizer.zero_grad()
        assert norms[0] == norms[1]
    assert engine.optimizer_steps == 3
    assert_equal(weights(net), weights(bare))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_changes_nothing(bad: float) -> None:
    net, untouched = small_net(), small_net()
    engine, twin = PlainEngine(net, group_of(net), CONFIG), PlainEngine(untouched, group_of(untouched), CONFIG)
    batch = batches(1)[0]
    for one in (engine, twin):
        one.backward(one.module(batch).square().mean())
        one.step()
    before = weights(net)
    engine.backward(engine.module(batch).square().mean() * bad)
    step = engine.step()
    assert not step.finite
    assert engine.optimizer_steps == 1
    assert_equal(weights(net), before)
    for one in (engine, twin):  # moments and gradients are as if it had never been
        one.backward(one.module(batch).square().mean())
        assert one.step().finite
    assert_equal(weights(net), weights(untouched))


def test_zero_grad_forgets_an_unfinished_update() -> None:
    net, fresh = small_net(), small_net()
    engine, twin = PlainEngine(net, group_of(net), CONFIG), PlainEngine(fresh, group_of(fresh), CONFIG)
    one, other = batches(2)
    engine.backward(engine.module(other).sum())
    engine.zero_grad()
    for each in (engine, twin):
        each.backward(each.module(one).square().mean())
        each.step()
    assert_equal(weights(net), weights(fresh))


def test_a_parameter_out_of_the_losss_reach_still_decays() -> None:
    used, unused = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    engine = PlainEngine(nn.Module(), [ParamGroup("policy", {"a": used, "b": unused})], CONFIG)
    engine.backward(used.sum())
    engine.step()
    torch.testing.assert_close(unused.detach(), torch.full((3,), 1 - 1e-2 * 0.1))


def test_groups_have_their_own_learning_rate() -> None:
    policy, critic = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))
    config = OptimizerConfig(lr=1e-3, weight_decay=0, warmup_steps=2, clip_grad_norm=None)
    groups = [ParamGroup("policy", {"p": policy}), ParamGroup("critic", {"critic.v": critic}, lr_scale=10.0)]
    engine = PlainEngine(nn.Module(), groups, config)
    assert list(engine.named_trainable()) == ["p", "critic.v"]
    engine.backward(policy.sum() - 3 * critic.sum())
    step = engine.step()
    assert step.lr == pytest.approx(0.5e-3)
    assert step.grad_norm == pytest.approx((2 + 18) ** 0.5)
    # Adam's first step is lr * sign(gradient)
    torch.testing.assert_close(policy.detach(), torch.full((2,), -0.5e-3))
    torch.testing.assert_close(critic.detach(), torch.full((2,), 0.5e-2))


def test_bf16_weights_have_fp32_masters() -> None:
    """Steps far below bf16's resolution (2^-8 around 1) add up in the master and appear in the weight at last."""
    weight = nn.Parameter(torch.ones(1, dtype=torch.bfloat16))
    config = OptimizerConfig(lr=1e-4, weight_decay=0, clip_grad_norm=None)
    engine = PlainEngine(nn.Module(), [ParamGroup("policy", {"w": weight})], config)
    for _ in range(10):
        engine.backward(weight.float().sum())
        engine.step()
    assert float(weight.detach()) == 1.0
    assert float(engine.full_tensor("w", "param")) == pytest.approx(1 - 10e-4, abs=1e-6)
    for _ in range(40):
        engine.backward(weight.float().sum())
        engine.step()
    assert float(weight.detach()) == pytest.approx(1 - 50e-4, abs=2**-9)
    assert engine.live_dtype("w") is torch.bfloat16
    assert engine.full_live("w").dtype is torch.bfloat16


def test_bf16_gradients_add_up_in_fp32() -> None:
    """256 + 1 is 256 in bf16; the gradient of the sum must be 257 all the same."""
    weight = nn.Parameter(torch.zeros(1, dtype=torch.bfloat16))
    engine = PlainEngine(nn.Module(), [ParamGroup("policy", {"w": weight})], OptimizerConfig(clip_grad_norm=None))
    engine.backward((weight * 256).sum())
    engine.backward((weight * 1).sum())
    assert engine.step().grad_norm == 257.0


def test_full_tensors_come_back_as_they_were_loaded() -> None:
    net, other = small_net(), small_net()
    engine, target = PlainEngine(net, group_of(net), CONFIG), PlainEngine(other, group_of(other), CONFIG)
    for batch in batches(3):
        engine.backward(engine.module(batch).square().mean())
        engine.step()
    assert not target.full_tensor("0.weight", "exp_avg").any()
    for name in engine.named_trainable():
        for kind in ("param", "exp_avg", "exp_avg_sq"):
            target.load_full(name, kind, engine.full_tensor(name, kind).clone())
    target.set_optimizer_steps(engine.optimizer_steps)
    for one in (engine, target):
        one.backward(one.module(batches(1)[0]).square().mean())
        one.step()
    assert_equal(weights(other), weights(net))


def test_impossible_groups_are_refused() -> None:
    weight = nn.Parameter(torch.zeros(1))
    with pytest.raises(ValueError, match="same name"):
        PlainEngine(nn.Module(), [ParamGroup("a", {"w": weight}), ParamGroup("b", {"w": weight})], CONFIG)
    with pytest.raises(ValueError, match="nothing to train"):
        PlainEngine(nn.Module(), [ParamGroup("a", {})], CONFIG)


def test_buckets_keep_order_and_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("learner.engines.plain._BUCKET_ELEMENTS", 10)
    tensors = [torch.zeros(size) for size in (4, 5, 3, 25, 10, 1)]
    assert [[t.numel() for t in bucket] for bucket in _buckets(tensors)] == [[4, 5], [3], [25], [10], [1]]


# -- the schedule


@given(
    step=st.integers(0, 500),
    warmup=st.integers(0, 50),
    final=st.floats(0, 1),
    shape=st.sampled_from(["cosine", "linear"]),
)
def test_the_schedule_stays_between_its_ends(step: int, warmup: int, final: float, shape: str) -> None:
    config = OptimizerConfig(warmup_steps=warmup, schedule=shape, schedule_steps=200, final_lr_scale=final)
    scale = lr_scale_at(step, config)
    assert 0 < scale <= 1 or final == 0
    if step >= 200:
        assert scale == pytest.approx(final)
    if step >= warmup:
        assert scale <= lr_scale_at(max(step - 1, warmup), config) + 1e-12


def test_the_schedule_at_its_landmarks() -> None:
    config = OptimizerConfig(warmup_steps=4, schedule="cosine", schedule_steps=104, final_lr_scale=0.2)
    assert [lr_scale_at(step, config) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]
    assert lr_scale_at(54, config) == pytest.approx(0.6)  # half-way: the mean of 1 and 0.2
    linear = OptimizerConfig(schedule="linear", schedule_steps=100, final_lr_scale=0.0)
    assert lr_scale_at(25, linear) == pytest.approx(0.75)
    assert lr_scale_at(10**6, OptimizerConfig(warmup_steps=2)) == 1.0


# -- DeepSpeed where it cannot run


@pytest.fixture
def without_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.mark.usefixtures("without_compiler")
def test_without_a_compiler_deepspeed_names_the_way_out() -> None:
    usable, reason = deepspeed_usable()
    assert not usable
    assert "g++" in reason
    net = small_net()
    with pytest.raises(DeepSpeedUnavailable, match="engine=plain"):
        DeepSpeedEngine(net, group_of(net), CONFIG)


def test_asking_whether_deepspeed_runs_does_not_import_it() -> None:
    script = "import sys; from learner.engines.deepspeed import deepspeed_usable as ask; ask(); print(*sys.modules)"
    imported = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split()
    assert "learner.engines.deepspeed" in imported
    assert "deepspeed" not in imported


def test_bf16_at_stage_0_is_refused_with_the_stage_to_take() -> None:
    with pytest.raises(ConfigError, match="zero_stage=1"):
        check_stage(0, "bf16")
    for stage, dtype in ((0, "fp32"), (1, "bf16"), (3, "bf16")):
        check_stage(stage, dtype)

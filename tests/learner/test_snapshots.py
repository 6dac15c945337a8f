"""Named snapshots: decays, the swap and its undoing. Under ZeRO-3: test_engine_ranks.py. About 2 s."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from contracts.config.learner import EmaConfig, OptimizerConfig
from learner.engines.base import ParamGroup
from learner.engines.plain import PlainEngine
from learner.objectives.nft import old_decay
from learner.snapshots import EMA, OLD, REF, Snapshots, warmup_decay


def make(
    *names: str, ema: EmaConfig | None = None, dtype: torch.dtype = torch.float32
) -> tuple[PlainEngine, Snapshots]:
    torch.manual_seed(0)
    net = nn.Linear(3, 2).to(dtype)
    engine = PlainEngine(net, [ParamGroup("policy", dict(net.named_parameters()))], OptimizerConfig(lr=0.1))
    return engine, Snapshots(engine, names, ema)


def take_step(engine: PlainEngine, seed: int = 0) -> None:
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(seed))
    engine.backward(engine.module(x.to(engine.module.weight.dtype)).float().square().sum())
    engine.step()


def bits(engine: PlainEngine) -> dict[str, torch.Tensor]:
    return {name: param.detach().clone() for name, param in engine.named_trainable().items()}


def test_the_warm_up_reaches_nine_tenths_at_step_80() -> None:
    assert warmup_decay(80, 0.999) == pytest.approx(81 / 90)
    assert warmup_decay(79, 0.9) < 0.9 == warmup_decay(80, 0.9) == warmup_decay(1000, 0.9)


def test_the_piecewise_decay_of_nft_at_its_landmarks() -> None:
    """Catalogue, type 2 (75, 0.0075, 0.999): 0 at 74, 0.75 at 175, 0.999 from 209."""
    assert old_decay(74, 75, 0.0075, 0.999) == 0
    assert old_decay(175, 75, 0.0075, 0.999) == pytest.approx(0.75)
    assert old_decay(209, 75, 0.0075, 0.999) == 0.999


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_within_a_snapshot_the_forward_is_its_own_and_after_it_every_bit_is_back(dtype: torch.dtype) -> None:
    engine, snapshots = make(REF, dtype=dtype)
    x = torch.randn(5, 3).to(dtype)
    at_start = engine.module(x)
    for seed in range(3):
        take_step(engine, seed)
    trained, now = bits(engine), engine.module(x)
    with snapshots.use(REF):
        assert torch.equal(engine.module(x), at_start)
        assert not torch.equal(engine.module(x), now)
    assert all(torch.equal(bits(engine)[name], value) for name, value in trained.items())
    with pytest.raises(RuntimeError, match="in the middle"), snapshots.use(REF):
        raise RuntimeError("in the middle")
    assert torch.equal(engine.module(x), now)


def test_a_swap_leaves_the_optimizer_where_it_was() -> None:
    (engine, snapshots), (twin, _) = make(REF), make()
    for one in (engine, twin):
        take_step(one)
    with snapshots.use(REF):
        engine.module(torch.randn(5, 3))
    for one in (engine, twin):
        take_step(one)
    assert all(torch.equal(bits(engine)[name], value) for name, value in bits(twin).items())


def test_none_means_the_current_weights_and_unknown_names_fail() -> None:
    engine, snapshots = make(REF)
    with snapshots.use(None):
        take_step(engine)
    with pytest.raises(KeyError, match="old"), snapshots.use(OLD):
        pass


def test_snapshots_do_not_nest() -> None:
    _, snapshots = make(REF, OLD)
    with pytest.raises(AssertionError, match="in use"), snapshots.use(REF), snapshots.use(OLD):
        pass
    with snapshots.use(OLD):
        pass


@given(decay=st.floats(0, 0.99), steps=st.integers(1, 12))
def test_the_average_of_constant_weights_closes_in_geometrically(decay: float, steps: int) -> None:
    """e_n - w = (e_0 - w) * product of decays: the closed form, of which the fixed point e = w is the special case."""
    engine, snapshots = make(OLD)
    start = snapshots.full_tensor(OLD, "weight").clone()
    engine.load_full("weight", "param", start + 1)
    for _ in range(steps):
        snapshots.after_step(0, lambda name, _: decay)
    expected = start + 1 - decay**steps
    torch.testing.assert_close(snapshots.full_tensor(OLD, "weight"), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(
        snapshots.full_tensor(OLD, "bias"), engine.full_tensor("bias", "param"), rtol=0, atol=1e-6
    )


def test_decay_zero_copies_bit_for_bit() -> None:
    engine, snapshots = make(OLD)
    take_step(engine)
    snapshots.after_step(1, lambda name, steps: 0.0)
    assert torch.equal(snapshots.full_tensor(OLD, "weight"), engine.full_tensor("weight", "param"))
    assert snapshots.full_tensor(OLD, "weight").data_ptr() != engine.full_tensor("weight", "param").data_ptr()


def test_ema_moves_at_its_interval_and_ref_never() -> None:
    engine, snapshots = make(REF, ema=EmaConfig(decay=0.5, interval=2))
    start = snapshots.full_tensor(EMA, "weight").clone()
    take_step(engine)
    snapshots.after_update(engine.optimizer_steps)
    assert torch.equal(snapshots.full_tensor(EMA, "weight"), start)
    take_step(engine)
    snapshots.after_update(engine.optimizer_steps)
    decay = warmup_decay(1, 0.5)  # 2/11: after the second step, t = 1
    expected = start + (1 - decay) * (engine.full_tensor("weight", "param") - start)
    torch.testing.assert_close(snapshots.full_tensor(EMA, "weight"), expected)
    snapshots.after_step(2, lambda name, steps: None)
    assert torch.equal(snapshots.full_tensor(REF, "weight"), start)


def test_the_objective_is_asked_once_for_each_but_ema() -> None:
    _, snapshots = make(REF, OLD, ema=EmaConfig())
    asked: list[tuple[str, int]] = []
    snapshots.after_step(7, lambda name, steps: asked.append((name, steps)))
    assert asked == [(REF, 7), (OLD, 7)]

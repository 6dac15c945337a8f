"""Noise levels and windows."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from contracts.config.rollout import SamplerConfig, WindowConfig
from contracts.errors import ConfigError
from policy.schedule import sigmas, stochastic_steps


@given(st.integers(1, 200), st.floats(0.2, 12.0))
def test_sigmas_fall_from_one_to_zero(steps: int, shift: float) -> None:
    levels = sigmas(steps, shift)
    assert levels.dtype == np.float32
    assert levels.shape == (steps + 1,)
    assert levels[0] == 1.0
    assert levels[-1] == 0.0
    assert (np.diff(levels) < 0).all()


def test_sigmas_equal_the_schedulers() -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(sigmas=np.linspace(1, 0, 9)[:-1].tolist())
    np.testing.assert_allclose(sigmas(8, 3.0), scheduler.sigmas.numpy(), atol=1e-7)


def test_without_a_window_every_step_but_the_last_is_stochastic() -> None:
    assert stochastic_steps(SamplerConfig(name="flow_sde", steps=5), 0, 0) == [0, 1, 2, 3]


@pytest.mark.parametrize("config", [SamplerConfig(name="ode"), SamplerConfig(name="flow_sde", noise_level=0.0)])
def test_deterministic_samplers_have_no_stochastic_step(config: SamplerConfig) -> None:
    assert stochastic_steps(config, 0, 0) == []


@given(st.integers(2, 30), st.data())
def test_a_window_is_contiguous_and_stays_in_its_bounds(steps: int, data: st.DataObject) -> None:
    hi = data.draw(st.integers(1, steps))
    lo = data.draw(st.integers(0, hi - 1))
    size = data.draw(st.integers(1, hi - lo))
    config = SamplerConfig(name="flow_sde", steps=steps, window=WindowConfig(size=size, lo=lo, hi=hi))
    picked = stochastic_steps(config, data.draw(st.integers(0, 10)), data.draw(st.integers(0, 10**6)))
    assert picked == list(range(picked[0], picked[0] + size))
    assert lo <= picked[0]
    assert picked[-1] < hi


def test_windows_differ_between_groups_and_cover_every_start() -> None:
    config = SamplerConfig(name="flow_sde", steps=6, window=WindowConfig(size=2))
    starts = [stochastic_steps(config, 3, group)[0] for group in range(60)]
    assert set(starts) == {0, 1, 2, 3}
    assert starts == [stochastic_steps(config, 3, group)[0] for group in range(60)]
    assert starts != [stochastic_steps(config, 4, group)[0] for group in range(60)]


def test_cps_refuses_a_window_over_its_deterministic_last_step() -> None:
    config = SamplerConfig(name="cps", steps=4, window=WindowConfig(size=2, hi=4))
    with pytest.raises(ConfigError, match=r"sampler\.window\.hi"):
        stochastic_steps(config, 0, 0)

"""Transition kernels against the closed forms and identities of their methods (float64 coefficients)."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from contracts.config.rollout import SamplerConfig
from contracts.errors import ConfigError
from policy.samplers.base import Coefficients, Sampler, build_sampler
from policy.schedule import sigmas

SDES = ("flow_sde", "dance_sde", "cps")


def kernel(name: str, noise_level: float = 0.7, **more: object) -> Sampler:
    return build_sampler(SamplerConfig.model_validate({"name": name, "noise_level": noise_level, **more}))


def coefficients(sampler: Sampler, s: float, s_next: float, s_max: float = 0.9) -> Coefficients:
    return sampler.coefficients(*(torch.tensor([value], dtype=torch.float64) for value in (s, s_next, s_max)))


def latents(seed: int = 0, n: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x, v, z = torch.randn(3, n, 3, 4, 4, generator=generator)
    return x, v, z


@pytest.mark.parametrize("s", [1.0, 0.9999999])
def test_flow_sde_at_s_1_is_clamped_to_the_second_level(s: float) -> None:
    a, s_next = 0.7, 0.8
    row = coefficients(kernel("flow_sde", a), s, s_next, s_max=s_next)
    assert row.std.item() == pytest.approx(a, rel=1e-6)
    assert row.c_x.item() == pytest.approx(1 - a * a / 2, rel=1e-6)
    assert row.c_v.item() == pytest.approx(s_next - 1, abs=1e-6)


def test_flow_sde_of_one_step() -> None:
    assert coefficients(kernel("flow_sde", 0.7), 1.0, 0.0, s_max=0.0).std.item() == pytest.approx(0.7)


@given(st.floats(0.05, 0.99), st.floats(0.01, 0.99), st.floats(0.05, 1.5))
def test_reverse_sdes_equal_their_score_form(s: float, share: float, level: float) -> None:
    s_next, x, v = s * share, 0.3, -1.7
    ds, score = s_next - s, -(x + (1 - s) * v) / s
    for name, sd in (("flow_sde", level * math.sqrt(s / (1 - s))), ("dance_sde", level)):
        row = coefficients(kernel(name, level), s, s_next)
        mean = x + (v - 0.5 * sd * sd * score) * ds
        assert (row.c_x * x + row.c_v * v).item() == pytest.approx(mean, rel=1e-9, abs=1e-9)
        assert row.std.item() == pytest.approx(sd * math.sqrt(-ds), rel=1e-9)


@pytest.mark.parametrize("s", [0.2, 0.6, 0.95])
def test_dance_sde_with_flow_sdes_coefficient_is_flow_sde(s: float) -> None:
    a = 0.7
    flow = coefficients(kernel("flow_sde", a), s, s - 0.1)
    dance = coefficients(kernel("dance_sde", a * math.sqrt(s / (1 - s))), s, s - 0.1)
    for one, other in zip((flow.c_x, flow.c_v, flow.std), (dance.c_x, dance.c_v, dance.std), strict=True):
        assert one.item() == pytest.approx(other.item(), abs=1e-14)


@given(st.floats(0.05, 1.0), st.floats(0.01, 0.99), st.floats(0.0, 1.0))
def test_cps_keeps_the_coefficient_of_the_image_and_the_total_noise(s: float, share: float, a: float) -> None:
    s_next = s * share
    row = coefficients(kernel("cps", a), s, s_next)
    # mean = A x0hat + B ehat, with x0hat = x - s v and ehat = x + (1-s) v: c_x = A + B, c_v = B (1-s) - A s.
    image = row.c_x * (1 - s) - row.c_v
    noise = row.c_x * s + row.c_v
    assert image.item() == pytest.approx(1 - s_next, abs=1e-12)
    assert math.hypot(noise.item(), row.std.item()) == pytest.approx(s_next, abs=1e-12)


@pytest.mark.parametrize("name", SDES)
def test_without_noise_every_kernel_is_the_ode(name: str) -> None:
    x, v, z = latents()
    quiet = kernel(name, 0.0).step(x, v, 0.8, 0.6, noise=z)
    assert quiet.log_prob_sum is None
    torch.testing.assert_close(quiet.next, kernel("ode").step(x, v, 0.8, 0.6).next, atol=1e-6, rtol=0)


def test_ode_equals_diffusers_euler_step() -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(sigmas=np.linspace(1, 0, 6)[:-1].tolist())
    levels = sigmas(5, 3.0)
    x, v, _ = latents()
    ours = theirs = x
    for k in range(5):
        ours = kernel("ode").step(ours, v, float(levels[k]), float(levels[k + 1])).next
        theirs = scheduler.step(v, scheduler.timesteps[k], theirs, return_dict=False)[0]
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", SDES)
def test_log_prob_is_the_gaussian_density_summed_over_dimensions(name: str) -> None:
    x, v, z = latents()
    result = kernel(name).step(x, v, 0.8, 0.6, noise=z)
    expected = torch.distributions.Normal(result.mean.double(), result.std.double()).log_prob(result.next.double())
    assert result.dims == 48
    assert result.log_prob_sum is not None
    torch.testing.assert_close(result.log_prob_sum.double(), expected.flatten(1).sum(1), rtol=1e-6, atol=1e-4)


@pytest.mark.parametrize("name", SDES)
def test_log_prob_at_the_mean(name: str) -> None:
    x, v, z = latents()
    mean = kernel(name).step(x, v, 0.8, 0.6, noise=z).mean
    result = kernel(name).step(x, v, 0.8, 0.6, next=mean)
    expected = 48 * (-result.std.flatten().log() - 0.5 * math.log(2 * math.pi))
    torch.testing.assert_close(result.log_prob_sum, expected)


def test_published_cps_log_ratio_is_2_s_squared_times_the_gaussian_one() -> None:
    x, v, z = latents()
    other_v = v + 0.01 * z.flip(0)
    ratios = {}
    for density in ("gaussian", "published"):
        sampler = kernel("cps", 0.8, density=density)
        old = sampler.step(x, v, 0.8, 0.6, noise=z)
        new = sampler.step(x, other_v, 0.8, 0.6, next=old.next)
        assert new.log_prob_sum is not None
        assert old.log_prob_sum is not None
        ratios[density] = (new.log_prob_sum - old.log_prob_sum).double()
        variance = 2 * old.std.flatten().double() ** 2
    torch.testing.assert_close(ratios["published"] / ratios["gaussian"], variance, rtol=2e-3, atol=0)


def test_the_last_cps_step_is_deterministic_and_gives_the_clean_estimate() -> None:
    x, v, z = latents()
    result = kernel("cps", 0.8).step(x, v, 0.3, 0.0, noise=z)
    assert result.log_prob_sum is None
    torch.testing.assert_close(result.next, x - 0.3 * v)


def test_cps_refuses_angles_beyond_a_right_one() -> None:
    with pytest.raises(ConfigError, match=r"sampler\.noise_level"):
        kernel("cps", 1.2)


# Final variance over the data's for x0 ~ N(0, 0.25) with the exact velocity, linear schedule, last step ODE.
TOY = {
    ("flow_sde", 0.7): {10: 0.920, 40: 0.990, 1000: 1.004},
    ("dance_sde", 0.3): {10: 0.775, 40: 0.939, 1000: 0.998},
    ("cps", 0.8): {10: 0.495, 40: 0.596, 1000: 0.649},
    ("ode", 0.0): {10: 0.742, 40: 0.929, 1000: 0.997},
}


@pytest.mark.parametrize(("name", "level", "steps"), [(*key, steps) for key, row in TOY.items() for steps in row])
def test_variance_of_the_gaussian_toy(name: str, level: float, steps: int) -> None:
    data, variance = 0.25, 1.0
    levels = np.linspace(1, 0, steps + 1)
    for k in range(steps):
        s = levels[k]
        last = k == steps - 1
        row = coefficients(kernel("ode" if last else name, level), s, levels[k + 1], s_max=levels[1])
        slope = (s - (1 - s) * data) / ((1 - s) ** 2 * data + s * s)  # E[eps - x0 | x] = slope * x
        variance = (row.c_x + row.c_v * slope).item() ** 2 * variance + row.std.item() ** 2
    assert variance / data == pytest.approx(TOY[name, level][steps], abs=2e-3)


@settings(deadline=None, max_examples=40)
@given(
    st.sampled_from(SDES), st.floats(0.1, 1.0), st.floats(0.05, 0.95), st.integers(1, 5),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)  # fmt: skip
def test_replay_of_a_sampled_step_is_bit_equal(name: str, s: float, share: float, n: int, dtype: torch.dtype) -> None:
    x, v, z = latents(n, n)
    sampled = kernel(name).step(x, v, s, s * share, noise=z, storage_dtype=dtype)
    stored = sampled.next.to(dtype)
    rows = torch.full((n,), s, dtype=torch.float64), torch.full((n,), s * share, dtype=torch.float64)
    replayed = kernel(name).step(x, v, *rows, next=stored, s_max=s * share)
    assert torch.equal(sampled.next, stored.float())
    assert torch.equal(sampled.mean, replayed.mean)
    assert sampled.log_prob_sum is not None
    assert replayed.log_prob_sum is not None
    assert torch.equal(sampled.log_prob_sum, replayed.log_prob_sum)


def test_gradient_of_the_log_prob_flows_through_the_velocity_alone() -> None:
    x, v, z = (tensor.requires_grad_() for tensor in latents())
    following = kernel("flow_sde").step(x, v, 0.8, 0.6, noise=z.detach()).next
    result = kernel("flow_sde").step(x, v, 0.8, 0.6, next=following)
    assert result.log_prob_sum is not None
    result.log_prob_sum.sum().backward()
    c_v = coefficients(kernel("flow_sde"), 0.8, 0.6).c_v.item()
    expected = (following - result.mean) / result.std**2 * c_v
    assert v.grad is not None
    torch.testing.assert_close(v.grad, expected.detach(), rtol=1e-4, atol=1e-4)
    assert x.grad is None


@pytest.mark.parametrize("name", SDES)
def test_a_stochastic_step_wants_exactly_one_of_noise_and_next(name: str) -> None:
    x, v, z = latents()
    for wrong in ({}, {"noise": z, "next": z}):
        with pytest.raises(ValueError, match="exactly one"):
            kernel(name).step(x, v, 0.8, 0.6, **wrong)
    with pytest.raises(ValueError, match="deterministic"):
        kernel("ode").step(x, v, 0.8, 0.6, noise=z)

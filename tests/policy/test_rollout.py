"""The sampling loop, against the diffusers pipeline and its own independence of batches; sampling with gradient."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from contracts.config.rollout import SamplerConfig
from policy import schedule
from policy.policy import Policy
from policy.rollout import Previous, extrapolated, paint, paint_with_gradient, seeded_noise
from policy.types import EmbeddingBatch, Trajectory

Load = Callable[..., Policy]


def batch(policy: Policy, text: str, n: int) -> EmbeddingBatch:
    return EmbeddingBatch.stack([policy.encode_prompt(text)] * n, policy.device, policy.dtype)


def test_ode_images_equal_the_pipelines(load_policy: Load, tiny_model_folder: Path) -> None:
    from diffusers import StableDiffusion3Pipeline

    policy = load_policy(trainable=False)
    config = SamplerConfig(name="ode", steps=5, shift=3.0, guidance_scale=2.5)
    painted = paint(
        policy, batch(policy, "a red circle", 2), batch(policy, "", 2), config, [], [7, 8], [[], []], record=False
    )
    pipeline = StableDiffusion3Pipeline.from_pretrained(tiny_model_folder)
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(
        "a red circle", guidance_scale=2.5, sigmas=np.linspace(1, 0, 6)[:-1].tolist(), num_images_per_prompt=2,
        latents=seeded_noise([7, 8], policy), max_sequence_length=12, output_type="np", num_inference_steps=5,
    ).images  # fmt: skip
    ours = policy.decode(painted.clean)
    assert np.abs(ours.astype(int) - (images * 255).round().astype(int)).max() <= 1


@pytest.mark.parametrize("name", ["flow_sde", "dance_sde", "cps"])
def test_a_sample_does_not_depend_on_its_batch(load_policy: Load, name: str) -> None:
    policy = load_policy(trainable=False)
    config = SamplerConfig(name=name, steps=5)
    steps = schedule.stochastic_steps(config, 0, 0)
    step_seeds = [[10 * i + k for k in steps] for i in range(3)]

    def run(rows: list[int]) -> Tensor:
        cond = batch(policy, "a red circle", len(rows))
        seeds = [step_seeds[i] for i in rows]
        return paint(policy, cond, None, config, steps, rows, seeds, record=True).clean

    together = run([0, 1, 2])
    torch.testing.assert_close(together[[2]], run([2]), atol=1e-5, rtol=0)
    torch.testing.assert_close(together[[1, 0]], run([1, 0]), atol=1e-5, rtol=0)
    assert not torch.allclose(together[0], together[1], atol=1e-2)


def test_what_is_recorded(load_policy: Load) -> None:
    policy = load_policy(trainable=False)
    config = SamplerConfig(name="flow_sde", steps=5)
    steps = [1, 2]
    seeds = [[1, 2], [3, 4]]
    cond = batch(policy, "a red circle", 2)
    trajectory = paint(
        policy, cond, None, config, steps, [0, 1], seeds, storage_dtype=torch.bfloat16, record=True, record_means=True
    )
    assert trajectory.states is not None
    assert trajectory.means is not None
    assert trajectory.log_prob_sum is not None
    assert trajectory.states.shape == (2, 3, *policy.latent_shape)
    assert trajectory.states.dtype == torch.bfloat16
    assert trajectory.means.shape == (2, 2, *policy.latent_shape)
    assert trajectory.log_prob_sum.shape == (2, 2)
    assert trajectory.clean.dtype == torch.float32
    # The next state is the mean plus the noise of its seed, rounded as it is stored.
    std = 0.7 * (float(schedule.sigmas(5, 3.0)[1]) / (1 - float(schedule.sigmas(5, 3.0)[1]))) ** 0.5
    std *= float(schedule.sigmas(5, 3.0)[1] - schedule.sigmas(5, 3.0)[2]) ** 0.5
    expected = trajectory.means[:, 0] + std * seeded_noise([1, 3], policy)
    torch.testing.assert_close(trajectory.states[:, 1].float(), expected, atol=2e-2, rtol=1e-2)
    unrecorded = paint(policy, cond, None, config, steps, [0, 1], seeds, storage_dtype=torch.bfloat16, record=False)
    assert torch.equal(unrecorded.clean, trajectory.clean)
    assert unrecorded.states is None


@pytest.mark.parametrize("storage", [torch.float32, torch.bfloat16])
def test_a_preview_is_the_jump_from_what_a_step_led_to_and_the_last_one_is_the_image(
    load_policy: Load, storage: torch.dtype
) -> None:
    policy = load_policy(trainable=False)
    config = SamplerConfig(name="flow_sde", steps=5, guidance_scale=2.0, window={"size": 3, "lo": 0, "hi": 4})
    steps, seeds = [1, 2, 3], [[1, 2, 3], [4, 5, 6]]
    cond, uncond = batch(policy, "a red circle", 2), batch(policy, "", 2)

    def painted(*preview_steps: int) -> Trajectory:
        return paint(
            policy, cond, uncond, config, steps, [0, 1], seeds, storage_dtype=storage, record=True,
            preview_steps=preview_steps,
        )  # fmt: skip

    found, plain = painted(0, 1, 2, 3, 4), painted()
    assert plain.previews is None
    assert torch.equal(plain.clean, found.clean), "previews change nothing"
    assert torch.equal(plain.states, found.states)
    levels = torch.from_numpy(schedule.sigmas(5, 3.0))
    for k in range(4):  # states[:, k] is x before step 1 + k, which step k led to
        x, s = found.states[:, k].float(), levels[k + 1]
        jump = x - s * policy.velocity(x, s.expand(2), cond, uncond, 2.0)
        torch.testing.assert_close(found.previews[:, k], jump, atol=1e-5, rtol=1e-5)
    assert torch.equal(found.previews[:, 4], found.clean)
    assert torch.equal(found.previews[:, 3], found.clean), "after it Euler's step to s = 0 is the jump itself"
    assert not torch.allclose(found.previews[:, 2], found.clean, atol=1e-2)
    assert torch.equal(painted(1, 4).previews, found.previews[:, [1, 4]])


def test_a_deterministic_sampling_has_previews_too(load_policy: Load) -> None:
    policy = load_policy(trainable=False)
    config = SamplerConfig(name="ode", steps=3, order=2)
    cond = batch(policy, "a red circle", 2)
    trajectory = paint(policy, cond, None, config, [], [0, 1], [[], []], record=False, preview_steps=[1, 2])
    assert trajectory.previews.shape == (2, 2, *policy.latent_shape)
    assert torch.equal(trajectory.previews[:, 1], trajectory.clean)
    assert torch.equal(trajectory.previews[:, 0], trajectory.clean), "the last step is Euler's at any order"


def test_noise_is_a_function_of_the_seed(load_policy: Load) -> None:
    policy = load_policy(trainable=False)
    noise = seeded_noise(list(range(60)), policy)
    assert torch.equal(noise[[7]], seeded_noise([7], policy))
    assert abs(noise.mean().item()) < 0.01
    assert abs(noise.std().item() - 1) < 0.01
    assert np.abs(np.corrcoef(noise.flatten(1).numpy()) - np.eye(60)).max() < 0.1


GRADIENT = SamplerConfig(name="ode", steps=3, shift=2.0, guidance_scale=2.0)


def gradients(policy: Policy, truncation: int, checkpoint: bool) -> dict[str, Tensor]:
    policy.module.zero_grad()
    cond, uncond = batch(policy, "a red circle", 2), batch(policy, "", 2)
    clean = paint_with_gradient(policy, cond, uncond, GRADIENT, [0, 1], truncation, checkpoint)
    (clean**2).sum().backward()
    return {name: p.grad.clone() for name, p in policy.trainable().items() if p.grad is not None}


def test_sampling_with_gradient_paints_what_sampling_paints(load_policy: Load) -> None:
    policy = load_policy()
    cond, uncond = batch(policy, "a red circle", 2), batch(policy, "", 2)
    painted = paint(policy, cond, uncond, GRADIENT, [], [0, 1], [[], []], record=False).clean
    for truncation in (0, 2):
        assert torch.equal(paint_with_gradient(policy, cond, uncond, GRADIENT, [0, 1], truncation, True), painted)


@pytest.mark.parametrize("truncation", [0, 1, 2])
def test_checkpointing_changes_no_gradient(load_policy: Load, truncation: int) -> None:
    policy = load_policy()
    plain, recomputed = gradients(policy, truncation, False), gradients(policy, truncation, True)
    assert plain.keys() == recomputed.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(recomputed[name], gradient, rtol=1e-5, atol=1e-6)


def test_gradient_of_the_whole_sampling_equals_finite_differences(load_policy: Load) -> None:
    policy = load_policy()
    policy.module.double()
    policy.dtype = torch.float64
    cond, uncond = batch(policy, "a red circle", 1), batch(policy, "", 1)
    weight = policy.trainable()["proj_out.weight"]

    def loss() -> Tensor:
        return (paint_with_gradient(policy, cond, uncond, GRADIENT, [0], 0, False) ** 2).sum()

    loss().backward()
    assert weight.grad is not None
    direction = torch.randn_like(weight, generator=torch.Generator().manual_seed(0))
    expected, h = (weight.grad * direction).sum().item(), 1e-3
    with torch.no_grad():
        weight.add_(direction, alpha=h)
        up = loss().item()
        weight.sub_(direction, alpha=2 * h)
        down = loss().item()
    assert (up - down) / (2 * h) == pytest.approx(expected, rel=1e-3)


class ScalarPolicy:
    """v = w x: the chain through T=3 steps is known in closed form. Stands in for a Policy."""

    latent_shape, device, dtype = (1, 1, 1), torch.device("cpu"), torch.float32

    def __init__(self, w: float) -> None:
        self.w = torch.tensor(w, requires_grad=True)

    def velocity(self, x: Tensor, s: Tensor, *_: object, **__: object) -> Tensor:
        return self.w * x


@pytest.mark.parametrize("truncation", [0, 1, 2])
def test_steps_before_the_truncation_contribute_exactly_nothing(truncation: int) -> None:
    w = 0.3
    policy = ScalarPolicy(w)
    config = SamplerConfig(name="ode", steps=3, shift=1.0)
    empty = EmbeddingBatch(torch.zeros(1, 1, 1), torch.zeros(1, 1))
    clean = paint_with_gradient(policy, empty, None, config, [4], truncation, False)  # type: ignore[arg-type]
    clean.sum().backward()
    x0 = seeded_noise([4], policy).item()  # type: ignore[arg-type]
    factor = 1 - w / 3  # every step multiplies x by it
    expected = (3 - truncation) * (-1 / 3) * factor**2 * x0
    assert clean.item() == pytest.approx(factor**3 * x0, rel=1e-5)
    assert policy.w.grad is not None
    assert policy.w.grad.item() == pytest.approx(expected, rel=1e-4)


# -- order


def test_extrapolation_is_exact_for_velocities_linear_in_time_over_uneven_steps() -> None:
    """x' = 3 - 2 s integrates to 3 s - s^2; the first step, Euler's, is replaced by the exact one."""
    levels = schedule.sigmas(6, 3.0).astype(float)

    def exact(s: float) -> float:
        return 3 * s - s * s

    def slope(s: float) -> Tensor:
        return torch.tensor([3 - 2 * s], dtype=torch.float64)

    x, previous = exact(levels[1]), Previous(slope(levels[0]), levels[1] - levels[0])
    for s, s_next in pairwise(levels[1:]):
        x += (s_next - s) * float(extrapolated(slope(s), s_next - s, previous))
        assert x == pytest.approx(exact(s_next), abs=1e-12)
        previous = Previous(slope(s), s_next - s)


def test_a_first_step_is_eulers() -> None:
    v = torch.ones(2)
    assert extrapolated(v, -0.1, None) is v


@pytest.mark.parametrize("gradient", [False, True])
def test_second_order_steps_come_nearer_to_the_ode_than_eulers(load_policy: Load, gradient: bool) -> None:
    policy = load_policy(trainable=gradient)
    cond = batch(policy, "a red circle", 2)

    def painted(steps: int, order: int) -> Tensor:
        config = SamplerConfig(name="ode", steps=steps, order=order)
        if gradient:
            return paint_with_gradient(policy, cond, None, config, [7, 8], 0, False).detach()
        return paint(policy, cond, None, config, [], [7, 8], [[], []], record=False).clean

    exact = painted(96, 2)
    euler, second = (float((painted(8, order) - exact).norm()) for order in (1, 2))
    assert second < 0.7 * euler  # the last step, to s=0, is Euler's in both


def test_order_leaves_stochastic_steps_alone(load_policy: Load) -> None:
    policy = load_policy(trainable=False)
    cond, seeds = batch(policy, "a red circle", 2), [[1, 2, 3], [4, 5, 6]]
    runs = [
        paint(policy, cond, None, SamplerConfig(steps=4, order=order), [0, 1, 2], [7, 8], seeds, record=True)
        for order in (1, 2)
    ]
    assert torch.equal(runs[0].states, runs[1].states)
    assert torch.equal(runs[0].clean, runs[1].clean)

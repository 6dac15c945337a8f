"""What the tests of objectives share: a toy policy with the real kernels, painted micro-batches, gradients by name.

The toy is float64-free and tiny, but sampling and replay are policy/'s own. Does not own: any assertion.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from contracts.config.rollout import SamplerConfig
from contracts.wire import GroupHeader, PromptSpec, Row
from learner.objectives.base import ModelHandle, Objective, ObjectiveContext
from learner.plan import noise_key
from learner.types import Credit, MicroBatch, StepJob
from policy import schedule
from policy.rollout import paint
from policy.types import EmbeddingBatch

SHAPE = (2, 4, 4)
WIDTH = 8
SAMPLER = SamplerConfig(name="flow_sde", steps=5, shift=2.0, noise_level=0.7)


class ToyNet(nn.Module):
    """A network with SD3's calling convention: two linear layers over channels, told the level and the prompt."""

    def __init__(self, channels: int = SHAPE[0], pooled: int = 3) -> None:
        super().__init__()
        self.inward = nn.Linear(channels, WIDTH)
        self.prompt = nn.Linear(pooled, WIDTH)
        self.level = nn.Linear(1, WIDTH)
        self.norm_out = nn.Identity()
        self.outward = nn.Linear(WIDTH, channels)

    def forward(self, hidden_states: Tensor, timestep: Tensor, pooled_projections: Tensor, **_: Any) -> tuple[Tensor]:
        tokens = hidden_states.flatten(2).transpose(1, 2)
        told = self.prompt(pooled_projections) + self.level(timestep[:, None] / 1000)
        hidden = self.norm_out(torch.tanh(self.inward(tokens) + told[:, None]))
        return (self.outward(hidden).transpose(1, 2).reshape(hidden_states.shape),)


@dataclass
class ToyPolicy:
    """The part of policy.Policy that objectives and the rollout use."""

    module: nn.Module
    latent_shape: tuple[int, int, int] = SHAPE
    device: torch.device = torch.device("cpu")
    feature_dim: int = WIDTH
    family: Any = field(default_factory=lambda: SimpleNamespace(feature_layer=lambda network: network.norm_out))

    def velocity(
        self, x: Tensor, s: Tensor, cond: Any, uncond: Any = None, guidance_scale: float = 1.0, *, module: Any = None
    ) -> Tensor:
        module = module or self.module
        if guidance_scale == 1.0:
            return self._call(module, x, s, cond)
        both = self._call(module, torch.cat([x, x]), torch.cat([s, s]), cond.join(uncond))
        v_cond, v_uncond = both.chunk(2)
        return v_uncond + guidance_scale * (v_cond - v_uncond)

    def _call(self, module: Any, x: Tensor, s: Tensor, cond: Any) -> Tensor:
        return module(
            hidden_states=x, timestep=s * 1000, encoder_hidden_states=cond.text, pooled_projections=cond.pooled,
            return_dict=False,
        )[0]  # fmt: skip


def toy_policy(seed: int = 0) -> ToyPolicy:
    torch.manual_seed(seed)
    return ToyPolicy(ToyNet())


def context(policy: Any, sampler: SamplerConfig = SAMPLER, **more: Any) -> ObjectiveContext:
    return ObjectiveContext(policy, sampler, run_seed=7, latent_shape=policy.latent_shape, **more)


def embeddings(num: int, seed: int = 0, text: tuple[int, int] = (1, 1), pooled: int = 3) -> EmbeddingBatch:
    generator = torch.Generator().manual_seed(seed)
    return EmbeddingBatch(
        torch.randn(num, *text, generator=generator), torch.randn(num, pooled, generator=generator)
    )  # fmt: skip


def painted(
    policy: Any, num: int = 4, sampler: SamplerConfig = SAMPLER, cond: EmbeddingBatch | None = None, **fields: Any
) -> MicroBatch:
    """A micro-batch of one group, painted by the policy as it is; advantages 1, -1, 1, ... unless given."""
    cond = cond or embeddings(1).repeat_rows(num)
    uncond = (
        embeddings(num, 1, tuple(cond.text.shape[1:]), cond.pooled.shape[1]) if sampler.guidance_scale != 1 else None
    )
    steps = schedule.stochastic_steps(sampler, 7, 0)
    trajectory = paint(
        policy, cond, uncond, sampler, steps, list(range(num)), [[100 * i + k for k in steps] for i in range(num)],
        record=True, record_means=True,
    )  # fmt: skip
    batch = MicroBatch(
        cond=cond, uncond=uncond, guidance_scale=sampler.guidance_scale, weight=torch.ones(num),
        advantage=torch.tensor([1.0, -1.0] * num)[:num], noise_keys=tuple(noise_key(0, i) for i in range(num)), step=3,
        sigmas=torch.from_numpy(schedule.sigmas(sampler.steps, sampler.shift)), step_indices=tuple(steps),
        staleness=torch.zeros(num, dtype=torch.long), clean=trajectory.clean, states=trajectory.states,
        log_prob_sum=trajectory.log_prob_sum, means=trajectory.means,
        rows=tuple(Row(group=0, sample=i, weight=1.0, noise_key=noise_key(0, i)) for i in range(num)),
        prompts=(PromptSpec(text="a red circle"),) * num,
    )  # fmt: skip
    return replace(batch, **fields)


def part(batch: MicroBatch, rows: slice) -> MicroBatch:
    """Some rows of a micro-batch."""
    tensors = {
        name: value[rows]
        for name, value in vars(batch).items()
        if isinstance(value, Tensor | tuple | EmbeddingBatch) and name not in ("sigmas", "step_indices")
    }
    prepass = {name: value[rows] for name, value in batch.prepass.items()}
    return replace(batch, **tensors, prepass=prepass)


def job(version: int = 0, painted_by: int = 0) -> StepJob:
    header = GroupHeader(
        group_id=0, attempt=0, prompt=PromptSpec(text="x"), group_size=4, weight_version=painted_by, prompt_digest="d"
    )
    return StepJob(step=3, current_version=version, headers={0: header}, credit=Credit({}), plans=())


def with_prepass(
    objective: Objective[Any], model: ModelHandle, batch: MicroBatch, *snapshots: str | None
) -> MicroBatch:
    """The batch with the prepasses' outputs, all under the model as it is."""
    with torch.no_grad():
        for snapshot in snapshots:
            batch.prepass.update(objective.prepass(model, batch, snapshot))
    return batch


def batch_loss(objective: Objective[Any], model: ModelHandle, batch: MicroBatch, divisor: float = 1.0) -> Tensor:
    """Sum over passes as the rank takes it: sum / (divisor * num_passes)."""
    passes = objective.num_passes(batch)
    return sum(objective.loss(model, batch, p).loss for p in range(passes)) / (divisor * passes)  # type: ignore[return-value]


def gradient(loss: Tensor, module: nn.Module) -> Tensor:
    """The flat gradient of a scalar with respect to the module's parameters, zeros where it does not reach."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    grads = torch.autograd.grad(loss, parameters, allow_unused=True, retain_graph=True)
    return torch.cat([
        (torch.zeros_like(p) if g is None else g).flatten() for p, g in zip(parameters, grads, strict=True)
    ])  # fmt: skip


def nudge(module: nn.Module, size: float, seed: int = 1) -> None:
    """Move every parameter by `size` times a standard normal."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += size * torch.randn(parameter.shape, generator=generator)

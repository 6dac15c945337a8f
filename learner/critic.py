"""The critic of PPO: the value of a denoising state (x_t, t, prompt), in one module and one engine with the policy.

Two forms. `shared`: a small head on the policy's pooled hidden states of the conditional rows, an embedding of the
noise level and the pooled prompt embedding, computed in the policy's own forward; unless `trunk_gradient`, the value
loss does not reach the trunk. `separate`: a small convolutional network on (x_t, s, pooled prompt embedding) alone.

Every call goes through `PolicyWithCritic.forward`, hence through the engine's wrapper, so that partitioned weights
are gathered. Does not own: advantages (credit/gae.py), the loss (objectives/ppo.py).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from contracts.config.objectives import PPOConfig
from contracts.seeds import Stream, derive_seed
from learner.objectives.base import ModelHandle

if TYPE_CHECKING:
    from policy.policy import Policy
    from policy.types import EmbeddingBatch

LEVEL_FEATURES = 32
HIDDEN = 128
PREFIX = "critic."


def level_embedding(s: Tensor) -> Tensor:
    """Sines and cosines of s in [0,1] at octaves from pi/2 on, fp32 [N,LEVEL_FEATURES]."""
    octaves = torch.arange(LEVEL_FEATURES // 2, device=s.device, dtype=torch.float32)
    angles = s.float()[:, None] * (math.pi / 2) * 2 ** (octaves / 2)
    return torch.cat([angles.sin(), angles.cos()], dim=1)


class SharedHead(nn.Module):
    """Value from pooled hidden states [N,F], levels s [N] and pooled prompt embeddings [N,Dp].

    The prompt is given once more, as the mean over an image's tokens keeps little of it. The last layer starts at zero:
    V = 0 at first.
    """

    def __init__(self, feature_dim: int, pooled_dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(feature_dim)
        self.prompt = nn.Linear(pooled_dim, HIDDEN)
        self.hidden = nn.Linear(feature_dim + LEVEL_FEATURES + HIDDEN, HIDDEN)
        self.out = _zero_linear(HIDDEN)

    def forward(self, features: Tensor, s: Tensor, pooled: Tensor) -> Tensor:
        dtype = self.hidden.weight.dtype
        parts = [self.norm(features.to(dtype)), level_embedding(s).to(dtype), self.prompt(pooled.to(dtype))]
        return self.out(nn.functional.silu(self.hidden(torch.cat(parts, dim=1))))[:, 0].float()


class SeparateTrunk(nn.Module):
    """Value from x [N,C,h,w], levels s [N] and pooled prompt embeddings [N,Dp]."""

    def __init__(self, channels: int, pooled_dim: int, width: int = 32) -> None:
        super().__init__()
        self.convs = nn.Sequential(
            nn.Conv2d(channels, width, 3, 2, 1), nn.SiLU(), nn.Conv2d(width, 2 * width, 3, 2, 1), nn.SiLU(),
            nn.Conv2d(2 * width, 2 * width, 3, 2, 1), nn.SiLU(),
        )  # fmt: skip
        self.prompt = nn.Linear(pooled_dim, HIDDEN)
        self.hidden = nn.Linear(2 * width + LEVEL_FEATURES + HIDDEN, HIDDEN)
        self.out = _zero_linear(HIDDEN)

    def forward(self, x: Tensor, s: Tensor, pooled: Tensor) -> Tensor:
        dtype = self.hidden.weight.dtype
        seen = self.convs(x.to(dtype)).mean((2, 3))
        joined = torch.cat([seen, level_embedding(s).to(dtype), self.prompt(pooled.to(dtype))], dim=1)
        return self.out(nn.functional.silu(self.hidden(joined)))[:, 0].float()


class PolicyWithCritic(nn.Module):
    """The policy's bare network and a critic as one module for one engine.

    forward(**network arguments) is the network's. With `value_at` = (levels [N], pooled prompts [N,Dp]), the output is
    (velocity, values [N]) where the values belong to the first N rows of the forward (the conditional ones). With
    `value_of` = (x, s, pooled), the separate critic alone is called.
    """

    def __init__(self, network: nn.Module, feature_layer: nn.Module, critic: nn.Module, trunk_gradient: bool) -> None:
        super().__init__()
        self.network = network
        self.critic = critic
        self.trunk_gradient = trunk_gradient
        self._feature_layer = [feature_layer]  # in a list: already registered below `network`

    def forward(
        self,
        *args: Any,
        value_at: tuple[Tensor, Tensor] | None = None,
        value_of: tuple[Tensor, Tensor, Tensor] | None = None,
        **kwargs: Any,
    ) -> Any:
        if value_of is not None:
            return self.critic(*value_of)
        if value_at is None:
            return self.network(*args, **kwargs)
        caught: list[Tensor] = []
        handle = self._feature_layer[0].register_forward_hook(lambda _module, _inputs, output: caught.append(output))
        try:
            velocity = self.network(*args, **kwargs)[0]
        finally:
            handle.remove()
        features = caught[-1][: len(value_at[0])].float().mean(1)
        return velocity, self.critic(features if self.trunk_gradient else features.detach(), *value_at)

    def critic_parameters(self) -> dict[str, nn.Parameter]:
        """The critic's parameters by canonical name ("critic."...), sorted."""
        return {PREFIX + name: parameter for name, parameter in sorted(self.critic.named_parameters())}


def build_critic(policy: Policy, config: PPOConfig, run_seed: int, pooled_dim: int | None = None) -> PolicyWithCritic:
    """The joint module, with a critic initialised from the run seed alone (fp32, on the policy's device).

    pooled_dim: width of pooled prompt embeddings; None: as the policy's family has it.
    """
    width = pooled_dim or _pooled_dim(policy)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(run_seed, Stream.MODEL_INIT, 1))
        if config.trunk == "shared":
            critic: nn.Module = SharedHead(policy.feature_dim, width)
        else:
            critic = SeparateTrunk(policy.latent_shape[0], width)
    feature_layer = policy.family.feature_layer(policy.module)
    return PolicyWithCritic(policy.module, feature_layer, critic.to(policy.device), config.trunk_gradient)


class CriticHandle(ModelHandle):
    """The model as PPO sees it. module: the engine's wrapper of a PolicyWithCritic."""

    def __init__(self, policy: Policy, module: nn.Module, config: PPOConfig) -> None:
        super().__init__(policy, module)
        self.shared = config.trunk == "shared"

    def value(self, x: Tensor, s: Tensor, cond: EmbeddingBatch) -> Tensor:
        """fp32 [N]: values of states x [N,C,h,w] at levels s [N]; the conditional branch alone."""
        assert self.module is not None
        if not self.shared:
            return cast(Tensor, self.module(value_of=(x, s, cond.pooled)))
        tap = self.tap(s, cond)
        self.policy.velocity(x, s, cond, module=cast(nn.Module, tap))
        return tap.values

    def velocity_and_value(
        self,
        x: Tensor,
        s: Tensor,
        cond: EmbeddingBatch,
        uncond: EmbeddingBatch | None = None,
        guidance_scale: float = 1.0,
    ) -> tuple[Tensor, Tensor]:
        """Velocity [N,C,h,w] and values [N], from one forward when the trunk is shared."""
        if not self.shared:
            return self.velocity(x, s, cond, uncond, guidance_scale), self.value(x, s, cond)
        tap = self.tap(s, cond)
        return self.policy.velocity(x, s, cond, uncond, guidance_scale, module=cast(nn.Module, tap)), tap.values

    def tap(self, s: Tensor, cond: EmbeddingBatch) -> ValueTap:
        """A stand-in for the module in one forward of the policy that leaves the values of its states behind."""
        assert self.module is not None
        return ValueTap(self.module, (s, cond.pooled))


class ValueTap:
    """Calls the joint module as the network is called, and keeps the values it also returns."""

    values: Tensor

    def __init__(self, module: nn.Module, value_at: tuple[Tensor, Tensor]) -> None:
        self._module, self._value_at = module, value_at

    def __call__(self, *args: Any, **kwargs: Any) -> tuple[Tensor]:
        velocity, self.values = self._module(*args, value_at=self._value_at, **kwargs)
        return (velocity,)


def split_state(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(the policy's, the critic's) of a joint state by canonical name: actors are sent the first alone."""
    return (
        {name: tensor for name, tensor in tensors.items() if not name.startswith(PREFIX)},
        {name: tensor for name, tensor in tensors.items() if name.startswith(PREFIX)},
    )


def _pooled_dim(policy: Policy) -> int:
    return len(policy.family.dummy_embedding(torch.Generator().manual_seed(0), 1).pooled)


def _zero_linear(width: int) -> nn.Linear:
    layer = nn.Linear(width, 1)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer

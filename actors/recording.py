"""What of a trajectory is recorded, decided once from the configuration and the objective's declaration."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from contracts.config import RunConfig
from contracts.errors import ConfigError
from contracts.needs import objective_needs
from policy import schedule


@dataclass(frozen=True)
class Recording:
    """states: latents and log-probs of the stochastic steps; means: their means; storage_dtype: of the states."""

    states: bool
    means: bool
    storage_dtype: torch.dtype


def decide_recording(config: RunConfig) -> Recording:
    """Raises ConfigError when the objective needs recorded steps and the sampler has none."""
    needs = objective_needs(config)
    states = needs.states
    if states and not schedule.stochastic_steps(config.sampler, config.seed, 0):
        raise ConfigError(
            "sampler", f"{config.objective.name} trains on stochastic steps, and this sampler has none",
            "take flow_sde, dance_sde or cps with noise_level > 0 and at least 2 steps",
        )  # fmt: skip
    dtype = torch.bfloat16 if config.rollout.storage_dtype == "bf16" else torch.float32
    return Recording(states, states and needs.means, dtype)

"""Noise levels of a sampling run and which of its steps are stochastic. numpy only.

Does not own: what a step does (samplers/).
"""

from __future__ import annotations

import numpy as np

from contracts.config.rollout import SamplerConfig
from contracts.errors import ConfigError
from contracts.registry import resolve
from contracts.seeds import Stream, derive_seed


def sigmas(steps: int, shift: float) -> np.ndarray:
    """float32 [steps+1]: s evenly from 1 to 0, then s -> shift*s / (1 + (shift-1)*s) (SD3, eq. 23)."""
    even = np.linspace(1.0, 0.0, steps + 1)
    return (shift * even / (1.0 + (shift - 1.0) * even)).astype(np.float32)


def stochastic_steps(config: SamplerConfig, run_seed: int, group_id: int) -> list[int]:
    """Indices of the group's stochastic steps, ascending and contiguous; all its samples share them.

    Without a window: every step but the last, which would leave noise in the image. With one: `window.size` steps
    whose start is drawn from the group's own seed. Empty for a deterministic sampler. Raises ConfigError for a window
    that takes in the last step of a kernel which is deterministic there.
    """
    give = resolve("sampler", config.name).declares
    if config.noise_level == 0 or not getattr(give, "log_probs", True):
        return []
    if config.window is None:
        return list(range(config.steps - 1))
    window = config.window
    hi = window.hi if window.hi is not None else config.steps - 1
    if hi == config.steps and config.name == "cps":
        raise ConfigError(
            "sampler.window.hi", "the last cps step is deterministic and has no density", f"at most {config.steps - 1}"
        )
    num_starts = hi - window.size - window.lo + 1
    start = window.lo + derive_seed(run_seed, Stream.WINDOW, group_id) % num_starts
    return list(range(start, start + window.size))

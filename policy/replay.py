"""Replay: the log-probs of recorded steps under the network as it is now, by the kernel that sampled them (law 1).

Does not own: ratios, clipping, losses (learner/objectives).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from contracts.config.rollout import SamplerConfig
from policy.policy import Policy
from policy.samplers.base import StepResult, build_sampler
from policy.types import EmbeddingBatch


def replay(
    policy: Policy,
    states: Tensor,
    step_indices: Sequence[int],
    sigmas: Tensor | np.ndarray,
    cond: EmbeddingBatch,
    uncond: EmbeddingBatch | None,
    config: SamplerConfig,
    ks: slice,
    module: nn.Module | None = None,
) -> StepResult:
    """Score the recorded steps `ks` (positions in step_indices) of N samples in one forward of N * len(ks) rows.

    states [N,K+1,C,h,w]; sigmas [T+1], on the CPU (a copy from a GPU would wait for it). Rows of the result are
    sample-major: row i * len(ks) + j is sample i at the j-th step of `ks`. Gradients flow when grad mode is on. With
    len(ks) = 1 the forward has the very shape it had in the rollout, which makes the ratio exactly 1 at zero updates.
    """
    levels = torch.as_tensor(sigmas).detach().to("cpu", torch.float32)
    picked = range(*ks.indices(len(step_indices)))
    num, steps = len(states), torch.tensor([step_indices[k] for k in picked])
    x = states[:, picked.start : picked.stop].flatten(0, 1).to(policy.device, torch.float32)
    following = states[:, picked.start + 1 : picked.stop + 1].flatten(0, 1).to(policy.device, torch.float32)
    s, s_next = levels[steps].repeat(num), levels[steps + 1].repeat(num)
    rows = cond.repeat_rows(len(picked)), uncond.repeat_rows(len(picked)) if uncond is not None else None
    s_device = s.to(policy.device, non_blocking=True)
    v = policy.velocity(x, s_device, *rows, config.guidance_scale, module=module)
    return build_sampler(config).step(x, v, s, s_next, next=following, s_max=float(levels[1]))

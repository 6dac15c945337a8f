"""bf16 products on fp32 weights (`model.autocast`), inside a network's own forward.

Owns the autocast. Does not own which dtype the weights have (policy.py), nor the kernels that go with it on a CPU
(cpu_kernels.py).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import nn

from policy.cpu_kernels import CpuKernels


def autocast_inside(network: nn.Module, device: torch.device, checkpointing: bool = False) -> None:
    """bf16 products within the network's own forward: DeepSpeed switches off an autocast that is entered outside it.

    With gradient checkpointing the CPU's own kernels stay: the recomputation runs outside the forward's mode.
    """
    forward = torch.autocast(device.type, torch.bfloat16)(network.forward)
    faster = device.type == "cpu" and not checkpointing
    network.forward = _with_cpu_kernels(forward) if faster else forward  # type: ignore[method-assign]


def _with_cpu_kernels(forward: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(forward)
    def run(*args: Any, **kwargs: Any) -> Any:
        with CpuKernels():
            return forward(*args, **kwargs)

    return run

"""The engine: one network, its AdamW, and the ranks that share both.

Owns the interface that learner/rank.py drives, the learning-rate schedule, and the layout that snapshots and states
rely on. An engine changes speed and memory only, never the result (law 3): `PlainEngine` and `DeepSpeedEngine` take
the same steps from the same gradients.

Life of one optimizer step, the same number of forwards on every rank:

    for each micro-batch and pass:  loss = f(engine.module(...)); engine.backward(loss)
    step = engine.step()            # average over ranks, clip, AdamW; nothing changes if a gradient is not finite

Gradients are *averaged* over ranks. A caller that wants "global sum over global count" therefore multiplies its local
sum by world_size / count.

A tensor is *live* (what the forward uses, compute dtype) or *master* (fp32, what AdamW steps). Under ZeRO-3 each rank
holds a flat piece of both; under every other engine all of it. Pieces are called local, whole tensors full.

Does not own: losses (learner/objectives), micro-batches (learner/batching.py), files (learner/state.py).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from contracts.config.learner import OptimizerConfig

TensorKind = Literal["param", "exp_avg", "exp_avg_sq"]
TENSOR_KINDS: tuple[TensorKind, ...] = ("param", "exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class ParamGroup:
    """Parameters that share a learning rate. named: canonical name -> parameter; lr_scale: over the configured lr."""

    name: str
    named: Mapping[str, nn.Parameter]
    lr_scale: float = 1.0


@dataclass(frozen=True)
class EngineStep:
    """What one optimizer step did. grad_norm: global L2 norm before clipping; lr of the first group.

    finite: False when the gradient was NaN or infinite on any rank; weights and optimizer are then as before.
    """

    grad_norm: float
    lr: float
    finite: bool


def lr_scale_at(step: int, config: OptimizerConfig) -> float:
    """Factor on the learning rate at the optimizer step with index `step` (from 0).

    Linear warm-up (step + 1) / warmup_steps, then constant, or cosine or linear from 1 to final_lr_scale at
    schedule_steps, where it stays.
    """
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return 1.0
    assert config.schedule_steps is not None
    length = max(config.schedule_steps - config.warmup_steps, 1)
    progress = min((step - config.warmup_steps) / length, 1.0)
    shape = 0.5 * (1 + math.cos(math.pi * progress)) if config.schedule == "cosine" else 1 - progress
    return config.final_lr_scale + (1 - config.final_lr_scale) * shape


def adamw(
    groups: Iterable[tuple[Iterable[Tensor], float]],
    config: OptimizerConfig,
    kind: type[torch.optim.AdamW] = torch.optim.AdamW,
) -> torch.optim.AdamW:
    """torch's AdamW (or a subclass) over (tensors, lr scale) groups."""
    return kind(
        [{"params": list(tensors), "lr": config.lr * scale, "lr_scale": scale} for tensors, scale in groups],
        lr=config.lr, betas=config.betas, eps=config.eps, weight_decay=config.weight_decay, foreach=True,
    )  # fmt: skip


def ensure_adam_state(optimizer: torch.optim.Optimizer) -> None:
    """Create AdamW's zero moments, which torch makes at the first step only."""
    for group in optimizer.param_groups:
        create_adam_state(optimizer, group["params"])


def create_adam_state(optimizer: torch.optim.Optimizer, tensors: Iterable[Tensor]) -> None:
    """Zero moments for those of `tensors` that have none."""
    for tensor in tensors:
        if not optimizer.state[tensor]:
            optimizer.state[tensor] = {
                "step": torch.tensor(0.0),
                "exp_avg": torch.zeros_like(tensor),
                "exp_avg_sq": torch.zeros_like(tensor),
            }


class Engine(ABC):
    """One network under training. `module` is what a forward calls.

    Methods marked *collective* must be called by every rank, in the same order.
    """

    module: nn.Module
    optimizer_steps: int

    def __init__(self, groups: Sequence[ParamGroup], config: OptimizerConfig, world_size: int) -> None:
        self.config, self.world_size, self.optimizer_steps = config, world_size, 0
        self._named = {name: param for group in groups for name, param in group.named.items()}
        if len(self._named) != sum(len(group.named) for group in groups):
            raise ValueError("two parameter groups hold parameters of the same name")
        if not self._named:
            raise ValueError("nothing to train: no parameter requires a gradient")
        self._shapes = {name: tuple(param.shape) for name, param in self._named.items()}
        self._dtypes = {name: param.dtype for name, param in self._named.items()}

    # -- training ------------------------------------------------------------------------------------------------

    @abstractmethod
    def backward(self, loss: Tensor) -> None:
        """Add the gradient of `loss` (a scalar) to what the next step takes. Collective under ZeRO-2 and 3."""

    @abstractmethod
    def step(self) -> EngineStep:
        """Average the gradients over ranks, clip, step, clear them. Collective."""

    @abstractmethod
    def zero_grad(self) -> None:
        """Forget the gradients of an unfinished update."""

    @property
    @abstractmethod
    def communicates_in_backward(self) -> bool:
        """Whether a rank that leaves an update half-way leaves the others waiting in a collective."""

    # -- canonical state -----------------------------------------------------------------------------------------

    def named_trainable(self) -> dict[str, nn.Parameter]:
        """Trained parameters by canonical name, in canonical order (groups in turn, each as its owner sorted it)."""
        return dict(self._named)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of the whole tensor, also where ranks hold pieces."""
        return self._shapes[name]

    def live_dtype(self, name: str) -> torch.dtype:
        """Compute dtype of a parameter: what actors hold."""
        return self._dtypes[name]

    @abstractmethod
    def full_tensor(self, name: str, kind: TensorKind) -> Tensor:
        """The whole fp32 tensor: master weights or a moment of AdamW (zeros before the first step). Collective."""

    @abstractmethod
    def load_full(self, name: str, kind: TensorKind, tensor: Tensor) -> None:
        """Replace it, in live and master weights alike. Every rank passes the same whole tensor."""

    def set_optimizer_steps(self, steps: int) -> None:
        """Set the number of steps taken, for bias correction and the schedule."""
        self.optimizer_steps = steps
        ensure_adam_state(self._adamw())
        for state in self._adamw().state.values():
            state["step"].fill_(float(steps))

    @abstractmethod
    def _adamw(self) -> torch.optim.Optimizer: ...

    # -- pieces, for snapshots -----------------------------------------------------------------------------------

    def local_live(self, name: str) -> Tensor:
        """The tensor whose `.data` this rank's forward reads (under ZeRO-3: gathers from)."""
        return self._named[name]

    def full_live(self, name: str) -> Tensor:
        """The whole tensor that a forward uses now, in the compute dtype. Collective under ZeRO-3."""
        return self.local_to_full(name, self.local_live(name).detach())

    def local_master(self, name: str) -> Tensor:
        """fp32 masters of this rank's piece, as many as in `local_live`. Collective under ZeRO-1 and 2 in bf16."""
        return self._named[name]

    def local_to_full(self, name: str, local: Tensor) -> Tensor:
        """A whole tensor from the ranks' pieces. Collective under ZeRO-3."""
        return local.view(self._shapes[name])

    def full_to_local(self, name: str, full: Tensor) -> Tensor:
        """This rank's piece of a whole tensor."""
        return full

    def before_swap(self) -> None:  # noqa: B027  (most engines have nothing to do)
        """Called before `local_live` tensors get other data, and before they get their own back. Collective."""

    def after_swap(self) -> None:  # noqa: B027
        """Called after each of the two. Collective."""

    # -- shared --------------------------------------------------------------------------------------------------

    def _set_lr(self, optimizer: torch.optim.Optimizer) -> float:
        """Write the schedule's learning rates into the groups; returns the first."""
        scale = lr_scale_at(self.optimizer_steps, self.config)
        for group in optimizer.param_groups:
            group["lr"] = self.config.lr * group["lr_scale"] * scale
        return float(optimizer.param_groups[0]["lr"])

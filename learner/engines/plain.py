"""Plain torch: AdamW on every rank, gradients averaged by one all-reduce an optimizer step.

The gradients of an update accumulate locally and are averaged in `step`: what DistributedDataParallel does under
`no_sync`, without having to know which backward is the last, without a wrapper that objects to parameters a custom
loss left out, and with no rank left waiting when another runs out of memory in mid-update
(docs/decisions/0008-plain-ranks-average-once-a-step.md).

Weights in bf16 get fp32 masters, and their gradients are added up in fp32; weights in fp32 are their own masters.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from contracts.config.learner import OptimizerConfig
from learner.engines.base import Engine, EngineStep, ParamGroup, TensorKind, adamw, ensure_adam_state

_BUCKET_ELEMENTS = 32 * 2**20  # an all-reduce of 128 MB: large enough for bandwidth, small beside the model


class PlainEngine(Engine):
    """One process a rank, the whole model in each."""

    def __init__(
        self, module: nn.Module, groups: Sequence[ParamGroup], config: OptimizerConfig, world_size: int = 1
    ) -> None:
        super().__init__(groups, config, world_size)
        self.module = module
        self._params = list(self._named.values())
        self._masters = [p if p.dtype == torch.float32 else _fp32_copy(p) for p in self._params]
        self._by_name = dict(zip(self._named, self._masters, strict=True))
        self._low_precision = [(p, m) for p, m in zip(self._params, self._masters, strict=True) if p is not m]
        self._optimizer = adamw(
            [([self._by_name[name] for name in group.named], group.lr_scale) for group in groups if group.named], config
        )

    @property
    def communicates_in_backward(self) -> bool:
        return False

    def backward(self, loss: Tensor) -> None:
        loss.backward()  # type: ignore[no-untyped-call]
        for param, master in self._low_precision:
            if param.grad is not None:
                master.grad = param.grad.float() if master.grad is None else master.grad.add_(param.grad)
                param.grad = None

    def step(self) -> EngineStep:
        self._fill_missing_gradients()
        if self.world_size > 1:
            self._average_gradients()
        lr = self._set_lr(self._optimizer)
        norm = torch.nn.utils.get_total_norm(self._gradients())
        grad_norm = float(norm)
        finite = grad_norm < float("inf")
        if finite:
            self._clip(norm)
            self._optimizer.step()
            self._write_live()
            self.optimizer_steps += 1
        self.zero_grad()
        return EngineStep(grad_norm=grad_norm, lr=lr, finite=finite)

    def zero_grad(self) -> None:
        for param, master in zip(self._params, self._masters, strict=True):
            param.grad = master.grad = None

    def full_tensor(self, name: str, kind: TensorKind) -> Tensor:
        master = self._by_name[name]
        if kind == "param":
            return master.detach()
        return self._optimizer.state.get(master, {}).get(kind, torch.zeros_like(master))

    @torch.no_grad()
    def load_full(self, name: str, kind: TensorKind, tensor: Tensor) -> None:
        master = self._by_name[name]
        if kind == "param":
            master.copy_(tensor)
            self._named[name].copy_(tensor)
        else:
            ensure_adam_state(self._optimizer)
            self._optimizer.state[master][kind].copy_(tensor)

    def local_master(self, name: str) -> Tensor:
        return self._by_name[name]

    def _adamw(self) -> torch.optim.Optimizer:
        return self._optimizer

    def _clip(self, norm: Tensor) -> None:
        if self.config.clip_grad_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(self._masters, self.config.clip_grad_norm, norm)

    @torch.no_grad()
    def _write_live(self) -> None:
        for param, master in self._low_precision:
            param.copy_(master)

    def _gradients(self) -> list[Tensor]:
        return [master.grad for master in self._masters if master.grad is not None]

    def _fill_missing_gradients(self) -> None:
        """Zeros where this rank's losses did not reach: another's may have, and weight decay applies all the same."""
        for master in self._masters:
            if master.grad is None:
                master.grad = torch.zeros_like(master)

    @torch.no_grad()
    def _average_gradients(self) -> None:
        for bucket in _buckets(self._gradients()):
            flat = torch.cat([grad.reshape(-1) for grad in bucket])
            dist.all_reduce(flat)
            flat /= self.world_size
            pieces = flat.split([grad.numel() for grad in bucket])
            torch._foreach_copy_(bucket, [p.view_as(g) for p, g in zip(pieces, bucket, strict=True)])


def _fp32_copy(param: Tensor) -> nn.Parameter:
    return nn.Parameter(param.detach().float().clone())


def _buckets(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    """Tensors in order, in runs of at most _BUCKET_ELEMENTS (a larger tensor stands alone)."""
    buckets: list[list[Tensor]] = []
    room = 0
    for tensor in tensors:
        if tensor.numel() > room or not buckets:
            buckets.append([])
            room = _BUCKET_ELEMENTS
        buckets[-1].append(tensor)
        room -= tensor.numel()
    return buckets

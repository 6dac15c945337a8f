"""Named snapshots of the trained tensors (ref, old, ema): what they hold, how they move, how they stand in for them.

One mechanism for LoRA adapters and full weights: fp32 copies of the *trained* tensors alone, swapped in place under a
context manager and out again without a bit changed. Under ZeRO-3 each rank copies, averages and swaps its own pieces,
so nothing is gathered.

| name | holds                                            | moves                                        |
|------|--------------------------------------------------|----------------------------------------------|
| ref  | the weights the run started with                 | never                                        |
| old  | what painted (`paints_with: sampling`) or, with  | once a learner step, as the objective says   |
|      | decay 0, the weights at the end of the last step |                                              |
| ema  | an average for evaluation and export             | every `interval` optimizer steps             |

Decays from the method catalogue (ema-lora-ref): min((1+t)/(10+t), decay) for ema; the objective's for old (NFT:
piecewise, 0 up to `flat`, then (t - flat) * rate, at most `hold`). t counts optimizer steps and is part of the state.

Does not own: when a step ends (rank.py), files (state.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from contracts.config.learner import EmaConfig
from learner.engines.base import Engine

REF, OLD, EMA = "ref", "old", "ema"


def warmup_decay(step: int, decay: float) -> float:
    """min((1+t)/(10+t), decay): an average that follows quickly while it is young. Reaches 0.9 at t = 80."""
    return min((1 + step) / (10 + step), decay)


class Snapshots:
    """All snapshots of one rank, held as this rank's pieces of the trained tensors."""

    def __init__(self, engine: Engine, names: Iterable[str], ema: EmaConfig | None = None) -> None:
        """Every snapshot starts as a copy of the weights."""
        self._engine, self._ema = engine, ema
        self._tensors = list(engine.named_trainable())
        wanted = [*dict.fromkeys(names), *([EMA] if ema is not None else [])]
        self._held: dict[str, list[Tensor]] = {name: self._copies() for name in wanted}
        self._in_use: str | None = None

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._held)

    @contextmanager
    def use(self, name: str | None) -> Iterator[None]:
        """Within it the live weights are those of the snapshot; None: the current ones. No step may be taken in it.

        Raises KeyError for a snapshot that is not held. Collective under ZeRO-3.
        """
        if name is None:
            yield
            return
        held = self._held[name]
        assert self._in_use is None, f"snapshot {self._in_use!r} is in use already"
        live = [self._engine.local_live(tensor) for tensor in self._tensors]
        self._engine.before_swap()
        kept = [tensor.data for tensor in live]
        self._in_use = name
        try:
            for tensor, replacement in zip(live, held, strict=True):
                tensor.data = replacement.to(tensor.dtype)  # the very memory in fp32: nothing is copied
            self._engine.after_swap()
            yield
        finally:
            self._engine.before_swap()
            for tensor, own in zip(live, kept, strict=True):
                tensor.data = own
            self._engine.after_swap()
            self._in_use = None

    def after_update(self, optimizer_steps: int) -> None:
        """Move `ema`, after the optimizer step that made the count `optimizer_steps`."""
        if self._ema is not None and optimizer_steps % self._ema.interval == 0:
            self._move(EMA, warmup_decay(optimizer_steps - 1, self._ema.decay))

    def after_step(self, optimizer_steps: int, decay: Callable[[str, int], float | None]) -> None:
        """Move the others, once after a learner step's updates: decay(name, optimizer steps), None: it stays."""
        for name in self._held:
            if name != EMA:
                of_this = decay(name, optimizer_steps)
                if of_this is not None:
                    self._move(name, of_this)

    @torch.no_grad()
    def _move(self, name: str, decay: float) -> None:
        """snapshot = decay * snapshot + (1 - decay) * current."""
        assert self._in_use is None, "a snapshot cannot move while another stands in for the weights"
        current = [self._engine.local_master(tensor).detach().float() for tensor in self._tensors]
        if decay == 0:
            torch._foreach_copy_(self._held[name], current)
        else:
            torch._foreach_lerp_(self._held[name], current, 1 - decay)

    # -- canonical state -----------------------------------------------------------------------------------------

    def full_tensor(self, name: str, tensor: str) -> Tensor:
        """The whole fp32 tensor of a snapshot. Collective under ZeRO-3."""
        return self._engine.local_to_full(tensor, self._held[name][self._tensors.index(tensor)])

    @torch.no_grad()
    def load_full(self, name: str, tensor: str, full: Tensor) -> None:
        """Replace it. Every rank passes the same whole tensor."""
        target = self._held[name][self._tensors.index(tensor)]
        target.copy_(self._engine.full_to_local(tensor, full).view_as(target))

    @torch.no_grad()
    def reset(self, name: str) -> None:
        """Make a snapshot a copy of the current weights."""
        torch._foreach_copy_(self._held[name], self._copies())

    def _copies(self) -> list[Tensor]:
        return [
            self._engine.local_master(name).detach().float().clone().view_as(self._engine.local_live(name))
            for name in self._tensors
        ]

"""The contract of an objective: which no-grad passes it wants, how often it is differentiated, and its loss as a sum.

Life of a learner step, as learner/rank.py drives it:

    for snapshot in objective.prepasses(job):       # with that snapshot's weights; None: the weights as they are
        batch.prepass |= objective.prepass(model, batch, snapshot)        # once per micro-batch, no gradient
    for each update, micro-batch and p in range(objective.num_passes(batch)):
        backward(objective.loss(model, batch, p).loss / (global_weight * num_passes))
    metrics = objective.finish_metrics(sums / weights)                    # over all ranks, entries of weight 0 left out
    for each declared snapshot: objective.snapshot_decay(name, optimizer_steps)          # once, after the last update

Nothing here divides by a count of rows, so nothing depends on the number of ranks. Every model call goes through the
handle, because only the engine's wrapper gathers partitioned weights.
Does not own: engines and snapshots (learner/engines, learner/snapshots.py), loading rows (learner/batching.py).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar, cast

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from contracts.config import RunConfig
from contracts.config.base import Section
from contracts.config.objectives import CustomObjective
from contracts.config.rollout import SamplerConfig
from contracts.declarations import ObjectiveNeeds
from contracts.errors import ConfigError
from contracts.registry import resolve
from contracts.scores import ScoreTable
from learner.types import LossSum, MicroBatch, StepJob

if TYPE_CHECKING:
    from policy.policy import Policy
    from policy.types import EmbeddingBatch

ConfigT = TypeVar("ConfigT")

ScoreGradient = Callable[[Any, Any, Any], ScoreTable]
"""(images uint8 [N,H,W,3], prompts, metadata) -> a point table with gradients of its first column."""


@dataclass(frozen=True)
class ObjectiveContext:
    """What an objective knows of its run. latent_shape (C,h,w); dtype: compute dtype of the model."""

    policy: Policy
    sampler: SamplerConfig
    run_seed: int
    latent_shape: tuple[int, int, int]
    dtype: str = "fp32"
    score_gradient: ScoreGradient | None = None

    @property
    def dims(self) -> int:
        """D = C*h*w."""
        return math.prod(self.latent_shape)

    @classmethod
    def of_run(cls, config: RunConfig, policy: Policy, score_gradient: ScoreGradient | None = None) -> ObjectiveContext:
        return cls(policy, config.sampler, config.seed, policy.latent_shape, config.model.arithmetic, score_gradient)


class ModelHandle:
    """What an objective sees of the network: the policy's arithmetic around the engine's wrapper of the module.

    module: what a forward must call (`engine.module`); None: the policy's bare network.
    """

    def __init__(self, policy: Policy, module: nn.Module | None = None) -> None:
        self.policy = policy
        self.module = module

    def velocity(
        self,
        x: Tensor,
        s: Tensor,
        cond: EmbeddingBatch,
        uncond: EmbeddingBatch | None = None,
        guidance_scale: float = 1.0,
    ) -> Tensor:
        """fp32 [N,C,h,w] at noise levels s [N]."""
        return self.policy.velocity(x, s, cond, uncond, guidance_scale, module=self.module)


class Objective(ABC, Generic[ConfigT]):
    """One training objective. Subclasses set `declares` and implement `loss`; the rest has defaults.

    section: the class of its configuration section. An own objective's options are read into it, so that a subclass
    of a built-in one takes the same fields; with `section` None its config is the CustomObjective as it is.
    """

    declares: ClassVar[ObjectiveNeeds]
    section: ClassVar[type[Section] | None] = None

    def __init__(self, config: ConfigT | CustomObjective, context: ObjectiveContext) -> None:
        self.config = cast(ConfigT, self._read(config))
        self.context = context

    def _read(self, config: Any) -> Any:
        if self.section is None or not isinstance(config, CustomObjective):
            return config
        try:
            return self.section.model_validate(config.options)
        except ValidationError as error:
            first = error.errors()[0]
            name = ".".join(str(part) for part in first["loc"])
            raise ConfigError(f"objective.options.{name}", str(first["msg"])) from error

    def num_passes(self, batch: MicroBatch) -> int:
        """Forward and backward passes a micro-batch makes; the same for every micro-batch of a step."""
        return 1

    def prepasses(self, job: StepJob) -> tuple[str | None, ...]:
        """Snapshots under which `prepass` is called before the first update; None: the current weights.

        A function of the job alone, so that every rank makes the same forwards.
        """
        return ()

    def prepass(self, model: ModelHandle, batch: MicroBatch, snapshot: str | None) -> dict[str, Tensor]:
        """Tensors with rows first, put into batch.prepass. Called without gradient."""
        return {}

    @abstractmethod
    def loss(self, model: ModelHandle, batch: MicroBatch, p: int) -> LossSum:
        """Weighted sum over rows for pass p; the sum over passes divided by num_passes is the batch's loss."""

    def finish_metrics(self, metrics: dict[str, float]) -> dict[str, float]:
        """Derived metrics from the global means of what `loss` reported."""
        return metrics

    def snapshot_decay(self, snapshot: str, optimizer_steps: int) -> float | None:
        """d in `snapshot = d * snapshot + (1 - d) * current`, applied once after a step's updates; None: it stays."""
        return None


def declared(name: str) -> ObjectiveNeeds:
    """The registry's declaration of a built-in objective, so that a subclass of it elsewhere inherits its needs."""
    return cast(ObjectiveNeeds, resolve("objective", name).declares)


def make_objective(
    config: RunConfig, policy: Policy, score_gradient: ScoreGradient | None = None
) -> Objective[Any]:  # fmt: skip
    """The objective of a run."""
    entry = resolve("objective", config.objective.name).load()
    return cast(Objective[Any], entry(config.objective, ObjectiveContext.of_run(config, policy, score_gradient)))


class Means:
    """Metrics of one pass as (weighted sum, weight) pairs, in float64 without gradient."""

    def __init__(self, weight: Tensor) -> None:
        """weight [B]: the rows' weights."""
        self._weight = weight.detach().double()
        self.pairs: dict[str, tuple[Tensor, Tensor]] = {}

    def add(self, name: str, values: Tensor, where: Tensor | None = None) -> None:
        """values [B] or [B,n]; where: bool, broadcastable to values: the entries that count."""
        values = values.detach().double()
        weight = self._weight.view(-1, *[1] * (values.ndim - 1)).expand_as(values)
        if where is not None:
            weight = weight * where
        total = torch.where(weight > 0, values * weight, torch.zeros_like(values)).sum()
        self.pairs[name] = (total, weight.sum())

"""What flows inside the learner: rewards, credit, jobs, micro-batches, loss sums.

Owns the types alone. `Rewards`, `CreditBatch` and `StepJob` are numpy and cross from the controller to the ranks;
`MicroBatch` and `LossSum` are torch and live within a rank. Does not own: how any of them is computed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from contracts.wire import GroupHeader, PromptSpec, Row, UpdatePlan

if TYPE_CHECKING:
    from torch import Tensor

    from policy.types import EmbeddingBatch

FetchArrays = Callable[[int, tuple[str, ...], slice], Mapping[str, np.ndarray]]
"""(group_id, array names, samples) -> arrays, read from the vault (or from memory in the in-process loop)."""
FetchEmbedding = Callable[[str], Mapping[str, np.ndarray]]
"""prompt digest -> arrays of its PromptEmbedding."""


@dataclass(frozen=True)
class Rewards:
    """One group's rewards. values float64 [G] (NaN where invalid), valid bool [G].

    optional float64 [G]: weighted sum of optional scorers, centred over the samples that have them, 0 where missing;
    it is added to the centred reward, so a missing optional score contributes nothing (law 4).
    scale float64 [G] or None: multiplies each sample's advantage after centring and normalisation.
    steps float64 [G,K] or None: a reward for each recorded step, the last of which is the final one; a critic's credit
    takes them instead of the final reward alone.
    absolute: the rewards are measured against a reference of the rule's own, so no group mean is taken off them.
    """

    values: np.ndarray
    valid: np.ndarray
    optional: np.ndarray
    scale: np.ndarray | None = None
    steps: np.ndarray | None = None
    absolute: bool = False

    def totals(self) -> np.ndarray:
        """float64 [G]: values plus the centred optional part; NaN where invalid."""
        return self.values + self.optional


@dataclass(frozen=True)
class Aggregated:
    """What a rule made of a batch's scores: rewards by group id, and metrics of the rule."""

    rewards: Mapping[int, Rewards]
    metrics: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class CreditBatch:
    """The whole claimed batch as credit sees it, keyed by group id. critic_values [G,K] only if declared."""

    rewards: Mapping[int, Rewards]
    critic_values: Mapping[int, np.ndarray] = field(default_factory=dict)


@dataclass(frozen=True)
class Credit:
    """What credit yields. advantages [G] or [G,K], 0 where invalid; returns [G,K] with a critic.

    rewards [G]: the rewards advantages were made of, NaN where invalid; pairs are chosen by them.
    """

    advantages: Mapping[int, np.ndarray]
    returns: Mapping[int, np.ndarray] = field(default_factory=dict)
    old_values: Mapping[int, np.ndarray] = field(default_factory=dict)
    rewards: Mapping[int, np.ndarray] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class StepJob:
    """One learner step: P groups, what credit gave them, and the optimizer steps to make of them."""

    step: int
    current_version: int
    headers: Mapping[int, GroupHeader]
    credit: Credit
    plans: tuple[UpdatePlan, ...]


@dataclass
class MicroBatch:
    """Rows of one forward, on the device. B rows (pairs: B = 2 * pairs, first half winners).

    cond/uncond: prompt embeddings; uncond is None without guidance. weight [B]: 0 for padding and invalid rows.
    advantage [B] or [B,K]. Fields an objective did not declare are None.
    """

    cond: EmbeddingBatch
    uncond: EmbeddingBatch | None
    guidance_scale: float
    weight: Tensor
    advantage: Tensor
    noise_keys: tuple[int, ...]  # rows with equal keys share time and noise
    step: int  # learner step, part of every seed
    sigmas: Tensor  # [T+1]
    step_indices: tuple[int, ...]  # the K recorded steps; one window a micro-batch
    staleness: Tensor  # [B] versions behind
    update: int = 0  # which optimizer step of this learner step; 0: the weights are still those it began with
    rows: tuple[Row, ...] = ()  # group and sample of each row
    prompts: tuple[PromptSpec, ...] = ()  # [B], for objectives that paint and score themselves
    clean: Tensor | None = None  # [B,C,h,w] fp32
    states: Tensor | None = None  # [B,K+1,C,h,w] fp32 (values rounded to the storage dtype)
    log_prob_sum: Tensor | None = None  # [B,K] behaviour
    means: Tensor | None = None  # [B,K,C,h,w]
    returns: Tensor | None = None  # [B,K]
    old_values: Tensor | None = None  # [B,K]
    prepass: dict[str, Tensor] = field(default_factory=dict)  # outputs of Objective.prepass, rows first


@dataclass
class LossSum:
    """The loss summed over rows with their weights (never averaged), and metrics as (weighted sum, weight) pairs."""

    loss: Tensor
    metrics: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)

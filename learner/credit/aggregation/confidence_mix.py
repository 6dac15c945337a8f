"""HARMO (2510.05283): a rule's reward as far as the rule is confident, a learned reward for the rest.

r_acc = q r_rule + (1 - q) sigmoid((r_model - mean) / std), q = 0 where no rule applies: the whole group lacks its score
or its confidence. A sample that alone lacks one has failed, and the group's means of q r_rule and of q stand in.
R = w_a r_acc + w_i r_instr - w_l pen, pen = clip((L - L_max) / L_buf, 0, 1).
State: weight, mean and variance of the learned reward over past batches, exponentially decayed. The published abstract
leaves the weights open, so they are settings.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

import numpy as np

from contracts.config.aggregation import ConfidenceMixConfig
from learner.credit.aggregation.base import Aggregation
from learner.credit.aggregation.columns import Column, GroupScores, Settled, composed, sum_terms
from learner.credit.aggregation.statistics import Running, filled
from learner.types import Aggregated


class ConfidenceMix(Aggregation[ConfidenceMixConfig]):
    """Takes the batch into its running statistics before it uses them."""

    def __init__(self, config: ConfidenceMixConfig) -> None:
        super().__init__(config)
        self.past = Running()

    def aggregate(self, batch: Mapping[int, GroupScores], step: int) -> Aggregated:
        parts = (self.config.model, self.config.rule, self.config.confidence)
        extras = [name for name in (self.config.instruction, self.config.length) if name is not None]
        settled = {group_id: scores.named(*parts, *extras) for group_id, scores in batch.items()}
        self._observe(settled)
        rewards = {group_id: sum_terms(self._terms(group)) for group_id, group in settled.items()}
        return Aggregated(rewards, {"model_reward_mean": self.past.mean, "model_reward_std": self.past.std})

    def _observe(self, settled: Mapping[int, Settled]) -> None:
        columns = [(group.columns[0], group.counted) for group in settled.values()]
        values = np.concatenate([c.values[c.among(counted)] for c, counted in columns] or [np.zeros(0)])
        if len(values):
            self.past = self.past.after(values, self.config.decay)

    def _terms(self, group: Settled) -> Settled:
        model, rule, confidence, *extras = group.columns
        by_name = iter(extras)
        instruction = next(by_name) if self.config.instruction else None
        length = next(by_name) if self.config.length else None
        w_accuracy, w_instruction, w_length = self.config.weights
        terms = [self._accuracy(model, rule, confidence, w_accuracy, group.counted)]
        if instruction is not None:
            terms.append(composed(instruction.name, [instruction], instruction.values, w_instruction))
        if length is not None:
            excess = (length.values - self.config.length_max) / self.config.length_buffer
            terms.append(composed(length.name, [length], np.clip(excess, 0.0, 1.0), -w_length))
        return Settled(tuple(terms), group.counted)

    def _accuracy(
        self, model: Column, rule: Column, confidence: Column, weight: float, counted: np.ndarray
    ) -> Column:  # fmt: skip
        both = replace(confidence, values=np.clip(confidence.values, 0.0, 1.0), valid=rule.valid & confidence.valid)
        q = filled(both, counted)
        by_rule = filled(replace(both, values=both.values * rule.values), counted)
        if q is None or by_rule is None:
            q = by_rule = np.zeros(len(counted))
        mean, std = self.past.mean, self.past.std
        z = (model.values - mean) / std if std > 0 else np.zeros(len(model.values))
        squashed = 0.5 * (1 + np.tanh(z / 2))  # sigmoid without overflow
        values = by_rule + (1 - q) * np.where(q == 1, 0.0, squashed)
        return Column("accuracy", weight, model.required, values, model.valid)

    def state_dict(self) -> dict[str, Any]:
        return asdict(self.past)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.past = Running(**state)

"""SophiaVL-R1, Trust-GRPO (2505.17018): a soft judge beside a verifier, as far as the group shows that it is right.

R = o + coef p, coef = 0.3 exp(-step / T) trust. With mu_right and mu_wrong the judge's means over samples whose outcome
is right (o >= 0.5) and wrong: trust = 1 when mu_right >= mu_wrong, else exp(mu_right - mu_wrong). A group wholly right
or wholly wrong cannot show it: coef = 0. The judge adds nothing to a sample with o < 0.2.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from contracts.config.aggregation import TrustConfig
from learner.credit.aggregation.base import Aggregation
from learner.credit.aggregation.columns import Column, GroupScores, Settled, sum_terms
from learner.types import Aggregated


class Trust(Aggregation[TrustConfig]):
    """Stateless: the annealing follows the learner step."""

    def aggregate(self, batch: Mapping[int, GroupScores], step: int) -> Aggregated:
        fade = self.config.coef * float(np.exp(-step / self.config.anneal_steps))
        rewards, trusts = {}, []
        for group_id, scores in batch.items():
            group = scores.named(self.config.outcome, self.config.judge)
            trust = self.trust(group)
            trusts += [trust] if trust is not None else []
            rewards[group_id] = sum_terms(self._terms(group, fade * (trust or 0.0)))
        metrics = {"judge_coef": fade} | ({"judge_trust": float(np.mean(trusts))} if trusts else {})
        return Aggregated(rewards, metrics)

    def trust(self, group: Settled) -> float | None:
        """Trust in the judge on this group, in (0, 1]; None when the group cannot show any."""
        outcome, judge = group.columns
        values = outcome.values[outcome.among(group.counted)]
        if not len(values) or (values >= self.config.all_right_at).all() or (values <= self.config.all_wrong_at).all():
            return None
        have, right = judge.among(group.counted) & outcome.valid, outcome.values >= self.config.right_at
        if not (have & right).any() or not (have & ~right).any():
            return None
        gap = float(judge.values[have & right].mean() - judge.values[have & ~right].mean())
        return 1.0 if gap >= 0 else float(np.exp(gap))

    def _terms(self, group: Settled, coef: float) -> Settled:
        outcome, judge = group.columns
        asked = outcome.values >= self.config.floor
        # Below the floor the judge adds 0 whether or not it answered, or its failure would lift a failure to the mean.
        valid = judge.valid | (outcome.valid & ~asked)
        said = Column(judge.name, coef, judge.required, np.where(asked, judge.values, 0.0), valid)
        return Settled((outcome, said), group.counted)

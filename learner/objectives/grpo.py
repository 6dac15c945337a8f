"""Flow-GRPO (2505.05470): critic-free policy gradient with group-relative advantages on every recorded step.

The loss is trajectory.py's; the advantage of a sample is the same for all its steps (credit/group.py).
"""

from __future__ import annotations

from contracts.config.objectives import GRPOConfig
from learner.objectives.base import declared
from learner.objectives.trajectory import TrajectoryObjective


class GRPO(TrajectoryObjective[GRPOConfig]):
    """Needs recorded states and log-probs; the reference snapshot with a KL term."""

    declares = declared("grpo")
    section = GRPOConfig

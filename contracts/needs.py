"""What the objective of a run needs: its declaration and the configuration together, for actors, learner and cluster.

The registry declares what an objective always needs. A KL term or a push limit adds the reference snapshot,
and groups that may be stale (or whose old log-probs are recomputed) add the recorded means, from which the drift is
measured in nats.
"""

from __future__ import annotations

from typing import Any

from contracts.config import RunConfig
from contracts.declarations import ObjectiveNeeds
from contracts.registry import resolve


def objective_needs(config: RunConfig) -> ObjectiveNeeds:
    """The run's needs. An own class without `declares` needs what the defaults say: nothing."""
    resolved = resolve("objective", config.objective.name).declares
    declared = resolved if isinstance(resolved, ObjectiveNeeds) else ObjectiveNeeds()
    snapshots = declared.snapshots
    limited = objective_field(config, "push_limit", None) is not None
    if (limited or objective_field(config, "kl_beta", 0) > 0) and "ref" not in snapshots:
        snapshots = (*snapshots, "ref")
    means = declared.means or (declared.log_probs and measures_drift(config))
    return declared.model_copy(update={"snapshots": snapshots, "means": means})


def measures_drift(config: RunConfig) -> bool:
    """Whether behaviour and proximal policy may differ: stale groups, or another engine's (bf16) arithmetic."""
    return config.pipeline.max_staleness > 0 or recomputes_always(config)


def recomputes_always(config: RunConfig) -> bool:
    """Whether old log-probs are recomputed even for fresh groups."""
    choice = objective_field(config, "old_log_prob", "auto")
    return choice == "recompute" or (choice == "auto" and config.model.arithmetic == "bf16")


def objective_field(config: RunConfig, name: str, default: Any) -> Any:
    """A field of the objective's section; of an own objective, whose fields are its options."""
    options = getattr(config.objective, "options", {})
    return getattr(config.objective, name, options.get(name, default))

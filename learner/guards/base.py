"""The contract of a guard: it sees the row of every learner step, in order, and says whether all is well.

A guard is a pure object: what it says follows from its settings and the rows it has seen. Its state holds what it has
seen and none of its settings, so that a resumed run may set them otherwise. Does not own: what a verdict leads to
(run_guards.py, cluster/learner_loop.py), what a row holds (cluster/step.py).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar

from contracts.config.guards import GuardSection

Row = Mapping[str, float]
"""Numbers of one learner step by name: the step's metrics (`kl`, `grad_norm`, `reward`, ...), and `reward_mean/` and
`reward_std/` with scorer/column. What the step did not measure is not there."""

Config = TypeVar("Config", bound=GuardSection)


@dataclass(frozen=True)
class Verdict:
    """What a guard says of a step; reason: in words for a user, empty where there is nothing to say."""

    action: Literal["none", "warn", "stop"] = "none"
    reason: str = ""


WELL = Verdict()


class Guard(ABC, Generic[Config]):
    """Subclasses implement `see`; those that remember something also the two methods of the state.

    A guard of your own takes its settings from `config.options`.
    """

    def __init__(self, config: Config) -> None:
        self.config = config

    @abstractmethod
    def see(self, row: Row) -> Verdict:
        """The verdict after this step. Called once a learner step; after a roll-back from the state of then."""

    def alarm(self, reason: str) -> Verdict:
        """The configured action."""
        return Verdict(self.config.action, reason)

    def state(self) -> dict[str, Any]:
        """What it has seen, as JSON; empty when it remembers nothing."""
        return {}

    def restore(self, state: Mapping[str, Any]) -> None:
        """The inverse of state, called on a fresh guard, whose settings may be others."""


def measured(row: Row, name: str) -> float | None:
    """A number of the row; None where it is missing, NaN or infinite."""
    value = row.get(name)
    return value if value is not None and math.isfinite(value) else None


def mean_score(row: Row, column: str) -> float | None:
    """Mean score of the step; column: `scorer` (its first column) or `scorer/column`."""
    prefix = f"reward_mean/{column}"
    name = prefix if "/" in column else next((key for key in row if key.startswith(f"{prefix}/")), prefix)
    return measured(row, name)

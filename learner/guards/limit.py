"""A metric that stays beyond a limit: the drift, the gradient's norm, the spread of rewards, a score."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from contracts.config.guards import LimitConfig
from learner.guards.base import WELL, Guard, Row, Verdict, measured


class Limit(Guard[LimitConfig]):
    """Acts when the newest `patience` values are all beyond the limit, until one is within.

    A value equal to the limit is within. A step without the metric, or where it is not finite, counts as neither: the
    row of values goes on after it.
    """

    def __init__(self, config: LimitConfig) -> None:
        super().__init__(config)
        self._values: list[float] = []

    def see(self, row: Row) -> Verdict:
        value = measured(row, self.config.metric)
        if value is not None:
            self._values = [*self._values, value][-self.config.patience :]
        if len(self._values) < self.config.patience or not all(map(self._beyond, self._values)):
            return WELL
        steps = "for 1 step" if self.config.patience == 1 else f"for {self.config.patience} steps in a row"
        return self.alarm(f"{self.config.metric} is {self._values[-1]:.4g}, and {self._limits()} {steps}")

    def _beyond(self, value: float) -> bool:
        low, high = self.config.min, self.config.max
        return (high is not None and value > high) or (low is not None and value < low)

    def _limits(self) -> str:
        low, high = self.config.min, self.config.max
        if low is None:
            return f"above {high:g}"
        return f"below {low:g}" if high is None else f"not within {low:g} to {high:g}"

    def state(self) -> dict[str, Any]:
        return {"metric": self.config.metric, "values": list(self._values)}

    def restore(self, state: Mapping[str, Any]) -> None:
        if state["metric"] == self.config.metric:
            self._values = list(state["values"])[-self.config.patience :]

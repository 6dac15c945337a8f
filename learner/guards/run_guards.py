"""The guards of a run: each sees every step; what is new in what they say is handed on. The one owner of their state.

Invariant: what is said depends on the rows alone, so a run that goes on from a checkpoint's state says what the
uninterrupted one says. State is JSON. Does not own: events, counters, the end of a run (cluster/learner_loop.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

from contracts import registry
from contracts.config.guards import GuardConfig
from learner.guards.base import Guard, Row


@dataclass(frozen=True)
class Word:
    """What a guard has to say after a step. begins, over: of a warning, each said once; reason: empty when over."""

    guard: str
    kind: Literal["begins", "over", "stop"]
    reason: str = ""


class RunGuards:
    """Every guard of `guards`, by its name in the run, in the order of the configuration."""

    def __init__(self, configs: Sequence[GuardConfig]) -> None:
        self._configs = tuple(configs)
        self.load_state_dict({})

    def see(self, row: Row) -> list[Word]:
        """What is new after this learner step; a guard that stops says so at every step."""
        return [word for key, guard in self._guards.items() for word in self._words(key, guard, row)]

    def _words(self, key: str, guard: Guard[Any], row: Row) -> Iterator[Word]:
        verdict, warned = guard.see(row), key in self._warned
        if verdict.action == "stop":
            yield Word(key, "stop", verdict.reason)
        elif verdict.action == "warn" and not warned:
            self._warned.add(key)
            yield Word(key, "begins", verdict.reason)
        elif verdict.action == "none" and warned:
            self._warned.remove(key)
            yield Word(key, "over")

    def state_dict(self) -> dict[str, Any]:
        """guard -> its plug-in, its state, and whether its warning goes on."""
        return {
            config.key: {
                "name": config.name, "state": self._guards[config.key].state(), "warned": config.key in self._warned,
            }
            for config in self._configs
        }  # fmt: skip

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of state_dict. A guard of which it knows nothing, or another plug-in's, begins anew."""
        self._guards = {config.key: _make(config) for config in self._configs}
        known = {
            config.key: state[config.key]
            for config in self._configs
            if state.get(config.key, {}).get("name") == config.name
        }
        for key, entry in known.items():
            self._guards[key].restore(entry["state"])
        self._warned = {key for key, entry in known.items() if entry["warned"]}


def _make(config: GuardConfig) -> Guard[Any]:
    return cast("Guard[Any]", registry.resolve("guard", config.name).load()(config))

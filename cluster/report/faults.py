"""Which events of a run are faults or words of a guard, and how they read.

A kind that nobody here has heard of is shown: better one line too many than a fault unseen.
Does not own: who writes events (the loops of a run).
"""

from __future__ import annotations

import textwrap
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

ROUTINE = {
    "started", "phase", "finished", "evaluation", "weights_proven", "host_copies", "resumed", "stopped", "report",
}  # fmt: skip
_ROUTINE_PREFIXES = ("checkpoint", "controller_started")
_BAD_WORDS = ("fail", "lost", "torn", "refused", "died", "late", "stall", "not_", "expired", "restart")

WORDS = {
    "lease_expired": "a lease ran out: its worker was too slow or hung",
    "late_result": "a result came after its lease had ended and was refused",
    "late_score": "scores came after their lease had ended and were refused",
    "paint_lost": "an actor died or hung while painting",
    "paint_failed": "painting failed",
    "offer_lost": "an actor did not take note of new weights",
    "actor_restart": "an actor was restarted",
    "actor_away": "an actor does not come back; the others go on without it",
    "actor_back": "an actor that was away is back",
    "weights_not_proven": "an actor could not prove its weights",
    "scoring_lost": "the dispatcher died or hung while scoring",
    "learner_rebuild": "a learner rank died or hung: all ranks are rebuilt",
    "learner_rebuilt": "the learner's ranks are back",
    "host_copies_lost": "host copies could not be filled",
    "evaluation_failed": "an evaluation in mid-run failed",
    "stalled": "no step ended in time: stacks were dumped",
    "sink_loses_rows": "a tracker does not take rows; the run goes on without them",
    "sink_writes_again": "a tracker takes rows again",
    "samples_not_kept": "images of an evaluation could not be written",
    "versions_not_kept": "the scorers' versions could not be written into manifest.json",
    "report_failed": "the report could not be written",
    "guard_warned": "a guard warned",
    "guard_stopped": "a guard stopped the run",
}


@dataclass(frozen=True)
class Fault:
    """One line. at: seconds since the epoch; detail: the event's fields that say which and why."""

    at: float
    kind: str
    words: str
    detail: str

    @property
    def clock(self) -> str:
        return time.strftime("%m-%d %H:%M:%S", time.localtime(self.at))


def is_guard(kind: str) -> bool:
    return kind.startswith("guard")


def is_fault(kind: str) -> bool:
    """Whether an event tells of something that went wrong, or is of a kind unknown here."""
    if kind in ROUTINE or is_guard(kind):
        return False
    return not kind.startswith(_ROUTINE_PREFIXES) or any(word in kind for word in _BAD_WORDS)


def faults(events: Sequence[dict[str, Any]]) -> list[Fault]:
    """Faults in order of time."""
    return [_line(event) for event in events if is_fault(str(event["event"]))]


def guard_events(events: Sequence[dict[str, Any]]) -> list[Fault]:
    """What guards said and did, in order of time."""
    return [_line(event) for event in events if is_guard(str(event["event"]))]


def counts(found: Sequence[Fault]) -> dict[str, int]:
    """Number of each kind, the most frequent first."""
    kinds = [fault.kind for fault in found]
    return dict(sorted(((kind, kinds.count(kind)) for kind in dict.fromkeys(kinds)), key=lambda pair: -pair[1]))


def _line(event: dict[str, Any]) -> Fault:
    kind = str(event["event"])
    shown = {k: v for k, v in event.items() if k not in ("time", "event") and isinstance(v, str | int | float)}
    detail = ", ".join(f"{key} {_value(value)}" for key, value in shown.items())
    return Fault(float(event["time"]), kind, WORDS.get(kind, kind.replace("_", " ")), detail)


def _value(value: str | int | float) -> str:
    """Long messages are cut: events.jsonl has them whole."""
    return f"{value:.3g}" if isinstance(value, float) else textwrap.shorten(str(value), 120, placeholder=" …")

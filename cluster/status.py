"""`python -m cluster status`: what a run does now, or did: one plain mapping, read from its folder alone.

Works from any machine that sees the folder, on a run that goes on, ended or crashed; asks no process of the run, so a
hung run can be looked at too. Does not own: how it looks (status_view.py), reading (report/view.py).
"""

from __future__ import annotations

import math
import time
from contextlib import closing
from typing import Any

from cluster.ledger.facts import LedgerFacts
from cluster.report.faults import faults
from cluster.report.view import RunView, read_run
from cluster.run_folder import RunFolder
from contracts.errors import LedgerError

RATE_S = 60.0
"""Seconds over which rates are counted while a run goes on."""

RECENT_STEPS = 20
"""Steps whose pace tells when the run will end."""

LAST_FAULTS = 6

Status = dict[str, Any]


def take_status(folder: RunFolder) -> Status:
    """Everything the view shows, as JSON values; a figure that is not known is None."""
    view = read_run(folder, newest_only=True)
    now = time.time()
    step, total = view.step, _setting(view, "stop.steps")
    seconds, limit = view.train_seconds(), _setting(view, "stop.seconds")
    if view.running and view.state == "running" and _phase(view) == "training":
        seconds += max(0.0, now - float(view.last.get("time", now)))
    done = _share_done(step, total, seconds, limit)
    found = faults(view.events)
    return {
        "name": view.name,
        "folder": view.folder.location,
        "state": view.state,
        "outcome": view.outcome,
        "why": view.why,
        "phase": _phase(view),
        "seconds_since_last_word": _silence(view, now),
        "step": step,
        "total_steps": None if total is None else int(total),
        "train_seconds": round(seconds, 1),
        "share_done": done,
        "seconds_left": _seconds_left(view, step, total, seconds, limit) if view.running else None,
        "rewards": _by_prefix(view, "reward_mean/"),
        "held_out": _held_out(view),
        "rates": _rates(view, now),
        "staleness": {
            "bound": view.max_staleness, "largest": view.books.max_staleness_seen if view.books else None,
            "groups": {str(steps): groups for steps, groups in sorted(view.staleness.items())},
        },
        "stages": view.books.groups if view.books else {},
        "capacity": view.last.get("queue_capacity_groups"),
        "books": _books(view),
        "weights": {
            "version": view.last.get("weight_version"),
            "publish_seconds": view.last.get("weight_publish_seconds/mean"),
            "not_proven": len(view.of_kind("weights_not_proven")),
        },
        "memory_bytes": _by_prefix(view, "process_memory_bytes/"),
        "faults": {
            "number": len(found),
            "last": [{"time": one.at, "what": one.words, "detail": one.detail} for one in found[-LAST_FAULTS:]],
        },
        "verdict": list(view.verdict().lines),
        "missing": view.missing,
    }  # fmt: skip


def _phase(view: RunView) -> str:
    """What a run that goes on is at; for one that ended, its state."""
    if not view.running:
        return view.state
    began = [i for i, event in enumerate(view.events) if event["event"] == "started"]
    since = view.events[began[-1] :] if began else []
    if not since:
        return "training" if view.rows else "starting"
    if any(event["event"] == "phase" and event.get("phase") == "training" for event in since):
        total = _setting(view, "stop.steps")
        return "evaluating after" if total is not None and view.step >= total else "training"
    return "evaluating before"


def _share_done(step: int, total: float | None, seconds: float, limit: float | None) -> float:
    """Progress to the nearest limit, 0 to 1."""
    shares = [step / total] if total else []
    shares += [seconds / limit] if limit else []
    return round(min(1.0, max(shares, default=0.0)), 4)


def _seconds_left(view: RunView, step: int, total: float | None, seconds: float, limit: float | None) -> float | None:
    """Time to the nearest limit of `stop`, at the pace of the last steps."""
    left = []
    pace = _step_seconds(view)
    if total is not None and pace is not None:
        left.append(max(0.0, (total - step) * pace))
    if limit is not None:
        left.append(max(0.0, limit - seconds))
    return round(min(left), 1) if left else None


def _step_seconds(view: RunView) -> float | None:
    """Seconds a step over the last steps; None before the second."""
    recent = view.rows[-RECENT_STEPS:]
    steps = recent[-1]["step"] - recent[0]["step"] if len(recent) > 1 else 0
    return (recent[-1]["time"] - recent[0]["time"]) / steps if steps > 0 else None


def _rates(view: RunView, now: float) -> dict[str, float | None]:
    """Images a second at each stage: lately while the run goes on, over all of its training afterwards."""
    seconds = view.train_seconds()
    rates: dict[str, float | None] = {
        "step_seconds": _rounded(_step_seconds(view)),
        "trained_per_second_per_device": _rounded(view.last.get("images_per_second_per_gpu")),
    }
    if view.running:
        span = min(RATE_S, max(1.0, now - view.events[0]["time"])) if view.events else RATE_S
        try:
            with closing(LedgerFacts(view.folder.ledger)) as ledger:
                moved = ledger.moved(now - span, now)
        except LedgerError:
            return rates
        counted = {"painted": moved.painted, "scored": moved.scored, "trained": moved.trained}
        return rates | {f"{name}_per_second": _rounded(number / span) for name, number in counted.items()}
    if view.books is None or seconds <= 0:
        return rates
    return rates | {
        "painted_per_second": _rounded(view.books.painted / seconds),
        "trained_per_second": _rounded(view.books.trained / seconds),
    }


def _books(view: RunView) -> dict[str, Any] | None:
    books = view.books
    if books is None:
        return None
    return {
        "painted": books.painted, "trained": books.trained, "alive": books.alive,
        "discarded": books.discarded_by_reason, "refused": books.refused, "balanced": books.balanced,
    }  # fmt: skip


def _held_out(view: RunView) -> dict[str, Any] | None:
    """The newest evaluation: tag, step, accuracy, standard error."""
    if not view.evaluations:
        return None
    event = view.evaluations[-1]
    result = event["result"]
    return {
        "tag": event.get("tag"), "step": event.get("step"), "accuracy": result.get("accuracy"),
        "standard_error": result.get("standard_error"),
        "shown": None if result.get("accuracy") is None else view.held_out(result["accuracy"]),
    }  # fmt: skip


def _silence(view: RunView, now: float) -> float | None:
    """Seconds since the run wrote anything."""
    times = [row["time"] for row in (view.last, *view.events[-1:]) if row]
    return round(now - max(times), 1) if times else None


def _by_prefix(view: RunView, prefix: str) -> dict[str, float]:
    return {key.removeprefix(prefix): value for key, value in view.last.items() if key.startswith(prefix)}


def _setting(view: RunView, key: str) -> float | None:
    value = view.settings.get(key)
    return None if value is None else float(value)


def _rounded(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else round(value, 3)

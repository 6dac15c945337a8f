"""The trace of a run: Chrome trace JSON, one lane a role, for Perfetto (https://ui.perfetto.dev) or chrome://tracing.

Format: the JSON array form of the Trace Event Format, one event a line. A reader accepts the array without its closing
bracket, so what a crash leaves opens as well. Spans of one lane that overlap (an actor stores one group while it paints
the next; a scorer answers several requests) get rows of their own within the lane.

Invariants: the files never hold more than `limit_mb` together, the newest part is kept (trace.json and, before it,
trace-older.json); nothing that fails here reaches the run.
Does not own: what spans are made of (contracts/spans.py), who measures them.
"""

from __future__ import annotations

import json
import logging
import os
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TextIO

from contracts.spans import wall_clock
from contracts.wire import Span

TRACE, OLDER = "trace.json", "trace-older.json"
FLUSH_S = 1.0
MAX_TEXT = 200
"""Longest text of an argument: a stack in an error message would fill the trace."""

log = logging.getLogger("salon.trace")


class Trace:
    """Writes one run's spans and events. Safe to call from several threads; without a folder it does nothing."""

    def __init__(self, folder: Path | None, limit_mb: float = 32.0) -> None:
        """folder: local run folder, or None for no trace."""
        self._folder, self._limit = folder, int(limit_mb * 2**20) // 2
        self._lanes: dict[str, _Lane] = {}
        self._lock = threading.Lock()
        self._file: TextIO | None = None
        self._written, self._flushed = 0, 0.0
        if folder is not None:
            with self._lock:
                self._rotate()

    def add(self, spans: Iterable[Span], **args: Any) -> None:
        """Spans that have ended; args are shown with each (group, version, step)."""
        if self._file is None:
            return
        shown = json.dumps(args, default=str)  # once for all of them: this is what a step does most often
        with self._lock:
            for span in spans:
                self._span(span, shown)

    def ended(self, lane: str, name: str, seconds: float) -> None:
        """A span of this process that has just ended."""
        if self._file is not None:
            self.add((Span(lane=lane, name=name, start=wall_clock() - seconds, seconds=seconds),))

    def instant(self, lane: str, name: str, args: dict[str, Any]) -> None:
        """Something that happened at once."""
        if self._file is None:
            return
        shown = {key: _short(value) for key, value in args.items() if isinstance(value, str | int | float)}
        with self._lock:
            process = self._lane(lane).number
            self._write(
                {"ph": "i", "s": "p", "name": name, "pid": process, "tid": 0, "ts": _micro(wall_clock()), "args": shown}
            )

    def close(self) -> None:
        """Close the array and the file."""
        with self._lock:
            if self._file is not None:
                try:
                    self._file.write("{}]\n")
                    self._file.close()
                except OSError as error:
                    log.warning("the trace ends early: %s", error)
                self._file = None

    def _span(self, span: Span, args: str) -> None:
        lane = self._lane(span.lane)
        row, is_new = lane.row_for(span)
        if is_new and row > 0:
            self._name_row(lane, row)
        self._write_line(
            f'{{"ph":"X","name":{json.dumps(span.name)},"pid":{lane.number},"tid":{row},"ts":{_micro(span.start)},'
            f'"dur":{_micro(span.seconds)},"args":{args}}}'
        )

    def _lane(self, name: str) -> _Lane:
        lane = self._lanes.get(name)
        if lane is None:
            lane = self._lanes[name] = _Lane(name, len(self._lanes) + 1)
            self._name_lane(lane)
        return lane

    def _name_lane(self, lane: _Lane) -> None:
        about = {"ph": "M", "pid": lane.number}
        self._write({**about, "name": "process_name", "args": {"name": lane.name}})
        self._write({**about, "name": "process_sort_index", "args": {"sort_index": _order(lane.name)}})
        self._name_row(lane, 0)

    def _name_row(self, lane: _Lane, row: int) -> None:
        name = lane.name if row == 0 else f"{lane.name} ({row + 1})"
        self._write({"ph": "M", "pid": lane.number, "tid": row, "name": "thread_name", "args": {"name": name}})

    def _write(self, event: dict[str, Any]) -> None:
        self._write_line(json.dumps(event, separators=(",", ":"), default=str))

    def _write_line(self, event: str) -> None:
        if self._file is None:
            return
        try:
            self._written += self._file.write(event + ",\n")
            now = wall_clock()
            if now - self._flushed > FLUSH_S:
                self._file.flush()
                self._flushed = now
            if self._written > self._limit:
                self._rotate()
        except OSError as error:
            log.warning("the trace ends here: %s", error)
            self._file = None

    def _rotate(self) -> None:
        """Begin a file; what was trace.json (of this process or an earlier one) is the older part."""
        assert self._folder is not None
        path = self._folder / TRACE
        try:
            if self._file is not None:
                self._file.write("{}]\n")
                self._file.close()
            if path.exists():
                os.replace(path, self._folder / OLDER)
            self._file = path.open("w", encoding="utf-8")
            self._written = self._file.write("[\n")
        except OSError as error:
            log.warning("no trace: %s", error)
            self._file = None
            return
        for lane in self._lanes.values():
            self._name_lane(lane)
            for row in range(1, len(lane.ends)):
                self._name_row(lane, row)


class _Lane:
    """One role: a process in the viewer, with as many rows as spans overlap."""

    def __init__(self, name: str, number: int) -> None:
        self.name, self.number = name, number
        self.ends: list[float] = []  # when the last span of each row ended

    def row_for(self, span: Span) -> tuple[int, bool]:
        """(row, whether it is new): the first in which the span overlaps nothing."""
        end = span.start + span.seconds
        for row, last in enumerate(self.ends):
            if span.start >= last - 1e-6:
                self.ends[row] = end
                return row, False
        self.ends.append(end)
        return len(self.ends) - 1, True


def _order(lane: str) -> int:
    """Controller first, then the way of a group: actors, vaults, dispatcher, scorers, learner, what follows a step."""
    roles = ("controller", "actor", "vault", "dispatcher", "scorer", "learner", "publish", "checkpoint")
    rank = next((index for index, role in enumerate(roles) if lane.startswith(role)), len(roles))
    digits = "".join(character for character in lane if character.isdigit())
    return 10_000 * rank + min(int(digits or 0), 9_999)


def _micro(seconds: float) -> int:
    return round(seconds * 1e6)


def _short(value: Any) -> Any:
    return value[:MAX_TEXT] if isinstance(value, str) else value

"""The trace of a run: Chrome trace JSON, one lane a role, for Perfetto (https://ui.perfetto.dev) or chrome://tracing.

Format: the JSON array form of the Trace Event Format, one event a line. A reader accepts the array without its closing
bracket, so what a crash leaves opens as well. Spans of one lane that overlap (an actor stores one group while it paints
the next; a scorer answers several requests) get rows of their own within the lane.

Invariants: the files never hold more than `limit_mb` together, the newest part is kept (trace.json and, before it,
trace-older.json); nothing that fails here reaches the run. What finds no room is lost, and the trace goes on behind it.
Does not own: what spans are made of (contracts/spans.py), who measures them.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from cluster.telemetry.appending import AppendingFile
from contracts.spans import wall_clock
from contracts.wire import Span

TRACE, OLDER = "trace.json", "trace-older.json"
FLUSH_S = 1.0
FLUSH_CHARACTERS = 2**16
HEAD, END = b"[\n", b"{}]\n"
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
        self._file: AppendingFile | None = None  # None: the next flush begins one
        self._lines: list[str] = []
        self._waiting, self._written, self._flushed = 0, 0, 0.0
        self._loses = False
        if folder is not None:
            with self._lock:
                self._flush()

    def add(self, spans: Iterable[Span], **args: Any) -> None:
        """Spans that have ended; args are shown with each (group, version, step)."""
        if self._folder is None:
            return
        shown = json.dumps(args, default=str)  # once for all of them: this is what a step does most often
        with self._lock:
            for span in spans:
                self._span(span, shown)

    def ended(self, lane: str, name: str, seconds: float) -> None:
        """A span of this process that has just ended."""
        if self._folder is not None:
            self.add((Span(lane=lane, name=name, start=wall_clock() - seconds, seconds=seconds),))

    def instant(self, lane: str, name: str, args: dict[str, Any]) -> None:
        """Something that happened at once."""
        if self._folder is None:
            return
        shown = {key: _short(value) for key, value in args.items() if isinstance(value, str | int | float)}
        with self._lock:
            process = self._lane(lane).number
            mark = {"ph": "i", "s": "p", "name": name, "pid": process, "tid": 0, "ts": _micro(wall_clock())}
            self._write_line(_json({**mark, "args": shown}))

    def close(self) -> None:
        """Close the array and the file."""
        with self._lock:
            if self._folder is not None:
                self._flush()
                self._end_file()
                self._folder = None

    def _span(self, span: Span, args: str) -> None:
        lane = self._lane(span.lane)
        row, is_new = lane.row_for(span)
        if is_new and row > 0:
            self._write_line(_row_name(lane, row))
        self._write_line(
            f'{{"ph":"X","name":{json.dumps(span.name)},"pid":{lane.number},"tid":{row},"ts":{_micro(span.start)},'
            f'"dur":{_micro(span.seconds)},"args":{args}}}'
        )

    def _lane(self, name: str) -> _Lane:
        lane = self._lanes.get(name)
        if lane is None:
            lane = self._lanes[name] = _Lane(name, len(self._lanes) + 1)
            for line in _names(lane):
                self._write_line(line)
        return lane

    def _write_line(self, event: str) -> None:
        self._lines.append(f"{event},\n")
        self._waiting += len(event) + 2
        if self._waiting > min(FLUSH_CHARACTERS, self._limit // 4) or time.monotonic() - self._flushed > FLUSH_S:
            self._flush()

    def _flush(self) -> None:
        """What waits goes into the file, or is lost; a new file when this one has its size."""
        self._flushed = time.monotonic()
        try:
            if self._file is None or self._written + self._waiting > self._limit:
                self._begin_file()
            if self._loses:
                self._append(self._all_names())  # they may be lost as well
            self._append("".join(self._lines).encode())
            if self._loses:
                log.warning("the trace goes on")
            self._loses = False
        except OSError as error:
            if not self._loses:
                log.warning("the trace loses spans until it can be written: %s", error)
            self._loses = True
        self._lines.clear()
        self._waiting = 0

    def _begin_file(self) -> None:
        """What was trace.json (of this process or an earlier one) becomes the older part. Raises OSError."""
        assert self._folder is not None
        self._end_file()
        path = self._folder / TRACE
        if path.exists() and path.stat().st_size:  # an empty one found no room and must not replace the older part
            os.replace(path, self._folder / OLDER)
        self._file, self._written = AppendingFile(path), 0
        self._append(self._all_names())

    def _end_file(self) -> None:
        if self._file is not None:
            with suppress(OSError):  # a reader does without
                self._append(END)
            self._file.close()
            self._file = None

    def _append(self, data: bytes) -> None:
        assert self._file is not None
        self._file.append(data, HEAD)
        self._written += len(data)

    def _all_names(self) -> bytes:
        return "".join(f"{line},\n" for lane in self._lanes.values() for line in _names(lane)).encode()


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


def _names(lane: _Lane) -> list[str]:
    """Events that tell a viewer what the lane and its rows are called, and where it stands."""
    about = {"ph": "M", "pid": lane.number}
    return [
        _json({**about, "name": "process_name", "args": {"name": lane.name}}),
        _json({**about, "name": "process_sort_index", "args": {"sort_index": _order(lane.name)}}),
        *(_row_name(lane, row) for row in range(max(1, len(lane.ends)))),
    ]


def _row_name(lane: _Lane, row: int) -> str:
    name = lane.name if row == 0 else f"{lane.name} ({row + 1})"
    return _json({"ph": "M", "pid": lane.number, "tid": row, "name": "thread_name", "args": {"name": name}})


def _json(event: dict[str, Any]) -> str:
    return json.dumps(event, separators=(",", ":"), default=str)


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

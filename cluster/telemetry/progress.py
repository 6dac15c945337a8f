"""The driver's display: one live table on a terminal, one line every few seconds elsewhere.

Owns how a run's status looks. Does not own: the status itself, which the controller answers as a plain mapping.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, TextIO, TypedDict

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table

from cluster.durations import MISSING, duration

PLAIN_INTERVAL_S = 5.0


class RunStatus(TypedDict, total=False):
    """What the controller says of a run; every key may be missing or None while it is not known."""

    phase: str  # 'starting', 'evaluating', 'training', 'stopping', ...
    step: int
    total_steps: int | None
    reward: float | None  # mean of the training reward over the last step
    held_out: float | None  # accuracy of the last evaluation, 0 to 1
    held_out_step: int | None  # the step it is of
    images_per_second: float | None
    staleness: float | None  # largest staleness of the last step's groups
    seconds: float | None  # of training
    seconds_left: float | None
    share_done: float | None  # 0 to 1


def seconds_left(share_done: float, train_seconds: float) -> float | None:
    """Time left at the pace so far; None before anything is done."""
    return train_seconds * (1.0 - share_done) / share_done if share_done > 0 else None


class ProgressDisplay:
    """`with ProgressDisplay(title) as display: display.update(status)`."""

    def __init__(
        self, title: str, stream: TextIO | None = None, clock: Callable[[], float] = time.monotonic,
        plain_interval_s: float = PLAIN_INTERVAL_S,
    ) -> None:  # fmt: skip
        self.title, self._clock, self._interval = title, clock, plain_interval_s
        self.console = Console(file=stream or sys.stdout)
        self._live = Live(console=self.console, refresh_per_second=4, transient=False) if self._is_terminal() else None
        self._last_line, self._last_phase = float("-inf"), ""

    def __enter__(self) -> ProgressDisplay:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def update(self, status: Mapping[str, Any]) -> None:
        """Show a status; off a terminal a line is written when the phase changes, else every few seconds."""
        if self._live is not None:
            self._live.update(_table(self.title, status))
            return
        now, phase = self._clock(), str(status.get("phase", ""))
        if phase != self._last_phase or now - self._last_line >= self._interval:
            self._last_line, self._last_phase = now, phase
            self.message(_line(status))

    def message(self, text: str) -> None:
        """A line that stays."""
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _is_terminal(self) -> bool:
        return self.console.is_terminal and not self.console.is_dumb_terminal


def _fields(status: Mapping[str, Any]) -> list[tuple[str, str]]:
    total = status.get("total_steps")
    step = f"{status.get('step', 0)}" + (f"/{total}" if total else "")
    return [
        ("step", step),
        ("reward", _number(status.get("reward"), "{:.3f}")),
        ("held-out", _held_out(status)),
        ("images/s", _number(status.get("images_per_second"), "{:.1f}")),
        ("staleness", _number(status.get("staleness"), "{:.0f}")),
        ("time left", duration(status.get("seconds_left"))),
    ]


def _held_out(status: Mapping[str, Any]) -> str:
    """The newest accuracy, and of which step it is: it may be much older than the rest."""
    accuracy, step = status.get("held_out"), status.get("held_out_step")
    return _number(accuracy, "{:.1%}") + ("" if accuracy is None or step is None else f" (step {step})")


def _line(status: Mapping[str, Any]) -> str:
    return f"{status.get('phase', ''):<10} " + "  ".join(f"{name} {value}" for name, value in _fields(status))


def _table(title: str, status: Mapping[str, Any]) -> Table:
    table = Table(title=f"{title}: {status.get('phase', '')}", title_justify="left", expand=False)
    for name, _ in _fields(status):
        table.add_column(name, justify="right")
    table.add_column("done", min_width=20)
    done = ProgressBar(total=1.0, completed=float(status.get("share_done") or 0.0), width=20)
    table.add_row(*(value for _, value in _fields(status)), done)
    return table


def _number(value: float | None, form: str) -> str:
    return MISSING if value is None or value != value else form.format(value)

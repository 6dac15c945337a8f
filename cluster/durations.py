"""Durations as people read them, for the display, `status`, the report and the summary's table."""

from __future__ import annotations

MISSING = "–"


def duration(seconds: float | None) -> str:
    """`1 d 2:03:04`, `2:03:04` or `3:04` of a number of seconds; a dash of None."""
    if seconds is None:
        return MISSING
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    day = f"{days} d " if days else ""
    return day + (f"{hours}:{minutes:02d}:{rest:02d}" if hours or days else f"{minutes}:{rest:02d}")

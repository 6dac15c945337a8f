"""Owns what a killed vLLM leaves in /dev/shm, where a segment outlives every process that mapped it.

Python's own clean-up is a process of vLLM's group and is killed with it. Linux only: elsewhere nothing is found.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from pathlib import Path

_SEGMENT = "/dev/shm/psm_"
"""How names begin that Python's `multiprocessing.shared_memory` chose."""


def segments_of(group: int) -> set[Path]:
    """The segments that processes of the group have mapped."""
    found: set[Path] = set()
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it ended, or is another user's
            if os.getpgid(int(folder.name)) == group:
                found |= _segments_in((folder / "maps").read_text())
    return found


def remove(segments: Iterable[Path]) -> None:
    """Once the group has ended."""
    for segment in segments:
        segment.unlink(missing_ok=True)


def _segments_in(maps: str) -> set[Path]:
    names = (line.split(maxsplit=5)[-1] for line in maps.splitlines())
    return {Path(name) for name in names if name.startswith(_SEGMENT) and not name.endswith(" (deleted)")}

"""Painters that cannot be made at times."""

from __future__ import annotations

from pathlib import Path

from benchmarks.stand_ins import WaitingPainter
from contracts.config import RunConfig


class Homeless(WaitingPainter):
    """A timer that cannot be made while <runs_dir>/no-room exists, as on a machine whose GPU is gone."""

    def __init__(self, config: RunConfig) -> None:
        if Path(config.runs_dir, "no-room").exists():
            raise RuntimeError("no room for the model")
        super().__init__(config)

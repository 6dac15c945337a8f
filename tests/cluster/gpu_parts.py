"""Stand-ins that note which GPU Ray gave their process, as gpu-PID.json in the runs' folder."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from benchmarks.stand_ins import WaitingLearner, WaitingPainter
from contracts.config import RunConfig


class NotingPainter(WaitingPainter):
    def __init__(self, config: RunConfig) -> None:
        super().__init__(config)
        note(config, "actor")


class NotingLearner(WaitingLearner):
    def __init__(self, config: RunConfig, rank: int, world_size: int, score_gradient: Any = None) -> None:
        super().__init__(config, rank, world_size, score_gradient)
        note(config, "rank")


def note(config: RunConfig, role: str) -> None:
    told = {"role": role, "visible": os.environ.get("CUDA_VISIBLE_DEVICES")}
    Path(config.runs_dir, f"gpu-{os.getpid()}.json").write_text(json.dumps(told))

"""Learners that lose a rank at a chosen call: killed (SIGKILL) or stopped (SIGSTOP), as a machine would have it.

The faults of a run stand in <runs_dir>/faults-<name>.json as [method, step, rank, signal]; each strikes once.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.stand_ins import WaitingLearner
from contracts.config import RunConfig
from contracts.wire import StepReport
from learner.types import StepJob

Fault = tuple[str, int, int, str]


def write_faults(config: RunConfig, faults: Sequence[Fault]) -> None:
    """Before the run starts."""
    _file(config).write_text(json.dumps(list(faults)))


def strike(config: RunConfig, method: str, step: int, rank: int) -> None:
    """Send this process the signal of the first fault that is meant for this call and has not struck yet."""
    file = _file(config)
    faults = json.loads(file.read_text()) if file.exists() else []
    for number, (of_method, of_step, of_rank, name) in enumerate(faults):
        if (of_method, of_step, of_rank) == (method, step, rank) and _first(file.with_suffix(f".{number}")):
            os.kill(os.getpid(), getattr(signal, name))
            return


def _file(config: RunConfig) -> Path:
    return Path(config.runs_dir) / f"faults-{config.name}.json"


def _first(mark: Path) -> bool:
    try:
        os.close(os.open(mark, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    return True


def mortal_learner(config: RunConfig, rank: int, world_size: int, **options: Any) -> Any:
    """The real learner of a rank, faults included. A function, so that this module imports no torch."""
    from learner.rank import RankLearner

    class MortalLearner(RankLearner):
        def update(self, job: StepJob, *fetches: Any) -> StepReport:
            strike(self.config, "update", job.step, self.rank)
            return super().update(job, *fetches)

    return MortalLearner(config, rank, world_size, **options)


class MortalTimer(WaitingLearner):
    """A learner without a model, faults included."""

    def __init__(self, config: RunConfig, rank: int, world_size: int, score_gradient: Any = None) -> None:
        super().__init__(config, rank, world_size, score_gradient)
        self.config, self.rank = config, rank

    def update(self, job: StepJob, fetch: Any, fetch_embedding: Any) -> StepReport:
        strike(self.config, "update", job.step, self.rank)
        return super().update(job, fetch, fetch_embedding)

    def begin_save(self, folder: str | Path) -> Any:
        step = Path(folder).name.removeprefix(".step-").split(".")[0]
        strike(self.config, "save_state", int(step), self.rank)
        return super().begin_save(folder)

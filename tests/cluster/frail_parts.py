"""Stand-ins that fail: a learner whose vault loses a group, one short of memory, a painter that cannot paint.

Timers as in benchmarks/stand_ins.py, so that no test here waits for a model.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.stand_ins import WaitingLearner, WaitingPainter
from contracts.config import RunConfig
from contracts.errors import OutOfMemory
from contracts.wire import PromptTask, StepReport
from learner.types import StepJob

LOSES_AT, SHORT_AT = 20, 2


class LosingLearner(WaitingLearner):
    """Once, before step LOSES_AT, its vault loses one of the groups it is to read."""

    def __init__(self, config: RunConfig, rank: int, world_size: int, score_gradient: Any = None) -> None:
        super().__init__(config, rank, world_size, score_gradient)
        self.lost = False

    def update(self, job: StepJob, fetch: Any, fetch_embedding: Any) -> StepReport:
        if job.step == LOSES_AT and not self.lost:
            import ray

            self.lost = True
            ray.get(fetch.__self__.vaults["vault-0"].delete.remote(max(job.headers)))
        return super().update(job, fetch, fetch_embedding)


class ShortOfMemory(WaitingLearner):
    """Runs out of memory in a collective of step SHORT_AT unless its micro-batches are halved."""

    def __init__(self, config: RunConfig, rank: int, world_size: int, score_gradient: Any = None) -> None:
        super().__init__(config, rank, world_size, score_gradient)
        self.mark = Path(config.runs_dir) / "halved"
        self.halved = False

    def halve_micro_batches(self) -> None:
        self.halved = True
        self.mark.write_text("")

    def update(self, job: StepJob, fetch: Any, fetch_embedding: Any) -> StepReport:
        if job.step == SHORT_AT and not self.halved:
            raise OutOfMemory("learner rank 0 ran out of memory")
        return super().update(job, fetch, fetch_embedding)


class BrokenPainter(WaitingPainter):
    """Paints evaluations, and no group."""

    def denoise(self, task: PromptTask) -> PromptTask:
        raise RuntimeError("the brush is broken\nand here is much more about it")


class DriftingLearner(WaitingLearner):
    """Measures a KL that grows by 0.1 a step."""

    def update(self, job: StepJob, fetch: Any, fetch_embedding: Any) -> StepReport:
        report = super().update(job, fetch, fetch_embedding)
        return report.model_copy(update={"metrics": {**report.metrics, "kl": job.step / 10}})

"""One run of the demo for demo_time.py, in a process of its own, that keeps its weights every now and then.

    python -m benchmarks.demo_arms cluster|in_process FOLDER SEED SECONDS WHOLE_SECONDS

Leaves FOLDER/weights-<step>.safetensors, the weights that actors paint with after that step, and, once the run has
ended, FOLDER/arm.json with the training seconds of each. Keeping weights costs some ten milliseconds each time.
Does not own: what is done with the weights (demo_time.py).
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from contracts.config import RunConfig
from learner.rank import Published, RankLearner

CONFIG = "configs/demo.yaml"
CORES = 2
POINTS = 10
"""Marks of a whole run."""
FOLDER, INTERVAL = "SALON_BENCH_ARM", "SALON_BENCH_INTERVAL"


class Keeper:
    """Writes weights when their time has come: the first ones, then the first after each multiple of interval_s."""

    def __init__(self, folder: Path, interval_s: float) -> None:
        self.folder, self.interval_s = folder, interval_s
        self.due: float | None = None

    def is_due(self, now: float) -> bool:
        return self.due is None or now >= self.due

    def keep(self, now: float, step: int, arrays: Mapping[str, np.ndarray], dtypes: Mapping[str, str]) -> None:
        file = self.folder / f"weights-{step:06d}.safetensors"
        save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, file)
        with (self.folder / "points.jsonl").open("a") as lines:
            lines.write(json.dumps({"file": file.name, "time": now, "step": step, "dtypes": dict(dtypes)}) + "\n")
        self.due = now + self.interval_s if self.due is None else self.due
        while self.due <= now:
            self.due += self.interval_s

    def points(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / "points.jsonl").read_text().splitlines()]


class KeepingLearner(RankLearner):
    """A learner rank that keeps what it publishes, by this machine's clock."""

    def __init__(self, config: RunConfig, rank: int, world_size: int, **more: Any) -> None:
        super().__init__(config, rank, world_size, **more)
        self.keeper = Keeper(Path(os.environ[FOLDER]), float(os.environ[INTERVAL]))

    def snapshot(self, version: int, step: int, average: bool = False) -> Published | None:
        published = super().snapshot(version, step, average)
        if published is not None and self.keeper.is_due(time.time()):
            self.keeper.keep(time.time(), step, published.arrays, published.offer.dtypes)
        return published


def run_cluster(config: RunConfig, folder: Path, interval_s: float) -> dict[str, Any]:
    """As `python -m cluster train` runs it: one rollout actor, one rank and a reward server, a thread each."""
    from benchmarks.measuring import controller_run

    summary = controller_run(
        config, {"learner": "benchmarks.demo_arms:KeepingLearner"}, {FOLDER: str(folder), INTERVAL: str(interval_s)}
    )
    events = (folder / config.name / "events.jsonl").read_text().splitlines()
    began = next(event["time"] for event in map(json.loads, events) if event["event"] == "started")
    points = [{**point, "seconds": max(0.0, point["time"] - began)} for point in Keeper(folder, interval_s).points()]
    return {"points": points, "steps": summary["steps"], "images_trained": summary["images_trained"]}


def run_in_process(config: RunConfig, folder: Path, interval_s: float) -> dict[str, Any]:
    """The same functions one after the other in this process, on as many threads as there are cores."""
    from cluster.inprocess import InProcessRun, start_in_process
    from policy.weights import export_arrays

    keeper = Keeper(folder, interval_s)

    def keep(run: InProcessRun, *_: Any) -> None:
        if keeper.is_due(run.train_seconds):
            keeper.keep(run.train_seconds, run.steps, *export_arrays(run.painter.policy.trainable()))

    run = start_in_process(config)
    keep(run)
    run.train(keep)
    points = [{**point, "seconds": point["time"]} for point in keeper.points()]
    trained = run.steps * config.rollout.groups_per_step * config.rollout.group_size
    return {"points": points, "steps": run.steps, "images_trained": trained}


def arm_config(arm: str, folder: Path, seed: int, seconds: float, interval_s: float) -> RunConfig:
    """configs/demo.yaml without its own evaluations, and a little longer, so that the last mark is passed."""
    from benchmarks.learning import playground_config

    changes: dict[str, Any] = {
        "seed": seed, "stop.seconds": seconds + 0.3 * interval_s, "runs_dir": folder, "name": "run",
        "exist": "replace", "eval.before": False, "eval.num_prompts": 1, "eval.samples_to_save": 0,
    }  # fmt: skip
    return playground_config(CONFIG, changes | ({"learner.threads": CORES} if arm == "in_process" else {}))


def main(arm: str, folder: Path, seed: int, seconds: float, whole_s: float) -> None:
    """One run of `seconds`, with as much time between its marks as a whole run of whole_s has."""
    interval_s = whole_s / POINTS
    config = arm_config(arm, folder, seed, seconds, interval_s)
    run = {"cluster": run_cluster, "in_process": run_in_process}[arm]
    result = run(config, folder, interval_s)
    (folder / "arm.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4]), float(sys.argv[5]))

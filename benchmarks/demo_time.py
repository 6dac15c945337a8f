"""The demo's time to half its held-out gain: the whole distributed path against the in-process loop, on the same cores.

Both run configs/demo.yaml from the same weights for the same training seconds, one after the other, first in turn:

- cluster: as `make demo` runs it; one rollout actor, one learner rank and one reward server with a thread each,
  staleness at most 1. Set-up is left out of both clocks.
- in process: `cluster.inprocess`, the same functions one after the other in one process, which has both cores: torch
  on 2 threads (left to one thread, a core would stand idle). No group is stale there.

Both keep their weights at the same marks, and are judged when both have ended, on the same validation prompts and
seeds at the rollout's own schedule: evaluation takes no time from either. The gain is the cluster run's, from the base
to its end; half of it is reached where straight lines between the marks cross it, after the rising curve closest to
each run's accuracies is taken, so that one lucky mark does not decide. A cluster run that gains less than twice its
standard error has no time to half of it.

    python -m benchmarks run demo_time [--repeats SEEDS] [--seconds TRAINING] [--resume]
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.learning import ROOT
from benchmarks.measuring import first_reached, rising

ARMS = ("cluster", "in_process")
WORK = ROOT / "build" / "benchmarks" / "demo_time"
PROMPTS = 400


def run(repeats: int = 1, seconds: float = 300.0, resume: bool = False) -> dict[str, Any]:
    """Rows by seed: gain in points, seconds to half of it and steps of both, their ratio. repeats: seeds.

    resume: what an earlier call with the same seconds has finished is kept.
    """
    if not resume:
        shutil.rmtree(WORK, ignore_errors=True)
    rows = []
    for seed in range(repeats):
        arms = {arm: _arm(arm, seed, seconds) for arm in (ARMS if seed % 2 == 0 else ARMS[::-1])}
        curves = {arm: _curve(WORK / _name(arm, seed, seconds), result) for arm, result in arms.items()}
        rows.append({"seed": seed, **compare(curves), "steps": {arm: arms[arm]["steps"] for arm in ARMS}})
    return {"repeats": repeats, "seconds": seconds, "config": "configs/demo.yaml", "prompts": PROMPTS, "rows": rows}


def _name(arm: str, seed: int, seconds: float) -> str:
    return f"{arm}-seed-{seed}-{seconds:g}s"


def _arm(arm: str, seed: int, seconds: float) -> dict[str, Any]:
    """The run of an arm, in a process of its own, or what is there of it."""
    folder = WORK / _name(arm, seed, seconds)
    done = folder / "arm.json"
    if not done.is_file():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        command = [sys.executable, "-m", "benchmarks.demo_arms", arm, str(folder), str(seed), str(seconds)]
        subprocess.run(command, cwd=ROOT, check=True, env={**os.environ, "OMP_NUM_THREADS": _threads(arm)})
    found: dict[str, Any] = json.loads(done.read_text())
    return found


def _threads(arm: str) -> str:
    from benchmarks.demo_arms import CORES

    return str(CORES) if arm == "in_process" else "1"


def _curve(folder: Path, arm: dict[str, Any]) -> list[dict[str, float]]:
    """Accuracy and its standard error by training seconds; judged once, then kept beside the weights."""
    kept = folder / "curve.json"
    if not kept.is_file():
        kept.write_text(json.dumps(_judge(folder, arm["points"])))
    found: list[dict[str, float]] = json.loads(kept.read_text())
    return found


def _judge(folder: Path, points: list[dict[str, Any]]) -> list[dict[str, float]]:
    import torch
    from safetensors.numpy import load_file

    from actors.painter import Painter
    from benchmarks.demo_arms import arm_config
    from cluster.evaluate import evaluate_in_process, rollout_sampling
    from policy.weights import load_arrays

    config = arm_config("cluster", folder, seed=0, seconds=1.0)
    torch.set_num_threads(os.cpu_count() or 1)
    painter, curve = Painter(config), []
    for point in sorted(points, key=lambda point: point["seconds"]):
        load_arrays(painter.policy, load_file(folder / point["file"]), point["dtypes"])
        result = evaluate_in_process(config, painter, rollout_sampling(config), PROMPTS)
        curve.append(
            {
                "seconds": point["seconds"], "step": point["step"], "accuracy": result.accuracy,
                "standard_error": result.standard_error,
            }
        )  # fmt: skip
    return curve


def compare(curves: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    """gain (points), seconds of each arm to half of it (None: never), ratio cluster / in process, and the curves.

    ratio_is_bound: the in-process loop had not reached it when it ended, so that the true ratio is below `ratio`.
    """
    fitted = {arm: rising([point["accuracy"] for point in curve]) for arm, curve in curves.items()}
    start, end = fitted["cluster"][0], fitted["cluster"][-1]
    result: dict[str, Any] = {
        "gain": 100 * (end - start), "standard_error": 100 * curves["cluster"][-1]["standard_error"], "curves": curves,
        "half_seconds": dict.fromkeys(curves), "ratio": None, "ratio_is_bound": False,
    }  # fmt: skip
    if result["gain"] < 2 * result["standard_error"]:
        return result
    for arm, curve in curves.items():
        times = [point["seconds"] for point in curve]
        result["half_seconds"][arm] = first_reached(times, fitted[arm], (start + end) / 2)
    result["ratio_is_bound"] = result["half_seconds"]["in_process"] is None
    theirs = result["half_seconds"]["in_process"] or curves["in_process"][-1]["seconds"]
    result["ratio"] = result["half_seconds"]["cluster"] / theirs
    return result


def table(result: dict[str, Any]) -> str:
    """The figures as a Markdown table."""
    lines = [
        "| seed | gain, points | standard error | cluster, s to half | in process, s | ratio "
        "| steps, cluster | in process |",
        "|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in result["rows"]:
        cluster, in_process = (row["half_seconds"][arm] for arm in ARMS)
        ratio = "no gain to halve" if row["ratio"] is None else f"{row['ratio']:.2f}"
        lines.append(
            f"| {row['seed']} | {row['gain']:.1f} | {row['standard_error']:.1f} | {_seconds(cluster)} "
            f"| {_seconds(in_process)} | {'below ' if row['ratio_is_bound'] else ''}{ratio} "
            f"| {row['steps']['cluster']} | {row['steps']['in_process']} |"
        )
    return "\n".join(lines)


def _seconds(value: float | None) -> str:
    return "not reached" if value is None else f"{value:.0f}"

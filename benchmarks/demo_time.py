"""The demo's time to half its held-out gain: the whole distributed path against the in-process loop, on the same cores.

Both run configs/demo.yaml from the same weights for the same training seconds, one after the other, first in turn:

- cluster: as `make demo` runs it; one rollout actor, one learner rank and one reward server with a thread each,
  staleness at most 1. Set-up is left out of both clocks.
- in process: `cluster.inprocess`, the same functions one after the other in one process, which has both cores: torch
  on 2 threads (left to one thread, a core would stand idle). No group is stale there.

Both keep their weights every so often, and are judged when all runs have ended, on the same validation prompts and
seeds at the rollout's own schedule: evaluation takes no time from either. The gain is that of the cluster's runs from
the base to their end, the mean of the first few seeds, which are run whole: half the demo's time, in which it makes
nearly all of its gain. Other seeds are run for a part of the time, in which half of the gain is well passed. Half of it
is reached where straight lines between a run's marks cross it, after the rising curve closest to its accuracies is
taken, so that one lucky mark does not decide. A gain of less than twice its standard error has no half.

    python -m benchmarks run demo_time [--repeats SEEDS] [--seconds TRAINING] [--resume]
"""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.learning import ROOT
from benchmarks.measuring import first_reached, median, rising
from contracts.config import RunConfig

Curve = list[dict[str, float]]
ARMS = ("cluster", "in_process")
WORK = ROOT / "build" / "benchmarks" / "demo_time"
PROMPTS = 400
WHOLE = 3
"""Seeds that are run whole and tell the gain."""
PART = 0.4
"""Of the training seconds, for the other seeds."""


def run(repeats: int = 10, seconds: float = 180.0, resume: bool = False) -> dict[str, Any]:
    """The gain in points, rows by seed with seconds to half of it in both, and their ratio. repeats: seeds.

    seconds: of a whole run. resume: what an earlier call with the same seconds has finished is kept.
    """
    if not resume:
        shutil.rmtree(WORK, ignore_errors=True)
    lengths = [seconds if seed < WHOLE else PART * seconds for seed in range(repeats)]
    ran: list[dict[str, Any]] = []
    for seed, length in enumerate(lengths):
        order = ARMS if seed % 2 == 0 else ARMS[::-1]
        ran.append({arm: _arm(arm, seed, length, seconds) for arm in order})
    curves = _curves([{arm: WORK / _name(arm, seed, lengths[seed]) for arm in ARMS} for seed in range(repeats)])
    steps = [{arm: arms[arm]["steps"] for arm in ARMS} for arms in ran]
    return {
        "repeats": repeats, "lengths": lengths, "config": "configs/demo.yaml", "prompts": PROMPTS,
        **compare(curves, whole=min(WHOLE, repeats)), "steps_made": steps,
    }  # fmt: skip


def _name(arm: str, seed: int, seconds: float) -> str:
    return f"{arm}-seed-{seed}-{seconds:g}s"


def _arm(arm: str, seed: int, seconds: float, whole_s: float) -> dict[str, Any]:
    """The run of an arm for so many seconds, in a process of its own, or what is there of it."""
    folder = WORK / _name(arm, seed, seconds)
    done = folder / "arm.json"
    if not done.is_file():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        numbers = [str(number) for number in (seed, seconds, whole_s)]
        command = [sys.executable, "-m", "benchmarks.demo_arms", arm, str(folder), *numbers]
        subprocess.run(command, cwd=ROOT, check=True, env={**os.environ, "OMP_NUM_THREADS": _threads(arm)})
    found: dict[str, Any] = json.loads(done.read_text())
    return found


def _threads(arm: str) -> str:
    from benchmarks.demo_arms import CORES

    return str(CORES) if arm == "in_process" else "1"


def _curves(seeds: list[dict[str, Path]]) -> list[dict[str, Curve]]:
    """Of all runs, after them: judging takes as long as they do, and does not mind a busy machine."""
    from benchmarks.demo_arms import arm_config

    config = arm_config("cluster", WORK, seed=0, seconds=1.0, interval_s=1.0)
    folders = [folder for arms in seeds for folder in arms.values()]
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(os.cpu_count(), spawn, initializer=_one_thread) as pool:
        found = dict(zip(folders, pool.map(partial(_curve, config=config, prompts=PROMPTS), folders), strict=True))
    return [{arm: found[folder] for arm, folder in arms.items()} for arms in seeds]


def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)


def _curve(folder: Path, config: RunConfig, prompts: int) -> Curve:
    """Accuracy and its standard error by training seconds. Judged once, point by point, and kept beside the weights."""
    from safetensors.numpy import load_file

    from actors.painter import Painter
    from cluster.evaluate import evaluate_in_process, rollout_sampling
    from policy.weights import load_arrays

    points = sorted(json.loads((folder / "arm.json").read_text())["points"], key=lambda point: point["seconds"])
    kept = folder / "curve.json"
    curve: Curve = json.loads(kept.read_text()) if kept.is_file() else []
    painter = None
    for point in points[len(curve) :]:
        painter = painter or Painter(config)
        load_arrays(painter.policy, load_file(folder / point["file"]), point["dtypes"])
        result = evaluate_in_process(config, painter, rollout_sampling(config), prompts)
        curve.append(
            {
                "seconds": point["seconds"], "step": point["step"], "accuracy": result.accuracy,
                "standard_error": result.standard_error,
            }
        )  # fmt: skip
        kept.write_text(json.dumps(curve))
    return curve


def compare(curves: list[dict[str, Curve]], whole: int) -> dict[str, Any]:
    """gain and its standard_error (points), of the first `whole` seeds; rows; ratio (median and interval, or None).

    A row: half_seconds of each arm (None: not before it ended), ratio cluster / in process. bound: "below" where only
    the in-process loop had not come so far when it ended, "above" where only the cluster had not; the ratio is then
    the one of that moment. The median is left out when a seed's ratio is unknown or only above something.
    """
    ends = [_start_and_end(seed["cluster"]) for seed in curves[:whole]]
    gains = [end - start for start, end in ends]
    error = (sum(seed["cluster"][-1]["standard_error"] ** 2 for seed in curves[:whole]) ** 0.5) / whole
    gain = sum(gains) / whole
    rows = [_row(seed, gain / 2 if gain >= 2 * error else None) for seed in curves]
    known = [row["ratio"] for row in rows if row["ratio"] is not None and row["bound"] != "above"]
    return {
        "gain": 100 * gain, "standard_error": 100 * error, "rows": rows,
        "ratio": median(known) if len(known) == len(curves) else None,
    }  # fmt: skip


def _start_and_end(curve: Curve) -> tuple[float, float]:
    fitted = rising([point["accuracy"] for point in curve])
    return fitted[0], fitted[-1]


def _row(curves: dict[str, Curve], half_gain: float | None) -> dict[str, Any]:
    half: dict[str, float | None] = {}
    last = {}
    for arm, curve in curves.items():
        fitted, times = rising([point["accuracy"] for point in curve]), [point["seconds"] for point in curve]
        half[arm] = None if half_gain is None else first_reached(times, fitted, curve[0]["accuracy"] + half_gain)
        last[arm] = times[-1]
    missing = [arm for arm in ARMS if half[arm] is None]
    reached = {arm: half[arm] or last[arm] for arm in ARMS}
    return {
        "half_seconds": half, "curves": curves,
        "ratio": None if len(missing) == 2 else reached["cluster"] / reached["in_process"],
        "bound": {"cluster": "above", "in_process": "below"}[missing[0]] if len(missing) == 1 else None,
    }  # fmt: skip


def table(result: dict[str, Any]) -> str:
    """The figures as a Markdown table."""
    gain = f"{result['gain']:.1f} ± {result['standard_error']:.1f} points"
    lines = [
        "| seed | trained for, s | cluster, s to half the gain | in process, s | ratio | steps, cluster | in process |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    seeds = zip(result["rows"], result["lengths"], result["steps_made"], strict=True)
    for seed, (row, length, steps) in enumerate(seeds):
        cluster, in_process = (_seconds(row["half_seconds"][arm]) for arm in ARMS)
        ratio = "unknown" if row["ratio"] is None else f"{row['bound'] or ''} {row['ratio']:.2f}".strip()
        lines.append(
            f"| {seed} | {length:g} | {cluster} | {in_process} | {ratio} | {steps['cluster']} | {steps['in_process']} |"
        )
    return "\n".join([*lines, _median_line(result, gain)])


def _median_line(result: dict[str, Any], gain: str) -> str:
    halves = [[row["half_seconds"][arm] for row in result["rows"]] for arm in ARMS]
    seconds = [_seconds(None if None in times else median(times)["median"]) for times in halves]
    ratio = result["ratio"]
    shown = "unknown" if ratio is None else f"{ratio['median']:.2f} ({ratio['low']:.2f} – {ratio['high']:.2f})"
    return f"| median; the gain is {gain} | | {seconds[0]} | {seconds[1]} | {shown} | | |"


def _seconds(value: float | None) -> str:
    return "not reached" if value is None else f"{value:.0f}"

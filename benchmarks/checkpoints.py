"""What a checkpoint costs a run of the playground's model, and how long a stopped run takes to work again.

The demo, without its evaluations and in groups of four, writes a checkpoint every EVERY steps: seconds from its begin
to its end, what the learner's step waited for, bytes. Whether actors paint on meanwhile is told by the groups they
finish: in the time of a checkpoint, and in as much time after the step before it, which no checkpoint follows. Both
windows begin at the end of a step, because the rest of a step is no match: a new version lets actors begin new groups.
Counts of all windows are taken together, as one of them lasts for a few small groups; the interval is a bootstrap's
over the pairs.

Then the run is resumed with the command line and stopped with SIGTERM after its first step, again and again: seconds
from the start of the process to the first task of an actor and to the end of the first step.

    python -m benchmarks.checkpoints
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tempfile
import time
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.learning import ROOT, playground_config
from benchmarks.measuring import controller_run, median
from cluster.checkpoints import layout
from cluster.ledger.reader import Event, LedgerReader
from cluster.report.view import Row, histogram_increments
from contracts.config import RunConfig
from contracts.errors import ExitCode
from contracts.wire import GroupState

CONFIG = "configs/demo.yaml"
EVERY = 3
"""Steps between checkpoints: the second of them has no checkpoint before it or after it."""
RESUME_S = 300.0
"""Longest a resume may take to its first step, and a stop to its end."""
RESUMES = 10
"""At most: one takes as long as some checkpoints."""
RESAMPLES = 2000


def run(repeats: int = 40) -> dict[str, Any]:
    """rows: figures of `repeats` checkpoints and of at most RESUMES resumes; groups: finished during and between."""
    with tempfile.TemporaryDirectory() as folder:
        config = _config(folder, repeats)
        controller_run(config, {})
        root = Path(folder) / config.name
        figures, groups = of_checkpoints(root, repeats)
        resumes = [_resume(root) for _ in range(min(repeats, RESUMES))]
    rows = figures + [
        _figure(f"resume: from its start to {name}", "s", [resume[name] for resume in resumes])
        for name in ("the first task", "the first step")
    ]
    return {"repeats": repeats, "every_steps": EVERY, "rows": rows, "groups": groups}


def _config(folder: str, repeats: int) -> RunConfig:
    """The demo, with a few steps after the last checkpoint that is counted: a run's last groups are painted early."""
    changes = {
        "name": "checkpoints", "runs_dir": folder, "stop.steps": EVERY * (repeats + 1), "stop.seconds": "null",
        "rollout.groups_per_step": 20, "rollout.group_size": 4, "rollout.micro_batch": 4,
        "checkpoint.every_steps": EVERY, "checkpoint.keep_every": EVERY, "eval.before": False, "eval.num_prompts": 1,
        "eval.samples_to_save": 0, "telemetry.tensorboard": False, "telemetry.report": False,
    }  # fmt: skip
    return playground_config(CONFIG, changes)


def of_checkpoints(root: Path, number: int) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """(figures of the first `number` checkpoints of a run, groups finished during and between them)."""
    rows = _lines(root / "metrics.jsonl")
    written = [event for event in _lines(root / "events.jsonl") if event["event"] == "checkpoint"][:number]
    stalls = [mean for _, _, mean in histogram_increments(rows, "checkpoint_stall_seconds")][:number]
    if not len(written) == len(stalls) == number:
        raise ValueError(f"{len(written)} checkpoints and {len(stalls)} stalls in {root}, {number} were to be written")
    sizes = [_megabytes(layout.read(root / "checkpoints" / layout.folder_name(event["step"]))) for event in written]
    figures = [
        _figure("checkpoint: from its begin to its end", "s", [event["seconds"] for event in written]),
        _figure("checkpoint: what the learner's step waited for", "s", stalls),
        _figure("checkpoint: size", "MB", sizes),
    ]
    finished = sorted(event.at for event in _journal(root) if event.event == "generated")
    return figures, paintings(windows(written, rows), finished)


def windows(written: Sequence[Row], rows: Sequence[Row]) -> list[tuple[float, float, float]]:
    """(begin during a checkpoint, begin between two, length) of each pair of windows.

    written: events of checkpoints; rows: of metrics.jsonl, whose time is the end of their step. A pair is as long as
    its checkpoint, or as the step after the window between, if that is shorter.
    """
    ended = {int(row["step"]): float(row["time"]) for row in rows}
    found, free_from = [], 0.0
    for event in written:
        begin, before = float(event["time"]) - float(event["seconds"]), ended.get(int(event["step"]) - 1)
        if before is not None and before >= free_from:
            found.append((begin, before, min(float(event["seconds"]), begin - before)))
        free_from = float(event["time"])
    return found


def paintings(pairs: Sequence[tuple[float, float, float]], finished: Sequence[float]) -> dict[str, Any]:
    """Groups a second that actors finished in both kinds of window, their ratio with a 95 % interval (bootstrap).

    finished: when each group was, in order. A ratio is None where no group was finished between checkpoints.
    """
    counts = np.array([[_number(finished, start, start + length) for start in (during, between)]
                       for during, between, length in pairs]).reshape(-1, 2)  # fmt: skip
    seconds = sum(length for _, _, length in pairs)
    chosen = np.random.default_rng(0).integers(0, max(1, len(counts)), (RESAMPLES, len(counts)))
    drawn = counts[chosen].sum(axis=1)
    ratios = drawn[drawn[:, 1] > 0]
    low, high = np.quantile(ratios[:, 0] / ratios[:, 1], (0.025, 0.975)) if len(ratios) else (None, None)
    during, between = (int(total) for total in counts.sum(axis=0))
    return {
        "windows": len(pairs), "window_seconds": seconds,
        "during": during, "between": between,
        "during_per_s": during / seconds if seconds else None, "between_per_s": between / seconds if seconds else None,
        "ratio": {"value": during / between, "low": float(low), "high": float(high)} if between else None,
    }  # fmt: skip


def _number(finished: Sequence[float], start: float, end: float) -> int:
    return bisect_left(finished, end) - bisect_left(finished, start)


def _resume(root: Path) -> dict[str, float]:
    """Seconds of one resume, which is stopped again after its first step."""
    known, start = len(_lines(root / "metrics.jsonl")), time.time()
    command = [sys.executable, "-m", "cluster", "resume", str(root), "stop.steps=1000000"]
    with (root.parent / "resumes.log").open("a") as log:
        process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)
    try:
        while len(_lines(root / "metrics.jsonl")) <= known:
            if process.poll() is not None or time.time() - start > RESUME_S:
                raise RuntimeError(f"no step after a resume: {(root.parent / 'resumes.log').read_text()[-2000:]}")
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        if process.wait(RESUME_S) != ExitCode.STOPPED_RESUMABLE:
            raise RuntimeError(f"a stopped run ended with status {process.returncode}")
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
    tasks = [event.at for event in _journal(root) if event.event == GroupState.GENERATING.value and event.at >= start]
    return {"the first task": tasks[0] - start, "the first step": _lines(root / "metrics.jsonl")[known]["time"] - start}


def _journal(root: Path) -> list[Event]:
    with closing(LedgerReader(root / "ledger.sqlite")) as ledger:
        return ledger.journal()


def _lines(path: Path) -> list[Row]:
    """Whole lines of a JSONL file that may be being written."""
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


def _megabytes(checkpoint: layout.Checkpoint) -> float:
    files: Mapping[str, Mapping[str, Any]] = checkpoint.manifest["files"]
    return sum(entry["bytes"] for entry in files.values()) / 1e6


def _figure(what: str, unit: str, values: list[float]) -> dict[str, Any]:
    return {"what": what, "unit": unit, "times": len(values), "worst": max(values), **median(values)}


def table(result: dict[str, Any]) -> str:
    """The figures as a Markdown table."""
    lines = ["| what | times | median | 95 % interval | most |", "|:---|---:|---:|---:|---:|"]
    for row in result["rows"]:
        lines.append(
            f"| {row['what']}, {row['unit']} | {row['times']} | {row['median']:.3f} "
            f"| {row['low']:.3f} – {row['high']:.3f} | {row['worst']:.3f} |"
        )
    groups = result["groups"]
    for name, words in (("during", "during a checkpoint"), ("between", "in as much time between two")):
        rate = groups[f"{name}_per_s"]
        told = "unknown" if rate is None else f"{rate:.2f}"
        lines.append(f"| groups a second that actors finish {words} | {groups[name]} | {told} |  |  |")
    ratio = groups["ratio"]
    told = "unknown | " if ratio is None else f"{ratio['value']:.2f} | {ratio['low']:.2f} – {ratio['high']:.2f}"
    lines.append(f"| the former over the latter, pairs of windows | {groups['windows']} | {told} |  |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(json.dumps(run(), indent=1))

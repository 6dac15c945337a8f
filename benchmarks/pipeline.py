"""Throughput of the whole house over the bound of its slowest stage, with timers in the place of models.

A real controller, ledger, vault, dispatcher and weight store; 1, 8 and 64 rollout actors that wait instead of painting
and are the slowest stage; a learner that is busy for 80 % of a step. Weights are published after every step, while the
actors are in the middle of their groups, and the row says how many images that discarded (none).

At most (max_staleness + 1) * groups_per_step groups are live at once, so throughput is also at most that many over
the time from a prompt's admission to the publication of its step. With staleness 1 that leaves the house the learner's
idle 20 % for everything it adds between painting and publication. It takes some 30 ms of processor time a group, all
processes together: 64 actors that finish together ask for two seconds of it, on however many cores. Painting takes 0.5,
2 and 8 seconds at 1, 8 and 64 actors, still far below a real model's, give or take 5 % from group to group: actors in
lockstep would measure how two cores take 64 processes that wake at one instant.

Each figure is the median over windows of two consecutive steps of one run, with a 95 % interval of the median.

    python -m benchmarks.pipeline [ACTORS ...]
"""

from __future__ import annotations

import json
import sys
import tempfile
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks.measuring import controller_run, median
from contracts.config.load import config_from_tree

TARGET = 0.95
PAINT_S = {1: 0.5, 8: 2.0, 64: 8.0}
WARM_UP_STEPS = 2
STEPS_A_WINDOW = 2
STAND_INS = {"painter": "benchmarks.stand_ins:WaitingPainter", "learner": "benchmarks.stand_ins:WaitingLearner"}


def run(repeats: int = 10, actors: tuple[int, ...] = tuple(PAINT_S)) -> dict[str, Any]:
    """Rows by number of actors: efficiency (median, low, high), bound and measured groups/s, discarded images.

    repeats: windows of one run.
    """
    return {"repeats": repeats, "target": TARGET, "rows": [measure(number, repeats) for number in actors]}


def measure(actors: int, windows: int) -> dict[str, Any]:
    """One run with `actors` actors."""
    paint_s, groups = PAINT_S[actors], max(4, actors)
    with tempfile.TemporaryDirectory() as folder:
        config = config_from_tree(_tree(folder, actors, paint_s, groups, windows))
        summary = controller_run(config, STAND_INS)
        times = _step_times(Path(folder) / config.name / "metrics.jsonl")
    return _row(actors, paint_s, groups, times, summary)


def _tree(folder: str, actors: int, paint_s: float, groups: int, windows: int) -> dict[str, Any]:
    step_s = paint_s * groups / actors
    times = {"paint_s": paint_s, "jitter": 0.05, "update_s": 0.8 * step_s, "load_s": 0.002, "weight_mb": 1.0}
    return {
        "name": f"pipeline-{actors}",
        "runs_dir": folder,
        "model": {"path": "none"},
        "prompts": {"source": "benchmarks.stand_ins:Prompts", "options": times},
        "rollout": {"actors": actors, "groups_per_step": groups, "group_size": 4, "micro_batch": 4,
                    "cpus_per_actor": 0.01},
        "scorers": [{"name": "timer", "function": "benchmarks.stand_ins:score"}],
        "objective": {"name": "nft"},
        "learner": {"engine": "plain", "cpus_per_rank": 0.01},
        "checkpoint": {"every_steps": 5},
        "eval": {"before": False, "num_prompts": 1, "samples_to_save": 0},
        "telemetry": {"tensorboard": False, "report": False},
        "stop": {"steps": WARM_UP_STEPS + 1 + windows * STEPS_A_WINDOW},
    }  # fmt: skip


def _step_times(rows: Path) -> list[float]:
    return [json.loads(line)["time"] for line in rows.read_text().splitlines()]


def _row(actors: int, paint_s: float, groups: int, times: list[float], summary: dict[str, Any]) -> dict[str, Any]:
    bound = actors / paint_s
    steady = times[WARM_UP_STEPS:]
    seconds = [end - start for start, end in pairwise(steady[::STEPS_A_WINDOW])]
    shares = [STEPS_A_WINDOW * groups / (took * bound) for took in seconds]
    return {
        "actors": actors, "paint_s": paint_s, "groups_a_step": groups, "bound_groups_per_s": bound,
        "measured_groups_per_s": bound * median(shares)["median"], "efficiency": median(shares), "windows": len(shares),
        "discarded_by_weight_sync": summary["images_discarded_by_weight_sync"],
        "discarded": summary["images_discarded"], "max_staleness": summary["max_staleness_seen"],
    }  # fmt: skip


def table(result: dict[str, Any]) -> str:
    """The figures as a Markdown table."""
    lines = [
        "| actors | painting, s | bound, groups/s | measured | share of bound | 95 % interval | discarded by weights |",
        "|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in result["rows"]:
        share = row["efficiency"]
        lines.append(
            f"| {row['actors']} | {row['paint_s']:g} | {row['bound_groups_per_s']:g} "
            f"| {row['measured_groups_per_s']:.2f} | {share['median']:.3f} | {share['low']:.3f} – {share['high']:.3f} "
            f"| {row['discarded_by_weight_sync']} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    print(json.dumps(run(actors=tuple(int(arg) for arg in sys.argv[1:]) or tuple(PAINT_S)), indent=1))

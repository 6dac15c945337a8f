"""Throughput of the whole house over the bound of its slowest stage, with timers in the place of models.

A real controller, ledger, vault, dispatcher and weight store; 1, 8 and 64 rollout actors that wait instead of painting.
Weights are published after every step and reach the actors in the middle of their work; the report says how many
images that discarded (none). Each figure is the median over windows of consecutive steps of one run, with the
interval from the lowest to the highest.
"""

from __future__ import annotations

import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

from contracts.config.load import config_from_tree

WINDOWS = 10
STEPS_A_WINDOW = 2


def run(actors: tuple[int, ...] = (1, 8, 64)) -> dict[str, Any]:
    """Rows by number of actors: efficiency (median, low, high), bound and measured groups/s, discarded images."""
    return {"pipeline": [measure(number) for number in actors]}


def measure(actors: int) -> dict[str, Any]:
    """One run with `actors` actors; the actors are the slowest stage, the learner is busy for 80 % of a step."""
    import ray

    from cluster.controller import ControllerActor, Parts
    from cluster.driver import start_ray, worker_environment

    paint_s = 0.5 if actors <= 8 else 4.0
    groups = max(4, actors)
    with tempfile.TemporaryDirectory() as folder:
        config = config_from_tree(_tree(folder, actors, paint_s, groups))
        start_ray(config)
        try:
            parts = Parts("benchmarks.stand_ins:WaitingPainter", "benchmarks.stand_ins:WaitingLearner")
            environment = {"env_vars": worker_environment(config)}
            controller = ControllerActor.options(runtime_env=environment).remote(config, parts)
            summary = ray.get(controller.run.remote())
        finally:
            ray.shutdown()
        times = _step_times(Path(folder) / config.name / "metrics.jsonl")
    return _row(actors, paint_s, groups, times, summary)


def _tree(folder: str, actors: int, paint_s: float, groups: int) -> dict[str, Any]:
    step_s = paint_s * groups / actors
    times = {"paint_s": paint_s, "update_s": 0.8 * step_s, "load_s": 0.002, "weight_mb": 1.0}
    return {
        "name": f"pipeline-{actors}",
        "runs_dir": folder,
        "model": {"path": "none"},
        "prompts": {"source": "benchmarks.stand_ins:Prompts", "options": times},
        "rollout": {"actors": actors, "groups_per_step": groups, "group_size": 4, "micro_batch": 4,
                    "cpus_per_actor": 0.01},
        "scorers": [{"name": "timer", "function": "benchmarks.stand_ins:score"}],
        "objective": {"name": "nft"},
        "learner": {"engine": "plain", "cpus_per_rank": 0.01, "state_every_steps": 5},
        "eval": {"before": False, "num_prompts": 1, "samples_to_save": 0},
        "telemetry": {"tensorboard": False},
        "stop": {"steps": 3 + WINDOWS * STEPS_A_WINDOW},
    }  # fmt: skip


def _step_times(rows: Path) -> list[float]:
    return [json.loads(line)["time"] for line in rows.read_text().splitlines()]


def _row(actors: int, paint_s: float, groups: int, times: list[float], summary: dict[str, Any]) -> dict[str, Any]:
    bound = actors / paint_s
    steady = times[2:]
    rates = [
        STEPS_A_WINDOW * groups / (steady[i + STEPS_A_WINDOW] - steady[i])
        for i in range(0, WINDOWS * STEPS_A_WINDOW, STEPS_A_WINDOW)
        if i + STEPS_A_WINDOW < len(steady)
    ]
    shares = [rate / bound for rate in rates]
    return {
        "actors": actors, "bound_groups_per_s": bound, "measured_groups_per_s": statistics.median(rates),
        "efficiency": statistics.median(shares), "low": min(shares), "high": max(shares), "windows": len(shares),
        "discarded_by_weight_sync": summary["images_discarded_by_weight_sync"],
        "discarded": summary["images_discarded"], "max_staleness": summary["max_staleness_seen"],
    }  # fmt: skip


if __name__ == "__main__":
    import sys

    print(json.dumps(run(tuple(int(arg) for arg in sys.argv[1:]) or (1, 8, 64)), indent=1))

"""Actors lost while they have nothing to paint: no lease of theirs runs out, so new weights must find them."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from cluster.controller import Parts
from contracts.config import RunConfig
from contracts.config.load import config_from_tree
from tests.laws.run_kit import controller_of, events

TIMERS = Parts("benchmarks.stand_ins:WaitingPainter", "benchmarks.stand_ins:WaitingLearner")
STEPS = 8


def slow_learner(folder: Path, name: str, actors: int) -> RunConfig:
    """Actors that are idle most of the time."""
    return config_from_tree(
        {
            "name": name,
            "runs_dir": str(folder),
            "model": {"path": "none"},
            "prompts": {"source": "benchmarks.stand_ins:Prompts", "options": {"paint_s": 0.02, "update_s": 1.0}},
            "rollout": {"actors": actors, "groups_per_step": 2, "group_size": 4, "micro_batch": 4},
            "scorers": [{"name": "timer", "function": "benchmarks.stand_ins:score"}],
            "objective": {"name": "nft"},
            "learner": {"engine": "plain"},
            "weights": {"timeout_s": 5.0},
            "eval": {"before": False, "num_prompts": 4, "samples_to_save": 0},
            "telemetry": {"tensorboard": False, "report": False},
            "stop": {"steps": STEPS},
        }
    )


def run_and_signal(config: RunConfig, actor: str, number: int) -> dict[str, Any]:
    """The run's summary; `actor` gets the signal in the middle of the second step's update."""
    import ray

    controller = controller_of(config, TIMERS)
    result = controller.run.remote()
    rows = Path(config.runs_dir) / config.name / "metrics.jsonl"
    while not rows.is_file() or not rows.read_text():
        assert not ray.wait([result], timeout=0.1)[0], "the run ended before its first step"
    time.sleep(0.5)
    processes = events(config, "started")[0]["processes"]
    os.kill(next(process["pid"] for process in processes if process["name"] == actor), number)
    return ray.get(result)


@pytest.mark.usefixtures("shared_ray")
def test_an_idle_actor_that_hangs_is_replaced_and_holds_nobody_up(tmp_path: Path) -> None:
    config = slow_learner(tmp_path, "hung", actors=2)
    summary = run_and_signal(config, "actor-1", signal.SIGSTOP)
    assert summary["steps"] == STEPS
    assert [(event["actor"], event["killed"]) for event in events(config, "actor_restart")] == [("actor-1", True)]
    assert events(config, "weights_proven")[-1]["version"] == STEPS - 1
    assert summary["images_trained"] == STEPS * 2 * 4


@pytest.mark.usefixtures("shared_ray")
def test_an_only_actor_killed_while_idle_paints_on_with_the_newest_weights(tmp_path: Path) -> None:
    config = slow_learner(tmp_path, "killed", actors=1)
    summary = run_and_signal(config, "actor-0", signal.SIGKILL)
    assert (summary["steps"], summary["images_trained"]) == (STEPS, STEPS * 2 * 4)
    assert summary["max_staleness_seen"] <= 1

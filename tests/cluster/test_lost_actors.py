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
from tests.cluster.lost_ranks import write_faults
from tests.cluster.whole_run import books_of, rows, wait_for
from tests.laws.run_kit import controller_of, events

TIMERS = Parts("benchmarks.stand_ins:WaitingPainter", "benchmarks.stand_ins:WaitingLearner")
STEPS = 8


def slow_learner(folder: Path, name: str, actors: int, steps: int = STEPS) -> RunConfig:
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
            "stop": {"steps": steps},
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


@pytest.mark.long  # law 6 stops an actor, too
@pytest.mark.usefixtures("shared_ray")
def test_an_idle_actor_that_hangs_is_replaced_and_holds_nobody_up(tmp_path: Path) -> None:
    config = slow_learner(tmp_path, "hung", actors=2)
    summary = run_and_signal(config, "actor-1", signal.SIGSTOP)
    assert summary["steps"] == STEPS
    assert [(event["actor"], event["killed"]) for event in events(config, "actor_restart")] == [("actor-1", True)]
    assert events(config, "weights_proven")[-1]["version"] == STEPS - 1
    assert summary["images_trained"] == STEPS * 2 * 4


@pytest.mark.long  # law 6 kills actors, too, and new weights must find the one below that stays away
@pytest.mark.usefixtures("shared_ray")
def test_an_only_actor_killed_while_idle_paints_on_with_the_newest_weights(tmp_path: Path) -> None:
    config = slow_learner(tmp_path, "killed", actors=1)
    summary = run_and_signal(config, "actor-0", signal.SIGKILL)
    assert (summary["steps"], summary["images_trained"]) == (STEPS, STEPS * 2 * 4)
    assert summary["max_staleness_seen"] <= 1


@pytest.mark.usefixtures("shared_ray")
@pytest.mark.timeout(400)
def test_a_run_goes_on_without_an_actor_that_stays_away_and_takes_it_back(tmp_path: Path) -> None:
    """Its constructor fails, after which Ray restarts it no more; nor does a learner that is rebuilt wait for it."""
    import ray

    config = slow_learner(tmp_path, "away", actors=2, steps=1000)
    write_faults(config, [("update", 12, 0, "SIGKILL")])
    controller = controller_of(
        config, Parts("tests.cluster.broken_painters:Homeless", "tests.cluster.lost_ranks:MortalTimer")
    )
    result, no_room = controller.run.remote(), tmp_path / "no-room"
    wait_for(lambda: events(config, "started"), result)
    processes = events(config, "started")[0]["processes"]
    no_room.touch()
    os.kill(next(process["pid"] for process in processes if process["name"] == "actor-1"), signal.SIGKILL)
    wait_for(lambda: events(config, "actor_away") and events(config, "learner_rebuilt"), result)
    before = trained_steps(config)
    wait_for(lambda: trained_steps(config) >= before + 2, result)
    no_room.unlink()
    wait_for(lambda: events(config, "actor_back"), result)
    came_back = events(config, "actor_back")[0]["time"]
    wait_for(lambda: painters_since(config, came_back) == {"actor-0", "actor-1"}, result)
    ray.get(controller.stop.remote())
    summary = ray.get(result)
    assert (summary["outcome"], summary["actor_restarts"]) == ("stopped", 1)
    assert books_of(config).balanced


def trained_steps(config: RunConfig) -> int:
    return len(rows(config))


def painters_since(config: RunConfig, when: float) -> set[str]:
    """Actors that proved their weights after `when`, in seconds since the epoch."""
    return {event["actor"] for event in events(config, "weights_proven") if event["time"] > when}

"""Held-out evaluation on a schedule, beside training: it is seen everywhere, and may fail."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import ray

from cluster.controller import Parts
from contracts.config import RunConfig
from tests.cluster.whole_run import LEARNER, PAINTER, rows, timed_run
from tests.laws.run_kit import controller_of, events

pytestmark = pytest.mark.usefixtures("shared_ray")

STEPS = 5
SCHEDULE = {"before": False, "num_prompts": 2, "samples_to_save": 0, "every_steps": 1, "during_prompts": 3}


def run_and_watch(config: RunConfig) -> tuple[dict[str, Any], list[tuple[float | None, int | None]]]:
    """The summary, and what the display was given until the end: accuracies, and the steps that they are of."""
    controller = controller_of(config, Parts(PAINTER, LEARNER))
    result, seen = controller.run.remote(), []
    while not ray.wait([result], timeout=0.1)[0]:
        status = ray.get(controller.status.remote())
        seen.append((status.get("held_out"), status.get("held_out_step")))  # neither until it has begun
    return ray.get(result), seen


def in_mid_run(config: RunConfig) -> list[dict[str, Any]]:
    return [event for event in events(config, "evaluation") if event["tag"].startswith("step ")]


def test_accuracy_is_measured_on_schedule_and_seen_everywhere(tmp_path: Path) -> None:
    """That it changes nothing of what is trained is in law 2."""
    times = {"paint_s": 0.3, "update_s": 0.3}
    prompts = {"source": "benchmarks.stand_ins:Prompts", "options": times}
    config = timed_run(tmp_path, "watched", prompts=prompts, eval=SCHEDULE, stop={"steps": STEPS})
    summary, shown = run_and_watch(config)
    assert (summary["outcome"], summary["steps"]) == ("finished", STEPS)
    measured = in_mid_run(config)
    assert measured, "every step was due"
    assert {event["result"]["num_images"] for event in measured} == {3}
    steps = [int(event["tag"].removeprefix("step ")) for event in measured]
    assert steps == sorted(set(steps))
    assert set(steps) <= set(range(1, STEPS + 1))
    assert not events(config, "evaluation_failed")
    accuracies = [event["result"]["accuracy"] for event in measured]
    # Of step 1 at least until step 2's is there, and the last of them while the final evaluation paints.
    displayed = [(round(number, 4), step) for number, step in shown if number is not None and step]
    assert set(displayed) & set(zip(accuracies, steps, strict=True)), "the display shows it"
    assert any(round(row.get("eval_score/test", -1.0), 4) in accuracies for row in rows(config)), "so do metrics"


def test_an_evaluation_that_nobody_judges_is_told_and_training_goes_on(tmp_path: Path) -> None:
    scorers = [
        {"name": "timer", "function": "benchmarks.stand_ins:score"},
        {"name": "judge", "function": "tests.cluster.own_scorers:refuses", "held_out": True, "required": False},
    ]
    config = timed_run(tmp_path, "unjudged", scorers=scorers, eval=SCHEDULE, stop={"steps": STEPS})
    summary, shown = run_and_watch(config)
    assert (summary["outcome"], summary["steps"]) == ("finished", STEPS)
    failed = events(config, "evaluation_failed")
    assert failed
    assert "judge judged none of 3 images" in failed[0]["error"]
    assert not in_mid_run(config)
    assert (summary["held_out_strict_after"], summary["held_out_gain_points"]) == (None, None)
    assert {number for number, _ in shown} == {None}, "no number is shown for what was not measured"

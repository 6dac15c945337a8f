"""Guards in whole runs: a stop with its exit code and its checkpoint, a resume that remembers what the guards saw.

The real command line, driver and controller; timers in the place of models, whose learner drifts 0.1 a step.
"""

from __future__ import annotations

import io
import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from rich.console import Console

from cluster import cli, driver
from cluster.checkpoints.layout import RunState, newest_whole, write_run_state
from cluster.controller import Parts
from cluster.run_folder import RunFolder
from cluster.status import take_status
from cluster.status_view import render
from contracts.config import RunConfig, to_yaml
from contracts.config.load import config_from_tree
from contracts.errors import ExitCode
from tests.cluster.whole_run import books_of, folder_of, rows
from tests.laws.run_kit import events

pytestmark = pytest.mark.usefixtures("shared_ray")

PARTS = Parts("benchmarks.stand_ins:WaitingPainter", "tests.cluster.frail_parts:DriftingLearner")
STEPS = 8
HARD, EARLY = "limit/kl", "early"


def guarded(folder: Path) -> RunConfig:
    """Stops when the KL, 0.1 at step 1 and 0.1 more at each, was above 0.25 twice; warns above 0.15."""
    tree: dict[str, Any] = {
        "name": "guarded", "runs_dir": str(folder), "model": {"path": "none"},
        "prompts": {"source": "benchmarks.stand_ins:Prompts", "options": {"paint_s": 0.02, "update_s": 0.02}},
        "rollout": {"groups_per_step": 2, "group_size": 4, "micro_batch": 4, "cpus_per_actor": 0.5},
        "scorers": [{"name": "timer", "function": "benchmarks.stand_ins:score"}],
        "objective": {"name": "nft"}, "learner": {"engine": "plain", "cpus_per_rank": 0.5},
        "eval": {"before": False, "num_prompts": 1, "samples_to_save": 0}, "telemetry": {"tensorboard": False},
        "guards": [
            {"name": "limit", "metric": "kl", "max": 0.25, "patience": 2, "action": "stop"},
            {"name": "limit", "metric": "kl", "max": 0.15, "patience": 1, "label": EARLY},
        ],
        "stop": {"steps": STEPS},
    }  # fmt: skip
    return config_from_tree(tree)


def call(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> Result:
    """The command line, with timers in the place of models (which `validate` would refuse)."""
    monkeypatch.setattr(cli, "_mismatches", lambda _: [])
    monkeypatch.setattr(driver, "train", partial(driver_train, parts=PARTS, show=False))
    return CliRunner().invoke(cli.main, list(arguments))


driver_train = driver.train


def guard_state(config: RunConfig) -> tuple[int, dict[str, Any]]:
    """(step, guard state) of the newest checkpoint, which its digests prove."""
    checkpoint, problems = newest_whole(folder_of(config) / "checkpoints")
    assert checkpoint is not None
    assert problems == []
    return checkpoint.step, checkpoint.run_state().guard


def warnings(config: RunConfig) -> list[tuple[str, str, int]]:
    return [(event["guard"], event["warning"], event["step"]) for event in events(config, "guard_warned")]


def test_a_guard_stops_a_run_which_remembers_it_and_goes_on_with_another_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = guarded(tmp_path)
    (tmp_path / "run.yaml").write_text(to_yaml(config))

    stopped = call(monkeypatch, "train", str(tmp_path / "run.yaml"))
    assert stopped.exit_code == ExitCode.GUARD_STOP, stopped.output
    why = "guard stop: limit/kl: kl is 0.4, and above 0.25 for 2 steps in a row (step 4)"
    assert why in stopped.output
    assert f"resume {folder_of(config)}" in stopped.output
    assert guard_state(config) == (4, {
        HARD: {"name": "limit", "state": {"metric": "kl", "values": [0.3, 0.4]}, "warned": False},
        EARLY: {"name": "limit", "state": {"metric": "kl", "values": [0.4]}, "warned": True},
    })  # fmt: skip
    summary = json.loads((folder_of(config) / "summary.json").read_text())
    assert (summary["outcome"], summary["steps"]) == (why, 4)
    assert warnings(config) == [(EARLY, "begins", 2)]
    assert [row[f"guard_warnings_total/{EARLY}"] for row in rows(config)] == [0, 0, 1, 1]
    assert [row[f"guard_warnings_total/{HARD}"] for row in rows(config)] == [0, 0, 0, 0]
    check_shown(config, why)

    again = call(monkeypatch, "resume", str(folder_of(config)))
    assert again.exit_code == ExitCode.GUARD_STOP, again.output
    assert guard_state(config)[0] == 5, "the step before was remembered: one more above the limit is enough"

    finished = call(monkeypatch, "resume", str(folder_of(config)), "guards.0.max=9", "guards.1.max=9")
    assert finished.exit_code == ExitCode.FINISHED, finished.output
    summary = json.loads((folder_of(config) / "summary.json").read_text())
    assert (summary["outcome"], summary["steps"]) == ("finished", STEPS)
    assert warnings(config) == [(EARLY, "begins", 2), (EARLY, "over", 6)]
    assert [(event["guard"], event["step"]) for event in events(config, "guard_stopped")] == [(HARD, 4), (HARD, 5)]
    assert [row["step"] for row in rows(config)] == list(range(1, STEPS + 1))
    assert books_of(config).balanced


def check_shown(config: RunConfig, why: str) -> None:
    """status and report say who stopped the run and why; the report has the guards' words."""
    status = take_status(RunFolder(folder_of(config)))
    assert (status["state"], status["outcome"]) == ("stopped", why)
    shown = io.StringIO()
    Console(width=200, file=shown).print(render(status))
    assert why in shown.getvalue()
    page = (folder_of(config) / "report.html").read_text()
    assert why in page
    assert "a guard stopped the run" in page
    assert "No guard spoke" not in page


def test_a_checkpoint_from_before_there_were_guards_is_read(tmp_path: Path) -> None:
    write_run_state(tmp_path, RunState(3, 7, 6, 1.0, credit={"rows": 1}))
    old = json.loads((tmp_path / "run.json").read_text())
    del old["guard"]
    assert RunState(**old).guard == {}

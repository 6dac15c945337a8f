"""`python -m benchmarks run`: what one benchmark does to the others' figures, what is written down. No measuring."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from click.testing import CliRunner, Result

from benchmarks import __main__ as command
from benchmarks import report

MACHINE = dict.fromkeys((*report.PACKAGES, "processor", "cores", "system", "python"), "1") | {"memory_gb": 8}
STATE = {"machine": MACHINE, "busy_before": 0.0, "measured_on": "2026-01-02"}
ROW = {"median": 1.25, "low": 1.0, "high": 1.5}
ROLLOUT = {
    "repeats": 15, "target": 1.05, "steps": 10,
    "rows": [{"images": 8, "guidance": 1.0, "wall": ROW, "cpu": ROW, "painter_seconds": 0.3, "bare_seconds": 0.2}],
}  # fmt: skip
UPDATE = {
    "repeats": 15, "target": 1.08,
    "rows": [{"engine": "plain", "bare": "torch", "objective": "grpo", "forwards": 6, "wall": ROW, "cpu": ROW,
              "update_seconds": 0.5, "bare_seconds": 0.4}],
}  # fmt: skip


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What each benchmark 'measures': a result, or the failure it ends with."""
    outcomes: dict[str, Any] = {"rollout": ROLLOUT, "update": UPDATE}

    def measure(name: str, options: dict[str, Any], limit_s: float) -> dict[str, Any]:
        assert limit_s == report.SECTIONS[name].limit_s
        outcome = outcomes[name]
        if isinstance(outcome, Exception):
            raise outcome
        return {**outcome, **STATE}

    monkeypatch.setattr(command, "in_own_process", measure)
    monkeypatch.setattr(command.signal, "signal", lambda *_: None)  # the tests' own process keeps its handlers
    return outcomes


def run(docs: Path, *arguments: str) -> Result:
    return CliRunner().invoke(command.main, ["run", *arguments, "--docs", str(docs)])


def written(docs: Path) -> dict[str, Any]:
    file = docs / "benchmarks.json"
    return json.loads(file.read_text()) if file.is_file() else {}


def test_a_failure_costs_no_other_benchmark_its_figures(measured: dict[str, Any], tmp_path: Path) -> None:
    measured["rollout"] = command.BenchmarkFailed("failed with exit status 1")
    result = run(tmp_path, "rollout", "update")
    assert result.exit_code == 1
    assert "python -m benchmarks run rollout" in result.output
    assert list(written(tmp_path)) == ["update"]
    assert "1.250" in (tmp_path / "benchmarks.md").read_text()


def test_one_run_alone_keeps_the_others_and_what_people_wrote(measured: dict[str, Any], tmp_path: Path) -> None:
    assert run(tmp_path, "rollout", "update").exit_code == 0
    page = tmp_path / "benchmarks.md"
    page.write_text(page.read_text().replace("# Benchmarks", "# Benchmarks, with a remark"))
    measured["update"] = {**UPDATE, "repeats": 30}
    assert run(tmp_path, "update").exit_code == 0
    assert written(tmp_path)["rollout"]["repeats"] == 15
    assert written(tmp_path)["update"]["repeats"] == 30
    assert "with a remark" in page.read_text()
    assert page.read_text().count("## ") == 2


@pytest.mark.parametrize(("repeats", "is_written"), [(9, False), (10, True), (15, True)])
def test_too_few_repeats_are_not_written_down(
    repeats: int, is_written: bool, measured: dict[str, Any], tmp_path: Path
) -> None:
    result = run(tmp_path, "rollout", "--repeats", str(repeats))
    assert result.exit_code == 0
    assert ("rollout" in written(tmp_path)) == is_written
    assert ("nothing is written down" in result.output) != is_written


@pytest.mark.parametrize(
    ("name", "options", "trial"),
    [
        ("demo_time", {}, False), ("demo_time", {"seconds": 60.0}, True), ("demo_time", {"resume": True}, False),
        ("ppo_critic", {"repeats": 2}, False), ("ppo_critic", {"steps": 5}, True),
    ],
)  # fmt: skip
def test_whole_runs_count_when_they_are_as_long_as_they_should_be(
    name: str, options: dict[str, Any], trial: bool
) -> None:
    assert command.is_trial(name, options) is trial


def test_an_option_that_a_named_benchmark_lacks_is_refused_before_anything_runs(
    measured: dict[str, Any], tmp_path: Path
) -> None:
    result = run(tmp_path, "update", "rollout", "--seconds", "60")
    assert result.exit_code == 2
    assert "--seconds" in result.output
    assert not written(tmp_path)


def test_a_page_says_so_when_the_machine_was_busy_and_time_matters() -> None:
    busy = {**STATE, "busy_before": 0.7}
    assert "The machine was busy" in report.section("rollout", {**ROLLOUT, **busy})
    learned = {"repeats": 1, "steps": 100, "config": "c", "rows": []}
    section = report.section("ppo_critic", {**learned, **busy})
    assert "busy" not in section
    assert "1 repeat, 100 steps each" in section


def test_a_benchmark_that_hangs_is_ended_with_what_it_started(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The interpreter is replaced by a shell that starts a child and waits for ever, deaf to a polite request."""
    deaf = tmp_path / "python"
    deaf.write_text(f"#!/bin/sh\ntrap '' INT\nsleep 600 &\necho $! >{tmp_path}/child\nwait\nsleep 600\n")
    deaf.chmod(0o755)
    monkeypatch.setattr(command.sys, "executable", str(deaf))
    monkeypatch.setattr(command.report, "machine_now", dict)
    monkeypatch.setattr(command, "ENDING_S", 0.2)
    with pytest.raises(command.BenchmarkFailed, match="no end within 3 s"):
        command.in_own_process("rollout", {}, limit_s=3)
    child = int((tmp_path / "child").read_text())
    assert not is_alive(child)


def is_alive(pid: int, patience: int = 100) -> bool:
    """Whether a process still runs after it was killed; the kernel may take a moment."""
    for _ in range(patience):
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return False
        time.sleep(0.05)
    return True


def test_a_failing_benchmark_names_its_exit_status(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command.sys, "executable", "false" if os.path.exists("/bin/false") else "/usr/bin/false")
    monkeypatch.setattr(command.report, "machine_now", dict)
    with pytest.raises(command.BenchmarkFailed, match="exit status 1"):
        command.in_own_process("rollout", {}, limit_s=30)

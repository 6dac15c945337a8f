"""The soak's notes and tables: which fault comes when, what an interrupted soak keeps, what the page says. No run."""

from __future__ import annotations

import json
import signal
import sys
from dataclasses import asdict
from pathlib import Path

import psutil
import pytest

from benchmarks.faults import FAULTS, RunUnderFire, fault_name
from benchmarks.soak import Notes, fault_at, make_config
from benchmarks.soak_report import memory_rows, recovery_rows, telemetry_rows, timing_rows, write_docs

SLEEP = [sys.executable, "-c", "import time; time.sleep(60)"]


def memory(mb_an_hour: float, hours: float = 1.0) -> list[dict[str, object]]:
    """A sample a minute: a process that fills 50 MB at its start and then grows by so much."""
    minutes = range(int(60 * hours))
    return [{"seconds": 60.0 * m, "mb": {"vault": [10.0, 100 + min(m, 5) * 10 + mb_an_hour * m / 60]}} for m in minutes]


@pytest.mark.parametrize("seed", [0, 1])
def test_every_fault_strikes_once_before_any_strikes_twice(seed: int) -> None:
    struck = [fault_at(seed, index) for index in range(3 * len(FAULTS))]
    for deck in range(3):
        assert sorted(struck[deck * len(FAULTS) :][: len(FAULTS)]) == sorted(FAULTS)
    assert struck[: len(FAULTS)] != struck[len(FAULTS) : 2 * len(FAULTS)]


def test_a_soak_that_was_ended_goes_on_with_its_own_notes_alone(tmp_path: Path) -> None:
    notes = Notes(seed=3, faults=[{"fault": "actor SIGKILL", "seconds": 2.0}], seconds=9.0, looks=7)
    notes.save(tmp_path / "soak.json")
    assert Notes.load(tmp_path / "soak.json", 3) == notes
    assert Notes.load(tmp_path / "soak.json", 4) == Notes(seed=4)
    assert Notes.load(tmp_path / "none.json", 3) == Notes(seed=3)


def test_a_driver_left_behind_is_ended_before_another_starts(tmp_path: Path) -> None:
    runs = [RunUnderFire(SLEEP, SLEEP, tmp_path / "ledger", tmp_path / "soak.log", tmp_path)]
    try:
        assert psutil.pid_exists(runs[0].process.pid)
        runs.append(RunUnderFire(SLEEP, SLEEP, tmp_path / "ledger", tmp_path / "soak.log", tmp_path))
        assert runs[0].process.wait(10) == -signal.SIGKILL
        assert runs[1].process.poll() is None
    finally:
        for run in runs:
            run.end()


def test_the_quiet_run_does_not_replace_the_one_under_fire(tmp_path: Path) -> None:
    under_fire, quiet = (make_config(tmp_path, tmp_path, 0, name) for name in ("soak", "soak-quiet"))
    assert under_fire.name != quiet.name
    limits = [under_fire.rollout.lease_s, under_fire.learner.hang_timeout_s]
    assert all(under_fire.cluster.hang_timeout_s < limit for limit in limits)


def test_recovery_is_told_by_fault_and_for_all() -> None:
    names = [fault_name(FAULTS[1]), fault_name(FAULTS[0])]
    faults = [{"fault": name, "seconds": s} for name, s in zip(2 * names, [4.0, 1.0, 8.0, 2.0], strict=True)]
    assert recovery_rows(faults) == [
        [names[1], "2", "1.5", "2.0"], [names[0], "2", "6.0", "8.0"], ["all", "4", "3.0", "8.0"],
    ]  # fmt: skip
    assert recovery_rows([]) == []


def test_a_leak_is_told_from_what_a_process_fills_at_its_start() -> None:
    (flat,), (leak,) = memory_rows(memory(0.0)), memory_rows(memory(12.0))
    assert flat[-1] == "+0.0"
    assert leak[-1] == "+12.0"
    assert flat[1:-1] == ["150"] * 5
    assert memory_rows([]) == []


def test_the_page_keeps_its_words_and_gets_the_tables(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "before\n<!-- soak:begin -->\nold\n<!-- soak:end -->\nbetween\n<!-- quiet:begin -->\n<!-- quiet:end -->\n"
    )
    notes = Notes(seed=0, faults=[{"fault": "actor SIGKILL", "seconds": 2.0}], memory=memory(0.0), seconds=3600.0)
    write_docs(asdict(notes), tmp_path, page, quiet=False)
    text = page.read_text()
    assert text.startswith("before\n<!-- soak:begin -->\n")
    assert text.endswith("<!-- soak:end -->\nbetween\n<!-- quiet:begin -->\n<!-- quiet:end -->\n")
    assert "| actor SIGKILL | 1 | 2.0 | 2.0 |" in text
    assert "1 faults in 1.0 h" in text
    assert "old" not in text


def test_times_of_checkpoints_and_resumes_come_from_the_runs_own_record(tmp_path: Path) -> None:
    events = [
        {"event": "started", "seconds": 9.0}, {"event": "checkpoint", "seconds": 0.5}, {"event": "resumed"},
        {"event": "started", "seconds": 4.0}, {"event": "learner_rebuilt", "seconds": 3.0},
    ]  # fmt: skip
    (tmp_path / "events.jsonl").write_text("\n".join(map(json.dumps, events)) + '\n{"event": "che')
    seen = [(0, None), (1, 0.01), (1, 0.01), (3, 0.03), (0, None), (1, 0.05), (1, 0.05)]  # (0, None): started anew
    rows = [
        {f"checkpoint_stall_seconds/{key}": value for key, value in (("count", n), ("mean", mean)) if value}
        for n, mean in seen
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    told = {row[0].partition(",")[0]: row[1:] for row in timing_rows(tmp_path)}
    assert told["checkpoint"] == ["1", "0.500", "0.500"]
    stalls = [0.01, 0.04, 0.04, 0.05]  # one a checkpoint: 0.01, two whose mean makes 0.03 of all three, 0.05
    assert told["stall of the learner's step by a checkpoint"] == ["4", "0.040", f"{max(stalls):.3f}"]
    assert told["resume"] == ["1", "4.000", "4.000"]
    assert told["rebuild of the learner's ranks"] == ["1", "3.000", "3.000"]


def test_the_share_of_telemetry_is_the_one_that_was_benchmarked(tmp_path: Path) -> None:
    row = {"actors": 8, "step_s": 2.0, "telemetry_s": {"median": 0.01}, "trace_s": {"median": 0.002}, "share": 0.005}
    (tmp_path / "figures.json").write_text(json.dumps({"trace": {"rows": [row]}}))
    assert telemetry_rows(tmp_path / "figures.json") == [["controller of 8 actors", "2", "10.00", "2.00", "0.50%"]]
    assert telemetry_rows(tmp_path / "none.json") == []

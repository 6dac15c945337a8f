"""What the benchmark of checkpoints makes of a run's record: one stall a checkpoint, pairs of windows, who painted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import checkpoints, report
from cluster.checkpoints import layout
from cluster.checkpoints.layout import RunState
from cluster.ledger import Ledger


def step_row(step: int, stalls: list[float]) -> dict[str, Any]:
    """Steps end every 10 s; the row is written before the step's own checkpoint begins."""
    row: dict[str, Any] = {"step": step, "time": 10.0 * step}
    if stalls:
        name = "checkpoint_stall_seconds"
        row |= {f"{name}/count": len(stalls), f"{name}/mean": sum(stalls) / len(stalls)}
    return row


def checkpoint_event(step: int, seconds: float) -> dict[str, Any]:
    return {"event": "checkpoint", "step": step, "seconds": seconds, "time": 10.0 * step + seconds}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A run folder with checkpoints of steps 3, 6 and 9, of which the first stalled 1 s, the second 2 s."""
    stalls = {3: 1.0, 6: 2.0, 9: 6.0}
    rows = [step_row(step, [took for at, took in stalls.items() if at < step]) for step in range(1, 11)]
    events = [{"event": "started"}, *(checkpoint_event(step, 4.0) for step in stalls)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 11, "ti')
    (tmp_path / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    for step in stalls:
        folder = tmp_path / "checkpoints" / layout.folder_name(step)
        folder.mkdir(parents=True)
        (folder / "param").write_bytes(bytes(1_000_000 * step))
        layout.write_manifest(folder, RunState(step, 0, 0, 0.0), {"param": (1_000_000 * step, "0" * 64)})
    Ledger(tmp_path / "ledger.sqlite").close()
    return tmp_path


def test_each_checkpoint_has_its_own_stall_time_and_size(root: Path) -> None:
    figures, groups = checkpoints.of_checkpoints(root, 2)
    whole, stall, size = ((row["median"], row["worst"], row["times"]) for row in figures)
    assert whole == (4.0, 4.0, 2)
    assert stall == (1.5, pytest.approx(2.0), 2)
    assert size == (4.5, 6.0, 2)
    assert groups["ratio"] is None, "nobody has painted"
    with pytest.raises(ValueError, match="4 were to be written"):
        checkpoints.of_checkpoints(root, 4)


def test_windows_begin_at_the_end_of_a_step_and_are_as_long() -> None:
    rows = [step_row(step, []) for step in range(1, 12)]
    written = [checkpoint_event(3, 4.0), checkpoint_event(6, 25.0), checkpoint_event(9, 1.0)]
    # The second takes longer than a step: its windows are a step long. It is still being written after step 8.
    assert checkpoints.windows(written, rows) == [(30.0, 20.0, 4.0), (60.0, 50.0, 10.0)]


@pytest.mark.parametrize(("during", "ratio"), [([], 0.0), ([30.5], 0.5), ([30.5, 32.0], 1.0)])
def test_actors_that_a_checkpoint_stalls_are_seen(during: list[float], ratio: float) -> None:
    between = [20.0, 23.9]
    found = checkpoints.paintings([(30.0, 20.0, 4.0)], sorted([*between, 24.0, 34.0, *during]))
    assert (found["during"], found["between"], found["window_seconds"]) == (len(during), 2, 4.0)
    assert found["between_per_s"] == 0.5
    assert found["ratio"] == {"value": ratio, "low": ratio, "high": ratio}


def test_the_interval_of_the_ratio_comes_from_the_pairs() -> None:
    """Half of the pairs with one group in each window, half with one between alone: 0.5, give or take chance."""
    pairs = [(100.0 * pair + 10, 100.0 * pair, 1.0) for pair in range(40)]
    finished = sorted([100.0 * pair for pair in range(40)] + [100.0 * pair + 10 for pair in range(0, 40, 2)])
    ratio = checkpoints.paintings(pairs, finished)["ratio"]
    assert ratio["value"] == 0.5
    spread = 1.96 * (0.25 / 40) ** 0.5  # a binomial's
    assert ratio["low"] == pytest.approx(0.5 - spread, abs=0.04)
    assert ratio["high"] == pytest.approx(0.5 + spread, abs=0.04)


@pytest.mark.parametrize("finished", [[], [20.0, 30.0]])
def test_the_table_tells_all_of_it(root: Path, finished: list[float]) -> None:
    figures, _ = checkpoints.of_checkpoints(root, 3)
    groups = checkpoints.paintings([(30.0, 20.0, 4.0)], finished)
    lines = checkpoints.table({"repeats": 3, "rows": figures, "groups": groups}).splitlines()
    assert len(lines) == 2 + len(figures) + 3
    assert {line.count("|") for line in lines} == {6}
    assert ("unknown" in lines[-1]) == (not finished)


def test_the_run_that_is_measured_makes_only_steps_and_checkpoints(tmp_path: Path) -> None:
    config = checkpoints._config(str(tmp_path), 10)
    assert (config.stop.steps, config.stop.seconds) == (33, None)
    assert not config.eval.before
    assert config.checkpoint.keep_every == config.checkpoint.every_steps == 3, "every one stays to be weighed"
    assert "checkpoints" in report.NAMES

"""A run whose folder is at a URL, killed together with its machine's local folder, resumed from the URL alone."""

from __future__ import annotations

import json
import random
import shutil
import sys
import time
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from benchmarks.faults import FAULTS, RunUnderFire
from cluster.inprocess import start_in_process
from cluster.ledger.reader import LedgerReader
from contracts.config import to_yaml
from contracts.errors import ExitCode
from tests.laws.run_kit import state_tensors, tiny_config

KILL_EVERYTHING = next(fault for fault in FAULTS if fault[0] == "everything" and fault[1].name == "SIGKILL")
PATIENCE_S = 300.0


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_killed_run_goes_on_from_its_url_though_its_local_folder_is_gone(
    tiny_model_folder: Path, tmp_path: Path, repo_root: Path
) -> None:
    """As on another machine: from the newest checkpoint, to the weights of a run that nothing happened to."""
    bucket = tmp_path / "bucket"
    config = tiny_config(
        tiny_model_folder, tmp_path, runs_dir=bucket.as_uri(), checkpoint__every_steps=2, stop__steps=500,
        learner__ema={"decay": 0.5},
    )  # fmt: skip
    file = tmp_path / "run.yaml"
    file.write_text(to_yaml(config))
    at_url, cluster = bucket / config.name, [sys.executable, "-m", "cluster"]
    run = RunUnderFire(
        [*cluster, "train", str(file)], [], at_url / "ledger.sqlite", tmp_path / "driver.log", repo_root
    )  # fmt: skip
    try:
        wait_for_checkpoint(run, at_url, 2)
        run.strike(KILL_EVERYTHING, random.Random(0))
        run.process.wait(60)
    finally:
        run.end()
    workplace = Path(json.loads((at_url / "manifest.json").read_text())["workplace"]["path"])
    assert (workplace / "ledger.sqlite").is_file()
    assert not workplace.is_relative_to(tmp_path)
    shutil.rmtree(workplace)
    steps = newest_at(at_url) + 2
    again = RunUnderFire(
        [*cluster, "resume", f"{bucket.as_uri()}/{config.name}", f"stop.steps={steps}"], [],
        at_url / "ledger.sqlite", tmp_path / "resumed.log", repo_root,
    )  # fmt: skip
    try:
        assert again.process.wait(PATIENCE_S) == ExitCode.FINISHED, (tmp_path / "resumed.log").read_text()[-4000:]
    finally:
        again.end()

    summary = json.loads((at_url / "summary.json").read_text())
    assert (summary["outcome"], summary["steps"]) == ("finished", steps)
    with closing(LedgerReader(at_url / "ledger.sqlite")) as ledger:
        books, rows = ledger.books(), ledger.rows()
    assert books.balanced
    assert (books.groups_trained, books.discarded, books.alive) == (2 * steps, 0, 0)
    assert [row.position for row in rows] == list(range(len(rows)))  # no prompt left out, none twice
    resumed = [json.loads(line) for line in (at_url / "events.jsonl").read_text().splitlines()]
    assert [event["step"] for event in resumed if event["event"] == "resumed"] == [steps - 2]
    reference = start_in_process(config)
    for _ in range(steps):
        reference.step()
    reference.learner.save_state(tmp_path / "reference")
    found = state_tensors(at_url / "checkpoints" / f"step-{steps:06d}")
    expected = state_tensors(tmp_path / "reference")
    assert found.keys() == expected.keys()
    assert [name for name in expected if not np.array_equal(found[name], expected[name])] == []


def newest_at(run: Path) -> int:
    """Step of the newest checkpoint there that is whole; 0 without one."""
    whole = (run / "checkpoints").glob("step-*/manifest.json")
    return max((int(path.parent.name.removeprefix("step-")) for path in whole), default=0)


def wait_for_checkpoint(run: RunUnderFire, at_url: Path, step: int) -> None:
    ends = time.monotonic() + PATIENCE_S
    while newest_at(at_url) < step:
        assert run.process.poll() is None, "the run has ended"
        assert time.monotonic() < ends, f"no checkpoint of step {step} within {PATIENCE_S:.0f} s"
        time.sleep(0.05)

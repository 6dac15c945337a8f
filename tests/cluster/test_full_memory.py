"""Another program takes a node's memory: Ray ends processes of the run, and the run goes on from what it has kept.

What Ray's error means to each who may meet it: test_deaths.py.
"""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import psutil
import pytest

from benchmarks.faults import RunUnderFire, Watch, recover
from contracts.errors import ExitCode
from tests.laws.test_law_06_a_crash_costs_seconds import exact_config, start

ROOM = 3 * 2**30
MOST = 8 * 2**30
CGROUP = Path("/sys/fs/cgroup/memory.max")


def processes(run: RunUnderFire) -> set[int]:
    return {process.pid for process in run.processes("everything")}


def fill_memory_until_one_dies(run: RunUnderFire) -> None:
    """The memory is free again when this returns."""
    before, held, deadline = processes(run), [], time.monotonic() + 60
    while before <= processes(run):
        assert time.monotonic() < deadline, f"nobody died, with {len(held)} times 256 MiB more in use"
        if len(held) * 2**28 < MOST:
            held.append(np.ones(2**25))
        time.sleep(0.1)


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.skipif(psutil.virtual_memory().available < ROOM + MOST, reason="needs 11 GiB of free memory")
@pytest.mark.skipif(CGROUP.is_file() and CGROUP.read_text().strip() != "max", reason="its memory is a cgroup's")
@pytest.mark.timeout(600)
def test_a_run_outlives_full_memory(tmp_path: Path, repo_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = psutil.virtual_memory()
    monkeypatch.setenv("RAY_memory_usage_threshold", f"{(memory.total - memory.available + ROOM) / memory.total:.4f}")
    monkeypatch.setenv("RAY_memory_monitor_refresh_ms", "100")
    config = exact_config(tmp_path)
    run, watch = start(config, tmp_path, repo_root, "exact"), Watch(config)
    try:
        recover(run, watch, steps=2)
        for _ in range(2):
            fill_memory_until_one_dies(run)
            recover(run, watch, steps=2)
        assert run.stop() == ExitCode.STOPPED_RESUMABLE
    finally:
        run.end()
        print((tmp_path / "driver.log").read_text()[-4000:])
    assert run.starts == 1, "the driver is not Ray's, and started the rest again by itself"

"""Whole runs in which what every group passes through hangs, fills up or loses bytes: they end with all their steps.

Timers in the place of models. The processes are stopped with SIGSTOP: nothing but the missing answer tells.
"""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import psutil
import pytest

from cluster.controller import Parts
from contracts.config import RunConfig
from tests.cluster.frail_parts import LOSES_AT, SHORT_AT
from tests.cluster.whole_run import (
    HELD_UP_S,
    LEARNER,
    PAINTER,
    TIMED_STEPS,
    books_of,
    folder_of,
    rows,
    timed_run,
    wait_for,
)
from tests.laws.run_kit import controller_of, events, run_on_cluster

pytestmark = pytest.mark.usefixtures("shared_ray")


def our(title: str) -> list[psutil.Process]:
    """Ray processes of this test's own Ray whose title begins so. Nobody else's is ever touched."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if process.cmdline() and process.cmdline()[0].startswith(f"ray::{title}"):
                found.append(process)
        except psutil.Error:
            continue
    return found


def replaced(config: RunConfig) -> dict[int, str]:
    """Names of the processes that were replaced, by pid; on a busy machine a slow one may be among them."""
    return {event["pid"]: event["process"] for event in events(config, "hung_process_replaced")}


def test_a_run_outlives_a_hung_dispatcher_a_hung_full_vault_and_lost_bytes(tmp_path: Path) -> None:
    import ray

    config = timed_run(
        tmp_path, "frail", cluster={"hang_timeout_s": 6.0}, vault={"disk_mb": 1}, checkpoint={"every_steps": 1000}
    )
    controller = controller_of(config, Parts(PAINTER, "tests.cluster.frail_parts:LosingLearner"))
    result = controller.run.remote()
    stopped = []
    metrics = folder_of(config) / "metrics.jsonl"
    wait_for(lambda: metrics.is_file() and len(rows(config)) >= 2, result)
    for title in ("Dispatcher", "Vault"):
        (process,) = our(title)
        os.kill(process.pid, signal.SIGSTOP)
        stopped.append(process.pid)
        wait_for(lambda: stopped[-1] in replaced(config), result)
    summary = ray.get(result, timeout=HELD_UP_S)

    assert [replaced(config)[pid] for pid in stopped] == ["dispatcher", "vault-0"]
    assert not any(psutil.pid_exists(pid) for pid in stopped)
    assert (summary["outcome"], summary["steps"]) == ("finished", TIMED_STEPS)
    assert summary["groups_trained"] == 2 * TIMED_STEPS
    assert summary["max_staleness_seen"] <= 1
    assert events(config, "vaults_full"), "1 MB is less than the run paints before its only planned state"
    assert [event["vault"] for event in events(config, "group_lost")] == ["vault-0"]
    books = books_of(config)
    assert books.balanced
    assert books.discarded_by_reason.keys() <= {"lost", "run_end"}
    assert books.discarded_by_reason["lost"] == 4
    assert books.max_staleness_seen is not None
    assert TIMED_STEPS > LOSES_AT
    assert books.painted == 4 * (2 * TIMED_STEPS + 1) + books.discarded_by_reason.get("run_end", 0)


def test_out_of_memory_in_a_collective_is_trained_with_half_the_micro_batch(tmp_path: Path) -> None:
    config = timed_run(tmp_path, "short", stop={"steps": 3})
    summary = run_on_cluster(config, Parts(PAINTER, "tests.cluster.frail_parts:ShortOfMemory"))
    assert (summary["outcome"], summary["steps"], summary["learner_rebuilds"]) == ("finished", 3, 1)
    (rebuild,) = events(config, "learner_rebuild")
    assert (rebuild["kind"], rebuild["step"]) == ("out_of_memory", SHORT_AT - 1)
    assert (tmp_path / "halved").is_file()


def test_a_run_that_fails_says_so_in_its_summary_and_leaves_no_process(tmp_path: Path) -> None:
    config = timed_run(tmp_path, "broken")
    with pytest.raises(RuntimeError, match="the brush is broken"):
        run_on_cluster(config, Parts("tests.cluster.frail_parts:BrokenPainter", LEARNER))
    summary = json.loads((folder_of(config) / "summary.json").read_text())
    assert summary["outcome"] == "failed: RuntimeError: the brush is broken"
    assert (summary["steps"], summary["images_painted"], summary["images_trained"]) == (0, 0, 0)
    assert events(config, "failed")[0]["summary"]["outcome"] == summary["outcome"]
    deadline = time.monotonic() + 30
    while left := [each.pid for title in ("Vault", "Dispatcher", "ActorWorker", "RankWorker") for each in our(title)]:
        assert time.monotonic() < deadline, left
        time.sleep(0.2)

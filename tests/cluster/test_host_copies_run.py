"""Runs whose host copies of weights are given up, or made anew. That real weights arrive by them is in law 2."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cluster.controller import Parts
from contracts.config import RunConfig
from tests.cluster.lost_ranks import write_faults
from tests.cluster.whole_run import LEARNER, PAINTER, timed_run
from tests.laws.run_kit import events, run_on_cluster

pytestmark = pytest.mark.usefixtures("shared_ray")

STEPS = 5


def timers(folder: Path, **weights: Any) -> RunConfig:
    return timed_run(folder, "timers", weights={"transport": "collective", **weights}, stop={"steps": STEPS})


def test_a_run_whose_broadcasts_fail_goes_on_by_the_object_store(tmp_path: Path) -> None:
    """NCCL on a machine without it: three attempts, then host copies are given up; every version arrives."""
    config = timers(tmp_path, backend="nccl", timeout_s=10.0)
    summary = run_on_cluster(config, Parts(PAINTER, LEARNER))
    assert summary["steps"] == STEPS
    assert [event["version"] for event in events(config, "host_copies_lost")] == [0, 1, 2]
    assert events(config, "weights_proven")[-1]["version"] >= STEPS - 1


@pytest.mark.long  # test_host_copies.py makes channels anew
def test_a_rebuilt_learner_makes_a_new_channel(tmp_path: Path) -> None:
    config = timers(tmp_path, timeout_s=30.0)
    write_faults(config, [("update", 3, 0, "SIGKILL")])
    summary = run_on_cluster(config, Parts(PAINTER, "tests.cluster.lost_ranks:MortalTimer"))
    assert (summary["steps"], summary["learner_rebuilds"]) == (STEPS, 1)
    assert events(config, "host_copies_lost") == []
    channels = [[process["pid"] for process in event["processes"]] for event in events(config, "host_copies")]
    assert len(channels) == 2
    assert channels[0] != channels[1]

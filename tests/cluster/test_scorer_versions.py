"""A reward server that is killed in mid-run and comes back at its address as another version: real processes, HTTP.

Timers in the place of models; what the loop does with one answer is in test_resume.py.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from cluster.controller import Parts
from cluster.ledger.reader import LedgerReader
from contracts.config import RunConfig
from contracts.errors import ExitCode, VersionChanged
from contracts.wire import GroupState
from reward_servers.client import ServerProcess
from tests.cluster.whole_run import (
    HELD_UP_S,
    LEARNER,
    PAINTER,
    books_of,
    folder_of,
    rows,
    timed_run,
    wait_for,
)
from tests.laws.run_kit import controller_of, events

pytestmark = pytest.mark.usefixtures("shared_ray")

ROOT = Path(__file__).resolve().parents[2]
STEPS = 12


@pytest.fixture
def servers() -> Iterator[list[ServerProcess]]:
    """Those that a test starts; ended with it."""
    started: list[ServerProcess] = []
    yield started
    for server in started:
        server.stop(grace_s=2.0)


def serve(servers: list[ServerProcess], version: str, port: int = 0) -> str:
    """Start a version of the scorer; its address."""
    scorer = "tests.reward_servers.scorers_to_deploy:Dated"
    servers.append(ServerProcess(scorer, {"version": version}, port=port, cwd=ROOT))
    return servers[-1].start()


def come_back_as(servers: list[ServerProcess], version: str) -> None:
    """The newest server is killed; another version takes its address."""
    port = int(servers[-1].url.rsplit(":", 1)[1])
    os.kill(servers[-1].pid, signal.SIGKILL)
    servers[-1].stop()
    serve(servers, version, port)


def judged_run(folder: Path, url: str, **reward: Any) -> RunConfig:
    """With patience enough for a server that starts on a busy machine."""
    scorer = {
        "name": "juror", "urls": [url], "timeout_s": 5.0, "max_retries": 50, "retry_budget": 100.0,
        "breaker_failures": 1000, "breaker_reset_s": 0.2,
    }  # fmt: skip
    return timed_run(
        folder, "judged", scorers=[scorer], reward={"max_unscored": 10_000, "max_fruitless": 10_000, **reward},
        prompts={"source": "benchmarks.stand_ins:Prompts", "options": {"paint_s": 0.2, "update_s": 0.05}},
        stop={"steps": STEPS},
    )  # fmt: skip


def begin(config: RunConfig, resume: bool = False) -> Any:
    return controller_of(config, Parts(PAINTER, LEARNER), resume).run.remote()


def steps_of(config: RunConfig) -> int:
    return len(rows(config)) if (folder_of(config) / "metrics.jsonl").is_file() else 0


def versions_used(config: RunConfig) -> set[str]:
    """Of the scores that the ledger accepted and that have a value."""
    with closing(LedgerReader(folder_of(config) / "ledger.sqlite")) as ledger:
        tables = [ledger.tables(row.group_id).get("juror") for row in ledger.rows()]
    return {table.version for table in tables if table is not None and table.valid().any()}


def kept_version(config: RunConfig) -> str:
    return str(json.loads((folder_of(config) / "manifest.json").read_text())["scorer_versions"]["juror"])


def test_a_run_goes_on_with_another_version_and_records_both(tmp_path: Path, servers: list[ServerProcess]) -> None:
    import ray

    config = judged_run(tmp_path, serve(servers, "1"))
    result = begin(config)
    wait_for(lambda: steps_of(config) >= 2, result)
    assert kept_version(config) == "1"
    come_back_as(servers, "2")
    summary = ray.get(result, timeout=HELD_UP_S)
    assert (summary["outcome"], summary["steps"]) == ("finished", STEPS)
    (changed,) = events(config, "scorer_version_changed")
    assert (changed["scorer"], changed["before"], changed["now"]) == ("juror", "1", "2")
    assert kept_version(config) == "2"
    assert versions_used(config) == {"1", "2"}
    assert books_of(config).balanced


def test_a_run_may_stop_before_a_score_of_another_version_is_used(tmp_path: Path, servers: list[ServerProcess]) -> None:
    import ray

    config = judged_run(tmp_path, serve(servers, "1"), on_version_change="stop")
    result = begin(config)
    wait_for(lambda: steps_of(config) >= 2, result)
    come_back_as(servers, "2")
    with pytest.raises(ray.exceptions.RayTaskError) as stopped:
        ray.get(result, timeout=HELD_UP_S)
    cause = stopped.value.cause
    assert isinstance(cause, VersionChanged), str(stopped.value)
    assert cause.exit_code == ExitCode.STOPPED_RESUMABLE == 75
    assert "juror from 1 to 2" in str(cause)
    assert versions_used(config) == {"1"}
    assert kept_version(config) == "1"
    books = books_of(config)
    assert books.balanced
    assert 0 < steps_of(config) < STEPS

    going_on = config.model_copy(update={"reward": config.reward.model_copy(update={"on_version_change": "continue"})})
    summary = ray.get(begin(going_on, resume=True), timeout=HELD_UP_S)
    assert (summary["outcome"], summary["steps"]) == ("finished", STEPS)
    assert (versions_used(config), kept_version(config)) == ({"1", "2"}, "2")
    with closing(LedgerReader(folder_of(config) / "ledger.sqlite")) as ledger:
        assert not [row for row in ledger.rows() if row.state is GroupState.SCORING]

"""Scorers that misbehave, in whole runs: typed failures and a run that goes on, or a stop that says what is wrong.

The runs that must stop have timers in the place of models (benchmarks/stand_ins.py): what stops them is the house.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray

from cluster.controller import Parts
from cluster.ledger.reader import LedgerReader
from contracts.config import RunConfig
from contracts.errors import ScoringError
from contracts.scores import Outcome, ScorerInfo, ScoreTable
from contracts.wire import DiscardReason, GroupState
from tests.cluster.whole_run import books_of, check_finished, folder_of, rows
from tests.laws.run_kit import run_on_cluster, tiny_config
from tests.reward_servers.reward_helpers import Behaviour, FaultServer, good_answer, http_answer

pytestmark = pytest.mark.usefixtures("shared_ray")

TIMERS = Parts("benchmarks.stand_ins:WaitingPainter", "benchmarks.stand_ins:WaitingLearner")
GARBAGE_BYTES = 50 * 2**20


@pytest.fixture
def faulty() -> Iterator[Callable[[Behaviour], str]]:
    """Starts servers that misbehave; gives their addresses."""
    servers: list[FaultServer] = []
    info = ScorerInfo(
        name="faulty", version="3", kind="point", columns=("mean", "first"), offers_gradients=False, max_images=64,
        max_pixels=10**6, max_body_bytes=10**7,
    )  # fmt: skip

    def start(behave: Behaviour) -> str:
        servers.append(FaultServer(behave, info).__enter__())
        return servers[-1].url

    yield start
    for server in servers:
        server.__exit__()


async def internal_error(body: bytes, writer: asyncio.StreamWriter) -> None:
    writer.write(http_answer(500, b"out of order"))


async def hang(body: bytes, writer: asyncio.StreamWriter) -> None:
    await asyncio.sleep(600)


async def too_few(body: bytes, writer: asyncio.StreamWriter) -> None:
    writer.write(good_answer(body, lambda t: replace(t, values=t.values[1:], outcomes=t.outcomes[1:])))


async def nan_for_the_first(body: bytes, writer: asyncio.StreamWriter) -> None:
    def spoil(table: ScoreTable) -> ScoreTable:
        values = table.values.copy()
        values[0] = np.nan
        broken = replace(table)
        object.__setattr__(broken, "values", values)  # as a server in another language might send it
        return broken

    writer.write(good_answer(body, spoil))


async def garbage(body: bytes, writer: asyncio.StreamWriter) -> None:
    writer.write(f"HTTP/1.1 200 OK\r\nContent-Length: {GARBAGE_BYTES}\r\n\r\n".encode())
    for _ in range(GARBAGE_BYTES // 2**16):
        writer.write(b"\x00" * 2**16)
        await writer.drain()


def by_url(name: str, url: str, **fields: Any) -> dict[str, Any]:
    return {"name": name, "urls": [url], "timeout_s": 5.0, "deadline_s": 6.0, "max_retries": 0, **fields}


def run_until_it_stops(config: RunConfig, parts: Parts) -> Exception:
    """What the driver would tell the user of a run that cannot go on."""
    with pytest.raises(ray.exceptions.RayTaskError) as caught:
        run_on_cluster(config, parts)
    assert isinstance(caught.value.cause, Exception)
    return caught.value.cause


def test_failures_are_typed_and_the_run_goes_on(
    faulty: Callable[[Behaviour], str], tiny_model_folder: Path, tmp_path: Path
) -> None:
    scorers = [
        {"name": "colour", "serve": "colourfulness"},
        by_url("partial", faulty(nan_for_the_first)),
        by_url("absent", faulty(internal_error), required=False),
        by_url("asleep", faulty(hang), required=False),
        by_url("short", faulty(too_few), required=False),
        by_url("flood", faulty(garbage), required=False),
    ]
    config = tiny_config(
        tiny_model_folder, tmp_path, scorers=scorers, stop__steps=2, reward={"optional_grace_s": 0.5}
    )  # fmt: skip
    summary = run_on_cluster(config)
    check_finished(config, summary)
    for tables in trained_tables(config):
        assert tables["colour"].valid().all()
        assert tables["partial"].outcomes[:, 0].tolist() == [Outcome.FAILED, 0, 0, 0]
        for name in ("absent", "short", "flood"):
            assert (tables[name].outcomes == Outcome.FAILED).all(), name
            assert np.isnan(tables[name].values).all(), name
        assert (tables["asleep"].outcomes == Outcome.TIMED_OUT).all()
        assert tables["asleep"].reasons[0] == "grace over", "nobody waited for its deadline"
    row = rows(config)[-1]
    assert row["score_outcomes_total/partial/failed"] * 3 == row["score_outcomes_total/partial/ok"]
    assert summary["evaluation_after"]["num_valid"] == config.eval.num_prompts, "colourfulness judges, and it answers"


def trained_tables(config: RunConfig) -> list[dict[str, ScoreTable]]:
    with closing(LedgerReader(folder_of(config) / "ledger.sqlite")) as ledger:
        return [ledger.tables(row.group_id) for row in ledger.rows(state=GroupState.TRAINED)]


def timed_config(folder: Path, scorer: dict[str, Any], **changes: Any) -> RunConfig:
    times = {"paint_s": 0.05, "update_s": 0.05, "weight_mb": 0.1}
    prompts = {"source": "benchmarks.stand_ins:Prompts", "options": times}
    return tiny_config(Path("none"), folder, "nft", prompts=prompts, scorers=[scorer], **changes)


def test_a_required_scorer_that_always_fails_stops_the_run(
    faulty: Callable[[Behaviour], str], tmp_path: Path
) -> None:  # fmt: skip
    config = timed_config(tmp_path, by_url("broken", faulty(internal_error)), reward={"max_unscored": 3})
    error = run_until_it_stops(config, TIMERS)
    assert isinstance(error, ScoringError)
    assert "3 groups in a row had fewer than 2 valid samples" in str(error)
    assert "broken (" in str(error)
    assert "500" in str(error)
    books = books_of(config)
    assert books.balanced
    assert books.trained == 0
    assert books.groups_discarded_by_reason[DiscardReason.TOO_FEW_VALID.value] >= 3


def test_a_reward_without_a_signal_does_not_paint_for_ever(tmp_path: Path) -> None:
    constant = {"name": "constant", "serve": "tests.cluster.own_scorers:Constant"}
    config = timed_config(tmp_path, constant, reward={"max_fruitless": 5})
    error = run_until_it_stops(config, TIMERS)
    assert isinstance(error, ScoringError)
    assert "5 groups in a row were discarded (zero_variance 5)" in str(error)
    assert "reward.max_fruitless" in str(error)
    books = books_of(config)
    assert books.balanced
    assert books.groups_discarded_by_reason[DiscardReason.ZERO_VARIANCE.value] >= 5

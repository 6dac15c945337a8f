"""`python -m reward_servers bench` against real servers: what it counts is what happened."""

from __future__ import annotations

import asyncio
import json
import socket
from pathlib import Path

import pytest
from click.testing import CliRunner
from reward_helpers import MeanScorer, served

from contracts.errors import ConfigError, ScoringError
from contracts.scores import ScoreTable
from reward_servers import bench
from reward_servers.__main__ import cli
from reward_servers.scorers.base import ScoreBatch

TOKEN_ENV = "SALON_BENCH_TEST_TOKEN"


def small(**fields: object) -> bench.Load:
    return bench.Load(**{"images": 2, "shape": (8, 8, 3), "seconds": 0.2, **fields})  # type: ignore[arg-type]


def test_it_counts_requests_images_and_the_scorers_own_batches() -> None:
    scorer = MeanScorer(seconds=0.005)
    with served(scorer, max_batch=16, max_wait_s=0) as server:
        info, (one, eight) = asyncio.run(bench.sweep(server.url, [1, 8], small(), TOKEN_ENV))
    assert (info.name, one.concurrency, eight.concurrency) == ("mean", 1, 8)
    for level in (one, eight):
        assert level.scores == {"ok": 2 * level.requests}
        assert level.p50_ms <= level.p90_ms <= level.p99_ms
        assert level.p50_ms >= 5
        assert level.images_per_s == pytest.approx(2 * level.requests / level.seconds, rel=0.01)
        assert not level.failures
    assert one.mean_batch == 2
    assert one.batches == {"2.0": one.requests}
    assert eight.mean_batch is not None
    assert eight.mean_batch > one.mean_batch, "eight callers' images were not joined"
    assert 2 * eight.requests == pytest.approx(eight.mean_batch * sum(eight.batches.values()), rel=0.01)
    assert sum(scorer.batch_sizes) == 2 * (one.requests + eight.requests + 1 + 8) + 1  # warm-up and the canary


class HalfBad(MeanScorer):
    """NaN for every other image of a call."""

    def score(self, batch: ScoreBatch) -> ScoreTable:
        values = super().score(batch).values.copy()
        values[1::2] = float("nan")
        return self.table(values)


def test_answers_are_sent_at_once() -> None:
    """asyncio turns Nagle's algorithm off for sockets whose protocol is named, and for those alone."""
    with served(MeanScorer()) as server:
        assert server.socket.proto == socket.IPPROTO_TCP


def test_scores_that_failed_and_requests_without_an_answer_are_counted_apart() -> None:
    with served(HalfBad(), max_wait_s=0) as server:
        _, (level,) = asyncio.run(bench.sweep(server.url, [1], small(), TOKEN_ENV))
    assert level.scores == {"ok": level.requests, "failed": level.requests}
    with served(MeanScorer(seconds=0.2), queue=2, max_batch=2, max_wait_s=0) as server:
        _, (level,) = asyncio.run(bench.sweep(server.url, [6], small(), TOKEN_ENV))
    assert level.failures["429"] > 0
    assert level.scores["ok"] == 2 * level.requests


def test_what_cannot_be_asked_is_said_before_anything_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    with served(MeanScorer(), token="secret", max_images=4) as server:
        with pytest.raises(ScoringError, match="answered 401"):
            asyncio.run(bench.sweep(server.url, [1], small(), TOKEN_ENV))
        monkeypatch.setenv(TOKEN_ENV, "secret")
        with pytest.raises(ConfigError, match="takes 4 at most"):
            asyncio.run(bench.sweep(server.url, [1], small(images=5), TOKEN_ENV))
        with pytest.raises(ConfigError, match="offers none"):
            asyncio.run(bench.sweep(server.url, [1], small(gradients=True), TOKEN_ENV))
    with pytest.raises(ScoringError, match="cannot be reached"):
        asyncio.run(bench.sweep(server.url, [1], small(), TOKEN_ENV))


def test_the_command_prints_a_table_or_json(tmp_path: Path) -> None:
    with served(MeanScorer(), max_wait_s=0) as server:
        arguments = ["bench", server.url, "--concurrency", "1,2", "--seconds", "0.1", "--shape", "8,8,3"]
        told = json.loads(CliRunner().invoke(cli, [*arguments, "--json"], catch_exceptions=False).output)
        shown = CliRunner().invoke(cli, arguments, env={"COLUMNS": "120"}, catch_exceptions=False).output
    assert [level["concurrency"] for level in told["levels"]] == [1, 2]
    assert told["levels"][0]["scores"]["ok"] == 16 * told["levels"][0]["requests"]
    for column in ("p50 ms", "p90 ms", "p99 ms", "img/s", "batch"):
        assert column in shown

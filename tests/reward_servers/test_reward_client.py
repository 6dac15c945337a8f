"""The client over real HTTP: right scores from good servers, typed failures within the deadline from bad ones."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from reward_helpers import (
    FaultServer,
    MeanScorer,
    Picky,
    config_for,
    good_answer,
    http_answer,
    mean_and_first,
    pictures,
    served,
)

from contracts.config.scoring import ScorerConfig
from contracts.declarations import ScorerGives
from contracts.errors import ConfigError, ScoringError
from contracts.scores import Outcome, ScoreTable
from reward_servers.client import RewardClient, SyncRewardClient


def ask(config: ScorerConfig, images: Any, **more: Any) -> tuple[ScoreTable, RewardClient]:
    """One call of a fresh client, which is closed afterwards."""

    async def go() -> tuple[ScoreTable, RewardClient]:
        async with RewardClient(config) as client:
            return await client.score(images, ["a prompt"] * len(images), [{}] * len(images), **more), client

    return asyncio.run(go())


def test_splits_into_requests_and_joins_in_order() -> None:
    scorer, images = MeanScorer(), pictures(23)
    with served(scorer, max_images=10, max_wait_s=0) as server:
        scorer.batch_sizes.clear()
        table, client = ask(config_for(server.url, max_batch=64, concurrency=2), images)
    np.testing.assert_array_equal(table.values, mean_and_first(images))
    assert (table.scorer, table.version, table.columns) == ("juror", "3", ("mean", "first"))
    assert client.stats.images == {"ok": 23}
    assert client.stats.requests == 4, "the info and three requests of at most ten images"


def test_mixed_sizes_and_no_images_at_all() -> None:
    images = [pictures(1, size, seed=size)[0] for size in (8, 16, 12)]
    with served(MeanScorer()) as server:
        table, _ = ask(config_for(server.url), images)
        empty, _ = ask(config_for(server.url), pictures(0))
    np.testing.assert_allclose(table.values, np.concatenate([mean_and_first(i[None]) for i in images]), rtol=1e-6)
    assert empty.values.shape == (0, 2)


def test_failures_of_single_images_are_kept_single() -> None:
    images = pictures(5)
    images[1, 0, 0, 0], images[3, 0, 0, 0] = 13, 14
    with served(Picky()) as server:
        table, client = ask(config_for(server.url), images)
    assert table.outcomes[:, 0].tolist() == [0, 1, 0, 1, 0]
    assert client.stats.images == {"ok": 3, "failed": 2}
    assert client.stats.retries == 0, "a scorer's own failure is an answer, not a reason to ask again"


def test_the_token_is_sent_and_a_wrong_one_is_a_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with served(MeanScorer(), token="right") as server:
        monkeypatch.setenv("JUROR_TOKEN", "right")
        table, _ = ask(config_for(server.url, token_env="JUROR_TOKEN"), pictures(2))
        assert table.valid().all()
        monkeypatch.setenv("JUROR_TOKEN", "wrong")
        table, client = ask(config_for(server.url, token_env="JUROR_TOKEN"), pictures(2))
        assert (table.outcomes == Outcome.FAILED).all()
        assert "401" in table.reasons[0]
        assert client.stats.requests == 1, "a refusal is not repeated"
        with pytest.raises(ScoringError, match="401"):
            asyncio.run(RewardClient(config_for(server.url, token_env="JUROR_TOKEN")).info())


def test_a_version_that_is_gone_fails_and_says_so() -> None:
    with served(MeanScorer()) as server:
        table, _ = ask(config_for(server.url, version="2"), pictures(2))
        exact, _ = ask(config_for(server.url, version="3"), pictures(2))
    assert (table.outcomes == Outcome.FAILED).all()
    assert "409" in table.reasons[0]
    assert "version '2' is gone" in table.reasons[0]
    assert exact.valid().all()


async def _hang(body: bytes, writer: asyncio.StreamWriter) -> None:
    await asyncio.sleep(60)


async def _internal_error(body: bytes, writer: asyncio.StreamWriter) -> None:
    writer.write(http_answer(500, b"Internal Server Error"))


async def _drop(body: bytes, writer: asyncio.StreamWriter) -> None:
    writer.write(good_answer(body)[:80])
    await writer.drain()
    writer.transport.abort()


async def _drip(body: bytes, writer: asyncio.StreamWriter) -> None:
    answer = good_answer(body)
    for i in range(len(answer)):
        writer.write(answer[i : i + 1])
        await writer.drain()
        await asyncio.sleep(0.05)


async def _compressed(body: bytes, writer: asyncio.StreamWriter) -> None:
    writer.write(http_answer(200, b"\x1f\x8b" + b"\x00" * 99, Content_Encoding="gzip"))


async def _html(body: bytes, writer: asyncio.StreamWriter) -> None:
    writer.write(http_answer(200, b"<html>It works!</html>"))


async def _foreign(body: bytes, writer: asyncio.StreamWriter) -> None:
    writer.write(good_answer(body, request_id="somebody else's"))


def _altered(change: Callable[[ScoreTable], ScoreTable]) -> Callable[[bytes, asyncio.StreamWriter], Any]:
    async def behave(body: bytes, writer: asyncio.StreamWriter) -> None:
        writer.write(good_answer(body, change))

    return behave


def _too_few(table: ScoreTable) -> ScoreTable:
    return replace(table, values=table.values[1:], outcomes=table.outcomes[1:])


def _other_columns(table: ScoreTable) -> ScoreTable:
    return replace(table, columns=("mean", "last"))


FAULTS = {
    "500": (_internal_error, Outcome.FAILED, "answered 500"),
    "hang": (_hang, Outcome.TIMED_OUT, "did not answer within"),
    "slow drip": (_drip, Outcome.TIMED_OUT, "did not answer within"),
    "dropped connection": (_drop, Outcome.FAILED, "broke the connection"),
    "too few scores": (_altered(_too_few), Outcome.FAILED, "for 3 images"),
    "other columns": (_altered(_other_columns), Outcome.FAILED, "instead of"),
    "not Salon": (_html, Outcome.FAILED, "nonsense"),
    "compressed": (_compressed, Outcome.FAILED, "is compressed"),
    "another request's answer": (_foreign, Outcome.FAILED, "another request"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_server_leaves_typed_failures_within_the_deadline(fault: str) -> None:
    behave, outcome, reason = FAULTS[fault]
    # A fault that answers gets all the time it wants: on a busy machine 0.3 s is not even enough for a 500.
    timeout_s = 0.3 if outcome is Outcome.TIMED_OUT else 20.0
    deadline_s = 8.0 if outcome is Outcome.TIMED_OUT else 60.0
    with FaultServer(behave) as server:
        config = config_for(server.url, timeout_s=timeout_s, deadline_s=deadline_s, max_retries=2)
        start = time.monotonic()
        table, client = ask(config, pictures(3))
        took = time.monotonic() - start
    assert (table.outcomes == outcome).all(), table.reasons
    assert reason in table.reasons[0]
    assert table.columns == ("mean", "first")
    assert np.isnan(table.values).all()
    assert server.calls == 3, "two retries"
    assert took < deadline_s + 1.0, "the deadline is a promise"
    assert client.stats.images == {outcome.name.lower(): 3}


def test_a_deadline_cuts_off_whatever_is_still_being_tried() -> None:
    with FaultServer(_hang) as server:
        table, _ = ask(config_for(server.url, timeout_s=60.0, deadline_s=60.0), pictures(2), deadline_s=0.4)
    assert (table.outcomes == Outcome.TIMED_OUT).all()


@pytest.mark.parametrize("declares_length", [True, False], ids=["content length", "chunked"])
def test_fifty_megabytes_of_garbage_are_not_read(declares_length: bool) -> None:
    total = 50 * 2**20
    written = 0

    async def flood(body: bytes, writer: asyncio.StreamWriter) -> None:
        nonlocal written
        length = f"Content-Length: {total}" if declares_length else "Transfer-Encoding: chunked"
        writer.write(f"HTTP/1.1 200 OK\r\n{length}\r\n\r\n".encode())
        block = b"\x00" * 65_536
        for _ in range(total // len(block)):
            writer.write(block if declares_length else b"10000\r\n" + block + b"\r\n")
            await writer.drain()
            written += len(block)

    with FaultServer(flood) as server:
        table, _ = ask(config_for(server.url, max_retries=0, timeout_s=20, deadline_s=20), pictures(3))
    assert (table.outcomes == Outcome.FAILED).all()
    assert "cannot be right" in table.reasons[0]
    assert written < total // 2


def test_not_finite_and_ill_coded_entries_fail_alone() -> None:
    def spoil(table: ScoreTable) -> ScoreTable:
        broken = replace(table)
        values = table.values.copy()
        values[1, 0], values[2, 1] = np.nan, np.inf
        object.__setattr__(broken, "values", values)  # as a server in another language might send it
        return broken

    images = pictures(4)
    with FaultServer(_altered(spoil)) as server:
        table, _ = ask(config_for(server.url), images)
    expected = np.zeros((4, 2))
    expected[1, 0] = expected[2, 1] = Outcome.FAILED
    np.testing.assert_array_equal(table.outcomes, expected)
    np.testing.assert_array_equal(table.values[table.valid()], mean_and_first(images)[table.valid()])


def test_missing_misshapen_or_infinite_gradients() -> None:
    def with_gradients(change: Callable[[np.ndarray], np.ndarray]) -> Callable[[ScoreTable], ScoreTable]:
        def alter(table: ScoreTable) -> ScoreTable:
            return replace(table, gradients=change(np.ones((3, 8, 8, 3), np.float32)))

        return alter

    def infinite(gradients: np.ndarray) -> np.ndarray:
        gradients[1, 0, 0, 0] = np.inf
        return gradients

    cases = {"missing": lambda table: table, "misshapen": with_gradients(lambda g: g[:, :4])}
    for name, change in cases.items():
        with FaultServer(_altered(change)) as server:
            table, _ = ask(config_for(server.url, max_retries=0), pictures(3), want_gradients=True)
        assert (table.outcomes == Outcome.FAILED).all(), name
        assert table.gradients is not None
        assert not table.gradients.any(), name
    with FaultServer(_altered(with_gradients(infinite))) as server:
        table, _ = ask(config_for(server.url), pictures(3), want_gradients=True)
    assert table.outcomes[:, 0].tolist() == [0, 1, 0]
    assert table.gradients is not None
    assert table.gradients[:, 0, 0, 0].tolist() == [1, 0, 1]


def test_gradients_of_a_scorer_without_them_fail_without_being_asked_for() -> None:
    with served(MeanScorer()) as server:
        table, client = ask(config_for(server.url), pictures(2), want_gradients=True)
    assert (table.outcomes == Outcome.FAILED).all()
    assert "no gradients" in table.reasons[0]
    assert client.stats.requests == 1


def test_a_passing_fault_is_healed_by_a_retry() -> None:
    async def once_bad(body: bytes, writer: asyncio.StreamWriter) -> None:
        writer.write(http_answer(500, b"") if server.calls == 1 else good_answer(body))

    with FaultServer(once_bad) as server:
        table, client = ask(config_for(server.url), pictures(2))
    assert table.valid().all()
    assert (client.stats.retries, dict(client.stats.failures)) == (1, {"500": 1})


def test_429_waits_for_retry_after_and_spends_neither_retries_nor_budget() -> None:
    moments: list[float] = []

    async def busy(body: bytes, writer: asyncio.StreamWriter) -> None:
        moments.append(time.monotonic())
        writer.write(http_answer(429, b'{"error": "full"}', Retry_After="1") if server.calls < 3 else good_answer(body))

    with FaultServer(busy) as server:
        table, client = ask(config_for(server.url, max_retries=0, deadline_s=20.0), pictures(2))
    assert table.valid().all()
    assert all(later - earlier >= 0.99 for earlier, later in itertools.pairwise(moments))
    assert client.stats.breakers == {server.url: "closed"}


def test_a_server_that_is_full_for_ever_times_out_at_the_deadline() -> None:
    async def full(body: bytes, writer: asyncio.StreamWriter) -> None:
        writer.write(http_answer(429, b'{"error": "the queue is full"}', Retry_After="1"))

    with FaultServer(full) as server:
        table, _ = ask(config_for(server.url, deadline_s=1.2), pictures(2))
    assert (table.outcomes == Outcome.TIMED_OUT).all()
    assert "the queue is full" in table.reasons[0]


def test_the_retry_budget_bounds_all_retries_together() -> None:
    async def many() -> tuple[list[ScoreTable], RewardClient]:
        config = config_for(server.url, max_retries=5, retry_budget=0.1, breaker_failures=10_000, deadline_s=60.0)
        async with RewardClient(config) as client:
            tables = [await client.score(pictures(1), ["p"], [{}]) for _ in range(30)]
            return tables, client

    with FaultServer(_internal_error) as server:
        tables, client = asyncio.run(many())
    assert all((table.outcomes == Outcome.FAILED).all() for table in tables)
    assert client.stats.retries <= 10 + 0.1 * (30 + 1)
    assert client.stats.retries >= 10
    assert "retry budget spent" in tables[-1].reasons[0]


def test_the_circuit_opens_probes_and_closes_again() -> None:
    async def sick_then_well(body: bytes, writer: asyncio.StreamWriter) -> None:
        writer.write(good_answer(body) if healthy else http_answer(500, b""))

    async def go() -> None:
        nonlocal healthy
        config = config_for(server.url, max_retries=0, breaker_failures=3, breaker_reset_s=4.0, deadline_s=10.0)
        async with RewardClient(config) as client:
            for _ in range(3):
                await client.score(pictures(1), ["p"], [{}])
            assert client.stats.breakers[server.url] == "open"
            calls = server.calls
            table = await client.score(pictures(1), ["p"], [{}], deadline_s=0.2)
            assert server.calls == calls, "nothing is sent through an open circuit"
            assert (table.outcomes == Outcome.TIMED_OUT).all()
            await asyncio.sleep(0.5)
            assert client.stats.breakers[server.url] == "half_open"
            await client.score(pictures(1), ["p"], [{}])
            assert server.calls == calls + 1, "one probe"
            assert client.stats.breakers[server.url] == "open", "a failed probe opens it again"
            healthy = True
            tables = await asyncio.gather(*(client.score(pictures(1), ["p"], [{}]) for _ in range(4)))
            assert all(table.valid().all() for table in tables), "those who waited are served after the probe"
            assert client.stats.breakers[server.url] == "closed"

    healthy = False
    with FaultServer(sick_then_well) as server:
        asyncio.run(go())


def test_replicas_take_over_from_each_other() -> None:
    images = pictures(12)
    with FaultServer(_internal_error) as sick, served(MeanScorer()) as well:
        dead = "http://127.0.0.1:9"
        config = config_for(dead, sick.url, well.url, max_batch=2, concurrency=2, breaker_failures=2)
        sick.info = sick.info.model_copy(update={"name": "mean"})
        table, client = ask(config, images)
    np.testing.assert_array_equal(table.values, mean_and_first(images))
    assert client.stats.breakers[well.url] == "closed"


def test_a_replica_without_the_version_hands_over_to_one_that_has_it() -> None:
    class Newer(MeanScorer):
        version = "4"

    with served(MeanScorer()) as old, served(Newer()) as new:
        table, _ = ask(config_for(old.url, new.url, version="4", max_batch=1), pictures(6))
    assert table.valid().all()
    assert table.version == "4"


def test_a_server_that_restarts_is_waited_for() -> None:
    images = pictures(4)
    with served(MeanScorer()) as first:
        url, port = first.url, int(first.url.rsplit(":", 1)[1])

    table = asyncio.run(_with_restart(url, port, images))
    assert table.valid().all()


async def _with_restart(url: str, port: int, images: np.ndarray) -> ScoreTable:
    config = config_for(url, max_retries=0, deadline_s=20.0, breaker_failures=2, breaker_reset_s=0.1)
    async with RewardClient(config) as client:
        waiting = asyncio.create_task(client.score(images, ["p"] * len(images), [{}] * len(images)))
        await asyncio.sleep(0.5)
        assert not waiting.done()
        assert client.stats.breakers[url] != "closed"
        again = served(MeanScorer(), port=port)
        await asyncio.to_thread(again.__enter__)
        try:
            return await waiting
        finally:
            await asyncio.to_thread(again.__exit__, None, None, None)


def test_a_server_that_is_never_reached_times_out_with_the_declared_columns() -> None:
    gives = ScorerGives(columns=("reward", "strict"))

    async def go() -> ScoreTable:
        config = config_for("http://127.0.0.1:9", deadline_s=0.5)
        async with RewardClient(config, gives=gives) as client:
            with pytest.raises(ScoringError, match="not ready within"):
                await client.info(deadline_s=0.3)
            return await client.score(pictures(2), ["p"] * 2, [{}] * 2)

    table = asyncio.run(go())
    assert table.columns == ("reward", "strict")
    assert (table.outcomes == Outcome.TIMED_OUT).all()
    assert "cannot be reached" in table.reasons[0]


def test_mistakes_of_the_caller_are_told_at_once() -> None:
    with pytest.raises(ConfigError, match="no reward server"):
        RewardClient(ScorerConfig(name="x", serve="jpeg_size"))
    with pytest.raises(ConfigError, match="not an http"):
        RewardClient(config_for("ftp://x"))

    async def go() -> None:
        async with RewardClient(config_for("http://127.0.0.1:9")) as client:
            with pytest.raises(ValueError, match="3 images with 1 prompts"):
                await client.score(pictures(3), ["p"], [{}])
            with pytest.raises(ValueError, match="float64"):
                await client.score(pictures(1)[0] / 255, ["p"] * 8, [])

    asyncio.run(go())


def test_metadata_that_is_no_json_fails_with_a_reason() -> None:
    async def go() -> ScoreTable:
        async with RewardClient(config_for(server.url)) as client:
            return await client.score(pictures(1), ["p"], [{"x": object()}])

    with served(MeanScorer()) as server:
        table = asyncio.run(go())
    assert (table.outcomes == Outcome.FAILED).all()
    assert "cannot be sent" in table.reasons[0]


def test_the_synchronous_client_keeps_the_same_promises() -> None:
    images = pictures(3)
    with served(MeanScorer()) as server, SyncRewardClient(config_for(server.url)) as client:
        assert client.info().columns == ("mean", "first")
        np.testing.assert_array_equal(client.score(images, ["p"] * 3, [{}] * 3).values, mean_and_first(images))
        assert client.stats.images == {"ok": 3}
    with FaultServer(_hang) as server, SyncRewardClient(config_for(server.url, deadline_s=0.3)) as client:
        assert (client.score(images, ["p"] * 3, [{}] * 3).outcomes == Outcome.TIMED_OUT).all()

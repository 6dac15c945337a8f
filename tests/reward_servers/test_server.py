"""The server over real HTTP on loopback: answers, limits, batching, back-pressure, probes, draining."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import httpx
import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families
from reward_helpers import MeanScorer, Picky, mean_and_first, pictures, post, read_table, score_body, served

from contracts.codec import encode
from contracts.declarations import ScorerGives
from contracts.errors import ConfigError, ScoringError
from contracts.metrics import BY_NAME
from contracts.scores import Outcome, ScoreRequest, ScorerInfo, ScoreTable
from contracts.wire import PromptSpec
from reward_servers.scorers.base import ScoreBatch, Scorer
from reward_servers.serving import RewardServer
from reward_servers.settings import ServerSettings


def wait_until(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(0.005)


def test_scores_every_image_of_a_request_and_says_who_answered() -> None:
    images = pictures(5)
    with served(MeanScorer()) as server:
        table = read_table(post(server.url, score_body(images)))
    np.testing.assert_array_equal(table.values, mean_and_first(images))
    assert (table.scorer, table.version, table.columns) == ("mean", "3", ("mean", "first"))
    assert table.valid().all()


def test_images_of_mixed_sizes_come_back_in_their_order() -> None:
    sizes = [8, 16, 8, 4, 16]
    images = [pictures(1, size, seed=i)[0] for i, size in enumerate(sizes)]
    with served(MeanScorer()) as server:
        table = read_table(post(server.url, score_body(images)))
    expected = np.concatenate([mean_and_first(image[None]) for image in images])
    np.testing.assert_allclose(table.values, expected, rtol=1e-6)


def test_requests_of_many_callers_share_scorer_calls_and_none_gets_anothers_score() -> None:
    scorer = MeanScorer()
    with served(scorer, max_batch=16, max_wait_s=0.01) as server, ThreadPoolExecutor(12) as pool:
        scorer.batch_sizes.clear()
        scorer.go.clear()  # the first call holds the scorer, the others queue up behind it
        images = [pictures(2, seed=i) for i in range(12)]
        answers = [pool.submit(post, server.url, score_body(part)) for part in images]
        wait_until(lambda: server.service is not None and server.service.batcher.depth >= 8)
        scorer.go.set()
        for part, answer in zip(images, answers, strict=True):
            np.testing.assert_array_equal(read_table(answer.result()).values, mean_and_first(part))
    assert sum(scorer.batch_sizes) == 24
    assert max(scorer.batch_sizes) > 2, "no call held images of two requests"
    assert max(scorer.batch_sizes) <= 16


def test_a_request_larger_than_max_batch_is_split() -> None:
    scorer, images = MeanScorer(), pictures(10)
    with served(scorer, max_batch=4, max_wait_s=0) as server:
        scorer.batch_sizes.clear()
        table = read_table(post(server.url, score_body(images)))
    np.testing.assert_array_equal(table.values, mean_and_first(images))
    assert scorer.batch_sizes == [4, 4, 2]


def test_one_failing_image_leaves_its_neighbours_scores() -> None:
    images = pictures(6)
    images[2, 0, 0, 0], images[4, 0, 0, 0] = 13, 14
    with served(Picky()) as server:
        table = read_table(post(server.url, score_body(images)))
    assert table.outcomes[:, 0].tolist() == [0, 0, Outcome.FAILED, 0, Outcome.FAILED, 0]
    good = [0, 1, 3, 5]
    np.testing.assert_array_equal(table.values[good], mean_and_first(images)[good])
    assert np.isnan(table.values[[2, 4]]).all()
    assert "thirteen is unlucky" in table.reasons[2]


class TooFew(MeanScorer):
    """Answers one row less than asked, whatever the batch."""

    def score(self, batch: ScoreBatch) -> ScoreTable:
        images = batch.images if len(batch) == 1 and (batch.images == 128).all() else batch.images[1:]
        return self.table(mean_and_first(images).reshape(-1, 2))


class WrongColumns(MeanScorer):
    def score(self, batch: ScoreBatch) -> ScoreTable:
        table = super().score(batch)
        if (batch.images == 128).all():
            return table
        return ScoreTable("mean", "3", ("other",), table.values[:, :1], table.outcomes[:, :1])


@pytest.mark.parametrize("scorer", [TooFew(), WrongColumns()], ids=["too few", "wrong columns"])
def test_an_answer_that_does_not_fit_is_failed_not_an_http_error(scorer: Scorer) -> None:
    with served(scorer) as server:
        table = read_table(post(server.url, score_body(pictures(3))))
    assert (table.outcomes == Outcome.FAILED).all()
    assert table.columns == ("mean", "first")
    assert all(table.reasons)


def test_a_full_queue_answers_429_with_retry_after_and_readyz_says_no() -> None:
    scorer = MeanScorer()
    with served(scorer, queue=4, max_batch=2, max_wait_s=0) as server, ThreadPoolExecutor(8) as pool:
        assert server.service is not None
        scorer.go.clear()
        running = pool.submit(post, server.url, score_body(pictures(2)))
        wait_until(lambda: server.service.batcher.busy_seconds > 0)
        waiting = [pool.submit(post, server.url, score_body(pictures(2))) for _ in range(2)]
        wait_until(lambda: server.service.batcher.depth == 4)
        refused = post(server.url, score_body(pictures(1)))
        assert refused.status_code == 429
        assert int(refused.headers["Retry-After"]) >= 1
        assert "error" in refused.json()
        assert httpx.get(f"{server.url}/readyz").status_code == 503
        assert httpx.get(f"{server.url}/livez").status_code == 200
        scorer.go.set()
        assert [job.result().status_code for job in (running, *waiting)] == [200, 200, 200]
        assert httpx.get(f"{server.url}/readyz").status_code == 200


def test_the_token_guards_scores_and_info_but_not_the_probes() -> None:
    body = score_body(pictures(1))
    with served(MeanScorer(), token="secret") as server:
        for header in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic secret"}):
            assert post(server.url, body, **header).status_code == 401
            assert httpx.get(f"{server.url}/v1/info", headers=header).status_code == 401
        assert post(server.url, body, Authorization="Bearer secret").status_code == 200
        assert httpx.get(f"{server.url}/readyz").status_code == 200


def test_without_a_token_it_refuses_to_listen_beyond_loopback() -> None:
    with pytest.raises(ConfigError, match="SALON_REWARD_TOKEN"), served(MeanScorer(), host="0.0.0.0"):
        pass


def test_malformed_requests_get_the_status_that_names_the_mistake() -> None:
    images = pictures(3)
    float_images = images.astype(np.float32)
    cases = {
        "garbage": (b"\x00" * 64, 400),
        "empty": (b"", 400),
        "another message": (encode(PromptSpec(text="x"), {}), 400),
        "prompts and images disagree": (score_body(images, prompts=("one",)), 422),
        "metadata disagree": (score_body(images, metadata=({},)), 422),
        "no prompt": (score_body(images[:0]), 422),
        "floats": (score_body(float_images), 422),
        "grey": (score_body(images[..., :1]), 422),
        "no gradients": (score_body(images, want_gradients=True), 422),
        "gone version": (score_body(images, version="2"), 409),
        "too many images": (score_body(pictures(9)), 413),
        "too many pixels": (score_body(pictures(1, 33)), 413),
        "too many bytes": (score_body(pictures(8, 32)) + b"\x00" * 40_000, 413),
    }
    with served(MeanScorer(), max_images=8, max_pixels=1024, max_body_bytes=40_000) as server:
        for name, (body, status) in cases.items():
            response = post(server.url, body)
            assert response.status_code == status, f"{name}: {response.status_code} {response.text}"
            assert response.json()["error"], name
        assert post(server.url, score_body(images, version="3")).status_code == 200
        assert httpx.get(f"{server.url}/nothing").json() == {"error": "Not Found"}


def test_the_byte_limit_holds_while_a_body_of_unknown_length_streams_in() -> None:
    sent = 0

    def endless() -> Iterator[bytes]:
        nonlocal sent
        while sent < 50 * 2**20:
            sent += 65_536
            yield b"\x00" * 65_536

    with served(MeanScorer(), max_body_bytes=200_000) as server:
        with suppress(httpx.TransportError):  # the server may have hung up while we were still sending
            assert httpx.post(f"{server.url}/v1/score", content=endless(), timeout=20).status_code == 413
        assert sent < 25 * 2**20
        assert post(server.url, score_body(pictures(1))).status_code == 200


def test_a_body_that_trickles_in_is_cut_off() -> None:
    with served(MeanScorer(), upload_seconds=0.3) as server:
        host, port = server.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=10) as connection:
            connection.sendall(b"POST /v1/score HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\nabc")
            assert b" 408 " in connection.recv(4096)


def test_work_whose_deadline_has_passed_is_dropped_unscored() -> None:
    scorer = MeanScorer()
    with served(scorer, max_wait_s=0) as server, ThreadPoolExecutor(2) as pool:
        assert server.service is not None
        scorer.batch_sizes.clear()
        scorer.go.clear()
        running = pool.submit(post, server.url, score_body(pictures(1)))
        wait_until(lambda: server.service.batcher.busy_seconds > 0)
        late = post(server.url, score_body(pictures(2), deadline_s=0.2))
        assert late.status_code == 504
        scorer.go.set()
        assert running.result().status_code == 200
        assert post(server.url, score_body(pictures(3))).status_code == 200
    assert scorer.batch_sizes == [1, 3]


def upload(url: str, body: bytes) -> socket.socket:
    """A connection that has sent its request and may hang up before the answer."""
    host, port = url.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)), timeout=10)
    connection.sendall(b"POST /v1/score HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))
    return connection


def test_work_whose_caller_hung_up_is_dropped_unscored_and_leaves_its_place_in_the_queue() -> None:
    scorer = MeanScorer()
    with served(scorer, queue=2, max_wait_s=0) as server, ThreadPoolExecutor(2) as pool:
        assert server.service is not None
        batcher = server.service.batcher
        scorer.batch_sizes.clear()
        scorer.go.clear()
        running = pool.submit(post, server.url, score_body(pictures(1)))
        wait_until(lambda: batcher.busy_seconds > 0)
        for _ in range(2):  # the queue has room for one of the two
            with upload(server.url, score_body(pictures(2))):
                wait_until(lambda: batcher.depth == 2)
            wait_until(lambda: batcher.depth == 0)
        scorer.go.set()
        assert running.result().status_code == 200
        wait_until(lambda: batcher.idle)
    assert scorer.batch_sizes == [1]


def test_info_tells_what_a_client_must_know() -> None:
    with served(MeanScorer(), max_images=99, max_pixels=123, max_body_bytes=4567) as server:
        info = ScorerInfo.model_validate_json(httpx.get(f"{server.url}/v1/info").content)
    assert (info.name, info.version, info.columns, info.kind) == ("mean", "3", ("mean", "first"), "point")
    assert (info.max_images, info.max_pixels, info.max_body_bytes) == (99, 123, 4567)
    assert not info.offers_gradients


class SlowLoader(MeanScorer):
    def __init__(self) -> None:
        super().__init__()
        self.may_load = threading.Event()

    def load(self) -> None:
        assert self.may_load.wait(10)


def test_it_is_alive_but_not_ready_while_weights_load() -> None:
    scorer = SlowLoader()
    server = RewardServer(scorer, ServerSettings(), None)
    thread = threading.Thread(target=lambda: asyncio.run(server.run()), daemon=True)
    thread.start()
    try:
        wait_until(lambda: _status(f"{server.url}/livez") == 200)
        assert _status(f"{server.url}/readyz") == 503
        refused = post(server.url, score_body(pictures(1)))
        assert (refused.status_code, "Retry-After" in refused.headers) == (503, True)
        scorer.may_load.set()
        wait_until(lambda: _status(f"{server.url}/readyz") == 200)
        assert post(server.url, score_body(pictures(1))).status_code == 200
    finally:
        scorer.may_load.set()
        server.stop()
        thread.join(10)
    assert not thread.is_alive()


def _status(url: str) -> int:
    try:
        return httpx.get(url, timeout=5).status_code
    except httpx.TransportError:
        return 0


class BadCanary(Picky):
    def canary(self) -> ScoreBatch:
        images = pictures(1)
        images[0, 0, 0, 0] = 13
        return ScoreBatch(images, ("x",), ({},))


class BadLoader(MeanScorer):
    def load(self) -> None:
        raise OSError("weights are not where they should be")


@pytest.mark.parametrize(("scorer", "message"), [(BadCanary(), "canary.*unlucky"), (BadLoader(), "weights are not")])
def test_a_scorer_that_cannot_score_never_becomes_ready(scorer: Scorer, message: str) -> None:
    with pytest.raises(ScoringError, match=message), served(scorer):
        pass


def test_draining_serves_the_queue_refuses_new_work_and_then_ends() -> None:
    scorer = MeanScorer()
    with served(scorer, max_batch=1, max_wait_s=0, drain_seconds=20.0) as server, ThreadPoolExecutor(4) as pool:
        assert server.service is not None
        batcher = server.service.batcher
        scorer.go.clear()
        accepted = [pool.submit(post, server.url, score_body(pictures(1, seed=i))) for i in range(3)]
        wait_until(lambda: batcher.depth == 2)
        server.stop()
        wait_until(lambda: batcher.draining)
        assert _status(f"{server.url}/readyz") == 503
        assert post(server.url, score_body(pictures(1))).status_code == 503
        scorer.go.set()
        for i, job in enumerate(accepted):
            np.testing.assert_array_equal(read_table(job.result()).values, mean_and_first(pictures(1, seed=i)))
        wait_until(lambda: _status(f"{server.url}/livez") == 0)


def test_livez_fails_when_one_call_of_the_scorer_hangs() -> None:
    scorer = MeanScorer()
    with served(scorer, stall_seconds=0.1) as server, ThreadPoolExecutor(1) as pool:
        scorer.go.clear()
        job = pool.submit(post, server.url, score_body(pictures(1)))
        wait_until(lambda: _status(f"{server.url}/livez") == 503)
        scorer.go.set()
        assert job.result().status_code == 200
        assert _status(f"{server.url}/livez") == 200


def test_metrics_are_the_catalogues_and_count_what_happened() -> None:
    images = pictures(6)
    images[2, 0, 0, 0] = 13
    with served(Picky(), queue=7) as server:
        post(server.url, score_body(images))
        post(server.url, b"garbage")
        text = httpx.get(f"{server.url}/metrics").text
    samples = {
        (sample.name, tuple(v for k, v in sorted(sample.labels.items()) if k not in ("scorer", "le"))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
    for family in text_string_to_metric_families(text):
        assert family.name in BY_NAME or f"{family.name}_total" in BY_NAME, f"{family.name} is not in the catalogue"
        assert BY_NAME.get(family.name, BY_NAME.get(f"{family.name}_total")).role in ("reward_server", "process")
    assert samples["salon_reward_requests_total", ("200",)] == 1
    assert samples["salon_reward_requests_total", ("400",)] == 1
    assert samples["salon_reward_images_total", ("ok",)] == 5
    assert samples["salon_reward_images_total", ("failed",)] == 1
    assert samples["salon_reward_queue_capacity", ()] == 7
    assert samples["salon_reward_ready", ()] == 1
    assert samples["salon_reward_batch_images_sum", ()] == 6


class Latents(Scorer):
    declares = ScorerGives(columns=("norm",), accepts="latents")
    name = "latents"

    def canary(self) -> ScoreBatch:
        return ScoreBatch(np.zeros((0, 0, 0, 3), np.uint8), ("x",), ({},), np.ones((1, 2, 4, 4), np.float32))

    def score(self, batch: ScoreBatch) -> ScoreTable:
        assert batch.latents is not None
        return self.table(np.square(batch.latents).sum(axis=(1, 2, 3)))


def test_a_scorer_of_latents_takes_latents_and_nothing_else() -> None:
    latents = np.random.default_rng(0).normal(size=(3, 2, 4, 4)).astype(np.float32)
    header = ScoreRequest(request_id="r", prompts=("a", "b", "c"))
    with served(Latents()) as server:
        table = read_table(post(server.url, encode(header, {"latents": latents})))
        assert post(server.url, score_body(pictures(3))).status_code == 422
    np.testing.assert_allclose(table.values[:, 0], np.square(latents).sum(axis=(1, 2, 3)), rtol=1e-5)


class PairJudge(Scorer):
    """Prefers the brighter image; whole groups only."""

    declares = ScorerGives(kind="pair", columns=("wins",))
    name = "pairs"

    def score(self, batch: ScoreBatch) -> ScoreTable:
        means = batch.images.mean(axis=(1, 2, 3))
        wins = (means[:, None] > means[None, :]).astype(np.float32)
        np.fill_diagonal(wins, np.nan)
        outcomes = np.where(np.isnan(wins), Outcome.UNDECIDED, Outcome.OK).astype(np.uint8)
        return ScoreTable("pairs", "1", ("wins",), wins[..., None], outcomes[..., None], "pair")


def test_a_pair_scorer_sees_a_request_as_one_group() -> None:
    images = pictures(5)
    with served(PairJudge(), max_batch=2) as server:
        table = read_table(post(server.url, score_body(images)))
    means = images.mean(axis=(1, 2, 3))
    off_diagonal = ~np.eye(5, dtype=bool)
    np.testing.assert_array_equal(
        table.values[..., 0][off_diagonal], (means[:, None] > means[None, :])[off_diagonal].astype(np.float32)
    )
    assert table.valid()[..., 0][off_diagonal].all()

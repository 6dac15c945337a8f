"""What the tests of reward servers share: scorers with known answers, servers in threads, servers that misbehave."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import httpx
import numpy as np

from contracts.codec import decode, encode
from contracts.config.scoring import ScorerConfig
from contracts.declarations import ScorerGives
from contracts.scores import ScoreRequest, ScoreResponse, ScorerInfo, ScoreTable, point_table, to_message
from reward_servers.scorers.base import ScoreBatch, Scorer
from reward_servers.serving import RewardServer
from reward_servers.settings import ServerSettings

MEAN_GIVES = ScorerGives(columns=("mean", "first"))


class MeanScorer(Scorer):
    """columns mean and first pixel of each image, so that any mix-up of images shows; counts its calls."""

    declares = MEAN_GIVES
    name = "mean"
    version = "3"

    def __init__(self, seconds: float = 0.0) -> None:
        self.seconds = seconds
        self.batch_sizes: list[int] = []
        self.go = threading.Event()
        self.go.set()

    def score(self, batch: ScoreBatch) -> ScoreTable:
        self.go.wait(30)
        time.sleep(self.seconds)
        self.batch_sizes.append(len(batch))
        return self.table(mean_and_first(batch.images))


class Picky(MeanScorer):
    """Raises on a batch that holds an image whose first pixel is 13, answers NaN where it is 14."""

    name = "picky"

    def score(self, batch: ScoreBatch) -> ScoreTable:
        if (batch.images[:, 0, 0, 0] == 13).any():
            raise RuntimeError("thirteen is unlucky")
        table = super().score(batch)
        values = table.values.copy()
        values[batch.images[:, 0, 0, 0] == 14] = np.nan
        return self.table(values)


def free_port() -> int:
    """A TCP port of loopback that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def mean_and_first(images: np.ndarray) -> np.ndarray:
    """[N,2]: what MeanScorer answers."""
    flat = images.reshape(len(images), -1).astype(np.float64)
    return np.stack([flat.mean(axis=1), flat[:, 0]], axis=1).astype(np.float32)


def pictures(num: int, size: int = 8, seed: int = 0) -> np.ndarray:
    """uint8 [num,size,size,3]; first pixels are 100, 101, ..."""
    images = np.random.default_rng(seed).integers(20, 250, (num, size, size, 3), dtype=np.uint8)
    images[:, 0, 0, 0] = 100 + np.arange(num) % 100
    return images


@contextmanager
def served(scorer: Scorer, token: str | None = None, **settings: Any) -> Iterator[RewardServer]:
    """A real server on a free loopback port, in a thread of this process; drained at the end."""
    server = RewardServer(scorer, ServerSettings(**{"drain_seconds": 5.0, **settings}), token)
    ready = threading.Event()
    failure: list[BaseException] = []

    def run() -> None:
        try:
            asyncio.run(server.run(lambda _: ready.set()))
        except BaseException as error:
            failure.append(error)
        ready.set()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    assert ready.wait(60)
    if failure:
        raise failure[0]
    try:
        yield server
    finally:
        server.stop()
        thread.join(15)
        assert not thread.is_alive(), "the server did not end"


def config_for(*urls: str, **fields: Any) -> ScorerConfig:
    """A client's configuration with short times."""
    quick = {"timeout_s": 2.0, "deadline_s": 5.0, "breaker_reset_s": 0.2, "name": "juror"}
    return ScorerConfig(**{**quick, **fields}, urls=urls)


def score_body(
    images: np.ndarray | list[np.ndarray], metadata: tuple[dict[str, Any], ...] = (), **fields: Any
) -> bytes:
    """The body of POST /v1/score as any client would write it."""
    prompts = fields.pop("prompts", tuple(f"prompt {i}" for i in range(len(images))))
    header = ScoreRequest(request_id="r1", prompts=prompts, metadata=metadata, **fields)
    if isinstance(images, list):
        return encode(header, {f"image_{i}": image for i, image in enumerate(images)})
    return encode(header, {"images": images})


def post(url: str, body: bytes, **headers: str) -> httpx.Response:
    return httpx.post(f"{url}/v1/score", content=body, headers=headers, timeout=20)


def read_table(response: httpx.Response) -> ScoreTable:
    """The table in a good answer."""
    from contracts.scores import from_message

    assert response.status_code == 200, response.text
    header, arrays = decode(response.content, ScoreResponse)
    return from_message(header.table, arrays)


Behaviour = Callable[[bytes, asyncio.StreamWriter], Awaitable[None]]


class FaultServer:
    """Speaks just enough HTTP to misbehave: good /v1/info, then whatever `behave(body, writer)` does on /v1/score."""

    def __init__(self, behave: Behaviour, info: ScorerInfo | None = None) -> None:
        self.behave, self.calls, self.bytes_written = behave, 0, 0
        self.info = info or ScorerInfo(
            name="faulty", version="3", kind="point", columns=("mean", "first"), offers_gradients=True, max_images=64,
            max_pixels=10**6, max_body_bytes=10**7,
        )  # fmt: skip
        self.url = ""
        self._loop = asyncio.new_event_loop()
        self._started = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> FaultServer:
        self._thread.start()
        assert self._started.wait(10)
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        server = self._loop.run_until_complete(asyncio.start_server(self._connection, "127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        self._started.set()
        self._loop.run_forever()
        server.close()
        for task in asyncio.all_tasks(self._loop):
            task.cancel()
        self._loop.run_until_complete(asyncio.sleep(0.01))
        self._loop.close()

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            head = await reader.readuntil(b"\r\n\r\n")
            lengths = [
                line.split(b":")[1] for line in head.lower().split(b"\r\n") if line.startswith(b"content-length")
            ]
            body = await reader.readexactly(int(lengths[0])) if lengths else b""
            if head.startswith(b"GET /v1/info"):
                writer.write(http_answer(200, self.info.model_dump_json().encode()))
            else:
                self.calls += 1
                await self.behave(body, writer)
            await writer.drain()
        with suppress(Exception):
            writer.close()


def http_answer(status: int, body: bytes, **headers: str) -> bytes:
    lines = [f"HTTP/1.1 {status} X", f"Content-Length: {len(body)}", "Connection: close"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return ("\r\n".join(lines) + "\r\n\r\n").encode() + body


def good_answer(
    body: bytes, change: Callable[[ScoreTable], ScoreTable] = lambda table: table, request_id: str | None = None
) -> bytes:
    """What MeanScorer would answer, changed."""
    header, arrays = decode(body, ScoreRequest)
    table = change(point_table("faulty", "3", ("mean", "first"), mean_and_first(arrays["images"])))
    table_header, table_arrays = to_message(table)
    response = ScoreResponse(request_id=request_id or header.request_id, table=table_header)
    return http_answer(200, encode(response, table_arrays))

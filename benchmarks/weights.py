"""From publish to loaded: how long weights of 1, 40 and 400 MB are on their way from learner rank 0 into an actor.

The real path: `LearnerGroup.snapshot` (tensors exported and their digest taken at rank 0), object store or host copy
(a gloo broadcast into this node's store), `WeightStore` offer, and the actor's load at its next boundary (bits copied
into live tensors, digest of the live tensors compared). Only the network is missing: rank and actor hold plain fp32
tensors of a megabyte at most, so there is no canary. One rank, one actor, one node, one thread each.

- published: snapshot called to arrays in a store of the actor's node
- loaded: snapshot called to the actor's proof (what a user waits for); load: the actor's part of it
- memcpy: the same bytes copied once in one process, the least any path can take

Sizes and transports are interleaved; each figure is the median over repeats with a 95 % interval of the median.

    python -m benchmarks.weights [--json]
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import tempfile
import time
from collections.abc import Mapping
from typing import Any

import numpy as np

from benchmarks.measuring import local_ray, median
from benchmarks.stand_ins import Published
from contracts.config import RunConfig
from contracts.digests import digest_arrays
from contracts.wire import WeightOffer, WeightProof

SIZES_MB = (1, 40, 400)
TRANSPORTS = ("object_store", "collective")
TENSOR_ELEMENTS = 2**18  # a megabyte of fp32


def run(repeats: int = 10, sizes: tuple[int, ...] = SIZES_MB) -> dict[str, Any]:
    """Rows by size and transport: seconds to published, to loaded and of the load, megabytes a second to loaded."""
    timings: dict[tuple[int, str], list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as folder, local_ray(8, 400 + 8 * max(sizes)):
        paths = {
            (size, transport): _Path(_config(folder, size, transport)) for size in sizes for transport in TRANSPORTS
        }
        asyncio.run(_measure(paths, repeats, timings))
    rows = [
        {
            "megabytes": size, "transport": transport,
            **{name: median([timing[name] for timing in found]) for name in ("published", "loaded", "load")},
            "memcpy": median([timing["memcpy"] for timing in found])["median"],
        }
        for (size, transport), found in timings.items()
    ]  # fmt: skip
    return {"repeats": repeats, "rows": rows}


async def _measure(paths: Mapping[Any, _Path], repeats: int, timings: dict[Any, list[dict[str, float]]]) -> None:
    for path in paths.values():
        await path.start()
        await path.publish()  # warm up: the channel is formed, the actor's first load made
    for _ in range(repeats):
        for key, path in paths.items():
            timings.setdefault(key, []).append(await path.publish())
    for path in paths.values():
        path.stop()


class _Path:
    """One rank and one actor, and the way between them."""

    def __init__(self, config: RunConfig) -> None:
        from cluster.learner_group import LearnerGroup
        from cluster.weights import WeightStore
        from cluster.workers import ActorWorker

        self.config, self.step = config, 0
        self.ranks = LearnerGroup(config, {}, [], "benchmarks.weights:TensorLearner")
        self.store = WeightStore(config.weights.timeout_s)
        worker: Any = ActorWorker
        self.actor = worker.options(num_cpus=0).remote(config, "actor-0", {}, "benchmarks.weights:TensorPainter")

    async def start(self) -> None:
        await self.ranks.start()
        self.node = (await self.actor.ready.remote())["node"]

    async def publish(self) -> dict[str, float]:
        """Seconds of one publication."""
        start = time.perf_counter()
        published = await self.ranks.snapshot(self.step, self.step, [self.node])
        there = time.perf_counter()
        assert not published.lost, published.lost
        self.store.add(published.offer, published.arrays, published.canary, published.on_nodes)
        await self.store.offer_to(self.actor, self.node)
        version, proof = await self.actor.held_version.remote()
        end = time.perf_counter()
        assert version == self.step
        assert proof.digest == published.offer.digest
        self.step += 1
        return {
            "published": there - start, "loaded": end - start, "load": proof.load_seconds,
            "memcpy": _memcpy(published.offer.num_bytes),
        }  # fmt: skip

    def stop(self) -> None:
        import ray

        self.ranks.stop()
        ray.kill(self.actor)


def _memcpy(num_bytes: int) -> float:
    source, target = np.ones(num_bytes, np.uint8), np.ones(num_bytes, np.uint8)  # touched: no page faults
    start = time.perf_counter()
    np.copyto(target, source)
    return time.perf_counter() - start


class _Tensors:
    """What the weight functions see of a policy: its trained tensors by name."""

    def __init__(self, config: RunConfig) -> None:
        import torch

        count = int(config.prompts.options["megabytes"])
        self.named = {f"tensor.{index:04d}": torch.zeros(TENSOR_ELEMENTS) for index in range(count)}

    def trainable(self) -> dict[str, Any]:
        return self.named


class TensorLearner:
    """Publishes as a rank does: every tensor changed, exported and digested."""

    def __init__(self, config: RunConfig, rank: int, world_size: int, score_gradient: Any = None) -> None:
        del rank, world_size, score_gradient
        self.policy = _Tensors(config)

    def snapshot(self, version: int, step: int, average: bool = False) -> Published:
        from policy.weights import export_arrays

        for tensor in self.policy.named.values():
            tensor.fill_(version + 0.5)
        arrays, dtypes = export_arrays(self.policy.named)
        offer = WeightOffer(
            version=version, step=step, snapshot="current", digest=digest_arrays(arrays, dtypes),
            num_bytes=sum(array.nbytes for array in arrays.values()), dtypes=dtypes,
        )  # fmt: skip
        return Published(offer, arrays, np.zeros(1, np.float32))


class TensorPainter:
    """Loads as a painter does, and proves it by the digest of its live tensors."""

    def __init__(self, config: RunConfig) -> None:
        self.policy: Any = _Tensors(config)

    def load(self, offer: WeightOffer, arrays: Mapping[str, np.ndarray], *canaries: Any) -> WeightProof:
        from actors.proof import check_digest
        from policy.weights import load_arrays

        del canaries
        start = time.perf_counter()
        load_arrays(self.policy, arrays, offer.dtypes)
        digest = check_digest(self.policy, offer)
        return WeightProof(
            version=offer.version, digest=digest, canary_to_current=0.0, canary_to_previous=None,
            load_seconds=time.perf_counter() - start,
        )  # fmt: skip


def _config(folder: str, megabytes: int, transport: str) -> RunConfig:
    from contracts.config.load import config_from_tree

    return config_from_tree(
        {
            "name": f"weights-{megabytes}-{transport}".replace("_", "-"),
            "runs_dir": folder,
            "model": {"path": "none"},
            "prompts": {"source": "benchmarks.stand_ins:Prompts", "options": {"megabytes": megabytes}},
            "scorers": [{"name": "timer", "function": "benchmarks.stand_ins:score"}],
            "objective": {"name": "nft"},
            "learner": {"engine": "plain", "cpus_per_rank": 0.01},
            "weights": {"transport": transport},
            "stop": {"steps": 1},
        }
    )


def table(result: dict[str, Any]) -> str:
    """The figures as a Markdown table, in milliseconds."""
    lines = [
        "| MB | transport | published, ms | loaded, ms | 95 % interval | of it the load, ms | MB/s | memcpy, ms |",
        "|---:|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in result["rows"]:
        loaded, size = row["loaded"], row["megabytes"]
        lines.append(
            f"| {size} | {row['transport']} | {1e3 * row['published']['median']:.0f} | {1e3 * loaded['median']:.0f} "
            f"| {1e3 * loaded['low']:.0f} – {1e3 * loaded['high']:.0f} | {1e3 * row['load']['median']:.0f} "
            f"| {size / loaded['median']:.0f} | {1e3 * row['memcpy']:.1f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    measured = run()
    print(json.dumps(measured, indent=1) if "--json" in sys.argv else table(measured))

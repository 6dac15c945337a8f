"""Host copies of weights over real gloo: bytes equal on every node, a lost member found in time.

Whole runs by them: test_host_copies_run.py.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cluster.host_copies import HostCopies
from cluster.workers import RankWorker
from contracts.config import RunConfig
from contracts.config.learner import WeightsConfig
from contracts.digests import digest_arrays
from contracts.errors import WeightsError, WeightsTimeout
from contracts.wire import WeightOffer
from tests.cluster.whole_run import timed_run

ROOT = Path(__file__).resolve().parents[2]
LIMIT_S = 120  # a hang would exceed it; what is tested ends after seconds


@pytest.fixture(scope="module")
def nodes() -> Iterator[list[str]]:
    """A Ray cluster of two nodes on this machine; their ids."""
    import ray
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "object_store_memory": 100 * 2**20})
    cluster.add_node(num_cpus=1, object_store_memory=100 * 2**20)
    try:
        ray.init(
            address=cluster.address, log_to_driver=False, logging_level="WARNING",
            runtime_env={"env_vars": {"PYTHONPATH": str(ROOT)}},
        )  # fmt: skip
        yield sorted(node["NodeID"] for node in ray.nodes())
    finally:
        ray.shutdown()
        cluster.shutdown()


@pytest.fixture
def sender(nodes: list[str], tmp_path: Path) -> Any:
    """Rank 0 with a megabyte of weights in place of a model."""
    import ray

    worker: Any = RankWorker
    rank = worker.options(num_cpus=0).remote(
        timed_run(tmp_path, "timers"), 0, {}, [], "tests.cluster.test_host_copies:ManyShapes"
    )
    ray.get(rank.build.remote("127.0.0.1", 1, None))
    return rank


class ManyShapes:
    """A learner whose weights have every shape and type that travels: bf16 as bits, a scalar, an empty array."""

    def __init__(self, config: RunConfig, rank: int, world_size: int, score_gradient: Any = None) -> None:
        del config, rank, world_size, score_gradient

    def snapshot(self, version: int, step: int, average: bool = False) -> Any:
        from benchmarks.stand_ins import Published

        rng = np.random.default_rng(version)
        arrays = {
            "z": rng.standard_normal((256, 1024), dtype=np.float32),
            "a": rng.integers(0, 2**16, (3, 5, 7), dtype=np.uint16),
            "scalar": np.array(1.5, np.float32),
            "transposed": rng.standard_normal((4, 8), dtype=np.float32).T,
            "empty": np.zeros((0, 4), np.float32),
        }
        for array in arrays.values():
            array.flags.writeable = False
        dtypes = {"a": "bfloat16"}
        offer = WeightOffer(
            version=version, step=step, snapshot="current", digest=digest_arrays(arrays, dtypes),
            num_bytes=sum(array.nbytes for array in arrays.values()), dtypes=dtypes,
        )  # fmt: skip
        return Published(offer, arrays, np.zeros(1, np.float32))


def snapshot(sender: Any, version: int) -> tuple[WeightOffer, Any, dict[str, np.ndarray]]:
    """(offer, specs, what rank 0 keeps)."""
    import ray

    (offer, _), specs = ray.get(sender.snapshot.options(num_returns=2).remote(version, version, True))
    return offer, specs, ray.get(sender.kept_arrays.options(num_returns=2).remote()[1])


def fill(copies: HostCopies, sender: Any, offer: WeightOffer, specs: Any, nodes: list[str]) -> dict[str, Any]:
    async def in_time() -> dict[str, Any]:
        return await asyncio.wait_for(copies.fill(sender, offer, specs, nodes), LIMIT_S)

    return asyncio.run(in_time())


def test_every_node_holds_the_senders_bytes_and_loses_no_channel_between_versions(
    nodes: list[str], sender: Any
) -> None:
    import ray

    copies = HostCopies(WeightsConfig(transport="collective", timeout_s=30.0))
    assert len(nodes) == 2
    seen = []
    for version in (0, 1):
        offer, specs, sent = snapshot(sender, version)
        filled = fill(copies, sender, offer, specs, nodes)
        assert sorted(filled) == nodes
        for node, reference in filled.items():
            arrays = ray.get(reference)
            assert digest_arrays(arrays, offer.dtypes) == offer.digest
            assert {name: (a.dtype, a.tobytes()) for name, a in arrays.items()} == {
                name: (a.dtype, a.tobytes()) for name, a in sent.items()
            }
            assert node in ray.experimental.get_object_locations([reference])[reference]["node_ids"]
        seen.append([process["pid"] for process in copies.processes])
    assert seen[0] == seen[1]
    copies.drop()


@pytest.mark.parametrize(("name", "error"), [("SIGKILL", WeightsError), ("SIGSTOP", WeightsTimeout)])
def test_a_lost_copy_is_an_error_in_time_and_the_next_call_starts_anew(
    name: str, error: type[Exception], nodes: list[str], sender: Any
) -> None:
    copies = HostCopies(WeightsConfig(transport="collective", timeout_s=4.0))
    offer, specs, _ = snapshot(sender, 0)
    fill(copies, sender, offer, specs, nodes)
    victim = copies.processes[1]["pid"]
    os.kill(victim, getattr(signal, name))
    with pytest.raises(error, match=r"the copy on node|learner rank 0"):
        fill(copies, sender, offer, specs, nodes)
    assert copies.processes == []
    assert sorted(fill(copies, sender, offer, specs, nodes)) == nodes
    assert victim not in {process["pid"] for process in copies.processes}
    copies.drop()


def test_what_arrives_otherwise_than_offered_is_refused(nodes: list[str], sender: Any) -> None:
    copies = HostCopies(WeightsConfig(transport="collective", timeout_s=30.0))
    offer, specs, _ = snapshot(sender, 0)
    snapshot(sender, 1)  # rank 0 now keeps other weights than those offered
    with pytest.raises(WeightsError, match="arrived with digest"):
        fill(copies, sender, offer, specs, nodes[:1])

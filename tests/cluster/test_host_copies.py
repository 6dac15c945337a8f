"""Host copies of weights over real gloo: bytes equal on every node, a lost member found in time, whole runs."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cluster.controller import Parts
from cluster.host_copies import HostCopies
from cluster.workers import RankWorker
from contracts.config import RunConfig
from contracts.config.learner import WeightsConfig
from contracts.config.load import config_from_tree
from contracts.digests import digest_arrays
from contracts.errors import WeightsError, WeightsTimeout
from contracts.wire import WeightOffer
from tests.cluster.lost_ranks import write_faults
from tests.laws.run_kit import events, local_ray, run_on_cluster, tiny_config

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
        timer_config(tmp_path), 0, {}, [], "tests.cluster.test_host_copies:ManyShapes"
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


def timer_config(folder: Path, **weights: Any) -> RunConfig:
    """Five steps without a model."""
    return config_from_tree(
        {
            "name": "timers",
            "runs_dir": str(folder),
            "model": {"path": "none"},
            "prompts": {"source": "benchmarks.stand_ins:Prompts", "options": {"paint_s": 0.05, "update_s": 0.05}},
            "rollout": {"groups_per_step": 2, "group_size": 4, "micro_batch": 4},
            "scorers": [{"name": "timer", "function": "benchmarks.stand_ins:score"}],
            "objective": {"name": "nft"},
            "learner": {"engine": "plain"},
            "weights": weights,
            "eval": {"before": False, "num_prompts": 1, "samples_to_save": 0},
            "telemetry": {"tensorboard": False, "report": False},
            "stop": {"steps": 5},
        }
    )


def test_a_run_whose_broadcasts_fail_goes_on_by_the_object_store(tmp_path: Path) -> None:
    """NCCL on a machine without it: three attempts, then host copies are given up; every version arrives."""
    config = timer_config(tmp_path, transport="collective", backend="nccl", timeout_s=10.0)
    with local_ray(config):
        summary = run_on_cluster(
            config, Parts("benchmarks.stand_ins:WaitingPainter", "benchmarks.stand_ins:WaitingLearner")
        )
    assert summary["steps"] == 5
    assert [event["version"] for event in events(config, "host_copies_lost")] == [0, 1, 2]
    assert events(config, "weights_proven")[-1]["version"] >= 4


def test_a_rebuilt_learner_makes_a_new_channel(tmp_path: Path) -> None:
    config = timer_config(tmp_path, transport="collective", timeout_s=30.0)
    write_faults(config, [("update", 3, 0, "SIGKILL")])
    with local_ray(config):
        summary = run_on_cluster(
            config, Parts("benchmarks.stand_ins:WaitingPainter", "tests.cluster.lost_ranks:MortalTimer")
        )
    assert (summary["steps"], summary["learner_rebuilds"]) == (5, 1)
    assert events(config, "host_copies_lost") == []
    channels = [[process["pid"] for process in event["processes"]] for event in events(config, "host_copies")]
    assert len(channels) == 2
    assert channels[0] != channels[1]


@pytest.mark.slow
def test_a_whole_run_by_host_copies_proves_its_weights(tiny_model_folder: Path, tmp_path: Path) -> None:
    config = tiny_config(
        tiny_model_folder, tmp_path, weights__transport="collective", rollout__actors=2, rollout__cpus_per_actor=0.5
    )
    with local_ray(config):
        summary = run_on_cluster(config)
    assert summary["steps"] == 3
    assert events(config, "host_copies_lost") == []
    assert [len(event["processes"]) for event in events(config, "host_copies")] == [1]
    assert {event["version"] for event in events(config, "weights_proven")} >= {1, 2}

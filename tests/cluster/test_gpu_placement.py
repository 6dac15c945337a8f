"""Actors with fractions of a GPU are placed together on it. Ray only counts: the GPU is declared, none is needed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray

from cluster import validate
from cluster.controller import Parts
from contracts.config import RunConfig
from contracts.config.load import config_from_tree
from tests.laws.run_kit import run_on_cluster

PARTS = Parts("tests.cluster.gpu_parts:NotingPainter", "tests.cluster.gpu_parts:NotingLearner")


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    """Two GPUs are declared; Ray counts them and looks at none."""
    ray.init(
        address="local", num_cpus=2, num_gpus=2, include_dashboard=False, log_to_driver=False,
        logging_level="WARNING", object_store_memory=300 * 2**20,
    )  # fmt: skip
    yield
    ray.shutdown()


def on_gpus(folder: Path, name: str, actors: int, share: float) -> RunConfig:
    tree: dict[str, Any] = {
        "name": name, "runs_dir": str(folder), "model": {"path": "none"},
        "prompts": {"source": "benchmarks.stand_ins:Prompts", "options": {"paint_s": 0.02, "update_s": 0.02}},
        "rollout": {"groups_per_step": 2, "group_size": 4, "micro_batch": 4, "actors": actors,
                    "cpus_per_actor": 0.25, "gpus_per_actor": share},
        "scorers": [{"name": "timer", "function": "benchmarks.stand_ins:score"}],
        "objective": {"name": "nft"}, "learner": {"engine": "plain", "cpus_per_rank": 0.25, "gpus_per_rank": 1},
        "eval": {"before": False, "num_prompts": 2, "samples_to_save": 0},
        "telemetry": {"tensorboard": False, "report": False}, "stop": {"steps": 2},
    }  # fmt: skip
    return config_from_tree(tree)


@pytest.mark.parametrize(("actors", "share"), [(2, 0.5), (1, 1.0)])
def test_actors_share_a_gpu_that_the_learner_does_not_have(actors: int, share: float, tmp_path: Path) -> None:
    config = on_gpus(tmp_path, f"of-{actors}", actors, share)
    assert validate.check_cluster(config, ray.cluster_resources()) == []
    summary = run_on_cluster(config, PARTS)
    assert (summary["outcome"], summary["steps"]) == ("finished", 2)
    noted = [json.loads(path.read_text()) for path in sorted(tmp_path.glob("gpu-*.json"))]
    painting = [each["visible"] for each in noted if each["role"] == "actor"]
    learning = [each["visible"] for each in noted if each["role"] == "rank"]
    assert len(painting) == actors
    assert len(set(painting)) == 1, "halves of one GPU, not of two"
    assert {*painting, *learning} == {"0", "1"}, "and the rank has the other one whole"


def test_more_than_there_are_is_found_before_anything_is_placed(tmp_path: Path) -> None:
    (error,) = validate.check_cluster(on_gpus(tmp_path, "too-many", 3, 0.5), ray.cluster_resources())
    assert "the run asks for 2.5 GPUs and the cluster has 2" in error.problem

"""Small runs for the laws: a configuration of the miniature model, and a cluster run of it from start to summary."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from contracts.config import RunConfig
from contracts.config.load import config_from_tree

OBJECTIVES: dict[str, dict[str, Any]] = {
    "grpo": {"name": "grpo", "clip_range": 1e-3},
    "nft": {"name": "nft", "draws": 2},
    "ppo": {"name": "ppo", "clip_range": 1e-3},
    "dpo": {"name": "dpo", "beta": 100.0},
    "alignprop": {"name": "alignprop", "loss_coeff": 100.0, "truncation": "fixed"},
}


def tiny_config(model: Path, folder: Path, objective: str = "grpo", **changes: Any) -> RunConfig:
    """Two groups of four a step, four steps of flow_sde, one plain rank, no staleness; changes: dotted keys."""
    tree: dict[str, Any] = {
        "name": "tiny",
        "seed": 7,
        "runs_dir": str(folder),
        "model": {"path": str(model)},
        "prompts": {"source": "playground"},
        "sampler": {"name": "flow_sde", "steps": 4, "noise_level": 0.7},
        "rollout": {"groups_per_step": 2, "group_size": 4, "micro_batch": 4},
        "scorers": [{"name": "colour", "serve": "colourfulness"}],
        "objective": dict(OBJECTIVES[objective]),
        "learner": {"engine": "plain", "optimizer": {"lr": 1e-3}},
        "pipeline": {"max_staleness": 0},
        "eval": {"before": False, "num_prompts": 4, "samples_to_save": 0},
        "telemetry": {"tensorboard": False, "report": False},
        "stop": {"steps": 3},
    }
    for key, value in changes.items():
        node, *rest = key.split("__")
        inner = tree
        for part in rest:
            inner = inner.setdefault(node, {})
            node = part
        inner[node] = value
    return config_from_tree(tree)


@contextmanager
def local_ray(config: RunConfig) -> Iterator[None]:
    """A Ray of the test's own."""
    import ray

    from cluster.driver import start_ray

    start_ray(config)
    try:
        yield
    finally:
        ray.shutdown()


def controller_of(config: RunConfig, parts: Any = None, resume: bool = False) -> Any:
    """A controller on the Ray of the test, as the driver makes it; `run` has not been called yet."""
    from cluster.controller import ControllerActor
    from cluster.driver import worker_environment

    environment = {"env_vars": worker_environment(config)}
    return ControllerActor.options(runtime_env=environment).remote(config, parts, resume)  # type: ignore[attr-defined]


def run_on_cluster(config: RunConfig, parts: Any = None, resume: bool = False) -> dict[str, Any]:
    """The whole run through the controller, or the rest of it; returns its summary."""
    import ray

    return ray.get(controller_of(config, parts, resume).run.remote())


def events(config: RunConfig, kind: str) -> list[dict[str, Any]]:
    """Lines of events.jsonl of one kind; none before there is one, and not the one that is being written."""
    file = Path(config.runs_dir) / config.name / "events.jsonl"
    lines = file.read_text().rpartition("\n")[0].splitlines() if file.is_file() else []
    return [event for event in map(json.loads, lines) if event["event"] == kind]


def state_tensors(folder: Path) -> dict[str, np.ndarray]:
    """Every tensor of a saved learner state, by file and name."""
    return {
        f"{file.name}:{key}": value
        for file in sorted(folder.glob("*.safetensors"))
        for key, value in load_file(file).items()
    }

"""What every test of a whole run asks of it: books, summary, changed weights; on top of tests/laws/run_kit.py."""

from __future__ import annotations

import json
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from cluster.ledger.reader import Books, LedgerReader
from contracts.config import RunConfig
from contracts.config.load import config_from_tree

PAINTER, LEARNER = "benchmarks.stand_ins:WaitingPainter", "benchmarks.stand_ins:WaitingLearner"
"""Timers in the place of models."""
TIMED_STEPS = 24
HELD_UP_S = 240.0

SUMMARY_KEYS = {
    "held_out_strict_before", "held_out_strict_after", "train_seconds", "images_painted", "images_trained",
    "images_discarded", "images_discarded_by_weight_sync", "groups_trained", "max_staleness_seen",
}  # fmt: skip


def timed_run(folder: Path, name: str, **sections: Any) -> RunConfig:
    """A run of timers: two groups of four a step; a vault of 1 MB holds 16 of them."""
    tree: dict[str, Any] = {
        "name": name, "runs_dir": str(folder), "model": {"path": "none"},
        "prompts": {"source": "benchmarks.stand_ins:Prompts", "options": {"paint_s": 0.02, "update_s": 0.02}},
        "rollout": {"groups_per_step": 2, "group_size": 4, "micro_batch": 4, "cpus_per_actor": 0.5},
        "scorers": [{"name": "timer", "function": "benchmarks.stand_ins:score"}],
        "objective": {"name": "nft"}, "learner": {"engine": "plain", "cpus_per_rank": 0.5},
        "eval": {"before": False, "num_prompts": 2, "samples_to_save": 0}, "telemetry": {"tensorboard": False},
        "stop": {"steps": TIMED_STEPS}, **sections,
    }  # fmt: skip
    return config_from_tree(tree)


def wait_for(what: Any, result: Any) -> None:
    """Until what() holds; fails when the run whose result is given ends first."""
    import ray

    deadline = time.monotonic() + HELD_UP_S
    while not what():
        if ray.wait([result], timeout=0.1)[0]:
            raise AssertionError(f"the run ended too early: {ray.get(result)}")  # or raises what it ended with
        assert time.monotonic() < deadline, "it never came to pass"


def folder_of(config: RunConfig) -> Path:
    return Path(config.runs_dir) / config.name


def books_of(config: RunConfig) -> Books:
    """The books of a run that has ended."""
    with closing(LedgerReader(folder_of(config) / "ledger.sqlite")) as ledger:
        return ledger.books()


def rows(config: RunConfig) -> list[dict[str, Any]]:
    """Lines of metrics.jsonl."""
    return [json.loads(line) for line in (folder_of(config) / "metrics.jsonl").read_text().splitlines()]


def weight_changes(config: RunConfig) -> dict[str, float]:
    """Largest change of each trained tensor between the run's start and its last state."""
    from policy.policy import Policy

    before = Policy.load(config.model, config.seed, trainable=True).trainable()
    state = max((folder_of(config) / "checkpoints").glob("step-*"))
    after = load_file(state / "param.safetensors")
    return {name: float(np.abs(after[name] - tensor.detach().numpy()).max()) for name, tensor in before.items()}


def check_finished(config: RunConfig, summary: dict[str, Any], steps: int = 2) -> Books:
    """A run that ended by itself: all keys of the summary, the same on disk, books balanced, weights changed."""
    assert summary.keys() >= SUMMARY_KEYS
    assert json.loads((folder_of(config) / "summary.json").read_text()) == summary
    assert summary["outcome"] == "finished"
    assert summary["steps"] == steps
    assert summary["groups_trained"] == steps * config.rollout.groups_per_step
    assert summary["train_seconds"] > 0
    assert summary["held_out_strict_after"] is not None
    assert summary["images_discarded_by_weight_sync"] == 0
    books = books_of(config)
    assert books.balanced
    assert books.alive == 0
    assert summary["images_painted"] == summary["images_trained"] + sum(summary["images_discarded"].values())
    assert summary["images_trained"] == books.trained > 0
    changes = weight_changes(config)
    assert changes
    assert max(changes.values()) > 0
    assert [row["step"] for row in rows(config)] == list(range(1, steps + 1))
    return books

"""What every test of a whole run asks of it: books, summary, changed weights; on top of tests/laws/run_kit.py."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from cluster.ledger.reader import Books, LedgerReader
from contracts.config import RunConfig

SUMMARY_KEYS = {
    "held_out_strict_before", "held_out_strict_after", "train_seconds", "images_painted", "images_trained",
    "images_discarded", "images_discarded_by_weight_sync", "groups_trained", "max_staleness_seen",
}  # fmt: skip


@contextmanager
def shared_ray(num_gpus: int | None = None) -> Iterator[None]:
    """One local Ray for the runs of a module. num_gpus: declared; Ray counts them and looks at none."""
    import ray

    ray.init(
        address="local", num_cpus=2, num_gpus=num_gpus, include_dashboard=False, log_to_driver=False,
        logging_level="WARNING", object_store_memory=300 * 2**20,
    )  # fmt: skip
    try:
        yield
    finally:
        ray.shutdown()


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

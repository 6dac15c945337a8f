"""A checkpoint under way never stalls the actors: with its writer held up they paint on, up to the admission bound.

The real controller, ledger and vaults; a painter that waits a moment and a learner whose state is held up by a file.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from benchmarks.stand_ins import WaitingLearner
from cluster.checkpoints.layout import list_whole
from cluster.controller import Parts
from cluster.ledger.reader import Books, LedgerReader
from contracts.config import RunConfig
from contracts.config.load import config_from_tree
from contracts.errors import LedgerError
from learner.state_writer import NothingToWrite
from tests.laws.run_kit import events, run_on_cluster

GROUPS, STALENESS, EVERY = 2, 1, 2
BOUND = (STALENESS + 1) * GROUPS
PATIENCE_S = 120.0


class HeldUp(WaitingLearner):
    """Its state cannot be copied while a file `hold-copy` lies in runs_dir, and not be written while `hold-write`."""

    def __init__(self, config: RunConfig, rank: int, world_size: int, score_gradient: Any = None) -> None:
        super().__init__(config, rank, world_size, score_gradient)
        self.runs_dir = Path(config.runs_dir)

    def begin_save(self, folder: str | Path) -> NothingToWrite:
        wait_while(self.runs_dir / "hold-copy")
        pending = super().begin_save(folder)
        pending.finish = lambda: wait_while(self.runs_dir / "hold-write") or {}  # type: ignore[method-assign]
        return pending


def wait_while(gate: Path) -> None:
    gate.with_suffix(".reached").touch()
    while gate.exists():
        time.sleep(0.02)


def config_of(folder: Path) -> RunConfig:
    return config_from_tree(
        {
            "name": "held",
            "runs_dir": str(folder),
            "model": {"path": "none"},
            "prompts": {"source": "benchmarks.stand_ins:Prompts", "options": {"paint_s": 0.02, "update_s": 0.02}},
            "rollout": {"groups_per_step": GROUPS, "group_size": 4, "micro_batch": 4},
            "scorers": [{"name": "timer", "function": "benchmarks.stand_ins:score"}],
            "objective": {"name": "nft"},
            "learner": {"engine": "plain"},
            "pipeline": {"max_staleness": STALENESS},
            "checkpoint": {"every_steps": EVERY},
            "eval": {"before": False, "num_prompts": 1, "samples_to_save": 0},
            "telemetry": {"tensorboard": False, "report": False},
            "stop": {"steps": 12},
        }
    )


def books_of(config: RunConfig) -> Books | None:
    try:
        with closing(LedgerReader(Path(config.runs_dir) / config.name / "ledger.sqlite")) as ledger:
            return ledger.books()
    except LedgerError:
        return None


def books_when(config: RunConfig, condition: Callable[[Books], bool]) -> Books:
    """The first books that fulfil the condition."""
    ends, books = time.monotonic() + PATIENCE_S, books_of(config)
    while books is None or not condition(books):
        assert time.monotonic() < ends, f"not within {PATIENCE_S:.0f} s: {books}"
        time.sleep(0.05)
        books = books_of(config)
    return books


def ready(books: Books) -> int:
    return books.groups["ready"]


@pytest.mark.usefixtures("shared_ray")
@pytest.mark.timeout(300)
def test_while_a_checkpoint_is_written_actors_paint_and_steps_are_made(tmp_path: Path) -> None:
    """With the writer held up the run trains to its last step; only its end waits for the checkpoint."""
    config, gate = config_of(tmp_path), tmp_path / "hold-write"
    gate.touch()
    with ThreadPoolExecutor(1) as beside:
        run = beside.submit(run_on_cluster, config, parts())
        try:
            books = books_when(config, lambda found: found.trained_steps == 12)
            assert gate.with_suffix(".reached").exists()
            assert books.painted >= 12 * GROUPS * 4
            assert books.live_groups <= BOUND
            assert list_whole(tmp_path / "held" / "checkpoints") == []
            time.sleep(0.5)
            assert not run.done()
        finally:
            gate.unlink()
        assert run.result(PATIENCE_S)["steps"] == 12
    assert [event["step"] for event in events(config, "checkpoint")] == [EVERY, 12]
    assert events(config, "actor_restart") == []


@pytest.mark.usefixtures("shared_ray")
@pytest.mark.timeout(300)
def test_while_a_checkpoint_holds_up_the_learner_actors_paint_up_to_the_bound(tmp_path: Path) -> None:
    """A state that is not copied yet holds up the learner's step: meanwhile all that may be admitted gets ready."""
    config, gate = config_of(tmp_path), tmp_path / "hold-copy"
    gate.touch()
    with ThreadPoolExecutor(1) as beside:
        run = beside.submit(run_on_cluster, config, parts())
        try:
            books = books_when(config, lambda found: ready(found) == BOUND)
            assert gate.with_suffix(".reached").exists()
            time.sleep(1.0)
            later = books_of(config)
            assert later is not None
            assert (books.trained_steps, later.trained_steps) == (EVERY, EVERY)
            assert (ready(later), later.live_groups, later.painted) == (BOUND, BOUND, (EVERY * GROUPS + BOUND) * 4)
        finally:
            gate.unlink()
        assert run.result(PATIENCE_S)["steps"] == 12
    assert events(config, "actor_restart") == []


def parts() -> Parts:
    return Parts("benchmarks.stand_ins:WaitingPainter", "tests.cluster.test_checkpoint_beside_actors:HeldUp")

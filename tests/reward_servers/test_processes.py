"""Scorers in processes of their own: cut and joined in order, started again when they die, gone with the server."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import psutil
import pytest
from reward_helpers import pictures, post, read_table, score_body, served

from contracts.errors import ConfigError, ScoringError
from contracts.scores import Outcome, ScoreTable
from reward_servers.client import ServerProcess
from reward_servers.isolation import score_isolated
from reward_servers.processes import ProcessScorer
from reward_servers.scorers.base import ScoreBatch

MODULE = "tests.reward_servers.scorers_in_processes"


@contextmanager
def loaded(kind: str = "Telling", processes: int = 2, *options: str) -> Iterator[ProcessScorer]:
    scorer = ProcessScorer(f"{MODULE}:{kind}", options, processes)
    try:
        scorer.load()
        yield scorer
    finally:
        scorer.close()


def batch_of(firsts: list[int]) -> ScoreBatch:
    images = pictures(len(firsts))
    images[:, 0, 0, 0] = firsts
    return ScoreBatch(images, ("p",) * len(firsts), ({},) * len(firsts))


def pids(table: ScoreTable) -> list[int]:
    return sorted({int(pid) for pid in table.column("pid")[0] if np.isfinite(pid)})


def test_a_batch_is_cut_scored_elsewhere_and_joined_in_order() -> None:
    seen: list[tuple[str, float]] = []
    with loaded() as scorer:
        assert (scorer.version, scorer.weight_digest, scorer.value_range) == ("7", "abc", (0.0, None))
        assert scorer.canary().images[0, 0, 0, 0] == 7, "its own, as it is once weights are there"
        scorer.meter = lambda name, value, **_: seen.append((name, value))
        table = scorer.score(batch_of([5, 4, 3, 2, 1]))
        assert table.column("first")[0].tolist() == [5, 4, 3, 2, 1]
        assert len(pids(table)) == 2
        assert os.getpid() not in pids(table)
        assert seen == [("salon_judge_pairs_total", 2), ("salon_judge_pairs_total", 3)], "counted by this server"
        assert set(pids(scorer.score(batch_of([9])))) < set(pids(table)), "one image is not cut"
    assert not any(psutil.pid_exists(pid) for pid in pids(table))


def test_only_the_image_that_kills_or_raises_fails() -> None:
    scorer = ProcessScorer(f"{MODULE}:Telling", (), 2)
    with served(scorer) as server:
        images = batch_of([1, 2, 13, 4, 14, 6, 7, 8]).images
        table = read_table(post(server.url, score_body(images)))
        assert table.outcomes[:, 0].tolist() == [0, 0, Outcome.FAILED, 0, Outcome.FAILED, 0, 0, 0]
        assert table.column("first")[0][[0, 1, 3, 5, 6, 7]].tolist() == [1, 2, 4, 6, 7, 8]
        assert "died" in table.reasons[2]
        assert "fourteen: no" in table.reasons[4]
        again = read_table(post(server.url, score_body(batch_of([1, 2]).images)))
        assert again.valid().all()
        for pid in pids(again):  # killed while nothing is asked of it, as the kernel does when memory is short
            os.kill(pid, signal.SIGKILL)
        after = read_table(post(server.url, score_body(batch_of([3, 4]).images)))
        assert after.column("first")[0].tolist() == [3, 4]
        assert not set(pids(after)) & set(pids(again))


def test_a_scorer_that_cannot_be_loaded_says_why() -> None:
    with pytest.raises(ScoringError, match="weights: none"), loaded("Unloadable", 1):
        pass


def test_a_process_that_could_not_be_loaded_again_is_tried_again(tmp_path: Path) -> None:
    weights = tmp_path / "weights"
    weights.write_text("there")
    with loaded("Needy", 1, f"file={weights}") as scorer:
        weights.unlink()
        for pid in pids(scorer.score(batch_of([1, 2]))):
            os.kill(pid, signal.SIGKILL)
        lost = score_isolated(scorer, batch_of([1, 2]))
        assert not lost.valid().any()
        assert "FileNotFoundError" in lost.reasons[0]
        weights.write_text("back")
        assert score_isolated(scorer, batch_of([1, 2])).valid().all()


def test_two_batches_at_a_time_get_their_own_scores_and_one_that_kills_spares_the_other() -> None:
    with loaded(processes=1) as scorer, ThreadPoolExecutor(2) as pool:
        batches = [[start, start + 1, 13 if start == 40 else start + 2] for start in range(20, 80, 4)]
        tables = list(pool.map(lambda firsts: score_isolated(scorer, batch_of(firsts)), batches))
    for firsts, table in zip(batches, tables, strict=True):
        right = [first != 13 for first in firsts]
        assert table.valid()[:, 0].tolist() == right
        assert table.column("first")[0][right].tolist() == [first for first in firsts if first != 13]


def test_scorers_that_it_would_break_are_refused() -> None:
    with pytest.raises(ConfigError, match="changes while it is served"):
        ProcessScorer(f"{MODULE}:Following", (), 1)
    with pytest.raises(ConfigError, match="whole group"):
        ProcessScorer(f"{MODULE}:Grouped", (), 2)
    with loaded("Grouped", 1) as scorer:
        assert scorer.declares.needs_group
        assert len(scorer.score(batch_of([1, 2, 3])).values) == 3


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_no_process_outlives_its_server(number: signal.Signals) -> None:
    with ServerProcess(f"{MODULE}:Telling", processes=2) as server:
        table = read_table(post(server.url, score_body(pictures(8))))
        assert table.valid().all()
        family = psutil.Process(server.pid).children(recursive=True)
        assert set(pids(table)) <= {process.pid for process in family}
        os.kill(server.pid, number)
        deadline = time.monotonic() + 20
        while any(process.is_running() for process in family):
            assert time.monotonic() < deadline, "a process outlives its server"
            time.sleep(0.02)
        if number == signal.SIGTERM:  # after SIGKILL, Python's tracker of semaphores says that it has cleared up
            assert "leaked" not in server.log_tail()
        assert "Traceback" not in server.log_tail()

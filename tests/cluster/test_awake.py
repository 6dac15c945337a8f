"""Time that a process has missed: known at its next look, and no reason to judge anybody else."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from typing import Any

import numpy as np
import pytest

from cluster import awake
from cluster.awake import GAP_S, Awake, wait_all, within
from cluster.ledger.clock import SteadyClock
from cluster.scoring import Jury
from contracts.config.scoring import RewardConfig, ScorerConfig
from contracts.scores import Outcome, ScoreTable, failed_table, point_table


class Stopped:
    """A process's clock under the test's hand: `sleep` is time in which the process does not run."""

    def __init__(self) -> None:
        self.asleep = 0.0

    def __call__(self) -> float:
        return time.monotonic() + self.asleep

    def sleep(self, seconds: float) -> None:
        self.asleep += seconds


@pytest.fixture
def process(monkeypatch: pytest.MonkeyPatch) -> Stopped:
    stopped = Stopped()
    monkeypatch.setattr(awake, "_own", Awake(stopped))
    return stopped


def test_only_a_gap_counts_as_missed() -> None:
    at = [10.0]
    mine = Awake(lambda: at[0])
    for seconds, missed in [(GAP_S, 0.0), (0.1, 0.0), (3600.0, 3600.0), (0.25, 3600.0), (GAP_S + 1, 3601.0 + GAP_S)]:
        at[0] += seconds
        assert mine.look() == (at[0], missed)


def test_time_missed_ends_no_lease(process: Stopped) -> None:
    clock = SteadyClock()
    lease = clock() + 600.0
    process.sleep(3600.0)
    assert lease - 600.0 <= clock() < lease - 590.0


async def wait_one(work: Awaitable[Any], limit_s: float) -> Any:
    done, _ = await wait_all([asyncio.ensure_future(work)], limit_s)
    if not done:
        raise TimeoutError
    return done.pop().result()


@pytest.mark.parametrize("wait", [within, wait_one])
def test_a_limit_in_which_the_process_was_stopped_begins_anew(wait: Callable[..., Any], process: Stopped) -> None:
    async def answered_after_the_limit() -> str:
        await asyncio.sleep(0.1)
        process.sleep(60.0)
        await asyncio.sleep(0.3)
        return "alive"

    assert asyncio.run(wait(answered_after_the_limit(), 0.25)) == "alive"


@pytest.mark.parametrize("wait", [within, wait_one])
def test_who_does_not_answer_a_process_that_runs_is_given_up(wait: Callable[..., Any], process: Stopped) -> None:
    with pytest.raises(TimeoutError):
        asyncio.run(wait(asyncio.sleep(30), 0.1))
    with pytest.raises(ZeroDivisionError):
        asyncio.run(wait(fail(), 5.0))


async def fail() -> None:
    raise ZeroDivisionError


def test_what_outlives_its_limit_has_ended_when_the_caller_goes_on() -> None:
    ended: list[str] = []

    async def work() -> None:
        try:
            await asyncio.sleep(30)
        finally:
            ended.append("ended")

    async def both() -> None:
        with pytest.raises(TimeoutError):
            await within(work(), 0.05)
        assert ended == ["ended"]

    asyncio.run(both())


def test_a_deadline_that_was_over_in_the_sleep_is_no_verdict_on_a_scorer(process: Stopped) -> None:
    """Asked again, once: the second answer stands, whatever it is."""
    asked: list[Outcome] = []

    class Judge:
        reads = "images"

        async def score(self, images: Any, *_args: Any, **_fields: Any) -> ScoreTable:
            if not asked:
                process.sleep(3600.0)
                asked.append(Outcome.TIMED_OUT)
                return failed_table("judge", "", ("score",), len(images), Outcome.TIMED_OUT, "no score in time")
            asked.append(Outcome.OK)
            return point_table("judge", "1", ("score",), np.full(len(images), 0.5))

    scorer = ScorerConfig(name="judge", function="judge:score")
    jury = Jury.__new__(Jury)
    jury.scorers, jury.judges, jury.reward = {"judge": scorer}, {"judge": Judge()}, RewardConfig()  # type: ignore
    tables = asyncio.run(jury.score(np.zeros((2, 4, 4, 3), np.uint8), ["a", "a"], [{}, {}]))
    assert asked == [Outcome.TIMED_OUT, Outcome.OK]
    assert tables["judge"].valid().all()


CHILD = """
import sys, time
from cluster import awake
awake.missed_s()
print("ready", flush=True)
sys.stdin.readline()
time.sleep(1.0)
print(awake.missed_s(), flush=True)
"""


def test_a_process_that_was_stopped_knows_it_though_nobody_asked_meanwhile() -> None:
    child = subprocess.Popen([sys.executable, "-c", CHILD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert child.stdin is not None
    assert child.stdout is not None
    try:
        assert child.stdout.readline() == "ready\n"
        child.send_signal(signal.SIGSTOP)
        time.sleep(GAP_S + 2.0)
        child.send_signal(signal.SIGCONT)
        child.stdin.write("\n")
        child.stdin.flush()
        assert float(child.stdout.readline()) > GAP_S + 1.0
    finally:
        child.kill()
        child.wait(30)

"""Faults for a run that is watched from outside: its processes by kind, what comes to harm, the books all the while.

A run is a driver process (`python -m ...`) and whatever it started. `strike` sends a signal to one of them, or to all
at once; a stopped driver, and a run that is stopped as a whole, are woken by `wake`. `RunUnderFire` starts the driver
again with `resume` when it ended, and `Watch` reads the ledger.
Shared by the soak (soak.py) and law 6 (tests/laws). Does not own: when what is struck.
"""

from __future__ import annotations

import random
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from cluster.hang_watch import kill_process
from cluster.ledger.reader import Books, LedgerReader
from contracts.config import RunConfig
from contracts.errors import LedgerError

KINDS = {
    "actor": "ray::ActorWorker",
    "rank": "ray::RankWorker",
    "dispatcher": "ray::Dispatcher",
    "vault": "ray::Vault",
    "reward server": "reward_servers serve",
    "controller": "ray::ControllerActor",
}
OTHERS = {"host of a reward server": "ray::ServerHost"}
"""Kinds that are not struck: this one's server ends with it."""

Fault = tuple[str, signal.Signals]
FAULTS: tuple[Fault, ...] = (
    *((kind, number) for kind in KINDS for number in (signal.SIGKILL, signal.SIGSTOP)),
    ("driver", signal.SIGKILL), ("driver", signal.SIGSTOP), ("everything", signal.SIGKILL),
    ("everything", signal.SIGSTOP),
)  # fmt: skip


def fault_name(fault: Fault) -> str:
    return f"{fault[0]} {fault[1].name}"


def is_woken(fault: Fault) -> bool:
    """Whether the watcher lets what was struck go on: nobody replaces a stopped driver, or a run stopped as a whole."""
    return fault in (("driver", signal.SIGSTOP), ("everything", signal.SIGSTOP))


def frozen_s(config: RunConfig) -> float:
    """How long a run is stopped as a whole: longer than anyone of it waits for an answer before he calls it a hang."""
    limits = [config.rollout.lease_s, config.learner.hang_timeout_s, config.weights.timeout_s]
    return 2.0 + max(*limits, config.cluster.hang_timeout_s, *(scorer.timeout_s for scorer in config.scorers))


class BooksBroken(Exception):
    """A law did not hold; the message says which, with the figures."""


@dataclass
class Watch:
    """Looks at the ledger from outside. Raises BooksBroken. still_s: longest time without a painting or a step."""

    config: RunConfig
    still_s: float = 240.0
    looks: int = 0
    most_live: int = 0
    progress: tuple[int, int] = (-1, -1)
    progress_at: float = field(default_factory=time.monotonic)

    def look(self, books: Books) -> None:
        """Every law that holds at every instant."""
        self.looks += 1
        # Admission keeps (staleness + 1) steps live; a roll-back revives those of the steps it undoes: of two intervals
        # at most, when a rank is lost while a checkpoint is being written.
        steps = self.config.pipeline.max_staleness + 1 + 2 * self.config.checkpoint.every_steps
        most = steps * self.config.rollout.groups_per_step
        self.most_live = max(self.most_live, books.live_groups)
        self._need(books.balanced, "painted is not trained + discarded + alive", books)
        self._need(books.live_groups <= most, f"more than {most} groups are live", books)
        within = (books.max_staleness_seen or 0) <= self.config.pipeline.max_staleness
        self._need(within, "the staleness bound is exceeded", books)
        self._need(books.discarded_by_weight_sync == 0, "weights discarded images", books)
        self._need(books.discarded_by_reason.get("lost", 0) == 0, "an acknowledged group was lost", books)
        now = (books.painted, books.trained_steps)
        if now != self.progress:
            self.progress, self.progress_at = now, time.monotonic()
        still = time.monotonic() - self.progress_at
        self._need(still < self.still_s, f"nothing has happened for {still:.0f} s", books)

    def rest(self) -> None:
        """Standing still is no fault now: models are loading."""
        self.progress_at = time.monotonic()

    def _need(self, holds: bool, what: str, books: Books) -> None:
        if not holds:
            raise BooksBroken(f"{what}: {books}")


class RunUnderFire:
    """A run's driver process, started again with `resume` whenever it ended by a signal."""

    def __init__(self, command: Sequence[str], resume: Sequence[str], ledger: Path, log: Path, cwd: Path) -> None:
        """command, resume: how the driver is started, and started again; log: where its output goes."""
        self._command, self._resume, self._ledger, self._log, self._cwd = command, resume, ledger, log, cwd
        self._driver = log.with_suffix(".driver")
        self._end_leftover()
        self.starts = 0
        self.process = self._start(command)

    def _start(self, command: Sequence[str]) -> subprocess.Popen[bytes]:
        self.starts += 1
        with self._log.open("ab") as log:
            process = subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, cwd=self._cwd, start_new_session=True
            )
        self._driver.write_text(f"{process.pid} {psutil.Process(process.pid).create_time()}")
        return process

    def _end_leftover(self) -> None:
        """Kill the driver that a watcher which was killed itself has left behind; its run ends with it."""
        with suppress(FileNotFoundError):
            pid, started = self._driver.read_text().split()
            kill_process(int(pid), float(started))

    def processes(self, kind: str) -> list[psutil.Process]:
        """The run's processes of a kind, in the order of their ids; `driver` and `everything` too."""
        with suppress(psutil.NoSuchProcess):
            driver = psutil.Process(self.process.pid)
            if kind == "driver":
                return [driver]
            started = driver.children(recursive=True)
            found = started if kind == "everything" else [each for each in started if _is(each, KINDS[kind])]
            return [*([driver] if kind == "everything" else []), *sorted(found, key=lambda each: each.pid)]
        return []

    def memory(self) -> dict[str, list[float]]:
        """Resident MB of every process by kind, the driver and what Ray runs for itself included."""
        found: dict[str, list[float]] = {}
        for process in self.processes("everything"):
            with suppress(psutil.NoSuchProcess):
                megabytes = round(process.memory_info().rss / 2**20, 1)
                found.setdefault(self._kind(process), []).append(megabytes)
        return found

    def _kind(self, process: psutil.Process) -> str:
        if process.pid == self.process.pid:
            return "driver"
        return next((kind for kind, text in (KINDS | OTHERS).items() if _is(process, text)), "Ray's own")

    def strike(self, fault: Fault, rng: random.Random) -> list[int]:
        """Send the signal; the process ids it went to (none: there is no such process just now)."""
        kind, number = fault
        struck: list[int] = []
        while victims := [each for each in self.processes(kind) if each.pid not in struck]:
            for victim in victims if kind == "everything" else [rng.choice(victims)]:
                with suppress(psutil.NoSuchProcess):
                    victim.send_signal(number)
                    struck.append(victim.pid)
            if kind != "everything" or number == signal.SIGKILL:
                break  # otherwise once more: what one of them has started meanwhile is still running
        return struck

    def wake(self) -> None:
        """Let what is stopped go on."""
        for process in self.processes("everything"):
            with suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGCONT)

    def again(self) -> bool:
        """Start the driver with `resume` if it was killed; whether it was."""
        if self.process.poll() is None or self.process.returncode != -signal.SIGKILL:
            return False
        self.process = self._start(self._resume)
        return True

    def books(self) -> Books | None:
        """The books now; None while there is no ledger yet."""
        try:
            with closing(LedgerReader(self._ledger)) as ledger:
                return ledger.books()
        except LedgerError:
            return None

    def stop(self, timeout_s: float = 180.0) -> int:
        """SIGTERM; the exit code."""
        self.process.terminate()
        return self.process.wait(timeout_s)

    def end(self) -> None:
        """Kill what is left."""
        for each in self.processes("everything"):
            with suppress(psutil.NoSuchProcess):
                each.kill()
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(10)


def _is(process: psutil.Process, text: str) -> bool:
    try:
        return text in " ".join(process.cmdline()) and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def recover(
    run: RunUnderFire, watch: Watch, steps: int = 1, timeout_s: float = 240.0, look_s: float = 0.25,
    restored: Callable[[], bool] = lambda: True,
) -> float:  # fmt: skip
    """Seconds until the run has made `steps` more learner steps than now and is `restored`; looks all the while.

    The driver is started again if it was killed. Raises BooksBroken when a law does not hold, when the run ends, or
    when it takes longer than timeout_s.
    """
    start, before = time.monotonic(), run.books()
    done = before.trained_steps if before else 0
    goal, lowest = done + steps, done
    watch.rest()
    while True:
        run.again()
        books = run.books()
        if books is not None:
            watch.look(books)
            lowest = min(lowest, books.trained_steps)  # a roll-back: what it undid is made again first
            goal = min(goal, lowest + steps)
            if books.trained_steps >= goal and restored():
                return time.monotonic() - start
        if run.process.poll() not in (None, -signal.SIGKILL):
            raise BooksBroken(f"the run ended with status {run.process.returncode}")
        if time.monotonic() - start > timeout_s:
            raise BooksBroken(f"{steps} more steps and all processes took over {timeout_s:.0f} s: {books}")
        time.sleep(look_s)


def at_full_strength(run: RunUnderFire, kind: str, number: int, struck: Sequence[int]) -> Callable[[], bool]:
    """Whether as many processes of a kind are there as before the fault, those that were struck not counted."""

    def restored() -> bool:
        if kind in ("driver", "everything"):
            return run.process.poll() is None
        return len([each for each in run.processes(kind) if each.pid not in struck]) >= number

    return restored

"""Reward servers under fire: requests by the thousand while one server after another is killed (SIGKILL).

Servers of one scorer on ports of their own, one client with the configuration that a run has, callers in a closed loop.
Whenever another `kill_every` requests are answered, one server is killed and started again at its address, the first
never: its memory tells whether serving makes a server grow. Every request must come back exactly once, as a table with
an outcome for each image, every score that of its own image, and every other entry with a reason.

    python -m benchmarks soak jury [--requests 100000] [--write-docs]

Does not own: faults of a whole run (soak.py), retries and outcomes (reward_servers.client).
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import click
import numpy as np
import psutil

from benchmarks.learning import ROOT
from benchmarks.soak_report import measured_on, replace_between_markers
from contracts.config.scoring import ScorerConfig
from contracts.scores import Outcome, ScoreTable
from reward_servers.client import RewardClient, ServerProcess
from reward_servers.scorers.base import ScoreBatch
from reward_servers.scorers.colourfulness import Colourfulness

PICTURES = 64
SIZE = 16
MOST_IMAGES = 4


class Broken(Exception):
    """A request was lost, answered with another image's score, or failed without a reason."""


class Server:
    """One reward server that comes back at its own address."""

    def __init__(self) -> None:
        self._process = ServerProcess("colourfulness", max_wait_ms=0)
        self.url = self._process.start()

    @property
    def megabytes(self) -> float:
        return float(psutil.Process(self._process.pid).memory_info().rss) / 2**20

    def kill_and_restart(self) -> float:
        """Seconds from its death until it is ready again."""
        os.kill(self._process.pid, signal.SIGKILL)
        start = time.monotonic()
        self._process.stop()
        self._process = ServerProcess("colourfulness", max_wait_ms=0, port=int(self.url.rsplit(":", 1)[1]))
        self._process.start()
        return time.monotonic() - start

    def stop(self) -> None:
        self._process.stop()


@dataclass
class Shower:
    """What came back. scores: images by outcome; failures: the client's failed attempts by cause; recovered_s: of each
    kill; megabytes: of the server that is never killed, at every kill."""

    requests: int = 0
    answered: int = 0
    scores: Counter[str] = field(default_factory=Counter)
    failures: Counter[str] = field(default_factory=Counter)
    retries: int = 0
    recovered_s: list[float] = field(default_factory=list)
    megabytes: list[float] = field(default_factory=list)
    seconds: float = 0.0


def soak(
    requests: int,
    kills: int,
    servers: int = 3,
    callers: int = 16,
    seed: int = 0,
    on_kill: Callable[[Shower], None] = lambda so_far: None,
) -> Shower:
    """Send `requests` requests and kill a server `kills` times on the way. Raises Broken."""
    started = [Server() for _ in range(servers)]
    try:
        return asyncio.run(_Soak(started, requests, kills, callers, seed, on_kill).run())
    finally:
        for server in started:
            server.stop()


class _Soak:
    def __init__(
        self, servers: list[Server], requests: int, kills: int, callers: int, seed: int,
        on_kill: Callable[[Shower], None],
    ) -> None:  # fmt: skip
        self.servers, self.kills, self.callers, self.on_kill = servers, kills, callers, on_kill
        self.rng = np.random.default_rng(seed)
        self.images = self.rng.integers(0, 256, (PICTURES, SIZE, SIZE, 3), dtype=np.uint8)
        batch = ScoreBatch(self.images, ("",) * PICTURES, ({},) * PICTURES)
        self.expected = Colourfulness().score(batch).values
        self.seen = Shower(requests=requests)
        self.left = requests

    async def run(self) -> Shower:
        urls = tuple(server.url for server in self.servers)
        start = time.monotonic()
        async with RewardClient(ScorerConfig(name="soaked", urls=urls, concurrency=self.callers)) as client:
            await client.info()
            killer = asyncio.create_task(self._kill())
            callers = [asyncio.create_task(self._caller(client)) for _ in range(self.callers)]
            try:
                await asyncio.gather(killer, *callers)
            finally:
                for task in (killer, *callers):
                    task.cancel()
                await asyncio.gather(killer, *callers, return_exceptions=True)
            self.seen.failures, self.seen.retries = client.stats.failures, client.stats.retries
        self.seen.seconds = time.monotonic() - start
        if self.seen.answered != self.seen.requests:
            raise Broken(f"{self.seen.requests} requests, {self.seen.answered} answers")
        return self.seen

    async def _caller(self, client: RewardClient) -> None:
        while self.left > 0:
            self.left -= 1
            rows = self.rng.integers(0, PICTURES, self.rng.integers(1, MOST_IMAGES + 1))
            table = await client.score(self.images[rows], [""] * len(rows), ())
            self._check(rows, table)

    def _check(self, rows: np.ndarray, table: ScoreTable) -> None:
        self.seen.answered += 1
        self.seen.scores.update(Outcome(code).name.lower() for code in table.outcomes[:, 0])
        if table.num_images != len(rows):
            raise Broken(f"{table.num_images} rows for {len(rows)} images")
        for index, row in enumerate(rows):
            if table.outcomes[index, 0] == Outcome.OK:
                if not np.allclose(table.values[index], self.expected[row], rtol=1e-5):
                    raise Broken(f"an image was given {table.values[index]} instead of {self.expected[row]}")
            elif not (table.reasons and table.reasons[index]):
                raise Broken(f"an image ended as {Outcome(table.outcomes[index, 0]).name} without a reason")

    async def _kill(self) -> None:
        """Evenly over the requests; the next kill waits until the server that was killed last is back."""
        for number in range(self.kills):
            while self.seen.answered < (number + 1) * self.seen.requests / (self.kills + 1):
                await asyncio.sleep(0.02)
            self.seen.megabytes.append(round(self.servers[0].megabytes, 1))
            self.on_kill(self.seen)
            victim = self.servers[1 + number % (len(self.servers) - 1)]
            self.seen.recovered_s.append(round(await asyncio.to_thread(victim.kill_and_restart), 2))
        self.seen.megabytes.append(round(self.servers[0].megabytes, 1))


@click.command()
@click.option("--requests", type=click.IntRange(min=1), default=100_000, show_default=True)
@click.option("--kills", type=click.IntRange(min=0), default=200, show_default=True)
@click.option("--servers", type=click.IntRange(min=2), default=3, show_default=True)
@click.option("--callers", type=click.IntRange(min=1), default=16, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--write-docs", "write_docs", is_flag=True, help="write the table into docs/reliability.md")
def command(requests: int, write_docs: bool, **options: Any) -> None:
    """Requests to reward servers while servers are killed."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    from rich.table import Table

    columns = TextColumn("requests answered"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    try:
        with Progress(*columns) as progress:
            task = progress.add_task("", total=requests)
            seen = soak(requests, on_kill=lambda so_far: progress.update(task, completed=so_far.answered), **options)
            progress.update(task, completed=seen.answered)
    except Broken as broken:
        raise click.ClickException(str(broken)) from broken
    table = Table(show_header=False, title="reward servers under fire", title_justify="left")
    for what, value in rows(seen):
        table.add_row(what, value)
    Console().print(table)
    if write_docs:
        lines = [
            f"{measured_on()}, {options['servers']} servers, {options['callers']} callers:",
            "",
            "| | |",
            "|---|---|",
        ]
        lines += [f"| {what} | {value} |" for what, value in rows(seen)]
        replace_between_markers(ROOT / "docs" / "reliability.md", "jury", "\n".join(lines))


def rows(seen: Shower) -> list[tuple[str, str]]:
    """What was seen, in words."""
    recovered = sorted(seen.recovered_s)
    return [
        ("requests, all answered once", f"{seen.answered}"),
        ("images by outcome", ", ".join(f"{name} {number}" for name, number in seen.scores.items())),
        ("failed attempts", ", ".join(f"{name} {number}" for name, number in seen.failures.items()) or "none"),
        ("attempts repeated", str(seen.retries)),
        ("kills", str(len(recovered))),
        ("from death to ready, s", f"{recovered[len(recovered) // 2]} (median), {recovered[-1]} (longest)"
         if recovered else ""),
        ("memory of the server never killed, MB", f"{seen.megabytes[0]} to {seen.megabytes[-1]}, {_growth(seen)}"),
        ("requests a second", f"{seen.answered / seen.seconds:.0f}"),
    ]  # fmt: skip


def _growth(seen: Shower) -> str:
    """Of its memory since a quarter of the kills: what a process fills at its start is no leak."""
    settled = seen.megabytes[len(seen.megabytes) // 4 :]
    return f"{max(settled) - settled[0]:+.1f} at most since the first quarter"


def main(arguments: list[str]) -> None:
    command.main(args=arguments, prog_name="python -m benchmarks soak jury")

"""A long run on the miniature model with faults injected, its books checked all the while (law 11).

Two actors, two DDP ranks, one reward server and one vault train by grpo at staleness 1. At random, seeded moments one
process after another is killed (SIGKILL) or stopped (SIGSTOP, so that it hangs). Every two seconds the ledger is read
from outside: painted = trained + discarded + alive, live groups and staleness within their bounds, nothing discarded by
weights, and progress since the last look that matters. Memory by kind of process is compared between the first and the
last quarter of the run.

Ends with a table, runs/soak/soak.json and exit code 0; the first violation ends it with 1.

    python -m benchmarks soak [--minutes 30] [--fault-every 60] [--seed 0] [--runs-dir runs] [--no-faults]
"""

from __future__ import annotations

import json
import random
import signal
import statistics
import sys
import tempfile
import time
from collections import Counter
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import psutil

from cluster.ledger.reader import Books, LedgerReader
from contracts.config import RunConfig

KINDS = {
    "actor": "ray::ActorWorker",
    "rank": "ray::RankWorker",
    "dispatcher": "ray::Dispatcher",
    "vault": "ray::Vault",
    "reward server": "reward_servers serve",
    "controller": "ray::ControllerActor",
}
FAULTS = [
    ("actor", signal.SIGKILL), ("actor", signal.SIGSTOP), ("rank", signal.SIGKILL), ("rank", signal.SIGSTOP),
    ("dispatcher", signal.SIGKILL), ("vault", signal.SIGKILL), ("reward server", signal.SIGKILL),
]  # fmt: skip
LOOK_S = 2.0
STILL_S = 240.0
"""Longest time without a group painted or trained: a process that hangs is noticed by a lease or a timeout alone."""


class BooksBroken(Exception):
    """A law did not hold; the message says which, with the figures."""


@dataclass
class Watch:
    """Looks at the ledger from outside. Raises BooksBroken."""

    config: RunConfig
    looks: int = 0
    most_live: int = 0
    progress: tuple[int, int] = (-1, -1)
    progress_at: float = field(default_factory=time.monotonic)

    def look(self, books: Books) -> None:
        """Every law that holds at every instant."""
        self.looks += 1
        # Admission keeps (staleness + 1) steps live; a roll-back revives those of the steps it undoes.
        steps = self.config.pipeline.max_staleness + 1 + self.config.checkpoint.every_steps
        most = steps * self.config.rollout.groups_per_step
        self.most_live = max(self.most_live, books.live_groups)
        self._need(books.balanced, "painted is not trained + discarded + alive", books)
        self._need(books.live_groups <= most, f"more than {most} groups are live", books)
        within = (books.max_staleness_seen or 0) <= self.config.pipeline.max_staleness
        self._need(within, "the staleness bound is exceeded", books)
        self._need(books.discarded_by_weight_sync == 0, "weights discarded images", books)
        now = (books.painted, books.trained_steps)
        if now != self.progress:
            self.progress, self.progress_at = now, time.monotonic()
        still = time.monotonic() - self.progress_at
        self._need(still < STILL_S, f"nothing has happened for {still:.0f} s", books)

    def _need(self, holds: bool, what: str, books: Books) -> None:
        if not holds:
            raise BooksBroken(f"{what}: {books}")


@dataclass
class Faults:
    """One process after another comes to harm, in every way once before any way twice."""

    rng: random.Random
    every_s: float
    due: float = 0.0
    deck: list[tuple[str, signal.Signals]] = field(default_factory=list)
    done: Counter[str] = field(default_factory=Counter)

    def maybe(self) -> None:
        """The next fault, if it is time."""
        if not self.every_s or time.monotonic() < self.due:
            return
        if self.due:
            self.deck = self.deck or self.rng.sample(FAULTS, len(FAULTS))
            self._strike(*self.deck.pop())
        self.due = time.monotonic() + self.every_s * self.rng.uniform(0.5, 1.5)

    def _strike(self, kind: str, number: signal.Signals) -> None:
        victims = processes(kind)
        if not victims:
            return
        victim = self.rng.choice(victims)
        try:
            victim.send_signal(number)
        except psutil.NoSuchProcess:
            return
        name = f"{kind} {number.name}"
        self.done[name] += 1
        click.echo(f"{time.strftime('%H:%M:%S')}  {name}, pid {victim.pid}", err=True)


def processes(kind: str) -> list[psutil.Process]:
    """The run's processes of a kind, in the order of their ids."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if KINDS[kind] in " ".join(process.cmdline()) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.NoSuchProcess:
            continue
    return sorted(found, key=lambda process: process.pid)


def memory() -> dict[str, float]:
    """Largest resident MB by kind of process."""
    largest = {}
    for kind in KINDS:
        sizes = [_resident(process) for process in processes(kind)]
        if sizes:
            largest[kind] = max(sizes) / 2**20
    return largest


def _resident(process: psutil.Process) -> int:
    try:
        return int(process.memory_info().rss)
    except psutil.NoSuchProcess:
        return 0


def soak(config: RunConfig, faults: Faults) -> dict[str, Any]:
    """The run from start to summary under watch; returns the report. Raises BooksBroken."""
    from cluster.driver import start_ray, worker_environment

    start_ray(config)  # before Ray is imported, as it sets the authentication that Ray reads then
    import ray

    from cluster.controller import ControllerActor

    actor: Any = ControllerActor
    watch, sizes = Watch(config), []
    path = Path(config.runs_dir) / config.name / "ledger.sqlite"
    try:
        controller = actor.options(runtime_env={"env_vars": worker_environment(config)}).remote(config)
        result = controller.run.remote()
        while not ray.wait([result], timeout=LOOK_S)[0]:
            books = _books(path)
            if books is None or books.trained_steps == 0:
                watch.progress_at = time.monotonic()  # models are loading
                continue
            watch.look(books)
            faults.maybe()
            sizes.append(memory())
        summary = ray.get(result)
    finally:
        ray.shutdown()
    books = _books(path)
    assert books is not None
    watch.look(books)
    return _report(summary, books, watch, faults, sizes)


def _books(path: Path) -> Books | None:
    if not path.is_file():
        return None
    with closing(LedgerReader(path)) as ledger:
        return ledger.books()


def _report(
    summary: dict[str, Any], books: Books, watch: Watch, faults: Faults, sizes: list[dict[str, float]]
) -> dict[str, Any]:
    if summary["images_trained"] != books.trained or summary["images_painted"] != books.painted:
        raise BooksBroken(f"the summary is not the ledger's: {summary} and {books}")
    quarter = max(1, len(sizes) // 4)
    growth = {kind: [_median_of(kind, part) for part in (sizes[:quarter], sizes[-quarter:])] for kind in KINDS}
    return {
        "steps": summary["steps"], "train_seconds": summary["train_seconds"], "looks_at_the_books": watch.looks,
        "most_live_groups": watch.most_live, "max_staleness_seen": books.max_staleness_seen,
        "images_painted": books.painted, "images_trained": books.trained,
        "images_discarded": books.discarded_by_reason, "results_refused": books.refused,
        "learner_rebuilds": summary["learner_rebuilds"], "actor_restarts": summary["actor_restarts"],
        "faults": dict(faults.done), "resident_mb_first_and_last_quarter": growth,
    }  # fmt: skip


def _median_of(kind: str, sizes: list[dict[str, float]]) -> float:
    return statistics.median([size[kind] for size in sizes if kind in size] or [0.0])


def make_config(folder: Path, runs_dir: Path, minutes: float, seed: int) -> RunConfig:
    """The run, on a miniature model with random weights that is written to `folder`."""
    from contracts.config.load import config_from_tree
    from playground.train.pipeline import build_pipeline

    build_pipeline(size="tiny", seed=0).save_pretrained(folder)
    return config_from_tree(
        {
            "name": "soak",
            "seed": seed,
            "runs_dir": str(runs_dir.absolute()),
            "exist": "replace",
            "model": {"path": str(folder)},
            "sampler": {"steps": 4},
            "rollout": {"actors": 2, "groups_per_step": 4, "group_size": 4, "micro_batch": 4, "lease_s": 60.0,
                        "cpus_per_actor": 0.5, "max_attempts": 10},
            "scorers": [{"name": "colour", "serve": "colourfulness"}],
            "reward": {"lease_s": 60.0},
            "objective": {"name": "grpo"},
            "learner": {"engine": "plain", "ranks": 2, "cpus_per_rank": 0.5, "hang_timeout_s": 60.0,
                        "max_rebuilds": 10_000},
            "checkpoint": {"every_steps": 5},
            "eval": {"before": False, "num_prompts": 4, "samples_to_save": 0},
            "telemetry": {"tensorboard": False},
            "stop": {"seconds": 60.0 * minutes},
        }
    )  # fmt: skip


@click.command()
@click.option("--minutes", type=click.FloatRange(min=0, min_open=True), default=30.0, show_default=True)
@click.option("--fault-every", type=click.FloatRange(min=1), default=60.0, show_default=True, help="mean seconds")
@click.option("--no-faults", is_flag=True, help="watch an undisturbed run")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--runs-dir", type=click.Path(path_type=Path), default=Path("runs"), show_default=True)
def command(minutes: float, fault_every: float, no_faults: bool, seed: int, runs_dir: Path) -> None:
    """A long run with faults injected and its books checked throughout."""
    faults = Faults(random.Random(seed), 0.0 if no_faults else fault_every)
    with tempfile.TemporaryDirectory() as folder:
        try:
            report = soak(make_config(Path(folder), runs_dir, minutes, seed), faults)
        except BooksBroken as broken:
            click.echo(f"broken after {dict(faults.done)}: {broken}", err=True)
            sys.exit(1)
    (runs_dir / "soak" / "soak.json").write_text(json.dumps(report, indent=1) + "\n")
    _show(report)


def _show(report: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title="soak: the books balanced at every look", show_header=False)
    for name, value in report.items():
        text = ", ".join(f"{key} {_brief(item)}" for key, item in value.items()) if isinstance(value, dict) else value
        table.add_row(name.replace("_", " "), str(text or "none"))
    Console().print(table)


def _brief(item: Any) -> str:
    return " -> ".join(f"{number:.0f}" for number in item) if isinstance(item, list) else str(item)


def main(arguments: list[str]) -> None:
    command.main(args=arguments, prog_name="python -m benchmarks soak")


if __name__ == "__main__":
    main(sys.argv[1:])

"""A long run with faults injected, its books checked all the while (laws 6 and 11), resumable itself.

Two actors, two DDP ranks, reward servers and a vault train by grpo at staleness 1. At seeded moments one process after
another, the controller, the driver and everything at once included, is killed (SIGKILL) or stopped (SIGSTOP, so that it
hangs; everything for longer than all hang limits, and then woken), in every way once before any way twice. After each
fault the soak waits until the run makes steps again with all its processes, and notes how long that took. The ledger is
read from outside: painted = trained + discarded + alive, live groups and staleness within their bounds, nothing
acknowledged lost. Memory is noted by kind of process.

Everything noted stands in <runs-dir>/soak.json after every fault: a soak that was ended goes on where it stopped. The
table of docs/reliability.md is written from it at the end. The first violation ends the soak with status 1.

A soak of 200 faults takes about an hour on two quiet cores.

    python -m benchmarks soak [--faults 200] [--gap 8] [--seed 0] [--minutes 60 --no-faults] [--write-docs]
"""

from __future__ import annotations

import json
import random
import signal
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import click

from benchmarks.faults import (
    FAULTS,
    BooksBroken,
    Fault,
    RunUnderFire,
    Watch,
    at_full_strength,
    fault_name,
    frozen_s,
    is_woken,
    recover,
)
from benchmarks.soak_report import show, write_docs
from contracts.config import RunConfig, to_yaml

ROOT = Path(__file__).resolve().parent.parent
RECOVERY_S = 600.0
"""Longest time a fault may take: a hung rank is noticed by learner.hang_timeout_s, a hung actor by its lease."""

SAMPLE_S = 10.0
"""Between two looks at memory."""

STOPPED_DRIVER_S = 5.0
"""How much longer a stopped driver stays stopped once the run has made a step without it."""

VICTIM_S = 30.0
"""How long a fault waits for a process of its kind: one may be starting again for reasons of the run's own."""


@dataclass
class Notes:
    """What a soak has seen so far; its file is the soak's own checkpoint."""

    seed: int
    faults: list[dict[str, Any]] = field(default_factory=list)
    memory: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0
    looks: int = 0
    most_live: int = 0

    @classmethod
    def load(cls, path: Path, seed: int) -> Notes:
        """Those of a soak with this seed, or none."""
        if path.is_file():
            notes = cls(**json.loads(path.read_text()))
            if notes.seed == seed:
                return notes
        return cls(seed)

    def save(self, path: Path) -> None:
        new = path.with_suffix(".tmp")
        new.write_text(json.dumps(asdict(self), indent=1) + "\n")
        new.rename(path)


class Soak:
    """One run under fire."""

    def __init__(self, config: RunConfig, notes: Notes, notes_path: Path, gap_s: float) -> None:
        self.config, self.notes, self.notes_path, self.gap_s = config, notes, notes_path, gap_s
        self.folder = Path(config.runs_dir) / config.name
        self.watch = Watch(config, still_s=RECOVERY_S, looks=notes.looks, most_live=notes.most_live)
        self.run: RunUnderFire | None = None
        self.sampled = self.began = time.monotonic()

    def start(self) -> RunUnderFire:
        """The driver, resuming the run of a soak that was ended."""
        resume = [sys.executable, "-m", "cluster", "resume", str(self.folder)]
        file = self.folder.parent / f"{self.config.name}.yaml"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(to_yaml(self.config))
        command = resume if self.notes.seconds else [sys.executable, "-m", "cluster", "train", str(file)]
        log = self.folder.parent / f"{self.config.name}.log"
        self.run = RunUnderFire(command, resume, self.folder / "ledger.sqlite", log, ROOT)
        return self.run

    def strike_until(self, number: int) -> None:
        """Faults until there are `number` of them. Raises BooksBroken."""
        run = self.start()
        self._recover(steps=3)
        while len(self.notes.faults) < number:
            index = len(self.notes.faults)
            rng = random.Random(f"{self.notes.seed}:{index}")
            self._wait(self.gap_s * rng.uniform(0.2, 1.0))
            self._one(run, fault_at(self.notes.seed, index), rng)
            self._note()

    def watch_for(self, seconds: float) -> None:
        """The same without faults."""
        self.start()
        self._recover(steps=3)
        while self.notes.seconds < seconds:
            self._wait(SAMPLE_S)
            self._note()

    def end(self) -> int:
        """Stop the run politely; its exit code."""
        assert self.run is not None
        return self.run.stop()

    def _one(self, run: RunUnderFire, fault: Fault, rng: random.Random) -> None:
        kind = fault[0]
        self._wait_for(kind)
        strength, before = len(run.processes(kind)), run.books()
        struck = run.strike(fault, rng)
        click.echo(f"{time.strftime('%H:%M:%S')}  {len(self.notes.faults) + 1}: {fault_name(fault)} {struck}", err=True)
        replaced = [] if is_woken(fault) else struck
        if kind == "everything" and is_woken(fault):
            self._wait(frozen_s(self.config))
            run.wake()
        seconds = self._recover(restored=at_full_strength(run, kind, strength, replaced))
        click.echo(f"{time.strftime('%H:%M:%S')}  recovered in {seconds:.1f} s", err=True)
        if kind == "driver" and is_woken(fault):
            self._wait(STOPPED_DRIVER_S)
            run.wake()
        after = run.books()
        self.notes.faults.append(
            {
                "fault": fault_name(fault), "struck": len(struck), "seconds": round(seconds, 2),
                "steps_before": before.trained_steps if before else 0,
                "steps_after": after.trained_steps if after else 0,
                "images_refused": after.refused - before.refused if before and after else 0, "at": time.time(),
            }
        )  # fmt: skip

    def _wait_for(self, kind: str) -> None:
        assert self.run is not None
        ends = time.monotonic() + VICTIM_S
        while not self.run.processes(kind):
            if time.monotonic() > ends:
                raise BooksBroken(f"there has been no {kind} for {VICTIM_S:.0f} s")
            self._wait(0.5)

    def _recover(self, **more: Any) -> float:
        assert self.run is not None
        return recover(self.run, self.watch, timeout_s=RECOVERY_S, **more)

    def _wait(self, seconds: float) -> None:
        """Let the run go on, looking at its books and its memory."""
        assert self.run is not None
        ends = time.monotonic() + seconds
        while time.monotonic() < ends:
            books = self.run.books()
            if books is not None:
                self.watch.look(books)
            if time.monotonic() - self.sampled > SAMPLE_S:
                self.sampled = time.monotonic()
                elapsed = self.notes.seconds + self.sampled - self.began
                self.notes.memory.append({"seconds": round(elapsed, 1), "mb": self.run.memory()})
            time.sleep(min(1.0, max(0.05, ends - time.monotonic())))

    def _note(self) -> None:
        self.notes.seconds += time.monotonic() - self.began
        self.began = time.monotonic()
        self.notes.looks, self.notes.most_live = self.watch.looks, self.watch.most_live
        self.notes.save(self.notes_path)


def fault_at(seed: int, index: int) -> Fault:
    """The fault with a number: decks of all of them, each shuffled anew."""
    deck, place = divmod(index, len(FAULTS))
    return random.Random(f"{seed}/{deck}").sample(FAULTS, len(FAULTS))[place]


def make_config(model: Path, runs_dir: Path, seed: int, name: str = "soak") -> RunConfig:
    """The run: the playground's prompts, a model of its kind in `model`; who hangs is noticed within 5 to 14 s.

    Vaults, dispatcher and controller soonest, so that those who wait for them keep their leases. It learns so slowly
    that its reward still varies after an hour: one that has nothing left to learn is stopped (reward.max_fruitless).
    """
    from contracts.config.load import config_from_tree

    return config_from_tree(
        {
            "name": name,
            "seed": seed,
            "runs_dir": str(runs_dir.absolute()),
            "exist": "replace",
            "model": {"path": str(model.absolute())},
            "sampler": {"steps": 4},
            "rollout": {"actors": 2, "groups_per_step": 4, "group_size": 4, "micro_batch": 4, "lease_s": 14.0,
                        "cpus_per_actor": 0.5, "max_attempts": 10_000},
            "scorers": [{"name": "colour", "serve": "colourfulness", "timeout_s": 5.0, "max_retries": 50,
                         "retry_budget": 10.0, "breaker_reset_s": 1.0}],
            "reward": {"lease_s": 120.0},
            "objective": {"name": "grpo"},
            "learner": {"engine": "plain", "ranks": 2, "cpus_per_rank": 0.5, "hang_timeout_s": 14.0,
                        "max_rebuilds": 10_000, "optimizer": {"lr": 1e-6}},
            "checkpoint": {"every_steps": 10, "keep_last": 2},
            "weights": {"timeout_s": 10.0},
            "cluster": {"hang_timeout_s": 8.0, "controller_restarts": 10_000},
            "eval": {"before": False, "num_prompts": 4, "samples_to_save": 0},
            "telemetry": {"tensorboard": False},
            "stop": {"steps": 10_000_000},
        }
    )  # fmt: skip


def _model(kind: str, runs_dir: Path) -> Path:
    """The playground's base, or the same architecture at miniature size with random weights, written once."""
    if kind == "base":
        return ROOT / "playground" / "base"
    folder = runs_dir / "soak-model"
    if not folder.is_dir():
        from playground.train.pipeline import build_pipeline

        build_pipeline(size="tiny", seed=0).save_pretrained(folder)
    return folder


@click.command()
@click.option("--faults", type=click.IntRange(min=0), default=200, show_default=True)
@click.option("--gap", type=click.FloatRange(min=0), default=8.0, show_default=True, help="most seconds between two")
@click.option("--no-faults", is_flag=True, help="watch an undisturbed run for --minutes")
@click.option("--minutes", type=click.FloatRange(min=0, min_open=True), default=60.0, show_default=True)
@click.option("--model", type=click.Choice(["miniature", "base"]), default="miniature", show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--again", is_flag=True, help="start anew instead of going on with a soak that was ended")
@click.option("--write-docs", "write_docs_too", is_flag=True, help="write the table into docs/reliability.md")
@click.option("--runs-dir", type=click.Path(path_type=Path), default=Path("runs"), show_default=True)
def command(
    faults: int, gap: float, no_faults: bool, minutes: float, model: str, seed: int, again: bool, write_docs_too: bool,
    runs_dir: Path,
) -> None:  # fmt: skip
    """A long run with faults injected and its books checked throughout."""
    runs_dir.mkdir(parents=True, exist_ok=True)
    path = runs_dir / ("soak-quiet.json" if no_faults else "soak.json")
    if again:
        path.unlink(missing_ok=True)
    notes = Notes.load(path, seed)
    config = make_config(_model(model, runs_dir), runs_dir, seed, path.stem)
    soak = Soak(config, notes, path, gap)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that the run is ended too
    try:
        soak.watch_for(60 * minutes) if no_faults else soak.strike_until(faults)
        click.echo(f"the run ended with exit code {soak.end()} (75: stopped and resumable)", err=True)
    except BooksBroken as broken:
        click.echo(f"broken after {len(notes.faults)} faults: {broken}", err=True)
        sys.exit(1)
    finally:
        if soak.run is not None:
            soak.run.end()
    show(asdict(notes), soak.folder)
    if write_docs_too:
        write_docs(asdict(notes), soak.folder, ROOT / "docs" / "reliability.md", quiet=no_faults)


def main(arguments: list[str]) -> None:
    command.main(args=arguments, prog_name="python -m benchmarks soak")


if __name__ == "__main__":
    main(sys.argv[1:])

"""A run folder read whole: configuration, rows, events, books, samples; whatever is missing is named, never fatal.

Works on a run that goes on, ended or crashed, on a local path and on any fsspec URL (whose small files are copied
here; weights and vaults stay where they are).
Invariant: reading changes nothing in the folder and never waits for the run.
Does not own: how any of it looks (page.py, cluster/status.py), single groups (cluster/ledger).
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import yaml

from cluster.ledger.facts import LedgerFacts
from cluster.ledger.reader import Books
from cluster.report.samples import SampleSet, read_samples
from cluster.run_folder import RunFolder, is_running
from cluster.telemetry.verdict import Verdict, judge
from contracts.config import RunConfig, load_config
from contracts.errors import ConfigError, LedgerError, SalonError

MAX_ROWS = 2000
"""Rows of metrics.jsonl kept, evenly spaced: more than a plot has pixels."""

NEWEST_BYTES = 4 * 2**20
"""How much of a long file is read for a look every second."""

MAX_EVENTS = 50_000
"""Newest events kept."""

LEFT_OUT = ("checkpoints", "tensorboard", "vaults", "stacks", "trace.json", "trace-older.json", "export")
"""What is not copied from a URL."""

NEWS_S = 120.0
"""A run at a URL that nobody here can see is taken to go on while its newest line is younger than this."""

_PROOF = b'"event": "weights_proven"'
"""By far the most frequent event, one an actor and version."""

State = Literal["finished", "stopped", "failed", "running", "crashed", "empty"]

Row = dict[str, Any]


@dataclass
class RunView:
    """One run. Lists are in the order of time; `missing` says what could not be read, in words."""

    folder: RunFolder
    config: RunConfig | None = None
    settings: dict[str, Any] = field(default_factory=dict)  # config.yaml as it stands, dotted keys
    manifest: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)  # of the lineage: what a roll-back undid is left out
    all_rows: list[Row] = field(default_factory=list)
    events: list[Row] = field(default_factory=list)
    samples: list[SampleSet] = field(default_factory=list)
    books: Books | None = None
    staleness: dict[int, int] = field(default_factory=dict)
    stage_seconds: dict[str, float] = field(default_factory=dict)
    running: bool = False
    from_start: bool = True  # whether all_rows begin where the run does
    missing: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        return str(self.settings.get("name") or self.folder.location.rstrip("/").rsplit("/", 1)[-1])

    @property
    def state(self) -> State:
        """finished, stopped, failed: as its summary says; crashed: it ended without a word."""
        if self.running:
            return "running"
        last = next((e["event"] for e in reversed(self.events) if e["event"] in ("finished", "started")), "finished")
        if not self.outcome or last == "started":
            return "crashed" if self.rows or self.events else "empty"
        return next((word for word in ("finished", "failed") if self.outcome.startswith(word)), "stopped")

    @property
    def outcome(self) -> str:
        """How the run says it ended; of one that failed, with the reason. Empty where it did not say."""
        return str(self.summary.get("outcome") or "")

    @property
    def why(self) -> str:
        """Why it failed, or which guard stopped it; empty where it says no more than its state."""
        return self.outcome if self.state in ("failed", "stopped") and self.outcome != self.state else ""

    @property
    def last(self) -> Row:
        """The newest row of metrics.jsonl; empty before the first step."""
        return self.rows[-1] if self.rows else {}

    @property
    def step(self) -> int:
        return int(self.last.get("step") or 0)

    @property
    def max_staleness(self) -> int:
        """The configured bound."""
        return int(self.settings.get("pipeline.max_staleness") or 0)

    @property
    def held_out_scorers(self) -> list[str]:
        """Names of scorers that never train."""
        flags = {key.removesuffix(".held_out") for key, on in self.settings.items() if key.endswith(".held_out") and on}
        return [str(self.settings.get(f"{key}.name")) for key in sorted(flags) if key.startswith("scorers.")]

    @property
    def cpu_only(self) -> bool:
        """Whether neither actors nor ranks were given GPUs."""
        given = ("rollout.gpus_per_actor", "learner.gpus_per_rank")
        return not any(float(self.settings.get(key) or 0) for key in given)

    def verdict(self) -> Verdict:
        """What was waited for, what to scale."""
        phases = self.totals("phase_seconds_total")
        return judge(phases, self.stage_seconds, self.max_staleness, self.cpu_only)

    def series(self, key: str) -> tuple[list[float], list[float]]:
        """(steps, values) of one key of metrics.jsonl, where it has a value."""
        found = [(row["step"], row[key]) for row in self.rows if row.get(key) is not None and row.get("step")]
        return [float(step) for step, _ in found], [float(value) for _, value in found]

    def total(self, key: str) -> float:
        """What a counter counted over the whole run: a controller that starts anew counts from zero again."""
        total, before = 0.0, 0.0
        if not self.from_start and self.all_rows:
            before = float(self.all_rows[0].get(key) or 0.0)
        for row in self.all_rows:
            value = float(row.get(key) or 0.0)
            total += value - before if value >= before else value
            before = value
        return total

    def totals(self, prefix: str) -> dict[str, float]:
        """The same for every key under `prefix/`, by the rest of the key, in the catalogue's order."""
        keys = dict.fromkeys(key for row in self.all_rows for key in row if key.startswith(f"{prefix}/"))
        return {key.removeprefix(f"{prefix}/"): self.total(key) for key in keys}

    def of_kind(self, kind: str) -> list[Row]:
        return [event for event in self.events if event["event"] == kind]

    @property
    def evaluations(self) -> list[Row]:
        """Events of evaluations: tag, step, result; the newest of each tag."""
        newest = {str(event.get("tag")): event for event in self.of_kind("evaluation") if event.get("result")}
        return sorted(newest.values(), key=lambda event: event["time"])

    def held_out(self, value: float) -> str:
        """A held-out result in words: per cent where the judging column is a share of right images, else a number."""
        return f"{value:.1%}" if self.judged_by_share else f"{value:.4g}"

    @property
    def judged_by_share(self) -> bool:
        """Whether every evaluation's result lies between 0 and 1, as the mean of right and wrong does."""
        results = [event["result"].get("accuracy") for event in self.evaluations]
        return all(0 <= result <= 1 for result in results if result is not None)

    def train_seconds(self) -> float:
        """Seconds of training, over every process that worked on the run."""
        if self.summary.get("train_seconds") is not None and not self.running:
            return float(self.summary["train_seconds"])
        begins = [event["time"] for event in self.of_kind("phase") if event.get("phase") == "training"]
        total = 0.0
        for begin, following in pairwise([*begins, float("inf")]):
            total += max((at for at in self._worked_at() if begin <= at < following), default=begin) - begin
        return total

    def _worked_at(self) -> list[float]:
        """When training is known to have gone on: at its rows, and at events that tell of nothing else."""
        others = ("started", "evaluation", "finished")
        return [row["time"] for row in self.all_rows] + [e["time"] for e in self.events if e["event"] not in others]


def open_run(location: str, runs_dir: str = "runs", whole: bool = False) -> RunFolder:
    """A run by path, fsspec URL, or name under `runs_dir`. Raises ConfigError when there is none.

    whole: copy checkpoints from a URL too.
    """
    named = Path(runs_dir) / location
    if "://" not in location and not Path(location).is_dir() and named.is_dir():
        return RunFolder.open(named)
    return RunFolder.open(location, leave_out=() if whole else LEFT_OUT)


def newest_run(runs_dir: str = "runs") -> RunFolder:
    """The run under `runs_dir` that wrote last. Raises ConfigError when there is none."""
    found = {path.parent: _last_written(path.parent) for path in Path(runs_dir).glob("*/config.yaml")}
    if not found:
        raise ConfigError("RUN", f"there is no run under {runs_dir}", "name a run folder, or start one")
    return RunFolder.open(max(found, key=lambda path: found[path]))


def read_run(folder: RunFolder, newest_only: bool = False) -> RunView:
    """Everything that can be read of a run.

    newest_only: of long files only the newest part, for a look every second; counters then count from there.
    """
    view = RunView(folder)
    part = NEWEST_BYTES if newest_only else None
    view.settings, view.config = _read_config(folder, view.missing)
    view.manifest = _read_json(folder.manifest, view.missing)
    view.summary = _read_json(folder.summary, []) if folder.summary.exists() else {}
    view.all_rows = list(_read_lines(folder.metrics, MAX_ROWS, spread=True, part=part))
    view.from_start = part is None or not folder.metrics.exists() or folder.metrics.stat().st_size <= part
    view.rows = lineage(view.all_rows)
    view.events = [
        event
        for event in _read_lines(folder.events, MAX_EVENTS, False, skip=_PROOF if newest_only else None)
        if "event" in event
    ]
    view.samples = read_samples(folder.root / "samples")
    _read_ledger(view)
    view.running = _goes_on(view)
    _name_missing(view)
    return view


def lineage(rows: list[Row]) -> list[Row]:
    """Rows without those that a roll-back undid: a later row of the same or an earlier step replaces all after it.

    Example: steps 1 2 3 4 3 4 5 become 1 2 3 4 5, with the second 3 and 4.
    """
    kept: list[Row] = []
    for row in rows:
        while kept and kept[-1].get("step", 0) >= row.get("step", 0):
            kept.pop()
        kept.append(row)
    return kept


def histogram_increments(rows: Iterable[Row], name: str) -> list[tuple[Row, int, float]]:
    """(row, observations since the row before, their mean), where there were any.

    Rows tell of a histogram what its process has seen since its start: `name/count`, and `name/mean` of all of them.
    A process that started anew counts from zero; a row without the histogram is of one that has seen nothing yet.
    """
    found = []
    count, total = 0, 0.0
    for row in rows:
        now = int(row.get(f"{name}/count") or 0)
        seen = now * float(row.get(f"{name}/mean") or 0.0)
        if now < count:
            count, total = 0, 0.0
        if now > count:
            found.append((row, now - count, max(0.0, (seen - total) / (now - count))))
        count, total = now, seen
    return found


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """A nested mapping by dotted keys; lists of mappings by index."""
    if isinstance(tree, dict) and tree:
        items = tree.items()
    elif isinstance(tree, list) and tree and all(isinstance(item, dict) for item in tree):
        items = {str(index): item for index, item in enumerate(tree)}.items()
    else:
        return {prefix: tree}
    flat: dict[str, Any] = {}
    for key, value in items:
        flat |= flatten(value, f"{prefix}.{key}" if prefix else str(key))
    return flat


def _read_config(folder: RunFolder, missing: list[str]) -> tuple[dict[str, Any], RunConfig | None]:
    try:
        settings = flatten(yaml.safe_load(folder.config.read_text()) or {})
    except (OSError, yaml.YAMLError) as error:
        missing.append(f"config.yaml cannot be read ({_first_line(error)})")
        return {}, None
    try:
        return settings, load_config(folder.config)
    except SalonError as error:
        missing.append(f"config.yaml is of another version of Salon ({_first_line(error)}): only its text is shown")
        return settings, None


def _read_json(path: Path, missing: list[str]) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        missing.append(f"{path.name} cannot be read ({_first_line(error)})")
        return {}
    return found if isinstance(found, dict) else {}


def _read_lines(
    path: Path, limit: int, spread: bool, part: int | None = None, skip: bytes | None = None
) -> Iterator[Row]:
    """At most `limit` lines of a JSONL file: evenly spaced with the last one, or the newest. Torn lines are left out.

    part: only the last so many bytes are looked at; skip: lines that hold this are not parsed.
    """
    try:
        with path.open("rb") as file:
            if part is not None:
                file.seek(max(0, path.stat().st_size - part))
            lines = [line for line in file.read().split(b"\n") if line and (skip is None or skip not in line)]
    except OSError:
        return
    if len(lines) > limit:
        stride = -(-len(lines) // limit)
        lines = lines[::-1][::stride][::-1] if spread else lines[-limit:]
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and isinstance(row.get("time"), int | float):
            yield row


def _read_ledger(view: RunView) -> None:
    try:
        with closing(LedgerFacts(view.folder.ledger)) as ledger:
            view.books, view.staleness = ledger.books(), ledger.staleness()
            view.stage_seconds = ledger.stage_seconds()
    except (LedgerError, OSError) as error:
        view.missing.append(f"the ledger cannot be read ({_first_line(error)}): no books")


def _goes_on(view: RunView) -> bool:
    """Whether a process works on the run; for a run seen through a URL: whether it wrote lately and did not end."""
    if view.folder.url is None:
        return is_running(view.folder.root)
    newest = max([0.0, *(row["time"] for row in (view.last, *view.events[-1:]) if row)])
    ended = bool(view.events) and view.events[-1]["event"] == "finished"
    return not ended and time.time() - newest < NEWS_S


def _name_missing(view: RunView) -> None:
    if not view.rows:
        view.missing.append("metrics.jsonl has no rows: no learner step has ended")
    if not view.events:
        view.missing.append("events.jsonl has no events")
    if not view.samples:
        view.missing.append(
            "samples/ holds no image with its prompt and seed: eval.samples_to_save is 0, or no evaluation has ended"
        )
    if not view.evaluations:
        view.missing.append("no evaluation has ended")


def _last_written(root: Path) -> float:
    names = ("metrics.jsonl", "events.jsonl", "ledger.sqlite", "ledger.sqlite-wal", "config.yaml")
    return max((root / name).stat().st_mtime for name in names if (root / name).exists())


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]

"""The soak's table, on the terminal and in docs/reliability.md between its markers.

Does not own: what was seen (soak.py's notes), the words around the table.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.faults import FAULTS, fault_name
from cluster.report.view import histogram_increments

Rows = list[list[str]]


def recovery_rows(faults: Sequence[Mapping[str, Any]]) -> Rows:
    """fault, times, median and worst seconds until the run made steps again with all its processes."""
    kinds = list(dict.fromkeys(fault_name(fault) for fault in FAULTS))
    kinds = [kind for kind in kinds if any(fault["fault"] == kind for fault in faults)]
    rows = []
    for kind in kinds:
        seconds = [float(fault["seconds"]) for fault in faults if fault["fault"] == kind]
        rows.append([kind, str(len(seconds)), f"{statistics.median(seconds):.1f}", f"{max(seconds):.1f}"])
    if faults:
        everything = [float(fault["seconds"]) for fault in faults]
        rows.append(["all", str(len(faults)), f"{statistics.median(everything):.1f}", f"{max(everything):.1f}"])
    return rows


def memory_rows(samples: Sequence[Mapping[str, Any]]) -> Rows:
    """kind of process, resident MB of its largest: medians over each quarter of the soak, the highest, MB an hour.

    The slope is fitted by least squares to the last three quarters: what a process fills at its start is no leak.
    """
    kinds = sorted({kind for sample in samples for kind in sample["mb"]})
    quarters = [samples[len(samples) * i // 4 : len(samples) * (i + 1) // 4] for i in range(4)]
    rows = []
    for kind in kinds:
        medians = [_median(megabytes for _, megabytes in _largest(part, kind)) for part in quarters]
        highest = max((megabytes for _, megabytes in _largest(samples, kind)), default=0.0)
        slope = mb_an_hour(_largest(samples[len(samples) // 4 :], kind))
        rows.append([kind, *(f"{m:.0f}" for m in medians), f"{highest:.0f}", f"{slope:+.1f}"])
    return rows


def _largest(samples: Sequence[Mapping[str, Any]], kind: str) -> list[tuple[float, float]]:
    return [(float(sample["seconds"]), max(sample["mb"][kind])) for sample in samples if sample["mb"].get(kind)]


def mb_an_hour(points: Sequence[tuple[float, float]]) -> float:
    """Least-squares slope of (seconds, MB); 0 for fewer than two."""
    if len({seconds for seconds, _ in points}) < 2:
        return 0.0
    return 3600 * statistics.linear_regression(*zip(*points, strict=True)).slope


def timing_rows(folder: Path) -> Rows:
    """Checkpoints and resumes of the run, from its events and metrics."""
    events = _lines(folder / "events.jsonl")
    increments = histogram_increments(_lines(folder / "metrics.jsonl"), "checkpoint_stall_seconds")
    stalls = [mean for _, checkpoints, mean in increments for _ in range(checkpoints)]
    series = {
        "checkpoint, from its begin to its end": [e["seconds"] for e in events if e["event"] == "checkpoint"],
        "stall of the learner's step by a checkpoint": stalls,
        "resume, from the controller's start to its first task": _resume_seconds(events),
        "rebuild of the learner's ranks": [e["seconds"] for e in events if e["event"] == "learner_rebuilt"],
    }
    return [
        [name, str(len(values)), f"{statistics.median(values):.3f}", f"{max(values):.3f}"]
        for name, values in series.items()
        if values
    ]


def telemetry_rows(figures: Path) -> Rows:
    """who, ms of telemetry and of the trace in it, share of the step: what `make bench` has measured (trace.py)."""
    found = json.loads(figures.read_text()) if figures.is_file() else {}
    return [
        [f"controller of {row['actors']} actors", f"{row['step_s']:g}", f"{1e3 * row['telemetry_s']['median']:.2f}",
         f"{1e3 * row['trace_s']['median']:.2f}", f"{row['share']:.2%}"]
        for row in (found.get("trace") or {}).get("rows", [])
    ]  # fmt: skip


def _resume_seconds(events: Sequence[Mapping[str, Any]]) -> list[float]:
    found, resumed = [], False
    for event in events:
        resumed = resumed or event["event"] == "resumed"
        if event["event"] == "started" and resumed:
            found.append(float(event["seconds"]))
            resumed = False
    return found


def _lines(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    found = []
    for line in path.read_text().splitlines():
        try:
            found.append(json.loads(line))
        except ValueError:
            continue  # the end of a file that is being written
    return found


def _median(values: Iterable[float]) -> float:
    listed = list(values)
    return statistics.median(listed) if listed else 0.0


FIGURES = Path(__file__).resolve().parent.parent / "docs" / "benchmarks.json"


def show(notes: Mapping[str, Any], folder: Path) -> None:
    """On the terminal."""
    from rich.console import Console
    from rich.table import Table

    for title, head, rows in _tables(notes, folder):
        table = Table(*head, title=title)
        for row in rows:
            table.add_row(*row)
        Console().print(table)


def write_docs(notes: Mapping[str, Any], folder: Path, page: Path, *, quiet: bool) -> None:
    """Replace what the page says of the soak."""
    replace_between_markers(page, "quiet" if quiet else "soak", as_markdown(notes, folder))


def replace_between_markers(page: Path, name: str, body: str) -> None:
    """What stands between the markers `<!-- name:begin -->` and `<!-- name:end -->`. Raises ValueError without them."""
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    before, found, rest = page.read_text().partition(begin)
    _, also_found, after = rest.partition(end)
    if not (found and also_found):
        raise ValueError(f"{page} has no markers {name}:begin and {name}:end")
    page.write_text(f"{before}{begin}\n{body}\n{end}{after}")


def measured_on() -> str:
    """Date and machine, as a sentence begins."""
    return f"Measured {time.strftime('%Y-%m-%d')} on {os.cpu_count()} cores ({platform.machine()})"


def as_markdown(notes: Mapping[str, Any], folder: Path) -> str:
    """Machine, length, tables."""
    hours = notes["seconds"] / 3600
    lines = [
        f"{measured_on()}, seed {notes['seed']}: "
        f"{len(notes['faults'])} faults in {hours:.1f} h, the books looked at {notes['looks']} times, at most "
        f"{notes['most_live']} groups live.",
    ]
    for title, head, rows in _tables(notes, folder):
        lines += ["", f"{title}:", "", f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
        lines += [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join(lines)


def _tables(notes: Mapping[str, Any], folder: Path) -> list[tuple[str, list[str], Rows]]:
    tables = [
        ("Recovery by fault, seconds", ["fault", "times", "median", "worst"], recovery_rows(notes["faults"])),
        ("Checkpoints and resumes, seconds", ["what", "times", "median", "worst"], timing_rows(folder)),
        (
            "Largest resident memory by kind of process, MB, median of each quarter of the soak",
            ["process", "1st", "2nd", "3rd", "4th", "highest", "MB an hour"],
            memory_rows(notes["memory"]),
        ),
        (
            "Tracing and telemetry in a learner step, of which they may take 2 % (`make bench ARGS=trace`)",
            ["who", "step, s", "telemetry, ms", "of it trace, ms", "share of the step"],
            telemetry_rows(FIGURES),
        ),
    ]
    return [table for table in tables if table[2]]

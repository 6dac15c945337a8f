"""Groups and one group on a terminal. Does not own: what is known of them (ledger_cli.py)."""

from __future__ import annotations

import time
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from cluster.ledger_cli import Json

MAX_REASON = 60
OTHER_COLUMNS, TIMES_AND_ACTOR = 105, 40
"""Width of everything in the list but the prompt, which is cut to what is left, and of what narrow terminals lack."""

MIN_PROMPT = 20
IN_A_PIPE = 160
"""Columns where nobody's terminal sets them: figures must not be cut in a file."""


def print_groups(listing: Json, console: Console | None = None) -> None:
    """Totals, then a line a group; times and actors are left out where the terminal is too narrow for them."""
    console = console or _console()
    states = ", ".join(f"{count} {state}" for state, count in listing["groups_by_state"].items() if count)
    reasons = ", ".join(f"{reason} {count}" for reason, count in listing["groups_discarded_by_reason"].items())
    images = listing["images"]
    console.print(
        f"[bold]{escape(listing['name'])}[/]: groups {states or 'none'}" + (f" ({reasons})" if reasons else "")
    )
    discarded = sum(images["discarded"].values())
    balance = "balance" if images["balanced"] else "[red]do not balance[/]"
    console.print(
        f"images {images['painted']} painted = {images['trained']} trained + {discarded} discarded + {images['alive']} "
        f"alive: the books {balance}"
    )
    table = Table(box=box.SIMPLE_HEAD, collapse_padding=True, pad_edge=False)
    wide = console.width >= OTHER_COLUMNS + MIN_PROMPT
    times = ("paint s", "score s", "wait s") if wide else ()
    for name in ("group", "state", "version", "step", "stale", "reward", *times):
        table.add_column(name, justify="left" if name == "state" else "right", no_wrap=True)
    if wide:
        table.add_column("actor", no_wrap=True)
    table.add_column("prompt")
    room = max(MIN_PROMPT, console.width - OTHER_COLUMNS + (0 if wide else TIMES_AND_ACTOR))
    for group in listing["groups"]:
        state = group["state"] + (f": {group['reason']}" if group["reason"] else "")
        figures = [group["version"], group["step"], group["staleness"], group["reward"]]
        seconds = [group["paint_seconds"], group["until_scored_seconds"], group["until_trained_seconds"]]
        table.add_row(
            str(group["group"]),
            state,
            *map(_figure, figures + seconds if wide else figures),
            *([group["actor"] or "–"] if wide else []),
            escape(_cut(group["prompt"], room)),
        )
    console.print(table)


def print_group(group: Json, console: Console | None = None) -> None:
    """One group: what it is, its images and scores, its way."""
    console = console or _console()
    console.print(f"[bold]group {group['group']}[/] {group['where']}")
    console.print(group["prompt"]["text"], markup=False, style="italic")
    if group["prompt"]["negative"]:
        console.print(f"without: {group['prompt']['negative']}", markup=False)
    facts = {
        "weights": f"version {_figure(group['version'])}, by {group['actor'] or '–'} as attempt {group['attempt']}",
        "seconds": f"painting {_figure(group['paint_seconds'])}, storing {_figure(group['store_seconds'])}, "
        f"until scored {_figure(group['until_scored_seconds'])}, until trained "
        f"{_figure(group['until_trained_seconds'])}",
        "sampler": _sampler(group["painted_with"]),
        "images": group["images"][0].rsplit("/", 1)[0] if group["images"] else str(group["images_missing"]),
    }
    for key, value in facts.items():
        console.print(f"[dim]{key:>8}[/]  {escape(value)}", soft_wrap=True)
    console.print(_score_table(group))
    console.print("[bold]its way[/]")
    for event in group["journal"]:
        at = time.strftime("%H:%M:%S", time.localtime(event["at"]))
        console.print(f"  {at}  {event['event']}" + (f"  {event['detail']}" if event["detail"] else ""), markup=False)
    if group.get("repainted"):
        console.print(f"[bold]again[/] {escape(group['repainted']['words'])}", soft_wrap=True)
        console.print(f"      {group['repainted']['images'][0].rsplit('/', 1)[0]}", markup=False, soft_wrap=True)


def _console() -> Console:
    console = Console()
    return console if console.is_terminal else Console(width=max(console.width, IN_A_PIPE))


def _score_table(group: Json) -> Table:
    """A line an image: seed, point scores or outcomes, reasons."""
    table = Table(box=box.SIMPLE_HEAD, collapse_padding=True, pad_edge=False)
    table.add_column("image", justify="right")
    table.add_column("seed", justify="right")
    points = [(name, each) for name, each in group["scores"].items() if each["kind"] == "point"]
    for name, each in points:
        for column in each["columns"]:
            table.add_column(escape(f"{name}/{column}"), justify="right")
    table.add_column("reward", justify="right")
    table.add_column("reasons")
    for index in range(group["size"]):
        cells = [_cell(each, index, k) for _, each in points for k in range(len(each["columns"]))]
        reasons = "; ".join(each["reasons"][index] for _, each in points if index < len(each["reasons"]))
        seeds, rewards = group["seeds"] or [], group["rewards"].get("values") or []
        table.add_row(
            str(index), str(seeds[index]) if index < len(seeds) else "–", *cells,
            _figure(rewards[index]) if index < len(rewards) else "–", escape(reasons[:MAX_REASON]),
        )  # fmt: skip
    others = [f"{name} ({each['kind']} table)" for name, each in group["scores"].items() if each["kind"] != "point"]
    if others:
        table.caption = f"not shown here, but with --json: {', '.join(others)}"
    return table


def _cell(table: Json, image: int, column: int) -> str:
    outcome = table["outcomes"][image][column]
    return _figure(table["values"][image][column]) if outcome == "ok" else outcome


def _sampler(painted: Json | None) -> str:
    if painted is None:
        return "as in config.yaml"
    return (
        f"{painted['sampler']}, {painted['steps']} steps, stochastic at {painted['stochastic_steps'] or 'none'}, "
        f"guidance {painted['guidance_scale']:g}, micro-batches {painted['micro_batches']}"
    )


def _cut(text: str, room: int) -> str:
    line = " ".join(text.split())
    return line if len(line) <= room else f"{line[: room - 1]}…"


def _figure(value: Any) -> str:
    if value is None:
        return "–"
    return f"{value:.3g}" if isinstance(value, float) else str(value)

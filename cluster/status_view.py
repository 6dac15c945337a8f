"""The terminal view of a run's status, live or once. Does not own: what it shows (status.py)."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

from rich import box
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.live import Live
from rich.markup import escape
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from cluster.durations import duration
from cluster.report.view import newest_run, open_run
from cluster.run_folder import RunFolder
from cluster.status import Status, take_status

REMOTE_S = 15.0
"""Shortest time between looks at a run behind a URL: each look copies its small files."""

GAP = 3
"""Columns between tables."""

STATE_STYLES = {"finished": "green", "running": "cyan", "stopped": "yellow", "failed": "red", "crashed": "red"}
STAGES = ("admitted", "generating", "generated", "scoring", "ready", "claimed", "trained", "discarded")


def show(
    run: str | None, *, runs_dir: str = "runs", once: bool = False, as_json: bool = False, every_s: float = 2.0,
    console: Console | None = None, sleep: Callable[[float], None] = time.sleep,
) -> None:  # fmt: skip
    """Show a run (None: the newest under runs_dir) until it ends or Ctrl-C; once where nobody watches a terminal."""
    console = console or Console()

    def find() -> RunFolder:
        return newest_run(runs_dir) if run is None else open_run(run, runs_dir)

    folder = find()
    status = take_status(folder)
    if as_json:
        print(json.dumps(status, indent=2))
        return
    if once or not console.is_terminal or status["state"] != "running":
        console.print(render(status))
        return
    try:
        with Live(render(status), console=console, screen=False, auto_refresh=False) as live:
            while status["state"] == "running":
                sleep(every_s if folder.url is None else max(every_s, REMOTE_S))
                folder = folder if folder.url is None else find()
                status = take_status(folder)
                live.update(render(status), refresh=True)
    except KeyboardInterrupt:
        return


def render(status: Status) -> RenderableType:
    """The whole view of one moment."""
    tables = [_progress(status), _rates(status), _stages(status), _books(status)]
    parts: list[RenderableType] = [_head(status), _Beside(tables), _verdict(status)]
    if status["faults"]["last"]:
        parts.append(_faults(status))
    parts += [Text(text, style="dim") for text in status["missing"]]
    return Group(*parts)


class _Beside:
    """Tables beside each other as far as the terminal is wide."""

    def __init__(self, tables: list[Table]) -> None:
        self.tables = tables

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        widths = [console.measure(table, options=options).maximum + GAP for table in self.tables]
        rows: list[list[Table]] = [[]]
        used = 0
        for table, width in zip(self.tables, widths, strict=True):
            if rows[-1] and used + width > options.max_width:
                rows.append([])
                used = 0
            rows[-1].append(table)
            used += width
        for row in rows:
            grid = Table.grid(padding=(0, GAP, 0, 0))
            grid.add_row(*row)
            yield grid
            yield ""


def _head(status: Status) -> RenderableType:
    state, phase = status["state"], status["phase"]
    head = Text()
    head.append(f"run {status['name']}  ", style="bold")
    head.append(state if phase in (state, "training") else f"{state}: {phase}", style=STATE_STYLES.get(state, ""))
    silence = status["seconds_since_last_word"]
    if silence is not None:
        head.append(f"   last word {duration(silence)} ago", style="dim")
    head.append(f"\n{status['folder']}", style="dim")
    if status["why"]:
        head.append(f"\n{status['why']}", style=STATE_STYLES[state])
    bar = Table.grid(padding=(0, 1, 1, 0))
    share = status["share_done"]
    bar.add_row(ProgressBar(total=1.0, completed=share, width=40), f"{share:.0%}")
    return Group(head, bar)


def _progress(status: Status) -> Table:
    total, held_out = status["total_steps"], status["held_out"]
    rows = {
        "step": f"{status['step']}" + (f" of {total}" if total else ""),
        "trained for": duration(status["train_seconds"]),
        "time left": duration(status["seconds_left"]),
        "weight version": _number(status["weights"]["version"]),
    }
    if held_out is not None and held_out["shown"] is not None:
        rows[f"held out ({held_out['tag']})"] = held_out["shown"]
    rows |= {key: _number(value) for key, value in list(status["rewards"].items())[:6]}
    return _table("progress", rows)


def _rates(status: Status) -> Table:
    rates, staleness = status["rates"], status["staleness"]
    rows = {
        "images painted /s": _number(rates.get("painted_per_second")),
        "images scored /s": _number(rates.get("scored_per_second")),
        "images trained /s": _number(rates.get("trained_per_second")),
        "per device": _number(rates.get("trained_per_second_per_device")),
        "seconds a step": _number(rates.get("step_seconds")),
        "seconds to publish": _number(status["weights"]["publish_seconds"]),
        "staleness seen / bound": f"{_number(staleness['largest'])} / {staleness['bound']}",
    }
    return _table("rates", {key: value for key, value in rows.items() if value != "–"})


def _stages(status: Status) -> Table:
    rows = {stage: _number(status["stages"].get(stage)) for stage in STAGES if stage in status["stages"]}
    rows["may be alive"] = _number(status["capacity"])
    return _table("groups", rows)


def _books(status: Status) -> Table:
    books = status["books"]
    if books is None:
        return _table("images", {"books": "no ledger"})
    rows = {"painted": _number(books["painted"]), "trained": _number(books["trained"])}
    rows |= {f"discarded: {reason}": _number(count) for reason, count in books["discarded"].items()}
    rows["alive"] = _number(books["alive"])
    rows["books"] = "balance" if books["balanced"] else "DO NOT BALANCE"
    return _table("images", rows)


def _verdict(status: Status) -> Text:
    waited, scale = status["verdict"]
    return Text.assemble((waited, ""), "\n", (scale, "bold"))


def _faults(status: Status) -> Table:
    table = Table(title=f"last of {status['faults']['number']} faults", title_justify="left", box=box.SIMPLE_HEAD)
    for name in ("when", "what", "which, and why"):
        table.add_column(name, overflow="fold")
    for one in status["faults"]["last"]:
        table.add_row(time.strftime("%H:%M:%S", time.localtime(one["time"])), one["what"], escape(one["detail"]))
    return table


def _table(title: str, rows: dict[str, str]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=None, show_header=False, padding=(0, 1))
    table.add_column(style="dim")
    table.add_column(justify="right")
    for key, value in rows.items():
        table.add_row(escape(key), escape(value))
    return table


def _number(value: Any) -> str:
    if value is None:
        return "–"
    return f"{value:,.4g}" if isinstance(value, float) and not value.is_integer() else f"{int(value):,}"

"""`make bench` and `make soak`.

    python -m benchmarks bench [NAME ...] [--repeats N] [--docs FOLDER]    docs/benchmarks.md and .json
    python -m benchmarks soak [--minutes M] ...                            a long run with faults (soak.py)

Every benchmark runs in a process of its own, one after the other, on one thread a process; tables are printed as well.
`--repeats` below 10 is for trying whether a benchmark runs: nothing is written then.

Does not own: what is measured (one file each), the pages (report.py).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from importlib import import_module
from pathlib import Path
from typing import Any

import click

from benchmarks import report

ROOT = Path(__file__).resolve().parent.parent
FULL_REPEATS = 10


@click.group()
def main() -> None:
    """Benchmarks and the soak run."""


@main.command()
@click.argument("names", nargs=-1, type=click.Choice(report.NAMES))
@click.option("--repeats", type=click.IntRange(min=2), help="instead of each benchmark's own number, 10 or more")
@click.option("--docs", type=click.Path(path_type=Path), default=ROOT / "docs", help="folder of the two pages")
def bench(names: tuple[str, ...], repeats: int | None, docs: Path) -> None:
    """Run the benchmarks NAMES (all of them), print their tables and write them down."""
    results = {name: _in_own_process(name, repeats) for name in names or report.NAMES}
    for name, result in results.items():
        report.show(name, result)
    if repeats is not None and repeats < FULL_REPEATS:
        click.echo(f"not written down: {repeats} repeats are fewer than {FULL_REPEATS}")
        return
    report.write(results, docs)
    click.echo(f"written: {docs / 'benchmarks.md'}, {docs / 'benchmarks.json'}")


@main.command(hidden=True)
@click.argument("name", type=click.Choice(report.NAMES))
@click.argument("repeats", type=int)
@click.argument("target", type=click.Path(path_type=Path))
def one(name: str, repeats: int, target: Path) -> None:
    """Run one benchmark in this process and write its result. 0 repeats: its own number."""
    options = {"repeats": repeats} if repeats else {}
    target.write_text(json.dumps(import_module(f"benchmarks.{name}").run(**options)))


@main.command(context_settings={"ignore_unknown_options": True, "help_option_names": []})
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def soak(arguments: tuple[str, ...]) -> None:
    """A long run with faults injected and its books checked throughout."""
    from benchmarks.soak import main as soak_main

    soak_main(list(arguments))


def _in_own_process(name: str, repeats: int | None) -> dict[str, Any]:
    """A benchmark's result, with the machine's state before it. Ends this command where the benchmark fails."""
    click.echo(f"benchmark {name} ...", err=True)
    state = report.machine_now()
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "result.json"
        command = [sys.executable, "-m", "benchmarks", "one", name, str(repeats or 0), str(target)]
        done = subprocess.run(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"})
        if done.returncode:
            raise click.ClickException(f"benchmark {name} failed")
        return {**json.loads(target.read_text()), **state}


if __name__ == "__main__":
    main(prog_name="python -m benchmarks")

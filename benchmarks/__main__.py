"""`make bench` and `make soak`.

    python -m benchmarks run [NAME ...] [options]    docs/benchmarks.md and .json
    python -m benchmarks soak [--minutes M] ...      a long run with faults (soak.py)
    python -m benchmarks soak jury [--requests N]    reward servers under fire (jury_soak.py)

Every benchmark runs in a process of its own, one after the other, on one thread a process, and is written down when it
ends: one that fails or outlives its limit costs no other its figures. With `--repeats`, `--seconds` or `--steps` below
a benchmark's own it is only tried: its table is printed and nothing is written.

Does not own: what is measured (one file each), the pages (report.py).
"""

from __future__ import annotations

import inspect
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import click

from benchmarks import report

ROOT = Path(__file__).resolve().parent.parent
FULL_REPEATS = 10
ENDING_S = 30.0
"""Time a benchmark that outlived its limit has to stop what it started."""


class BenchmarkFailed(Exception):
    """A benchmark ended without a result."""


@click.group()
def main() -> None:
    """Benchmarks and the soak run."""


@main.command("run")
@click.argument("names", nargs=-1, type=click.Choice(report.NAMES))
@click.option("--repeats", type=click.IntRange(min=1), help="repeats, or runs (seeds) where whole runs are compared")
@click.option("--seconds", type=click.FloatRange(min=1), help="training seconds of each run")
@click.option("--steps", type=click.IntRange(min=1), help="learner steps of each run")
@click.option("--resume", is_flag=True, help="keep the whole runs that an earlier, interrupted call has finished")
@click.option("--docs", type=click.Path(path_type=Path), default=ROOT / "docs", help="folder of the two pages")
def run_benchmarks(names: tuple[str, ...], docs: Path, **options: Any) -> None:
    """Run the benchmarks NAMES (all of them), print their tables and write them down."""
    given = {name: value for name, value in options.items() if value}
    chosen = names or report.NAMES
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that a benchmark under way is ended
    taken = {name: _options_of(name, given, strict=bool(names)) for name in chosen}
    failures = []
    for name in chosen:
        try:
            result = in_own_process(name, taken[name], report.SECTIONS[name].limit_s)
        except BenchmarkFailed as error:
            click.echo(f"benchmark {name}: {error}", err=True)
            failures.append(name)
            continue
        report.show(name, result)
        if is_trial(name, taken[name]):
            click.echo(f"{name} was only tried: nothing is written down")
        else:
            report.write({name: result}, docs)
            click.echo(f"written: {docs / 'benchmarks.md'}, {docs / 'benchmarks.json'}")
    if failures:
        raise click.ClickException(f"no figures of {', '.join(failures)}; again: {_again(failures)}")


@main.command(hidden=True)
@click.argument("name", type=click.Choice(report.NAMES))
@click.argument("options")
@click.argument("target", type=click.Path(path_type=Path))
def one(name: str, options: str, target: Path) -> None:
    """Run one benchmark in this process with OPTIONS (JSON) and write its result."""
    target.write_text(json.dumps(import_module(f"benchmarks.{name}").run(**json.loads(options))))


@main.command(context_settings={"ignore_unknown_options": True, "help_option_names": []})
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def soak(arguments: tuple[str, ...]) -> None:
    """A long run with faults injected and its books checked throughout; `soak jury`: requests to servers under fire."""
    if arguments[:1] == ("jury",):
        from benchmarks.jury_soak import main as jury_main

        jury_main(list(arguments[1:]))
        return
    from benchmarks.soak import main as soak_main

    soak_main(list(arguments))


def is_trial(name: str, options: Mapping[str, Any]) -> bool:
    """Whether these options make less than the benchmark asks for (10 repeats do, where its own number is higher)."""
    enough = {option: parameter.default for option, parameter in _parameters(name).items()}
    enough["repeats"] = min(enough["repeats"], FULL_REPEATS)
    return any(value < enough[option] for option, value in options.items() if not isinstance(value, bool))


def _options_of(name: str, given: Mapping[str, Any], strict: bool) -> dict[str, Any]:
    """Those of the given options that the benchmark has. strict: refuse the others (a benchmark asked for by name)."""
    known = _parameters(name)
    unknown = [f"--{option}" for option in given if option not in known]
    if unknown and strict:
        raise click.UsageError(f"{name} has no {', '.join(unknown)}")
    return {option: value for option, value in given.items() if option in known}


def _parameters(name: str) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(import_module(f"benchmarks.{name}").run).parameters


def in_own_process(name: str, options: Mapping[str, Any], limit_s: float) -> dict[str, Any]:
    """A benchmark's result, with the machine's state before it. Raises BenchmarkFailed."""
    click.echo(f"benchmark {name} ...", err=True)
    state = report.machine_now()
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "result.json"
        command = [sys.executable, "-m", "benchmarks", "one", name, json.dumps(dict(options)), str(target)]
        process = subprocess.Popen(
            command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, start_new_session=True
        )
        try:
            code = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            raise BenchmarkFailed(f"no end within {limit_s:g} s") from None
        finally:
            _end(process)
        if code:
            raise BenchmarkFailed(f"failed with exit status {code}")
        return {**json.loads(target.read_text()), **state}


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a benchmark that is still running and what it started: politely, then at once."""
    if process.poll() is not None:
        return
    os.killpg(process.pid, signal.SIGINT)
    try:
        process.wait(ENDING_S)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _again(names: list[str]) -> str:
    return f"python -m benchmarks run {' '.join(names)}"


if __name__ == "__main__":
    main(prog_name="python -m benchmarks")

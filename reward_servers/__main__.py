"""Command line of reward servers: `python -m reward_servers serve NAME`, `list`, `train CONFIG`, `judge up|probe`.

Imports stay within the commands, so that --help answers at once.
Does not own: what the commands do (serving, training, judging.cli, contracts.registry).
"""

from __future__ import annotations

import os
import sys
from typing import Any

import click

from reward_servers.judging.cli import judge
from reward_servers.reporting import tell_in_one_line
from reward_servers.training.cli import train


@click.group(help="Reward servers of Salon: scorers behind HTTP.")
def cli() -> None:
    """Sub-commands below."""


cli.add_command(judge)
cli.add_command(train)


@cli.command()
@click.argument("name")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address; beyond loopback a token is required.")
@click.option("--port", default=8000, show_default=True, type=click.IntRange(0, 65535), help="0: any free port.")
@click.option("--max-batch", default=64, show_default=True, type=click.IntRange(1), help="Images in one scorer call.")
@click.option("--max-wait-ms", default=5.0, show_default=True, type=click.FloatRange(0), help="Wait for company.")
@click.option("--queue", default=1024, show_default=True, type=click.IntRange(1), help="Waiting images before 429.")
@click.option("--max-images", default=256, show_default=True, type=click.IntRange(1), help="Images a request.")
@click.option("--max-body-mb", default=512, show_default=True, type=click.IntRange(1), help="MiB a request.")
@click.option("--max-seconds", default=300.0, show_default=True, type=click.FloatRange(0, min_open=True),
              help="Longest a request may take.")  # fmt: skip
@click.option("--drain-s", default=30.0, show_default=True, type=click.FloatRange(0), help="Longest drain on SIGTERM.")
@click.option("--option", "options", multiple=True, metavar="KEY=VALUE", help="Keyword argument of the scorer (YAML).")
@click.option("--ready-file", default=None, type=click.Path(dir_okay=False), help="Written when ready: url and pid.")
@click.option("--parent-pid", default=None, type=int, help="End when this parent process has gone.")
def serve(name: str, options: tuple[str, ...], ready_file: str | None, parent_pid: int | None, **given: Any) -> None:
    """Serve one scorer over HTTP until SIGTERM.

    NAME is one of `list`, or your own class in the working directory as module:Class. When it is ready one JSON line
    {"url", "pid"} is printed. The bearer token is read from SALON_REWARD_TOKEN.
    """
    if parent_pid is not None:
        _die_with_parent(parent_pid)
    tell_in_one_line(lambda: _serve(name, options, ready_file, parent_pid, given))


@cli.command(name="list")
@click.option("--json", "as_json", is_flag=True, help="Rows as JSON.")
def list_scorers(as_json: bool) -> None:
    """List the scorers that can be served by name."""
    import json

    from contracts.registry import entries

    rows = [entry.row() for entry in entries("scorer")]
    if as_json:
        click.echo(json.dumps(rows, indent=2))
        return
    for row in rows:
        click.echo(f"{row['name']:<22}{row['summary']}  ({row['paper']})")


def _serve(
    name: str, options: tuple[str, ...], ready_file: str | None, parent_pid: int | None, given: dict[str, Any]
) -> None:
    import logging

    from reward_servers.construct import make_scorer
    from reward_servers.serving import serve as run_server
    from reward_servers.settings import ServerSettings, token_from_environment

    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    settings = ServerSettings(
        host=given["host"], port=given["port"], max_batch=given["max_batch"], max_wait_s=given["max_wait_ms"] / 1000,
        queue=given["queue"], max_images=given["max_images"], max_body_bytes=given["max_body_mb"] * 2**20,
        max_seconds=given["max_seconds"], drain_seconds=given["drain_s"],
    )  # fmt: skip
    run_server(make_scorer(name, options), settings, token_from_environment(), ready_file, parent_pid)


def _die_with_parent(parent_pid: int) -> None:
    """Ask Linux for SIGTERM at the parent's death; elsewhere the parent-watch thread alone sees to it."""
    import signal

    if sys.platform == "linux":
        import ctypes

        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)
    if os.getppid() != parent_pid:  # it died before we asked
        sys.exit(1)


if __name__ == "__main__":
    cli(prog_name="python -m reward_servers")

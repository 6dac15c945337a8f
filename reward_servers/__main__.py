"""Command line of reward servers: `python -m reward_servers serve NAME`, `list`, `bench URL`, `train CONFIG`,
`judge up|probe`.

Imports stay within the commands, so that --help answers at once.
Does not own: what the commands do (serving, bench, training, judging.cli, contracts.registry).
"""

from __future__ import annotations

from typing import Any

import click

from reward_servers.judging.cli import judge
from reward_servers.leash import die_with_parent
from reward_servers.reporting import tell_in_one_line
from reward_servers.training.cli import direction, train


@click.group(help="Reward servers of Salon: scorers behind HTTP.")
def cli() -> None:
    """Sub-commands below."""


cli.add_command(judge)
cli.add_command(train)
cli.add_command(direction)


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
@click.option("--processes", default=0, show_default=True, type=click.IntRange(0), help="Score in so many processes "
              "of their own: for scorers that are mostly Python, or crash. 0: in the server's.")  # fmt: skip
@click.option("--ready-file", default=None, type=click.Path(dir_okay=False), help="Written when ready: url and pid.")
@click.option("--parent-pid", default=None, type=int, help="End when this parent process has gone.")
def serve(name: str, options: tuple[str, ...], ready_file: str | None, parent_pid: int | None, **given: Any) -> None:
    """Serve one scorer over HTTP until SIGTERM.

    NAME is one of `list`, or your own class in the working directory as module:Class. When it is ready one JSON line
    {"url", "pid"} is printed. The bearer token is read from SALON_REWARD_TOKEN.
    """
    if parent_pid is not None:
        die_with_parent(parent_pid)
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


@cli.command()
@click.argument("url")
@click.option(
    "--concurrency", default="1,2,4,8,16", show_default=True, help="Callers at once, one level after another."
)
@click.option(
    "--seconds", default=5.0, show_default=True, type=click.FloatRange(0, min_open=True), help="Of each level."
)
@click.option("--images", default=16, show_default=True, type=click.IntRange(1), help="Images a request.")
@click.option("--shape", default="512,512,3", show_default=True, help="Of one image (H,W,3) or one latent (C,h,w).")
@click.option("--prompt", default="a red circle left of a blue square", show_default=True, help="Of every image.")
@click.option("--metadata", default="{}", show_default=True, help="Of every image, as a YAML or JSON mapping.")
@click.option("--gradients", is_flag=True, help="Ask for gradients too.")
@click.option("--token-env", default="SALON_REWARD_TOKEN", show_default=True, help="Variable with the bearer token.")
@click.option("--json", "as_json", is_flag=True, help="Everything as JSON.")
def bench(url: str, concurrency: str, shape: str, metadata: str, token_env: str, as_json: bool, **given: Any) -> None:
    """Sweep concurrency against the reward server at URL: waiting times, throughput, batch sizes, failures."""
    tell_in_one_line(lambda: _bench(url, concurrency, shape, metadata, token_env, as_json, given))


def _bench(
    url: str, concurrency: str, shape: str, metadata: str, token_env: str, as_json: bool, given: dict[str, Any]
) -> None:
    import asyncio
    import json

    import yaml

    from contracts.errors import ConfigError
    from reward_servers import bench as benching

    levels, sizes, each = _integers(concurrency), _integers(shape), yaml.safe_load(metadata)
    if not levels or min(levels) < 1:
        raise ConfigError("concurrency", f"{concurrency!r} is no list of numbers", "write 1,4,16")
    if len(sizes) != 3 or min(sizes) < 1:
        raise ConfigError("shape", f"{shape!r} is no shape", "write 512,512,3")
    if not isinstance(each, dict):
        raise ConfigError("metadata", f"{metadata!r} is no mapping", "write {key: value}")
    load = benching.Load(shape=(sizes[0], sizes[1], sizes[2]), metadata=each, **given)
    info, found = asyncio.run(benching.sweep(url, levels, load, token_env))
    if as_json:
        click.echo(json.dumps(benching.as_json(url, info, load, found), indent=2))
    else:
        benching.show(url, info, load, found)


def _integers(text: str) -> list[int]:
    parts = text.split(",")
    return [int(part) for part in parts] if all(part.strip().isdigit() for part in parts) else []


def _serve(
    name: str, options: tuple[str, ...], ready_file: str | None, parent_pid: int | None, given: dict[str, Any]
) -> None:
    import logging

    from reward_servers.construct import make_scorer
    from reward_servers.processes import ProcessScorer
    from reward_servers.serving import serve as run_server
    from reward_servers.settings import ServerSettings, token_from_environment

    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    settings = ServerSettings(
        host=given["host"], port=given["port"], max_batch=given["max_batch"], max_wait_s=given["max_wait_ms"] / 1000,
        queue=given["queue"], max_images=given["max_images"], max_body_bytes=given["max_body_mb"] * 2**20,
        max_seconds=given["max_seconds"], drain_seconds=given["drain_s"],
    )  # fmt: skip
    processes = given["processes"]
    scorer = ProcessScorer(name, options, processes) if processes else make_scorer(name, options)
    run_server(scorer, settings, token_from_environment(), ready_file, parent_pid)


if __name__ == "__main__":
    cli(prog_name="python -m reward_servers")

"""`python -m cluster jury deploy|list|remove`: scorers as Ray Serve deployments on a Ray cluster that is up.

Does not own: what is done (deployments), a scorer in a process of its own (`python -m reward_servers serve`).
"""

from __future__ import annotations

import json
import os
from typing import Any

import click

_address = click.option("--address", help="The Ray cluster; RAY_ADDRESS, or the one on this machine, unless given.")


@click.group()
def jury() -> None:
    """Deploy scorers on a Ray cluster, where each scales on its own queue."""


@jury.command()
@click.argument("scorer")
@click.option("--as", "name", help="Name to reach it by; SCORER unless given (needed for module:Class).")
@click.option("--min", "min_replicas", default=1, show_default=True, type=click.IntRange(1), help="Fewest replicas.")
@click.option("--max", "max_replicas", default=4, show_default=True, type=click.IntRange(1), help="Most replicas.")
@click.option("--target-images", default=64.0, show_default=True, type=click.FloatRange(0, min_open=True),
              help="Images a replica is meant to hold; more, and another is started.")  # fmt: skip
@click.option("--up-after-s", default=10.0, show_default=True, type=click.FloatRange(0), help="Before one is added.")
@click.option("--down-after-s", default=300.0, show_default=True, type=click.FloatRange(0), help="Before one goes.")
@click.option("--cpus", default=1.0, show_default=True, type=click.FloatRange(0), help="Reserved for a replica.")
@click.option("--gpus", default=0.0, show_default=True, type=click.FloatRange(0), help="Reserved for a replica.")
@click.option("--option", "options", multiple=True, metavar="KEY=VALUE", help="Keyword argument of the scorer (YAML).")
@click.option("--env", "variables", multiple=True, metavar="NAME", help="Variable of this shell its replicas get.")
@click.option("--max-batch", default=64, show_default=True, type=click.IntRange(1), help="Images in one scorer call.")
@click.option("--max-wait-ms", default=5.0, show_default=True, type=click.FloatRange(0), help="Wait for company.")
@click.option("--queue", default=1024, show_default=True, type=click.IntRange(1), help="Waiting images before 429.")
@click.option("--max-images", default=256, show_default=True, type=click.IntRange(1), help="Images a request.")
@click.option("--max-body-mb", default=512, show_default=True, type=click.IntRange(1), help="MiB a request.")
@click.option("--host", default="127.0.0.1", show_default=True, help="Of Serve's proxies, if Serve is not running yet.")
@click.option("--port", default=8000, show_default=True, type=click.IntRange(1, 65535), help="The same.")
@_address
def deploy(
    scorer: str, name: str | None, address: str | None, options: tuple[str, ...], variables: tuple[str, ...],
    max_wait_ms: float, max_body_mb: int, cpus: float, gpus: float, **given: Any,
) -> None:  # fmt: skip
    """Deploy SCORER (of `reward_servers list`, or module:Class) and wait until it is ready.

    A configuration then names it: `scorers: [{name: ..., urls: [NAME]}]`. Prints one JSON line {"name", "urls"}. The
    bearer token is read from SALON_REWARD_TOKEN. Deploying again under the same name changes it in place.
    """
    from cluster.deployed.deployments import Deployment, check_deployment
    from cluster.deployed.deployments import deploy as put_up
    from cluster.deployed.scaling import Scaling
    from contracts.errors import ConfigError
    from reward_servers.construct import parse_options
    from reward_servers.settings import ServerSettings, token_from_environment

    if name is None and ":" in scorer:
        raise ConfigError("as", f"{scorer} needs a name to be reached by", "add --as NAME")
    limits = ("host", "port", "max_batch", "queue", "max_images")
    settings = ServerSettings(
        max_wait_s=max_wait_ms / 1000, max_body_bytes=max_body_mb * 2**20, **{key: given.pop(key) for key in limits}
    )
    wanted = Deployment(
        scorer, name or scorer, parse_options(options), Scaling(**given), cpus, gpus, _replica_environment(variables)
    )
    check_deployment(wanted)
    _join(address)
    urls = put_up(wanted, settings, token_from_environment())
    click.echo(json.dumps({"name": wanted.name, "urls": urls}))


@jury.command("list")
@click.option("--json", "as_json", is_flag=True, help="Rows as JSON.")
@_address
def list_(as_json: bool, address: str | None) -> None:
    """List what is deployed: replicas, their process ids, URLs."""
    from cluster.deployed.deployments import listing

    _join(address)
    rows = listing()
    if as_json:
        click.echo(json.dumps(rows, indent=2))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("name", "status", "replicas", "wanted", "process ids", "URLs")
    for row in rows:
        pids, urls = ", ".join(map(str, row["pids"])), "\n".join(row["urls"])
        table.add_row(row["name"], row["status"], str(row["replicas"]), str(row["wanted"]), pids, urls)
    Console().print(table)


@jury.command()
@click.argument("name")
@_address
def remove(name: str, address: str | None) -> None:
    """Take NAME down once its replicas have answered what they had accepted."""
    from cluster.deployed.deployments import remove as take_down

    _join(address)
    take_down(name)


def _join(address: str | None) -> None:
    """Join a cluster that is up. Raises ConfigError when there is none: a new one would end with this command."""
    import logging

    import ray

    from contracts.errors import ConfigError

    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    if ray.is_initialized():
        return

    try:
        ray.init(
            address=address or os.environ.get("RAY_ADDRESS") or "auto", logging_level="WARNING", log_to_driver=False
        )
    except ConnectionError as error:
        raise ConfigError("address", "no Ray cluster answers", _START) from error


_START = "start one with `ray start --head`, or serve the scorer alone: `python -m reward_servers serve`"


def _replica_environment(names: tuple[str, ...]) -> dict[str, str]:
    """Variables of every replica. In a submitted job Ray itself puts the working directory on the import path."""
    from cluster.driver import import_path, in_job
    from contracts.errors import ConfigError

    missing = [name for name in names if name not in os.environ]
    if missing:
        raise ConfigError("env", f"{', '.join(missing)} is not set in this shell")
    path = {} if in_job() else {"PYTHONPATH": import_path()}
    return {"TOKENIZERS_PARALLELISM": "false", **path, **{name: os.environ[name] for name in names}}

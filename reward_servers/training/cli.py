"""`python -m reward_servers train`. Imports stay within the command, so that --help answers at once."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import click


@click.command()
@click.argument("config")
@click.argument("overrides", nargs=-1, metavar="[a.b=c ...]")
def train(config: str, overrides: Sequence[str]) -> None:
    """Train a reward model as CONFIG (a YAML file) says; a.b=c overrides a key.

    A training that was killed goes on from its last checkpoint when the same command is given again.
    """
    from contracts.errors import SalonError

    try:
        from reward_servers.training.config import load_training

        settings = load_training(config, overrides)
        from reward_servers.training.trainer import train as run

        run(settings, click.echo)
    except SalonError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(int(error.exit_code))

"""`python -m reward_servers train` and `direction`. Imports stay within the command, so that --help answers at once."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

import click


@click.command()
@click.argument("config")
@click.argument("overrides", nargs=-1, metavar="[a.b=c ...]")
def train(config: str, overrides: Sequence[str]) -> None:
    """Train a reward model as CONFIG (a YAML file) says; a.b=c overrides a key.

    A training that was killed goes on from its last checkpoint when the same command is given again.
    """

    def work() -> None:
        from reward_servers.training.config import load_training

        settings = load_training(config, overrides)
        from reward_servers.training.trainer import train as run

        run(settings, click.echo)

    _tell(work)


@click.command()
@click.argument("config")
@click.argument("overrides", nargs=-1, metavar="[a.b=c ...]")
def direction(config: str, overrides: Sequence[str]) -> None:
    """Learn D2-Align's direction against a reward model's bias as CONFIG (a YAML file) says."""

    def work() -> None:
        from reward_servers.training.direction import load_direction, train_direction

        train_direction(load_direction(config, overrides), click.echo)

    _tell(work)


def _tell(work: Callable[[], None]) -> None:
    from contracts.errors import SalonError

    try:
        work()
    except SalonError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(int(error.exit_code))

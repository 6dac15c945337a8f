"""How the command lines of this package tell a user what is wrong: one line, a status a scheduler can act on.

Does not own: the errors and their statuses (contracts.errors). Imports nothing heavy, for --help.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

import click


def tell_in_one_line(work: Callable[[], None]) -> None:
    """Run a command; a SalonError ends the process with one line and its status, without a traceback."""
    from contracts.errors import SalonError

    try:
        work()
    except SalonError as error:
        click.echo(f"error: {error}", err=True)
        sys.stderr.flush()
        sys.stdout.flush()
        os._exit(int(error.exit_code))  # a hanging scorer thread must not keep a failed server alive

"""Runs a command that ends when its parent does: `python leash.py PARENT_PID COMMAND ...`.

Linux delivers SIGTERM to this process when the thread that started it dies, and that setting survives exec; elsewhere
the command simply runs. A file on its own, started by path: it must not import what the command's environment lacks.
"""

import os
import signal
import sys


def main(arguments: list[str]) -> None:
    """Never returns: becomes the command."""
    parent, command = int(arguments[0]), arguments[1:]
    if sys.platform == "linux":
        import ctypes

        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)
    if os.getppid() != parent:  # it died before we asked
        sys.exit(1)
    os.execvp(command[0], command)


if __name__ == "__main__":
    main(sys.argv[1:])

"""A process that ends when its parent does: `die_with_parent`, and the same for any command,
`python leash.py PARENT_PID COMMAND ...`.

Linux sends a signal to the process when the thread that started it dies, and that setting survives exec; elsewhere
whoever needs more watches the parent itself. The standard library alone: the file is also started by path.
"""

import os
import signal
import sys


def die_with_parent(parent_pid: int, number: signal.Signals = signal.SIGTERM) -> None:
    """Have signal `number` sent here at the parent's death. Ends the process, status 1, where it has died already."""
    if sys.platform == "linux":
        import ctypes

        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, number)
    if os.getppid() != parent_pid:  # it died before we asked
        os._exit(1)


def main(arguments: list[str]) -> None:
    """Never returns: becomes the command."""
    die_with_parent(int(arguments[0]))
    os.execvp(arguments[1], arguments[1:])


if __name__ == "__main__":
    main(sys.argv[1:])

"""What every process of a run does first: stack dumps on request, thread limits.

Does not own: who dumps stacks and when (telemetry/watchdog.py).
"""

from __future__ import annotations

import contextlib
import os
import sys


def prepare_process(name: str) -> None:
    """Let the watchdog find this process: its stacks go to SALON_STACKS/<name>-<pid>.txt on request."""
    folder = os.environ.get("SALON_STACKS")
    if folder:
        from cluster.telemetry import watchdog

        with contextlib.suppress(OSError):
            watchdog.install(os.path.join(folder, f"{name}-{os.getpid()}.txt"))


def limit_threads(threads: int) -> None:
    """Hold torch to `threads` threads where torch is loaded; two processes on all cores ruin each other."""
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(threads)

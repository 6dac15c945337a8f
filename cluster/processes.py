"""What every process of a run does first: thread limits, stack dumps on request, a name.

Does not own: who dumps stacks and when (telemetry/watchdog.py).
"""

from __future__ import annotations

import contextlib
import os


def prepare_process(name: str, threads: int | None = None) -> None:
    """Name the process for stack dumps and set torch's threads where torch is used (threads not None)."""
    folder = os.environ.get("SALON_STACKS")
    if folder:
        from cluster.telemetry import watchdog

        with contextlib.suppress(OSError):
            watchdog.install(os.path.join(folder, f"{name}-{os.getpid()}.txt"))
    if threads is not None:
        import torch

        torch.set_num_threads(threads)

"""What every process of a run does first: stack dumps on request, /metrics, thread limits; and what it says of itself.

Does not own: who dumps stacks and when (telemetry/watchdog.py), what /metrics tells (telemetry/process.py).
"""

from __future__ import annotations

import contextlib
import os
import sys
from typing import Any


def prepare_process(name: str, metrics: bool = True) -> None:
    """Let the watchdog find this process: its stacks go to SALON_STACKS/<name>-<pid>.txt on request.

    metrics: answer /metrics too; False for a process with an exporter of its own.
    """
    if metrics:
        from cluster.telemetry import process

        process.listen()
    folder = os.environ.get("SALON_STACKS")
    if folder:
        from cluster.telemetry import watchdog

        with contextlib.suppress(OSError):
            watchdog.install(os.path.join(folder, f"{name}-{os.getpid()}.txt"))


def describe_process(_actor: Any = None) -> dict[str, Any]:
    """Pid, start, node, memory, and where /metrics is (None: nowhere); asked of Ray actors (`__ray_call__`)."""
    import psutil
    import ray

    from cluster.telemetry import process, targets

    address = process.address()
    return {
        "pid": os.getpid(),
        "started": psutil.Process().create_time(),
        "node": ray.get_runtime_context().get_node_id(),
        "memory_bytes": psutil.Process().memory_info().rss,
        "metrics": address and targets.reachable(address, ray.util.get_node_ip_address()),
    }


def limit_threads(threads: int) -> None:
    """Hold torch to `threads` threads where torch is loaded; two processes on all cores ruin each other."""
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(threads)

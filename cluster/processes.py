"""What every process of a run does first: stack dumps on request, /metrics, thread limits; and what it says of itself.

Does not own: who dumps stacks and when (telemetry/watchdog.py), what /metrics tells (telemetry/process.py).
"""

from __future__ import annotations

import os
import sys
import tempfile
from typing import Any

from contracts import stacks
from contracts.config import RunConfig
from contracts.digests import digest_text


def prepare_process(name: str, metrics: bool = True) -> None:
    """Let the watchdog find this process: its stacks go to SALON_STACKS/<name>-<pid>.txt on request.

    metrics: answer /metrics too; False for a process with an exporter of its own.
    """
    if metrics:
        from cluster.telemetry import process

        process.listen()
    stacks.register(name)


def stacks_folder(config: RunConfig) -> str:
    """Where the run's processes put their stacks, on whatever machine they are: known before the run folder is there.

    That of a run at a URL is local to each machine; what the watchdog collects is in the run folder all the same.
    """
    if "://" not in config.runs_dir:
        return f"{config.runs_dir}/{config.name}/stacks"
    location = digest_text(config.runs_dir, config.name)
    return os.path.join(tempfile.gettempdir(), f"salon-stacks-{os.getuid()}", f"{config.name}-{location[:12]}")


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

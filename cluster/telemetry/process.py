"""The /metrics of a process that has no series of the run to tell: its memory, CPU time and open files.

Every process of a run listens, so that Prometheus sees each by its own `up`, whatever node it is on; the controller
and reward servers have exporters of their own and add these series to them (`register`). A replica of a deployed
scorer, which is reached through a proxy, listens here too, with its reward server's registry.
Does not own: the run's series (telemetry.py), who finds the address (targets.py).
"""

from __future__ import annotations

import os

from prometheus_client import CollectorRegistry, ProcessCollector, disable_created_metrics, start_http_server

HOST_ENV = "SALON_METRICS_HOST"
"""Address that the processes of a run listen on (telemetry.metrics_host); unset: they do not."""

WILDCARDS = ("0.0.0.0", "::", "")

_address: str | None = None

disable_created_metrics()  # type: ignore[no-untyped-call]  # `_created` series are not in the catalogue


def register(registry: CollectorRegistry) -> None:
    """Add the process's own series (salon_process_...) to a registry."""
    ProcessCollector(namespace="salon", registry=registry)


def listen(host: str | None = None, registry: CollectorRegistry | None = None) -> None:
    """Answer /metrics on any free port. A process that cannot is seen as down, and works on.

    host: SALON_METRICS_HOST unless given; registry: what it tells, in the place of the process's own series alone.
    """
    global _address
    host = host or os.environ.get(HOST_ENV)
    if host is None or _address is not None:
        return
    if registry is None:
        registry = CollectorRegistry(auto_describe=True)
        register(registry)
    try:
        server, _ = start_http_server(0, addr=host, registry=registry)
    except OSError:
        return
    _address = f"{host}:{server.server_port}"


def address() -> str | None:
    """host:port this process listens on, None when it does not."""
    return _address

"""Puts a scorer up as a Ray Serve application of its own, lists what is up, and takes it down.

Invariant: one application a scorer, so scaling, restarting or removing one touches no other; replicas reserve CPUs and
GPUs with Ray, so none takes what actors or learner ranks hold: a replica without room waits.
Does not own: replicas (replica), their number (scaling), who asks them (names).
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from cluster.deployed.names import addresses, serve_details
from cluster.deployed.scaling import Scaling
from contracts import registry
from contracts.config.scorers import SCORER_OPTIONS, checked_options
from contracts.errors import ConfigError, SalonError, ScoringError

if TYPE_CHECKING:
    from reward_servers.settings import ServerSettings

_REASON_CHARS = 600
PROXY_S = 120.0
"""Longest wait for Ray Serve's first HTTP proxy."""


@dataclass(frozen=True)
class Deployment:
    """What to put up. scorer: a registry name or module:Class; name: of the application and of its route.

    cpus, gpus: reserved with Ray for each replica; environment: variables of its replicas beside Ray's own.
    """

    scorer: str
    name: str
    options: Mapping[str, Any] = field(default_factory=dict)
    scaling: Scaling = field(default_factory=Scaling)
    cpus: float = 1.0
    gpus: float = 0.0
    environment: Mapping[str, str] = field(default_factory=dict)


def check_deployment(wanted: Deployment) -> None:
    """What can be told without importing the scorer. Raises RegistryError or ConfigError."""
    if not wanted.name.replace("-", "").replace("_", "").replace(".", "").isalnum():
        raise ConfigError("as", f"{wanted.name!r} is no name for a deployment", "use letters, digits, - _ and .")
    if ":" not in wanted.scorer:
        registry.resolve("scorer", wanted.scorer)
    try:
        checked_options(wanted.scorer, dict(wanted.options))
    except ValidationError as error:
        known = ", ".join(SCORER_OPTIONS[wanted.scorer].model_fields) or "none"
        problems = "; ".join(f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors())
        raise ConfigError("option", f"{wanted.scorer}: {problems}", f"options of {wanted.scorer}: {known}") from error


def deploy(wanted: Deployment, settings: ServerSettings, token: str | None) -> list[str]:
    """Put it up, or bring what is up under its name to this state; its URLs once its first replicas are ready.

    settings: limits of each replica; host and port are those of Ray Serve's proxies, and count only where Serve is not
    running yet. token: the bearer token that callers must send. Raises ConfigError, RegistryError or ScoringError.
    """
    check_deployment(wanted)
    from ray import serve

    settings = _start_serve(settings, token)
    try:
        serve.run(_application(wanted, settings, token), name=wanted.name, route_prefix=f"/{wanted.name}")
    except RuntimeError as error:
        reason = _why(wanted.name) or str(error)
        serve.delete(wanted.name)  # it would be tried for ever
        raise ScoringError(f"{wanted.scorer!r} cannot be deployed as {wanted.name!r}: {reason}") from error
    details = serve_details("deploy")
    return addresses(details["applications"][wanted.name], details)


def remove(name: str) -> None:
    """Take a deployment down; its replicas answer what they have accepted first. Raises ConfigError."""
    applications = serve_details("name")["applications"]
    if name not in applications:
        raise ConfigError(
            "name", f"nothing is deployed as {name!r}", f"there is {', '.join(applications) or 'nothing'}"
        )
    from ray import serve

    serve.delete(name)


def listing() -> list[dict[str, Any]]:
    """One row a deployment: name, status, replicas that run and that are wanted, process ids, URLs."""
    details = serve_details("jury")
    return [_row(name, application, details) for name, application in details["applications"].items()]


def _row(name: str, application: Mapping[str, Any], details: Mapping[str, Any]) -> dict[str, Any]:
    deployed = list(application["deployments"].values())
    replicas = [replica for one in deployed for replica in one["replicas"]]
    running = [replica for replica in replicas if replica["state"] == "RUNNING"]
    return {
        "name": name, "status": str(getattr(application["status"], "value", application["status"])),
        "replicas": len(running), "wanted": sum(one["target_num_replicas"] for one in deployed),
        "pids": sorted(replica["pid"] for replica in running), "urls": addresses(application, details),
        "message": application["message"],
    }  # fmt: skip


def _application(wanted: Deployment, settings: ServerSettings, token: str | None) -> Any:
    from ray import serve

    from cluster.deployed.replica import ScorerReplica

    options = [f"{key}={json.dumps(value)}" for key, value in wanted.options.items()]
    return (
        serve.deployment(serve.ingress()(ScorerReplica))
        .options(
            name=wanted.name,
            autoscaling_config=wanted.scaling.autoscaling(),
            max_ongoing_requests=settings.queue,  # the scorer's own queue refuses first, with 429 and a time
            ray_actor_options={
                "num_cpus": wanted.cpus, "num_gpus": wanted.gpus, "runtime_env": {"env_vars": dict(wanted.environment)},
            },
            graceful_shutdown_timeout_s=settings.drain_seconds,
            health_check_period_s=5.0,
            max_constructor_retry_count=2,  # what does not load the second time will not load the twentieth
        )
        .bind(wanted.scorer, options, settings, token)
    )  # fmt: skip


def _start_serve(settings: ServerSettings, token: str | None) -> ServerSettings:
    """Ray Serve, if it is not running; the settings with the address that its proxies listen on.

    Raises ConfigError for a scorer without a token that others could reach.
    """
    from ray import serve
    from ray.exceptions import RayActorError
    from ray.serve.context import _get_global_client

    from reward_servers.settings import check_reach

    client = _get_global_client(raise_if_no_controller_running=False)
    if client is not None:
        settings = replace(settings, host=client.http_config.host)
    check_reach(settings, token)
    if client is None:
        with suppress(RayActorError):  # a proxy that was slow to start: Serve replaces it by itself
            serve.start(proxy_location="EveryNode", http_options={"host": settings.host, "port": settings.port})
        _wait_for_proxy()
    return settings


def _wait_for_proxy() -> None:
    """Until a proxy listens. Raises ScoringError when none does in PROXY_S."""
    deadline = time.monotonic() + PROXY_S
    while not any(proxy["status"] == "HEALTHY" for proxy in serve_details("deploy")["proxies"].values()):
        if time.monotonic() > deadline:
            raise ScoringError(f"no HTTP proxy of Ray Serve was ready within {PROXY_S:g} s; is its port taken?")
        time.sleep(0.2)


def _why(name: str) -> str:
    """Serve's message about a deployment that failed, cut to what the scorer said."""
    try:
        application = serve_details("deploy")["applications"].get(name)
    except SalonError:
        return ""
    messages = [one["message"] for one in application["deployments"].values()] if application else []
    lines = [line.strip() for message in messages for line in message.splitlines() if line.strip()]
    said = [line for line in lines if "Error: " in line]
    return (said or lines or [""])[-1][:_REASON_CHARS]

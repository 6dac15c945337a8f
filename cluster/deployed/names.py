"""From the name of a deployed scorer to the URLs of its replicas' proxies, as Ray Serve knows them at this moment.

A configuration's `urls` may hold names beside URLs. Whoever asks a scorer resolves them first, in a process that has
joined the Ray cluster; a dispatcher that is started again resolves them again.
Does not own: requests (reward_servers.client), deploying (deployments).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cluster.telemetry.targets import reachable
from contracts.config.online import OnlineSection
from contracts.config.scoring import ScorerConfig
from contracts.errors import ConfigError

DEPLOY = "deploy it with `python -m cluster jury deploy`"


def resolved(scorer: ScorerConfig, where: str = "") -> ScorerConfig:
    """The same with URLs in the place of names. Raises ConfigError for a name that nothing is deployed under.

    where: the scorer's place in the configuration; one of the run's scorers unless given.
    """
    if not scorer.deployments:
        return scorer
    field = f"{where or f'scorers.{scorer.name}'}.urls"
    details = serve_details(field)
    urls = [url for entry in scorer.urls for url in ([entry] if "://" in entry else _urls(field, entry, details))]
    return scorer.model_copy(update={"urls": tuple(dict.fromkeys(urls))})


def with_judge(trainer: OnlineSection, where: str = "") -> OnlineSection:
    """The same with URLs in the place of its judge's names. Raises as `resolved`."""
    judge = trainer.judge_config
    if judge is None or not judge.deployments:
        return trainer
    return trainer.model_copy(update={"judge": resolved(judge, f"{where or f'online.{trainer.scorer}'}.judge")})


def _urls(field: str, name: str, details: Mapping[str, Any]) -> list[str]:
    application = details["applications"].get(name)
    if application is None:
        there = ", ".join(details["applications"]) or "nothing"
        raise ConfigError(field, f"no scorer is deployed as {name!r}; there is {there}", DEPLOY)
    urls = addresses(application, details)
    if not urls:
        raise ConfigError(field, f"Ray Serve has no HTTP proxy to reach {name!r} through")
    return urls


def addresses(application: Mapping[str, Any], details: Mapping[str, Any]) -> list[str]:
    """One URL a proxy; one alone where they listen on loopback, which is reached from its own machine only."""
    options, prefix = details["http_options"], (application["route_prefix"] or "").rstrip("/")
    listens = f"{options['host']}:{options['port']}"
    hosts = [reachable(listens, proxy["node_ip"]) for proxy in details["proxies"].values()]
    return [f"http://{host}{prefix}" for host in dict.fromkeys(hosts)]


def serve_details(field: str) -> dict[str, Any]:
    """What Ray Serve says of itself: http_options, proxies, applications. Raises ConfigError when there is none."""
    import ray

    if not ray.is_initialized():
        raise ConfigError(field, "names of deployed scorers are known within a Ray cluster alone", "give URLs here")
    from ray.serve.context import _get_global_client

    client = _get_global_client(raise_if_no_controller_running=False)
    if client is None:
        raise ConfigError(field, "no scorer is deployed on this Ray cluster", f"{DEPLOY}, or join its cluster")
    details: dict[str, Any] = client.get_serve_details()
    return details

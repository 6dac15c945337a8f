"""Finds every mismatch of a configuration before the first image (law 10), by declarations and headers alone.

`check` needs no cluster and loads no model; built-in plug-ins are not imported, so no torch. `check_scorers_live` asks
reward servers given by URL; `check_deployed` those given by name, and `check_cluster` compares with the resources, of a
Ray cluster that this process has joined; `join_and_check` joins the one that is named.
Does not own: unknown keys and wrong types (contracts.config), the checks themselves (checks/).
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

from cluster.checks.aggregation import check_aggregation
from cluster.checks.declared import look_up
from cluster.checks.guards import check_guards
from cluster.checks.inputs import check_inputs, metadata_keys
from cluster.checks.jury import Asked, ask_servers, check_jury, check_metadata, check_names, reached
from cluster.checks.machines import check_machines, check_resources
from cluster.checks.method import check_method, method_warnings
from cluster.checks.online import check_online
from cluster.checks.previews import check_previews
from contracts.config import RunConfig
from contracts.errors import ConfigError, ConfigErrors


def check(config: RunConfig) -> list[ConfigError]:
    """Every mismatch, each with its fields and a way out; empty when the run can start."""
    declared = look_up(config)
    return [
        *declared.errors,
        *check_method(config, declared),
        *check_jury(config, declared),
        *check_aggregation(config, declared),
        *check_previews(config, declared),
        *check_metadata(config, declared, metadata_keys(config)),
        *check_names(config),
        *check_online(config),
        *check_guards(config, declared),
        *check_inputs(config, declared),
        *check_machines(config),
    ]


def check_evaluation(config: RunConfig) -> list[ConfigError]:
    """What keeps the held-out evaluation of a model from running here; how it would be trained is not looked at."""
    declared = look_up(config)
    return [
        *declared.errors,
        *check_jury(config, declared),
        *check_metadata(config, declared, metadata_keys(config)),
        *check_inputs(config, declared),
    ]


def warnings(config: RunConfig) -> list[str]:
    """What works but is worth a line before a long run."""
    return list(method_warnings(config, look_up(config)))


def check_cluster(config: RunConfig, resources: Mapping[str, float]) -> list[ConfigError]:
    """What a live cluster cannot give. resources: ray.cluster_resources()."""
    return list(check_resources(config, resources))


def check_deployed(config: RunConfig) -> Asked:
    """The same of scorers and judges named by their deployment, in a process that has joined their Ray cluster."""
    if not _names_deployments(config):
        return Asked([], {})
    from cluster.deployed.names import resolved, with_judge

    try:
        scorers = tuple(resolved(scorer) for scorer in config.scorers)
        online = tuple(with_judge(each, f"online.{index}") for index, each in enumerate(config.online))
    except ConfigError as error:
        return Asked([error], {})
    return asyncio.run(ask_servers(config.model_copy(update={"scorers": scorers, "online": online})))


def join_and_check(config: RunConfig) -> Asked:
    """What the cluster that the run is to join lacks, resources and deployed scorers; joins it where one is named."""
    from cluster.driver import cluster_address, start_ray

    if cluster_address(config) is None and not _names_deployments(config):
        return Asked([], {})
    try:
        joined = start_ray(config)
    except ConfigError as error:
        return Asked([error], {})
    import ray

    try:
        asked = check_deployed(config)
        return Asked([*check_cluster(config, ray.cluster_resources()), *asked.errors], asked.infos)
    finally:
        if joined:
            ray.shutdown()


def _names_deployments(config: RunConfig) -> bool:
    return any(each.scorer.deployments for each in reached(config))


async def check_scorers_live(config: RunConfig) -> Asked:
    """What running reward servers (given by URL) answer, and where that is not what the configuration expects."""
    return await ask_servers(config)


def refuse(errors: list[ConfigError]) -> None:
    """Raise ConfigErrors when there are any."""
    if errors:
        raise ConfigErrors(errors)

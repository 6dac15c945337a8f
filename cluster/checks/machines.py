"""Engine, devices, trackers and the resources of the cluster. Imports neither torch nor DeepSpeed."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

from cluster.checks.inputs import missing_package
from cluster.telemetry.rates import gpus_a_replica
from cluster.telemetry.sinks import missing_sink
from contracts.config import RunConfig
from contracts.errors import ConfigError


def check_machines(config: RunConfig) -> Iterator[ConfigError]:
    """What can be said of engine and devices before a cluster is joined."""
    yield from _deepspeed(config)
    yield from _precision(config)
    yield from _devices(config)
    yield from _broadcast(config)
    yield from _local_ray(config)
    for name in config.telemetry.sinks:
        error = missing_sink(name)
        if error is not None:
            yield error


def _deepspeed(config: RunConfig) -> Iterator[ConfigError]:
    if config.learner.engine != "deepspeed":
        return
    plain = "set learner.engine=plain"
    if missing_package("deepspeed"):
        yield ConfigError("learner.engine", "deepspeed is not installed", f"{plain}, or run make setup")
        return
    elsewhere = config.cluster.address or os.environ.get("RAY_ADDRESS")
    if config.learner.gpus_per_rank > 0 or elsewhere:
        return  # NCCL needs no extension; other machines cannot be looked at from here
    compiler = os.environ.get("CXX", "g++")  # needed even where torch has the extension cached: it checks the build
    missing = [tool for tool in (compiler, "ninja") if find_tool(tool) is None]
    if missing:
        yield ConfigError(
            "learner.engine", f"DeepSpeed compiles an extension on the CPU and {' and '.join(missing)} cannot be found",
            f"{plain} (the plain torch engine), or install it and run make setup",
        )  # fmt: skip


def find_tool(name: str) -> str | None:
    """A program on the path or beside the interpreter (ninja comes with the environment)."""
    return shutil.which(name) or shutil.which(name, path=str(Path(sys.executable).parent))


def _precision(config: RunConfig) -> Iterator[ConfigError]:
    learner = config.learner
    if learner.engine == "deepspeed" and config.model.dtype == "bf16" and learner.zero_stage == 0:
        yield ConfigError(
            "learner.zero_stage, model.dtype", "DeepSpeed's stage 0 in bf16 keeps no fp32 master weights: other losses",
            "set learner.zero_stage=1",
        )  # fmt: skip


def _devices(config: RunConfig) -> Iterator[ConfigError]:
    asked = {
        "rollout.gpus_per_actor": config.rollout.gpus_per_actor,
        "learner.gpus_per_rank": config.learner.gpus_per_rank,
    }
    for field, gpus in asked.items():
        if config.model.device == "cuda" and gpus == 0:
            yield ConfigError(f"{field}, model.device", "cuda is asked for, but Ray gives these processes no GPU",
                              f"set {field}=1 or a fraction")  # fmt: skip
        if config.model.device == "cpu" and gpus > 0:
            yield ConfigError(f"{field}, model.device", f"{gpus:g} GPUs would be held and not used",
                              f"set {field}=0 or model.device=auto")  # fmt: skip
    ranks = config.learner.gpus_per_rank
    if ranks > 1:
        yield ConfigError("learner.gpus_per_rank", "a rank uses one GPU", "set it to 1 and raise learner.ranks")
    if 0 < ranks < 1 and config.learner.ranks > 1:
        yield ConfigError("learner.gpus_per_rank", "ranks that share a GPU cannot use NCCL", "set it to 1")
    if config.rollout.gpus_per_actor > 1:
        yield ConfigError("rollout.gpus_per_actor", "an actor uses one GPU", "set it to 1 and raise rollout.actors")


def _broadcast(config: RunConfig) -> Iterator[ConfigError]:
    weights = config.weights
    if weights.transport != "collective" or weights.backend != "nccl":
        return
    if not config.learner.gpus_per_rank or not config.rollout.gpus_per_actor:
        yield ConfigError("weights.backend", "nccl moves weights between GPUs, and ranks or actors have none",
                          "set weights.backend=gloo")  # fmt: skip


def _local_ray(config: RunConfig) -> Iterator[ConfigError]:
    given = config.cluster.num_cpus
    if config.cluster.address is None and given is not None and given < wanted_cpus(config):
        yield ConfigError(
            "cluster.num_cpus", f"actors and ranks ask for {wanted_cpus(config):g} CPUs and a local Ray has {given}",
            "leave it out (Ray then has as many as are asked for), or lower cpus_per_actor or cpus_per_rank",
        )  # fmt: skip


def wanted_cpus(config: RunConfig) -> float:
    """CPUs that actors, ranks and online trainers reserve with Ray; every other process reserves none."""
    painting, learning = config.rollout, config.learner
    online = sum(each.cpus for each in config.online)
    return painting.actors * painting.cpus_per_actor + learning.ranks * learning.cpus_per_rank + online


def wanted_gpus(config: RunConfig) -> float:
    """GPUs that actors, ranks, online trainers and the reward servers the run starts reserve with Ray."""
    servers = sum(gpus_a_replica(scorer) for scorer in config.scorers if scorer.serve)
    return (
        config.rollout.actors * config.rollout.gpus_per_actor
        + config.learner.ranks * config.learner.gpus_per_rank
        + servers
        + sum(each.gpus for each in config.online)
    )


def check_resources(config: RunConfig, resources: Mapping[str, float]) -> Iterator[ConfigError]:
    """The plan against a live cluster. resources: as ray.cluster_resources() gives them."""
    for name, wanted in (("CPU", wanted_cpus(config)), ("GPU", wanted_gpus(config))):
        there = resources.get(name, 0.0)
        if wanted > there + 1e-6:
            kind = name.lower() + "s"
            yield ConfigError(
                f"rollout.actors, rollout.{kind}_per_actor, learner.ranks, learner.{kind}_per_rank",
                f"the run asks for {wanted:g} {name}s and the cluster has {there:g}",
                "lower one of them, or add nodes",
            )  # fmt: skip

"""How the driver has Ray start a controller, the first and every one that replaces it. No Ray is started."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cluster import driver
from contracts.config import RunConfig
from tests.laws.run_kit import tiny_config

NODE = "ab" * 28


class Asked(Exception):
    """The controller would have been started."""


class RecordedActor:
    """Stands where ControllerActor stands: keeps what its options were."""

    def __init__(self) -> None:
        self.given: dict[str, Any] = {}

    def options(self, **given: Any) -> RecordedActor:
        self.given = given
        return self

    def remote(self, *_: Any) -> Any:
        raise Asked


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    return tiny_config(tmp_path, tmp_path)


@pytest.fixture
def actor(monkeypatch: pytest.MonkeyPatch) -> RecordedActor:
    recorded = RecordedActor()
    monkeypatch.setattr("cluster.controller.ControllerActor", recorded)
    monkeypatch.setattr("ray.get_runtime_context", lambda: SimpleNamespace(get_node_id=lambda: NODE))
    return recorded


@pytest.mark.parametrize("resume", [False, True])
def test_a_controller_stays_on_its_drivers_node_unless_that_is_lost(
    config: RunConfig, actor: RecordedActor, resume: bool
) -> None:
    options, display = driver.controller_options(config), driver._display(config, show=False)
    with pytest.raises(Asked):
        driver._one_controller(config, resume, None, options, driver._Interrupts(), display)
    strategy = actor.given["scheduling_strategy"]
    assert (strategy.node_id, strategy.soft) == (NODE, True)
    assert actor.given["runtime_env"]["env_vars"] == driver.worker_environment(config)


@pytest.mark.usefixtures("actor")
def test_processes_that_inherit_the_environment_are_given_none(config: RunConfig) -> None:
    """Ray starts the interpreter of a process twice where there is a runtime_env."""
    assert "runtime_env" not in driver.controller_options(config, inherited=True)


def test_the_drivers_own_environment_is_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SALON_A", "old")
    monkeypatch.delenv("SALON_B", raising=False)
    with driver._environment({"SALON_A": "new", "SALON_B": "new"}):
        assert (os.environ["SALON_A"], os.environ["SALON_B"]) == ("new", "new")
    assert os.environ["SALON_A"] == "old"
    assert "SALON_B" not in os.environ

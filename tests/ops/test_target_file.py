"""The file that tells Prometheus where a run's processes are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cluster.telemetry.targets import TargetFile, reachable, role_of, targets_folder
from contracts.config import RunConfig
from contracts.config.load import config_from_tree


def run_config(folder: Path | str, **telemetry: Any) -> RunConfig:
    return config_from_tree(
        {
            "name": "seen", "runs_dir": str(folder), "model": {"path": "m"}, "objective": {"name": "grpo"},
            "stop": {"steps": 1}, "scorers": [{"name": "a", "serve": "jpeg_size"}], "telemetry": telemetry,
        }
    )  # fmt: skip


def labels_by_target(file: TargetFile) -> dict[str, dict[str, str]]:
    return {group["targets"][0]: group["labels"] for group in json.loads(file.path.read_text())}


def test_processes_and_reward_servers_with_their_labels(tmp_path: Path) -> None:
    file = TargetFile(run_config(tmp_path))
    processes = [
        {"name": "controller", "metrics": "10.0.0.1:9400"},
        {"name": "actor-0", "metrics": "10.0.0.2:4001"},
        {"name": "vault-0", "metrics": "10.0.0.1:4002"},
        {"name": "silent", "metrics": None},
    ]
    servers = {"a": ["http://10.0.0.3:8000", "https://jury.lab/clip/"], "inside": []}
    assert file.write(processes, servers)
    assert file.path == tmp_path / ".prometheus" / "seen.json"
    assert labels_by_target(file) == {
        "10.0.0.1:9400": {"run": "seen", "role": "controller", "process": "controller"},
        "10.0.0.2:4001": {"run": "seen", "role": "actor", "process": "actor-0"},
        "10.0.0.1:4002": {"run": "seen", "role": "vault", "process": "vault-0"},
        "10.0.0.3:8000": {"run": "seen", "role": "reward_server", "process": "reward-a", "scorer": "a"},
        "jury.lab:443": {
            "run": "seen", "role": "reward_server", "process": "reward-a", "scorer": "a", "__scheme__": "https",
            "__metrics_path__": "/clip/metrics",
        },
    }  # fmt: skip


def test_it_is_written_when_something_changed_and_removed_at_the_end(tmp_path: Path) -> None:
    file = TargetFile(run_config(tmp_path))
    before = [{"name": "actor-0", "metrics": "127.0.0.1:1"}]
    assert file.write(before, {})
    assert not file.write(before, {})
    assert file.write([{"name": "actor-0", "metrics": "127.0.0.1:2"}], {}), "an actor that came back elsewhere"
    assert list(labels_by_target(file)) == ["127.0.0.1:2"]
    assert [path.name for path in file.path.parent.iterdir()] == ["seen.json"], "nothing half-written is left"
    file.remove()
    assert not file.path.exists()
    file.remove()


def test_where_it_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert targets_folder(run_config("runs")) == tmp_path / "runs" / ".prometheus"
    assert targets_folder(run_config("memory://bucket/runs")) == tmp_path / "runs" / ".prometheus"
    assert targets_folder(run_config("runs", file_sd="/etc/prometheus/targets")) == Path("/etc/prometheus/targets")


@pytest.mark.parametrize(
    ("address", "expected"),
    [("127.0.0.1:5", "127.0.0.1:5"), ("0.0.0.0:5", "10.1.2.3:5"), ("[::]:5", "10.1.2.3:5"), ("::1:5", "::1:5")],
)
def test_whoever_listens_everywhere_is_found_at_the_nodes_address(address: str, expected: str) -> None:
    assert reachable(address, "10.1.2.3") == expected


@pytest.mark.parametrize(
    ("process", "role"),
    [
        ("actor-12", "actor"),
        ("host-copy-0", "host-copy"),
        ("dispatcher", "dispatcher"),
        ("controller", "controller"),
        ("online-taste-2", "online"),
    ],
)
def test_the_role_is_in_the_name(process: str, role: str) -> None:
    assert role_of(process) == role

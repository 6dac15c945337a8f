"""Law 9: one catalogue of metrics, one prefix, base units; nothing else names or exports a series."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from cluster.telemetry import Telemetry
from contracts.config.load import config_from_tree
from contracts.metrics import BY_NAME, CATALOGUE, Metric

SUFFIXES = ("_bucket", "_sum", "_count")  # what a histogram's samples add to its name
SCANNED = (".py", ".yaml", ".yml", ".json", ".md", ".html")
NAME = re.compile(r"\bsalon_[a-z0-9_]*[a-z0-9]\b")


def by_role(role: str) -> set[str]:
    return {metric.name for metric in CATALOGUE if metric.role == role}


def series_of(exposition: str) -> set[str]:
    names = {sample.name for family in text_string_to_metric_families(exposition) for sample in family.samples}
    names |= {line.split()[2] for line in exposition.splitlines() if line.startswith("# TYPE")}
    return names


def of_catalogue(name: str) -> bool:
    bases = [name, *(name.removesuffix(suffix) for suffix in SUFFIXES if name.endswith(suffix))]
    return any(base in BY_NAME and (base == name or BY_NAME[base].type == "histogram") for base in bases)


def test_names_are_unique_prefixed_and_in_base_units() -> None:
    assert len(BY_NAME) == len(CATALOGUE)
    for metric in CATALOGUE:
        assert NAME.fullmatch(metric.name), metric.name
        assert (metric.type == "counter") == metric.name.endswith("_total"), metric.name
        assert not re.search(r"_(ms|millis|minutes|hours|mb|kb|gb|percent)(_|$)", metric.name), metric.name
        assert metric.help.endswith("."), metric.name
        assert (metric.type == "histogram") == bool(metric.buckets), metric.name
        assert list(metric.buckets) == sorted(set(metric.buckets)), metric.name
        first = {"controller": ("run",), "process": ()}.get(metric.role, ("scorer",))
        assert metric.labels[:1] == first, metric.name


def tracked_files(root: Path) -> list[Path]:
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=root, capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    files = [root / name for name in listed.stdout.splitlines() if name.endswith(SCANNED)]
    assert len(files) > 50
    return [path for path in files if path.exists() and path != Path(__file__)]


def test_nothing_in_the_tree_names_another_series(repo_root: Path) -> None:
    unknown = {
        f"{path.relative_to(repo_root)}: {name}"
        for path in tracked_files(repo_root)
        for name in NAME.findall(path.read_text(encoding="utf-8"))
        if not of_catalogue(name)
    }
    assert not unknown


def test_only_the_two_exporters_register_series(repo_root: Path) -> None:
    exporters = ("cluster/telemetry/", "reward_servers/telemetry.py", "tests/", "benchmarks/")
    others = [
        name
        for path in tracked_files(repo_root)
        if path.suffix == ".py" and not (name := path.relative_to(repo_root).as_posix()).startswith(exporters)
        if re.search(
            r"^\s*(from|import) (prometheus_client\b(?!\.parser)|ray\.util\.metrics|opentelemetry)",
            path.read_text(),
            re.M,
        )
    ]
    assert not others


@pytest.fixture
def telemetry(tmp_path: Path):
    config = config_from_tree(
        {
            "name": "law9", "model": {"path": "m"}, "objective": {"name": "grpo"}, "stop": {"steps": 1},
            "scorers": [{"name": "a", "serve": "jpeg_size"}], "telemetry": {"tensorboard": False},
        }
    )  # fmt: skip
    made = Telemetry(config, tmp_path, serve=False)
    yield made
    made.close()


def touch(telemetry: Telemetry, metric: Metric) -> None:
    labels = {label: "x" for label in metric.labels if label != "run"}
    call = {"counter": telemetry.count, "gauge": telemetry.gauge, "histogram": telemetry.observe}[metric.type]
    call(metric.name, 1.0, **labels)


def test_the_controller_exports_its_part_of_the_catalogue_and_nothing_else(telemetry: Telemetry) -> None:
    from prometheus_client import generate_latest

    for metric in CATALOGUE:
        if metric.role == "controller":
            touch(telemetry, metric)
    names = series_of(generate_latest(telemetry.registry).decode())
    assert all(of_catalogue(name) for name in names), sorted(name for name in names if not of_catalogue(name))
    assert by_role("controller") <= names
    assert not by_role("reward_server") & names


def test_a_series_that_is_not_the_controllers_cannot_be_exported(telemetry: Telemetry) -> None:
    with pytest.raises(ValueError, match="add it there first"):
        telemetry.gauge("salon_" + "moonphase", 1.0)
    with pytest.raises(ValueError, match="add it there first"):
        telemetry.gauge("salon_reward_ready", 1.0)
    with pytest.raises(ValueError, match="is a gauge, not a counter"):
        telemetry.count("salon_step")
    with pytest.raises(ValueError, match="label"):
        telemetry.gauge("salon_step", 1.0, planet="mars")


def test_a_row_of_metrics_jsonl_has_no_key_of_its_own(telemetry: Telemetry) -> None:
    for metric in CATALOGUE:
        if metric.role == "controller":
            touch(telemetry, metric)
    known = {metric.name.removeprefix("salon_") for metric in CATALOGUE if metric.role == "controller"}
    assert {key.split("/")[0] for key in telemetry.snapshot()} == known


REWARD_SERVER = """
import numpy as np
from contracts.scores import point_table
from reward_servers.telemetry import Telemetry
telemetry = Telemetry("x")
telemetry.request(200, 0.1)
telemetry.answered(point_table("x", "1", ["score"], np.ones(2)))
telemetry.scored(2, 0.1)
telemetry.watch(lambda: 0.0, 8, lambda: True)
print(telemetry.exposition().decode())
"""


def test_a_reward_server_exports_its_part_of_the_catalogue_and_nothing_else(repo_root: Path) -> None:
    """In a process of its own: what the controller's module switches in prometheus_client must not help it."""
    done = subprocess.run(
        [sys.executable, "-c", REWARD_SERVER], cwd=repo_root, capture_output=True, text=True, check=True, timeout=120
    )
    names = series_of(done.stdout)
    assert all(of_catalogue(name) for name in names), sorted(name for name in names if not of_catalogue(name))
    assert by_role("reward_server") <= names

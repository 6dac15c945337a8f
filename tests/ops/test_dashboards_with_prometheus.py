"""A real Prometheus finds every process of a real run by itself, and every panel of the dashboards has data of it.

One short run on the miniature model, scraped every second; every expression is asked for over the time it took. Its
jury has what the dashboards show: a plain scorer, one that learns beside the run, and one that asks a judge.
"""

from __future__ import annotations

import math
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from cluster.deploy import check, tools
from cluster.deploy.grafana.dashboards import BOARDS
from cluster.telemetry.targets import targets_folder
from contracts.config import RunConfig
from tests.cluster.online_parts import build_dino
from tests.laws.run_kit import run_on_cluster, tiny_config
from tests.reward_servers.judge_helpers import judging, leans, pictures_of
from tests.reward_servers.online_kit import flat, write_references

ROLES = {"controller", "vault", "dispatcher", "actor", "learner", "host", "reward_server", "online"}


@dataclass
class Prometheus:
    """A server of the test's own, and the span of the run it watched."""

    url: str
    began: float
    ended: float = 0.0
    listed: set[str] = field(default_factory=set)  # target files seen while the run went on
    summary: dict[str, Any] = field(default_factory=dict)

    def values(self, expr: str) -> list[tuple[dict[str, str], list[float]]]:
        """(labels, finite values) of each series over the run."""
        span = {"start": self.began, "end": self.ended, "step": 1}
        answer = httpx.get(f"{self.url}/api/v1/query_range", params={"query": expr, **span}, timeout=60).json()
        assert answer["status"] == "success", (expr, answer)
        found = [(each["metric"], [float(value) for _, value in each["values"]]) for each in answer["data"]["result"]]
        return [(labels, finite) for labels, values in found if (finite := [v for v in values if math.isfinite(v)])]


def run_config(model: Path, folder: Path, judge: str) -> RunConfig:
    asking = {"urls": [judge], "model": "judge", "hedge_quantile": None}
    scorers = [
        {"name": "colour", "serve": "colourfulness"},
        {"name": "real", "serve": "adversarial_dino", "options": build_dino(folder / "dino")},
        {"name": "asked", "serve": "vqascore", "options": asking, "held_out": True},
    ]
    references = write_references(folder / "references", flat((200, 40, 40)))
    online = [{"name": "adversarial_dino", "scorer": "real", "references": references, "per_prompt": False}]
    return tiny_config(
        model, folder / "runs", name="watched", scorers=scorers, online=online, objective__kl_beta=0.01,
        pipeline__max_staleness=1, eval__before=True, stop__steps=60,
    )  # fmt: skip


def says_yes(body: dict[str, Any]) -> dict[str, Any]:
    """A judge that likes bright pictures."""
    share = min(max(float(pictures_of(body)[0].mean()) / 255, 0.01), 0.99)
    return leans({"yes": share, "no": 1 - share}, body)


def write_prometheus_config(folder: Path, targets: Path) -> Path:
    """The committed configuration with the run's folder, and a second in place of its intervals."""
    config = yaml.safe_load((check.PROMETHEUS / "prometheus.yml").read_text())
    config["global"] = {"scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "1s"}
    config["rule_files"] = [str(check.PROMETHEUS / "rules/*.yml")]
    job = config["scrape_configs"][0]
    job["file_sd_configs"] = [{"files": [str(targets / "*.json")], "refresh_interval": "1s"}]
    path = folder / "prometheus.yml"
    path.write_text(yaml.safe_dump(config))
    return path


def free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_ready(url: str, process: subprocess.Popen[bytes]) -> None:
    while True:
        assert process.poll() is None, "prometheus ended"
        try:
            if httpx.get(f"{url}/-/ready", timeout=5).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.2)


def watch(folder: Path, seen: set[str], ended: threading.Event) -> None:
    while not ended.wait(0.5):
        seen |= {path.name for path in folder.glob("*.json")}


@pytest.fixture(scope="module")
def watched(
    shared_ray: None, tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Prometheus]:
    try:
        program = tools.find("prometheus")
    except tools.MissingTool as error:
        pytest.skip(str(error))
    folder = tmp_path_factory.mktemp("watched")
    with judging(says_yes) as judge:
        yield from watch_a_run(program, run_config(tiny_model_folder, folder, judge.url), folder)


def watch_a_run(program: str, config: RunConfig, folder: Path) -> Iterator[Prometheus]:
    """The Prometheus that has watched the run from its beginning to its end."""
    path, port = write_prometheus_config(folder, targets_folder(config)), free_port()
    targets_folder(config).mkdir(parents=True)
    storage, address = f"--storage.tsdb.path={folder / 'tsdb'}", f"--web.listen-address=127.0.0.1:{port}"
    with (folder / "prometheus.log").open("wb") as log:
        process = subprocess.Popen([program, f"--config.file={path}", storage, address], stdout=log, stderr=log)
    prometheus, ended = Prometheus(f"http://127.0.0.1:{port}", time.time()), threading.Event()
    watcher = threading.Thread(target=watch, args=(targets_folder(config), prometheus.listed, ended))
    try:
        wait_ready(prometheus.url, process)
        watcher.start()
        prometheus.summary = run_on_cluster(config)
        prometheus.ended = time.time()
        assert not list(targets_folder(config).glob("*")), "a run that has ended is no target"
        yield prometheus
    finally:
        ended.set()
        process.terminate()
        process.wait(30)


def test_prometheus_finds_every_process_by_the_file_of_the_run(watched: Prometheus) -> None:
    assert watched.summary["outcome"] == "finished"
    assert watched.listed == {"watched.json"}
    up = {labels["role"] for labels, values in watched.values('up{job="salon", run="watched"}') if max(values) == 1}
    assert up == ROLES
    memory = watched.values("salon_process_resident_memory_bytes")
    assert {labels["role"] for labels, _ in memory} == ROLES, "each process tells its own memory"
    assert all(min(values) > 1e6 for _, values in memory)


@pytest.mark.parametrize("title", [panel.title for board in BOARDS for panel in board.panels])
def test_a_panel_has_data(title: str, watched: Prometheus) -> None:
    panel = next(panel for board in BOARDS for panel in board.panels if panel.title == title)
    for query in panel.queries:
        found = watched.values(tools.expanded(query.expr))
        assert found, query.expr


def test_the_bottleneck_table_has_its_two_lines(watched: Prometheus) -> None:
    panel = next(panel for board in BOARDS for panel in board.panels if panel.title == "Bottleneck")
    found = [row for query in panel.queries for row in watched.values(tools.expanded(query.expr))]
    assert len(found) == 2
    for labels, shares in found:
        assert labels.keys() >= {"run", "waiting", "scale"}
        assert all(0 <= share <= 1 for share in shares)


def test_a_healthy_run_raises_no_alert(watched: Prometheus) -> None:
    assert watched.values('ALERTS{alertstate="firing"}') == []


def test_a_run_counts_all_its_slots(watched: Prometheus) -> None:
    """An actor, a rank, three reward servers, a trainer and a judge on a machine without a GPU: seven slots (law 8)."""
    ((_, values),) = watched.values("run:salon_accelerators:sum")
    assert set(values) == {7.0}


def test_a_scorer_has_one_name_in_the_series_of_its_server_and_of_the_run(watched: Prometheus) -> None:
    """That of the configuration, whatever the scorer is called in the registry: so one `$scorer` picks all of it."""
    names = {"colour", "real", "asked"}
    for series in ("salon_reward_ready", "salon_reward_batch_images_count", "salon_score_outcomes_total"):
        assert {labels["scorer"] for labels, _ in watched.values(series)} == names, series
    ((labels, _),) = watched.values("salon_online_version")
    assert labels["scorer"] == "real"

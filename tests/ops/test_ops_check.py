"""What is deployed is valid: rules and their unit tests, dashboards, images, compose file, manifests.

The same checks as `make ops-check`; here those that need an outside program are skipped when it is absent.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from cluster.deploy import check, tools
from cluster.deploy.grafana import dashboards, generate
from contracts.metrics import BY_NAME

SUFFIXES = ("_bucket", "_sum", "_count")


def problems(one: Callable[[], Iterator[str]]) -> list[str]:
    try:
        return list(one())
    except tools.MissingTool as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("one", check.CHECKS, ids=lambda one: one.__name__)
def test_nothing_is_wrong(one: Callable[[], Iterator[str]]) -> None:
    assert problems(one) == []


def test_every_alert_is_unit_tested_both_ways() -> None:
    """That promtool passes them is `rules` above; here that no alert was left out, silent or firing."""
    rules = yaml.safe_load((check.PROMETHEUS / "rules/alerts.yml").read_text())
    alerts = {rule["alert"] for group in rules["groups"] for rule in group["rules"]}
    cases = [
        case
        for path in (check.PROMETHEUS / "tests").glob("*.yml")
        for test in yaml.safe_load(path.read_text())["tests"]
        for case in test.get("alert_rule_test", [])
    ]
    assert {case["alertname"] for case in cases if case["exp_alerts"]} == alerts
    assert {case["alertname"] for case in cases if not case["exp_alerts"]} == alerts


def test_the_dashboards_have_the_panels_they_are_for() -> None:
    titles = {board.title: [panel.title for panel in board.panels] for board in dashboards.BOARDS}
    assert list(titles) == ["Salon: Run", "Salon: Throughput", "Salon: Jury"]
    for title, words in (
        ("Salon: Run", ("held-out", "KL", "Clip fraction", "Effective sample size")),
        ("Salon: Throughput", ("per GPU, all GPUs", "Learner: share", "Actors: share", "capacity", "Staleness",
                               "Weight sync", "Bottleneck")),
        ("Salon: Jury", ("Latency", "Outcomes", "Queue", "Batch size", "Replicas", "Cache hits", "versions and updates",
                         "copies of groups", "how well")),
    ):  # fmt: skip
        for word in words:
            assert any(word in panel for panel in titles[title]), (title, word)


def test_every_series_of_rules_and_dashboards_is_in_the_catalogue() -> None:
    texts = [*check.expressions(), *(path.read_text() for path in (check.PROMETHEUS / "rules").glob("*.yml"))]
    names = {name for text in texts for name in re.findall(r"\bsalon_[a-z0-9_]+", text)}
    assert len(names) > 25
    for name in names:
        bases = [name, *(name.removesuffix(suffix) for suffix in SUFFIXES if name.endswith(suffix))]
        assert any(base in BY_NAME for base in bases), name


def test_every_recorded_series_that_is_asked_for_is_recorded() -> None:
    recording = yaml.safe_load((check.PROMETHEUS / "rules/recording.yml").read_text())
    recorded = {rule["record"] for group in recording["groups"] for rule in group["rules"]}
    texts = [*check.expressions(), (check.PROMETHEUS / "rules/alerts.yml").read_text()]
    asked = {name for text in texts for name in re.findall(r"\brun\w*:salon_\w+:\w+", text)}
    assert asked
    assert asked <= recorded


def test_a_changed_dashboard_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generate, "FOLDER", tmp_path)
    assert generate.main([]) == 0
    assert generate.main(["--check"]) == 0
    board = json.loads((tmp_path / "salon-run.json").read_text())
    board["panels"][0]["title"] = "by hand"
    (tmp_path / "salon-run.json").write_text(json.dumps(board))
    (tmp_path / "another.json").write_text("{}")
    assert generate.differing() == ["another.json", "salon-run.json"]
    assert generate.main(["--check"]) == 1


def test_an_expression_that_is_none_is_refused() -> None:
    try:
        assert tools.parse_problem(["sum(rate(up[1m]))"]) == ""
        assert "parse error" in tools.parse_problem(["sum(rate(up[1m])"])
    except tools.MissingTool as error:
        pytest.skip(str(error))


FAULTS = {
    "FROM python:latest\n": "not pinned",
    "FROM python:3.11.13-slim-bookworm\nENV API_TOKEN=abc\n": "secret",
    "FROM python:3.11.13-slim-bookworm\nRUN pip install ray\n": "--require-hashes",
    "FROM python:3.11.13-slim-bookworm\nUSER root\n": "USER 1000:1000",
}


@pytest.mark.parametrize(("text", "found"), FAULTS.items(), ids=FAULTS.values())
def test_faults_of_an_image_are_found(text: str, found: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "DOCKER", tmp_path)
    monkeypatch.setattr(check, "ROOT", tmp_path)
    monkeypatch.setattr(tools, "run", lambda *command: "")
    (tmp_path / "bad.Dockerfile").write_text(text)
    assert any(found in problem for problem in problems(check.dockerfiles))


def test_faults_of_the_compose_file_are_found() -> None:
    spec = yaml.safe_load((check.DOCKER / "compose.yaml").read_text())
    grafana = spec["services"]["grafana"]
    assert list(check.service_problems(grafana, spec)) == []
    grafana |= {"image": "grafana/grafana", "ports": ["3000:3000"], "depends_on": ["nobody"]}
    grafana["environment"]["GF_SECURITY_ADMIN_PASSWORD"] = "admin"
    grafana["volumes"].append("./nowhere:/x")
    found = " ".join(check.service_problems(grafana, spec))
    for word in ("not pinned", "open to other machines", "no service", "take it from the environment", "nowhere"):
        assert word in found


def test_compose_trains_a_run_that_exists(repo_root: Path) -> None:
    """The command line of the compose file is a valid run."""
    from contracts.config.load import load_config

    command = yaml.safe_load((check.DOCKER / "compose.yaml").read_text())["services"]["train"]["command"]
    assert command[0] == "train"
    config = load_config(repo_root / command[1], command[2:])
    assert config.scorers[0].urls == ("http://reward:8000",)
    assert config.telemetry.metrics_host == "0.0.0.0"


def test_health_of_a_container(tmp_path: Path, repo_root: Path) -> None:
    """`run` asks the newest run's controller; an address that nobody listens on is unhealthy."""
    from prometheus_client import CollectorRegistry, start_http_server

    def status(*arguments: str) -> int:
        return subprocess.run([sys.executable, repo_root / "docker/healthcheck.py", *arguments]).returncode

    assert status("run", str(tmp_path)) == 1
    server, thread = start_http_server(0, addr="127.0.0.1", registry=CollectorRegistry())
    (tmp_path / "a").mkdir()
    (tmp_path / "a/metrics_address").write_text(f"http://0.0.0.0:{server.server_port}/metrics\n")
    assert status("run", str(tmp_path)) == 0
    assert status("url", f"http://127.0.0.1:{server.server_port}/metrics") == 0
    server.shutdown()
    server.server_close()
    thread.join()
    assert status("run", str(tmp_path)) == 1
    assert status("url", "file:///etc/hostname") == 1


def test_the_command_fails_without_its_tools(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    def absent(name: str) -> str:
        raise tools.MissingTool(f"{name} is not here: `make ops-tools` brings it")

    monkeypatch.setattr(tools, "find", absent)
    monkeypatch.setattr(check, "CHECKS", (check.rules,))
    assert check.main() == 1
    assert "promtool is not here: `make ops-tools` brings it" in capsys.readouterr().out


APT = """
case "$*" in *download*) ;; *) exit 0 ;; esac
echo "apt-get $*" >>"$CALLS"
[[ $APT_WORKS == yes ]] || { echo "E: Unable to locate package prometheus"; exit 100; }
touch prometheus_1.deb
"""
DPKG = """
mkdir -p "$3/usr/bin"
printf '#!/bin/sh\\n' >"$3/usr/bin/promtool"
chmod +x "$3/usr/bin/promtool"
"""


@pytest.fixture
def fetch(tmp_path: Path, repo_root: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """fetch_tools.sh in a repository of its own, with an apt-get and a dpkg-deb of the test's own."""
    (tmp_path / "cluster/deploy").mkdir(parents=True)
    (tmp_path / "bin").mkdir()
    script = shutil.copy(repo_root / "cluster/deploy/fetch_tools.sh", tmp_path / "cluster/deploy")
    for name, text in {"apt-get": APT, "dpkg-deb": DPKG}.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/bash\n{text}")
        (tmp_path / "bin" / name).chmod(0o755)

    def run(works: str = "yes") -> subprocess.CompletedProcess[str]:
        own = {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "APT_WORKS": works, "CALLS": str(tmp_path / "calls"),
               "TMPDIR": str(tmp_path)}  # fmt: skip
        return subprocess.run([script], capture_output=True, text=True, env={**os.environ, **own})

    return run


def test_tools_are_fetched_once(fetch: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path) -> None:
    assert [fetch().returncode, fetch().returncode] == [0, 0]
    assert (tmp_path / ".venv/ops/usr/bin/promtool").exists()
    assert len((tmp_path / "calls").read_text().splitlines()) == 1, "the second call fetches nothing"
    assert not list(tmp_path.glob("tmp.*"))


def test_tools_that_cannot_be_fetched_are_told_in_one_line(
    fetch: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    done = fetch(works="no")
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "(E: Unable to locate package prometheus): tests that need them are skipped" in done.stderr
    assert len((tmp_path / "calls").read_text().splitlines()) == 2, "with the lists there are, then with its own"
    assert not (tmp_path / ".venv").exists()
    assert fetch().returncode == 0, "and it is tried again"


DIGEST = "sha256:" + "0123456789abcdef" * 4


def pin(folder: Path, docker: str) -> subprocess.CompletedProcess[str]:
    """pin_digests.sh on a copy of docker/, with a docker of the test's own."""
    (folder / "bin").mkdir()
    (folder / "bin/docker").write_text(f"#!/bin/sh\n{docker}\n")
    (folder / "bin/docker").chmod(0o755)
    shutil.copytree(check.DOCKER, folder / "docker")
    path = f"{folder / 'bin'}:{os.environ['PATH']}"
    script = folder / "docker/pin_digests.sh"
    return subprocess.run([script], capture_output=True, text=True, env={**os.environ, "PATH": path})


def test_digests_are_pinned_where_a_registry_answers(tmp_path: Path) -> None:
    done = pin(tmp_path, f"echo {DIGEST}")
    assert done.returncode == 0, done.stderr
    bases = [
        base
        for path in (tmp_path / "docker").glob("*.Dockerfile")
        for base in re.findall(r"^FROM (\S+)", path.read_text(), re.MULTILINE)
    ]
    services = yaml.safe_load((tmp_path / "docker/compose.yaml").read_text())["services"]
    images = [*bases, services["prometheus"]["image"], services["grafana"]["image"]]
    assert len(bases) == 6
    assert all(image.endswith(f"@{DIGEST}") and check.PINNED.match(image) for image in images), images
    assert services["train"]["image"] == "salon-train:local", "what is built here has no digest yet"


@pytest.mark.parametrize("docker", ["exit 1", "echo not-a-digest"])
def test_no_digest_is_invented(docker: str, tmp_path: Path) -> None:
    done = pin(tmp_path, docker)
    assert done.returncode == 1
    assert "Nothing was changed" in done.stderr
    for path in check.DOCKER.glob("*.Dockerfile"):
        assert (tmp_path / "docker" / path.name).read_text() == path.read_text()

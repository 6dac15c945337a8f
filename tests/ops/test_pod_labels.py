"""Kubernetes' manifests and a run's file_sd file give series the same labels, and the Jury dashboard finds them."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.deploy import check
from cluster.deploy.grafana import dashboards
from cluster.deploy.labels import label_problems, relabelled, target_labels
from cluster.deploy.scorer import Wanted, documents
from cluster.telemetry.targets import TargetFile
from contracts.config.load import config_from_tree

K8S = check.DEPLOY / "k8s"
SERVERS_SERIES = re.compile(r"salon_(?:reward_(?!mean|std)|judge_)\w+\{([^}]*)\}|up\{([^}]*)\}")


def monitor(name: str) -> dict[str, Any]:
    found = yaml.safe_load_all((K8S / "podmonitors.yaml").read_text())
    return next(each for each in found if each["metadata"]["name"] == name)


def pods(*texts: str) -> list[tuple[dict[str, str], dict[str, Any]]]:
    return [pod for text in texts for document in yaml.safe_load_all(text) for pod in check._pods(document)]


def target_file(folder: Path) -> list[dict[str, Any]]:
    """What the example's run writes for itself: its controller, and the server of its scorer."""
    config = config_from_tree(
        {
            "name": "playground", "runs_dir": str(folder), "model": {"path": "m"}, "objective": {"name": "grpo"},
            "stop": {"steps": 1}, "scorers": [{"name": "playground", "urls": ["http://a:1"]}],
        }
    )  # fmt: skip
    file = TargetFile(config)
    file.write([{"name": "controller", "metrics": "b:1"}], {"playground": ["http://a:1"]})
    return json.loads(file.path.read_text())


@pytest.mark.parametrize(("name", "file"), [("salon-reward", "reward.yaml"), ("salon-controller", "train.yaml")])
def test_a_pod_has_the_labels_that_a_runs_own_file_gives(name: str, file: str, tmp_path: Path) -> None:
    found, spec = pods((K8S / file).read_text()), monitor(name)["spec"]
    chosen = [labels for labels, _ in found if check.selects(spec["selector"], labels)]
    (given,) = [target_labels(spec["podMetricsEndpoints"][0], labels) for labels in chosen]
    role = "reward_server" if name == "salon-reward" else "controller"
    (wanted,) = [each["labels"] for each in target_file(tmp_path) if each["labels"]["role"] == role]
    assert given == wanted


def test_a_scorer_is_called_as_the_run_calls_it_however_prometheus_found_it() -> None:
    """The server says `playground_verifier` of itself, and honoured labels win over the target's."""
    configs = [check.PROMETHEUS / "prometheus.yml", check.DOCKER / "compose.prometheus.yml"]
    by_file = [yaml.safe_load(path.read_text())["scrape_configs"][0] for path in configs]
    (by_pod,) = monitor("salon-reward")["spec"]["podMetricsEndpoints"]
    assert by_file[0]["metric_relabel_configs"] == by_file[1]["metric_relabel_configs"]
    assert all(each["honor_labels"] for each in by_file)
    assert by_pod["honorLabels"]
    ((labels, _),) = pods((K8S / "reward.yaml").read_text())
    series = {**target_labels(by_pod, labels), "scorer": "playground_verifier"}
    assert relabelled(by_pod["metricRelabelings"], series)["scorer"] == "playground"
    assert list(label_problems(monitor("salon-reward"), [(labels, {})])) == []


def without_rules(endpoint: dict[str, Any]) -> None:
    del endpoint["metricRelabelings"]


def without_run(endpoint: dict[str, Any]) -> None:
    endpoint["relabelings"] = [rule for rule in endpoint["relabelings"] if rule["targetLabel"] != "run"]


def without_honour(endpoint: dict[str, Any]) -> None:
    del endpoint["honorLabels"]


@pytest.mark.parametrize(
    ("name", "breaks", "problem"),
    [
        ("salon-reward", without_rules, "its own name"), ("salon-controller", without_run, "no label run"),
        ("salon-reward", without_honour, "honorLabels"),
    ],
)  # fmt: skip
def test_labels_that_differ_are_found(name: str, breaks: Any, problem: str) -> None:
    broken = copy.deepcopy(monitor(name))
    breaks(broken["spec"]["podMetricsEndpoints"][0])
    everything = pods(*((K8S / file).read_text() for file in ("reward.yaml", "train.yaml")))
    assert list(label_problems(monitor(name), everything)) == []
    assert any(problem in each for each in label_problems(broken, everything))


def test_a_scorers_pods_name_their_run_where_they_have_one_and_never_in_a_selector() -> None:
    of_one, of_several = (documents(Wanted("pickscore", "taste", run))[0]["spec"] for run in ("lamps", None))
    assert of_one["template"]["metadata"]["labels"]["salon/run"] == "lamps"
    assert "salon/run" not in of_several["template"]["metadata"]["labels"]
    assert of_one["selector"] == of_several["selector"], "it can never be changed"
    endpoint = monitor("salon-reward")["spec"]["podMetricsEndpoints"][0]
    given = target_labels(endpoint, of_several["template"]["metadata"]["labels"])
    assert given == {"role": "reward_server", "process": "reward-taste", "scorer": "taste"}


@pytest.mark.parametrize("chosen", ["a", "(a|b)", ".*"], ids=["one run", "two runs", "all runs"])
def test_the_jury_is_shown_whether_it_serves_one_run_or_several(chosen: str) -> None:
    """Of series that servers export; those of the controller always name their run."""
    expressions = [query.expr for panel in dashboards.JURY.panels for query in panel.queries]
    matched = [one or other for expr in expressions for one, other in SERVERS_SERIES.findall(expr)]
    assert len(matched) >= 10
    for matchers in matched:
        (run,) = re.findall(r'run=~"([^"]*)"', matchers)
        pattern = re.compile(run.replace("$run", chosen))
        assert pattern.fullmatch("a"), matchers
        assert pattern.fullmatch(""), f"a server of several runs is left out: {matchers}"
        assert bool(pattern.fullmatch("c")) == (chosen == ".*"), f"another run's server is shown: {matchers}"


def test_the_jury_lists_the_scorers_of_the_chosen_runs() -> None:
    """`All` of them is their list, as a server that names no run is chosen by its scorer alone."""
    board = json.loads((check.DEPLOY / "grafana/dashboards/salon-jury.json").read_text())
    variables = {each["name"]: each for each in board["templating"]["list"]}
    assert list(variables) == ["run", "scorer"], "the second depends on the first"
    assert variables["scorer"]["query"]["query"] == 'label_values(salon_scorer_held_out{run=~"$run"}, scorer)'
    assert "allValue" not in variables["scorer"]
    assert variables["run"]["allValue"] == ".*"

"""Which labels a PodMonitor gives a pod's series: those of a run's file_sd file, which dashboards and rules ask for.

Owns Prometheus' relabelling as far as the manifests use it (replace), and its comparison with prometheus.yml.
Does not own: the labels (cluster/telemetry/targets.py), the other checks of manifests (check.py).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import yaml

from cluster.deploy.tools import ROOT

Rules = Sequence[Mapping[str, Any]]
Pod = tuple[dict[str, str], dict[str, Any]]  # labels, spec

NEEDED = {"controller": {"run", "role", "process"}, "reward_server": {"role", "process", "scorer"}}
"""By role. A reward server that serves several runs is of none."""


def label_problems(document: Mapping[str, Any], pods: Sequence[Pod]) -> Iterator[str]:
    """What is wrong with the labels that a PodMonitor gives; nothing for Ray's own series, which have no role."""
    if document["kind"] != "PodMonitor":
        return
    ours = prometheus_job()
    for endpoint in document["spec"]["podMetricsEndpoints"]:
        if not any(rule.get("targetLabel") == "role" for rule in endpoint.get("relabelings", [])):
            continue
        if endpoint.get("honorLabels") is not ours["honor_labels"]:
            yield f"port {endpoint['port']}: honorLabels is not that of prometheus.yml"
        for labels, _ in pods:
            if not selects(document["spec"]["selector"], labels):
                continue
            given = target_labels(endpoint, labels)
            if missing := NEEDED[given["role"]] - given.keys():
                yield f"port {endpoint['port']}: a pod it selects gets no label {', '.join(sorted(missing))}"
            found, wanted = (
                relabelled(rules, {**given, "scorer": "its own name"})
                for rules in (endpoint.get("metricRelabelings", []), _as_operator(ours["metric_relabel_configs"]))
            )
            if found != wanted:
                yield f"port {endpoint['port']}: series come out as {found}, by prometheus.yml as {wanted}"


def prometheus_job() -> dict[str, Any]:
    """The job of runs in prometheus.yml."""
    text = (ROOT / "cluster/deploy/prometheus/prometheus.yml").read_text(encoding="utf-8")
    job: dict[str, Any] = yaml.safe_load(text)["scrape_configs"][0]
    return job


def target_labels(endpoint: Mapping[str, Any], pod: Mapping[str, str]) -> dict[str, str]:
    """Labels of a pod's target, the operator's own left out. pod: its labels."""
    known = {f"__meta_kubernetes_pod_label_{re.sub('[^a-zA-Z0-9_]', '_', key)}": value for key, value in pod.items()}
    return {key: value for key, value in relabelled(endpoint["relabelings"], known).items() if key not in known}


def relabelled(rules: Rules, labels: Mapping[str, str]) -> dict[str, str]:
    """Labels after the operator's rules; an empty value is no label. Raises ValueError for actions but `replace`."""
    made = dict(labels)
    for rule in rules:
        if rule.get("action", "replace") != "replace":
            raise ValueError(f"relabelling by {rule['action']} is not known here")
        source = rule.get("separator", ";").join(made.get(name, "") for name in rule.get("sourceLabels", []))
        match = re.fullmatch(rule.get("regex", "(.*)"), source)
        if match:
            made[rule["targetLabel"]] = match.expand(re.sub(r"\$(\d)", r"\\\1", rule.get("replacement", "$1")))
    return {key: value for key, value in made.items() if value}


def selects(selector: Mapping[str, Any], labels: Mapping[str, str]) -> bool:
    """Whether a Kubernetes label selector chooses what has these labels."""
    equal = all(labels.get(key) == value for key, value in selector.get("matchLabels", {}).items())
    among = all(labels.get(rule["key"]) in rule["values"] for rule in selector.get("matchExpressions", []))
    return equal and among


def _as_operator(rules: Rules) -> Rules:
    """Prometheus' own spelling of rules as the operator spells them: source_labels -> sourceLabels."""
    return [{re.sub(r"_(\w)", lambda m: m[1].upper(), key): value for key, value in rule.items()} for rule in rules]

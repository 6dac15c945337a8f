"""The manifest of one scorer, and that a check sees what would keep its HPA from working."""

from __future__ import annotations

from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from cluster.deploy import check, scorer
from contracts.errors import ConfigError


def made(*arguments: str) -> list[dict[str, Any]]:
    result = CliRunner().invoke(scorer.main, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return list(yaml.safe_load_all(result.output))


def monitors() -> list[tuple[str, dict[str, Any]]]:
    text = (check.DEPLOY / "k8s/podmonitors.yaml").read_text()
    found = list(yaml.safe_load_all(text))
    return [("podmonitors", each) for each in found if each["metadata"]["name"] == "salon-reward"]


def problems(documents: list[dict[str, Any]]) -> list[str]:
    pytest.importorskip("kubernetes_validate")
    return list(check.manifest_problems([*(("made", each) for each in documents), *monitors()]))


def test_what_is_asked_for_stands_in_the_manifest_and_nothing_of_the_template_is_left() -> None:
    documents = made("pickscore", "--name", "taste", "--option", "model=/models/p", "--gpus", "1", "--max", "5",
                     "--target-images", "32", "--models", "weights", "--memory", "8Gi")  # fmt: skip
    deployment, _, autoscaler = documents
    pod = deployment["spec"]["template"]["spec"]
    assert pod["containers"][0]["args"] == ["pickscore", "--option", "model=/models/p"]
    assert pod["containers"][0]["resources"]["limits"] == {"memory": "8Gi", "nvidia.com/gpu": "1"}
    assert pod["volumes"][-1]["persistentVolumeClaim"] == {"claimName": "weights", "readOnly": True}
    assert autoscaler["spec"]["maxReplicas"] == 5
    assert autoscaler["spec"]["metrics"][0]["pods"] == {
        "metric": {"name": "salon_reward_queue_depth"}, "target": {"type": "AverageValue", "averageValue": "32"},
    }  # fmt: skip
    assert {each["metadata"]["name"] for each in documents} == {"salon-reward-taste"}
    assert "verifier" not in yaml.safe_dump(documents)
    assert problems(documents) == []


def test_two_scorers_share_no_selector() -> None:
    """Scaling one must not count, or kill, the other's pods."""
    (one, service, _), (other, *_) = made("pickscore"), made("jpeg_size")
    assert one["spec"]["selector"]["matchLabels"] != other["spec"]["selector"]["matchLabels"]
    assert service["spec"]["selector"].items() <= one["spec"]["template"]["metadata"]["labels"].items()
    assert not service["spec"]["selector"].items() <= other["spec"]["template"]["metadata"]["labels"].items()


@pytest.mark.parametrize(
    ("key", "value", "problem"),
    [
        ("scaleTargetRef", {"apiVersion": "apps/v1", "kind": "Deployment", "name": "salon-reward-other"}, "not exist"),
        ("metrics", [{"type": "Pods", "pods": {"metric": {"name": "another_depth"},
                                               "target": {"type": "AverageValue", "averageValue": "1"}}}],
         "scales by another_depth"),
        ("minReplicas", 9, "more replicas at least"),
        ("maxReplicas", "many", "many"),
    ],
)  # fmt: skip
def test_an_hpa_that_cannot_work_is_found(key: str, value: Any, problem: str) -> None:
    documents = made("jpeg_size")
    assert problems(documents) == []
    documents[2]["spec"][key] = value
    if key == "maxReplicas":
        del documents[2]["spec"]["minReplicas"]
    assert any(problem in each for each in problems(documents))


def test_a_scorer_whose_series_nobody_fetches_is_found() -> None:
    documents = made("jpeg_size")
    labels = documents[0]["spec"]["template"]["metadata"]["labels"]
    labels["app.kubernetes.io/component"] = "other"
    assert any("no PodMonitor fetches" in each for each in problems(documents))


def test_mistakes_are_said_in_one_line() -> None:
    with pytest.raises(ConfigError, match="no name for a Deployment"):
        scorer.documents(scorer.Wanted("jpeg_size", "Jpeg_Size"))
    result = CliRunner().invoke(scorer.main, ["jpeg_size", "--min", "3", "--max", "2"])
    assert (result.exit_code, "1 <= min <= max" in result.output) == (1, True)

"""The Kubernetes manifest of one scorer: Deployment, Service and HPA, made from k8s/reward.yaml, which is one itself.

    python -m cluster.deploy.scorer pickscore --name taste --run lamps --models salon-models | kubectl apply -f -

Every scorer is a Deployment of its own with an HPA of its own on salon_reward_queue_depth, so each scales, restarts and
updates without touching another. Does not own: the image (docker/), the checks (check.py).
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import yaml

from contracts.errors import ConfigError, SalonError

TEMPLATE = Path(__file__).parent / "k8s/reward.yaml"
PREFIX = "salon-reward-"
RUN_LABEL = "salon/run"
_TEMPLATE_NAME = f"{PREFIX}verifier"


@dataclass(frozen=True)
class Wanted:
    """name: of the Deployment after `salon-reward-`, and of the scorer in the run, which its series carry; run: the one
    it serves, or None for several; options: KEY=VALUE as `reward_servers serve` takes them;
    target_images: images waiting in each pod beyond which another is started; models: a claim with weights, mounted
    read-only at /models, or None; memory: of a pod, in Kubernetes' units.
    """

    scorer: str
    name: str
    run: str | None = None
    options: tuple[str, ...] = ()
    replicas: tuple[int, int] = (1, 8)
    target_images: int = 64
    gpus: int = 0
    memory: str = "2Gi"
    models: str | None = None
    image: str = "salon-reward:local"


def documents(wanted: Wanted) -> list[dict[str, Any]]:
    """Deployment, Service and HPA. Raises ConfigError for a name Kubernetes would refuse, or bounds that cannot be."""
    if not re.fullmatch(r"[a-z0-9]([-a-z0-9]{0,38}[a-z0-9])?", wanted.name):
        raise ConfigError("name", f"{wanted.name!r} is no name for a Deployment", "use a-z, 0-9 and - (at most 40)")
    if not 1 <= wanted.replicas[0] <= wanted.replicas[1]:
        raise ConfigError("max", f"{wanted.replicas[0]} to {wanted.replicas[1]} replicas", "use 1 <= min <= max")
    text = TEMPLATE.read_text(encoding="utf-8").replace(_TEMPLATE_NAME, f"{PREFIX}{wanted.name}")
    deployment, service, autoscaler = copy.deepcopy(list(yaml.safe_load_all(text)))
    for labels in (deployment["metadata"]["labels"], deployment["spec"]["selector"]["matchLabels"],
                   deployment["spec"]["template"]["metadata"]["labels"], service["spec"]["selector"]):  # fmt: skip
        labels["salon/scorer"] = wanted.name
    pod_labels = deployment["spec"]["template"]["metadata"]["labels"]
    del pod_labels[RUN_LABEL]  # a label of the template's own run; the selector, which can never change, has none
    if wanted.run is not None:
        pod_labels[RUN_LABEL] = wanted.run
    _fill(deployment["spec"]["template"]["spec"], wanted)
    spec = autoscaler["spec"]
    spec["minReplicas"], spec["maxReplicas"] = wanted.replicas
    spec["metrics"][0]["pods"]["target"]["averageValue"] = str(wanted.target_images)
    return [deployment, service, autoscaler]


def _fill(pod: dict[str, Any], wanted: Wanted) -> None:
    container = pod["containers"][0]
    container["image"] = wanted.image
    container["args"] = [wanted.scorer, *(part for option in wanted.options for part in ("--option", option))]
    for kind in ("requests", "limits"):
        container["resources"][kind]["memory"] = wanted.memory
    if wanted.gpus:
        container["resources"]["limits"]["nvidia.com/gpu"] = str(wanted.gpus)
    if wanted.models:
        claim = {"claimName": wanted.models, "readOnly": True}
        pod["volumes"].append({"name": "models", "persistentVolumeClaim": claim})
        container["volumeMounts"].append({"name": "models", "mountPath": "/models", "readOnly": True})
        container["env"] += [{"name": "HF_HOME", "value": "/models"}, {"name": "HF_HUB_OFFLINE", "value": "1"}]


def as_yaml(made: Sequence[dict[str, Any]]) -> str:
    """What kubectl reads; written out in full, since it knows no anchors across documents."""
    plain = json.loads(json.dumps(made))  # anchors of the template are written out
    return yaml.safe_dump_all(plain, sort_keys=False)


@click.command()
@click.argument("scorer")
@click.option("--name", help="After salon-reward-; the scorer's own name unless given.")
@click.option("--run", help="The run it serves; without, it may serve several, and its series name none.")
@click.option("--option", "options", multiple=True, metavar="KEY=VALUE", help="Keyword argument of the scorer.")
@click.option("--min", "least", default=1, show_default=True, type=click.IntRange(1), help="Fewest pods.")
@click.option("--max", "most", default=8, show_default=True, type=click.IntRange(1), help="Most pods.")
@click.option("--target-images", default=64, show_default=True, type=click.IntRange(1), help="Waiting in each pod.")
@click.option("--gpus", default=0, show_default=True, type=click.IntRange(0), help="Of each pod.")
@click.option("--memory", default="2Gi", show_default=True, help="Limit of each pod.")
@click.option("--models", help="Persistent volume claim with weights, mounted at /models as the hub's cache.")
@click.option("--image", default="salon-reward:local", show_default=True, help="Built from docker/reward.Dockerfile.")
def main(scorer: str, name: str | None, least: int, most: int, **given: Any) -> None:
    """Print the manifest of SCORER (of `reward_servers list`, or module:Class within the image)."""
    plain = re.sub(r"[^a-z0-9]+", "-", scorer.lower()).strip("-")
    try:
        made = documents(Wanted(scorer, name or plain, replicas=(least, most), **given))
    except SalonError as error:
        raise click.ClickException(str(error)) from error
    click.echo(as_yaml(made), nl=False)


if __name__ == "__main__":
    main(prog_name="python -m cluster.deploy.scorer")

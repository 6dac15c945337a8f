"""`make ops-check`: Dockerfiles, compose file, rules, dashboards and manifests, without a network or an engine.

Each check yields the problems it found, one text each; the command prints them and fails if there are any.
Does not own: the programs it calls (tools.py), what is checked (docker/, prometheus/, grafana/, k8s/).
"""

from __future__ import annotations

import json
import re
import sys
import tomllib
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import yaml

from cluster.deploy import tools
from cluster.deploy.labels import label_problems, selects
from cluster.deploy.scorer import Wanted, as_yaml, documents
from cluster.deploy.tools import ROOT, MissingTool
from contracts.metrics import BY_NAME

DEPLOY = ROOT / "cluster/deploy"
DOCKER = ROOT / "docker"
PROMETHEUS = DEPLOY / "prometheus"
PINNED = re.compile(r"^[a-z0-9./-]+:v?\d+\.\d+[^@\s]*(@sha256:[0-9a-f]{64})?$")
OWN_IMAGE = re.compile(r"^salon-[a-z]+:local$")
SECRET = re.compile(r"(TOKEN|PASSWORD|SECRET|API_?KEY)", re.IGNORECASE)
CUSTOM_KINDS = {"PodMonitor": "monitoring.coreos.com/v1", "RayJob": "ray.io/v1", "Kustomization": ""}


def dockerfiles() -> Iterator[str]:
    """Lint, bases pinned by version, hash-locked packages, an unprivileged user, a health check, no secret."""
    for path in sorted(DOCKER.glob("*.Dockerfile")):
        text = path.read_text(encoding="utf-8")
        if problem := tools.run(tools.find("hadolint"), str(path)):
            yield problem
        for base in re.findall(r"^FROM\s+(\S+)", text, re.MULTILINE):
            if not PINNED.match(base):
                yield f"{path.name}: base {base} is not pinned by version"
        installs = [line for line in text.splitlines() if "pip install" in line]
        if not installs or any("--require-hashes" not in line for line in installs):
            yield f"{path.name}: packages are not installed with --require-hashes"
        for needed in ("\nUSER 1000:1000\n", "\nHEALTHCHECK "):
            if needed not in text:
                yield f"{path.name}: no {needed.strip()}"
        for line in re.findall(r"^(?:ENV|ARG)\s.*", text, re.MULTILINE):
            if SECRET.search(line):
                yield f"{path.name}: {line} would bake a secret into the image"
        yield from _lock_problems(path)


def _lock_problems(dockerfile: Path) -> Iterator[str]:
    lock = DOCKER / "locks" / f"{dockerfile.name.split('.')[0]}.txt"
    if not lock.is_file():
        yield f"{dockerfile.name}: {lock.relative_to(ROOT)} is missing; docker/lock.sh writes it"
        return
    text = re.sub(r"^\s*#.*\n", "", lock.read_text(encoding="utf-8"), flags=re.MULTILINE)
    for requirement in re.split(r"\n(?=\S)", text.strip()):
        name = requirement.split(None, 1)[0]
        if "==" not in name or "--hash=sha256:" not in requirement:
            yield f"{lock.name}: {name} has no exact version or no hash"
    for name in sorted(_asked_for(dockerfile) - set(re.findall(r"^([A-Za-z0-9._-]+)(?===)", text, re.MULTILINE))):
        yield f"{lock.name}: {name} is asked for and not locked; run docker/lock.sh"
    if "://" in text:
        yield f"{lock.name}: names an address; packages come from the configured index"


def _asked_for(dockerfile: Path) -> set[str]:
    """Names of the packages an image is to hold: those of requirements/<image>.in, else the project's own."""
    asked = ROOT / "docker/requirements" / f"{dockerfile.name.split('.')[0]}.in"
    if asked.is_file():
        lines = asked.read_text(encoding="utf-8").splitlines()
    else:
        lines = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["dependencies"]
    return {re.split(r"[^A-Za-z0-9._-]", line)[0].lower() for line in lines if line and not line.startswith("#")}


def compose() -> Iterator[str]:
    """The schema, and what no schema sees: pinned images, mounted files, declared names, health, no secret."""
    path = DOCKER / "compose.yaml"
    spec = yaml.safe_load(path.read_text(encoding="utf-8"))
    yield from _compose_schema(path, spec)
    services = spec["services"]
    for name, service in services.items():
        for problem in service_problems(service, spec):
            yield f"compose: {name}: {problem}"


def _compose_schema(path: Path, spec: dict[str, Any]) -> Iterator[str]:
    if not tools.run("docker", "compose", "version"):
        given = [f"{name}=x" for name in re.findall(r"\$\{(\w+)", path.read_text(encoding="utf-8"))]
        if problem := tools.run("env", *given, "docker", "compose", "--file", str(path), "config", "--quiet"):
            yield f"compose: {problem}"
        return
    if not tools.COMPOSE_SCHEMA.is_file():
        raise MissingTool("neither docker compose nor the compose schema is here: `make ops-tools` brings the schema")
    import jsonschema

    validator = jsonschema.Draft7Validator(json.loads(tools.COMPOSE_SCHEMA.read_text(encoding="utf-8")))
    for error in validator.iter_errors({key: value for key, value in spec.items() if key != "name"}):
        yield f"compose: {'.'.join(map(str, error.absolute_path))}: {error.message}"


def service_problems(service: dict[str, Any], spec: dict[str, Any]) -> Iterator[str]:
    image = service["image"]
    if not PINNED.match(image) and not OWN_IMAGE.match(image):
        yield f"image {image} is not pinned by version"
    if OWN_IMAGE.match(image) and not (DOCKER / service["build"]["context"] / service["build"]["dockerfile"]).is_file():
        yield f"{service['build']['dockerfile']} does not exist"
    if not OWN_IMAGE.match(image) and "healthcheck" not in service:
        yield "no healthcheck"
    for mount in service.get("volumes", []):
        source = mount.split(":")[0]
        if source.startswith(".") and not (DOCKER / source).exists():
            yield f"mounts {source}, which does not exist"
        if not source.startswith((".", "/")) and source not in spec["volumes"]:
            yield f"volume {source} is not declared"
    for port in service.get("ports", []):
        if not port.startswith("127.0.0.1:"):
            yield f"port {port} is open to other machines"
    for other in service.get("depends_on", []):
        if other not in spec["services"]:
            yield f"depends on {other}, which is no service"
    for key, value in service.get("environment", {}).items():
        if SECRET.search(key) and not re.match(r"^\$\{\w+:\?", str(value)):
            yield f"{key} has a value in the file; take it from the environment"


def rules() -> Iterator[str]:
    """promtool: configurations, rules, and the rules' unit tests."""
    promtool = tools.find("promtool")
    files = [str(path) for path in sorted((PROMETHEUS / "rules").glob("*.yml"))]
    tests = [str(path) for path in sorted((PROMETHEUS / "tests").glob("*.yml"))]
    commands = (["check", "rules", *files], ["test", "rules", *tests])
    configurations = (PROMETHEUS / "prometheus.yml", DOCKER / "compose.prometheus.yml")
    for command in (*commands, *(["check", "config", "--syntax-only", str(path)] for path in configurations)):
        if problem := tools.run(promtool, *command):
            yield problem


def dashboards() -> Iterator[str]:
    """Committed files are what the script writes, and Prometheus can parse every expression in them."""
    from cluster.deploy.grafana import generate

    for name in generate.differing():
        yield f"{name} is not what `python -m cluster.deploy.grafana.generate` writes"
    if problem := tools.parse_problem(tools.expanded(expr) for expr in expressions()):
        yield f"dashboards: {problem}"


def expressions() -> list[str]:
    """Every expression of the committed dashboards."""
    boards = [json.loads(path.read_text("utf-8")) for path in sorted((DEPLOY / "grafana/dashboards").glob("*.json"))]
    return [target["expr"] for board in boards for panel in board["panels"] for target in panel["targets"]]


def manifests() -> Iterator[str]:
    """Kubernetes' own kinds by their schemas; that what PodMonitors and Services select exists, ports included; that
    an HPA has its target and its series; that series get the labels that dashboards ask for. Of what scorer.py makes
    too.
    """
    found = [
        (path.name, document)
        for path in sorted((DEPLOY / "k8s").glob("*.yaml"))
        for document in yaml.safe_load_all(path.read_text(encoding="utf-8"))
    ]
    yield from manifest_problems(found)
    monitors = [each for each in found if each[1].get("metadata", {}).get("name") == "salon-reward"]
    for wanted in (
        Wanted("playground_verifier", "verifier"),
        Wanted("pickscore", "taste", "lamps", ("model=/models/x",), gpus=1, models="salon-models"),
    ):
        made = [(f"scorer {wanted.scorer}", each) for each in yaml.safe_load_all(as_yaml(documents(wanted)))]
        yield from manifest_problems([*made, *monitors])


def manifest_problems(found: list[tuple[str, dict[str, Any]]]) -> Iterator[str]:
    """What is wrong with documents that are to be applied together, each with the name of where it stands."""
    import kubernetes_validate

    pods = [pod for _, document in found for pod in _pods(document)]
    for name, document in found:
        where = f"{name}: {document['kind']} {document.get('metadata', {}).get('name', '')}"
        if document["kind"] not in CUSTOM_KINDS:
            try:
                kubernetes_validate.validate(document, kubernetes_validate.latest_version(), strict=True)
            except kubernetes_validate.ValidationError as error:
                yield f"{where}: {error.message}"
                continue
        elif CUSTOM_KINDS[document["kind"]] not in ("", document["apiVersion"]):
            yield f"{where}: apiVersion {document['apiVersion']} is not {CUSTOM_KINDS[document['kind']]}"
        of_document = (
            _selection_problems(document, pods),
            _scaling_problems(document, found),
            label_problems(document, pods),
        )
        for problem in chain(*of_document):
            yield f"{where}: {problem}"
    for labels, spec in pods:
        if not spec["securityContext"].get("runAsNonRoot") or spec["securityContext"].get("runAsUser") != 1000:
            yield f"pod {labels}: does not run as user 1000"


def _pods(document: Any) -> Iterator[tuple[dict[str, str], dict[str, Any]]]:
    """(labels, spec) of every pod template within a document."""
    if isinstance(document, dict):
        if "template" in document and "containers" in document["template"].get("spec", {}):
            yield document["template"]["metadata"]["labels"], document["template"]["spec"]
        for value in document.values():
            yield from _pods(value)
    elif isinstance(document, list):
        for value in document:
            yield from _pods(value)


def _selection_problems(document: dict[str, Any], pods: list[tuple[dict[str, str], dict[str, Any]]]) -> Iterator[str]:
    spec = document.get("spec", {})
    if document["kind"] == "PodMonitor":
        ports, selector = [endpoint["port"] for endpoint in spec["podMetricsEndpoints"]], spec["selector"]
    elif document["kind"] == "Service":
        ports, selector = [port["targetPort"] for port in spec["ports"]], {"matchLabels": spec["selector"]}
    else:
        return
    chosen = [pod_spec for labels, pod_spec in pods if selects(selector, labels)]
    if not chosen:
        yield "selects no pod of these manifests"
    for pod_spec in chosen:
        named = {port["name"] for container in pod_spec["containers"] for port in container.get("ports", [])}
        for port in set(ports) - named:
            yield f"a pod it selects has no port {port}"


def _scaling_problems(document: dict[str, Any], found: list[tuple[str, dict[str, Any]]]) -> Iterator[str]:
    """Of an HPA: whom it scales, and by which series, which a pod must export and a PodMonitor must fetch."""
    if document["kind"] != "HorizontalPodAutoscaler":
        return
    target = document["spec"]["scaleTargetRef"]
    scaled = [
        each for _, each in found
        if (each["kind"], each.get("metadata", {}).get("name")) == (target["kind"], target["name"])
    ]  # fmt: skip
    if not scaled:
        yield f"scales {target['kind']} {target['name']}, which does not exist"
    for metric in document["spec"]["metrics"]:
        name = metric["pods"]["metric"]["name"]
        if name not in BY_NAME or BY_NAME[name].role != "reward_server":
            yield f"scales by {name}, which no reward server exports"
    if document["spec"].get("minReplicas", 1) > document["spec"]["maxReplicas"]:
        yield "has more replicas at least than at most"
    monitors = [each["spec"]["selector"] for _, each in found if each["kind"] == "PodMonitor"]
    for each in scaled:
        labels = each["spec"]["template"]["metadata"]["labels"]
        if not any(selects(selector, labels) for selector in monitors):
            yield f"no PodMonitor fetches the series of {target['name']}"


CHECKS: tuple[Callable[[], Iterator[str]], ...] = (dockerfiles, compose, rules, dashboards, manifests)


def main() -> int:
    failed = False
    for check in CHECKS:
        try:
            problems = list(check())
        except MissingTool as error:
            problems = [str(error)]
        print(f"{check.__name__:<12}{'ok' if not problems else ''}")
        for problem in problems:
            print(f"  {problem}")
        failed = failed or bool(problems)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())

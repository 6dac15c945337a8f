"""Where Prometheus finds the processes of a run: one file a run, in the format of file_sd.

Prometheus watches `<folder>/*.json`; the controller rewrites the run's file when a process comes, moves or ends, and
removes it when the run ends. After a crash the file stays, so that what is gone shows as down until the run is resumed.
Labels: run, role (controller, vault, dispatcher, actor, learner, reward_server, ...), process; scorer for reward
servers. Invariant: the file is whole or absent, and holds no address twice.
Does not own: who is asked for addresses (cluster/observed.py), the processes' exporters (process.py, telemetry.py).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from cluster.telemetry.process import WILDCARDS
from contracts.config import RunConfig

FOLDER = ".prometheus"
"""Under runs_dir: a name no run can have."""


def targets_folder(config: RunConfig) -> Path:
    """Folder of the target files: telemetry.file_sd, else beside the runs; `runs/` here when those live at a URL."""
    if config.telemetry.file_sd is not None:
        return Path(config.telemetry.file_sd).expanduser()
    return Path("runs" if "://" in config.runs_dir else config.runs_dir).expanduser().absolute() / FOLDER


def role_of(process: str) -> str:
    """Role of a process by its name: 'actor-3' -> 'actor', 'host-copy' -> 'host-copy', 'online-taste' -> 'online'."""
    if process.startswith("online-"):  # named after its scorer
        return "online"
    stem, _, number = process.rpartition("-")
    return stem if number.isdigit() and stem else process


def reachable(address: str, node_ip: str) -> str:
    """host:port as another machine finds it; whoever listens on every address is found at its node's."""
    host, _, port = address.rpartition(":")
    return f"{node_ip}:{port}" if host.strip("[]") in WILDCARDS else address


class TargetFile:
    """The file of one run."""

    def __init__(self, config: RunConfig) -> None:
        self.run, self.path = config.name, targets_folder(config) / f"{config.name}.json"
        self._written: list[dict[str, Any]] | None = None

    def write(self, processes: Iterable[Mapping[str, Any]], servers: Mapping[str, Iterable[str]]) -> bool:
        """Bring the file up to date; True when it changed. Raises OSError when it cannot be written.

        processes: name and `metrics` (host:port or None) of each; servers: URLs of reward servers by scorer.
        """
        groups = [self._process(each) for each in processes if each.get("metrics")]
        groups += [self._server(scorer, url) for scorer, urls in servers.items() for url in urls]
        unique = {group["targets"][0]: group for group in groups}
        wanted = [unique[target] for target in sorted(unique)]
        if wanted == self._written:
            return False
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}.tmp")
        temporary.write_text(json.dumps(wanted, indent=1) + "\n", encoding="utf-8")
        os.replace(temporary, self.path)
        self._written = wanted
        return True

    def remove(self) -> None:
        """The run has ended: nothing of it is to be scraped, or missed."""
        self.path.unlink(missing_ok=True)
        self._written = None

    def _process(self, process: Mapping[str, Any]) -> dict[str, Any]:
        name = str(process["name"])
        labels = {"run": self.run, "role": role_of(name), "process": name}
        return {"targets": [str(process["metrics"])], "labels": labels}

    def _server(self, scorer: str, url: str) -> dict[str, Any]:
        parts = urlsplit(url)
        labels = {"run": self.run, "role": "reward_server", "process": f"reward-{scorer}", "scorer": scorer}
        if parts.scheme != "http":
            labels["__scheme__"] = parts.scheme
        if path := parts.path.rstrip("/"):
            labels["__metrics_path__"] = f"{path}/metrics"
        port = {"https": 443}.get(parts.scheme, 80)
        return {"targets": [parts.netloc if parts.port else f"{parts.netloc}:{port}"], "labels": labels}

"""What scorers say of themselves stands in the manifest: asked until all have answered, and after another version."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cluster import observed
from cluster.observed import JuryRecord
from cluster.report.page import provenance
from cluster.report.view import RunView
from cluster.run_folder import RunFolder
from contracts.scores import ScorerInfo


class Servers:
    """A dispatcher whose scorers answer, or do not; counts how often they were asked."""

    def __init__(self) -> None:
        self.said: dict[str, ScorerInfo] | None = None
        self.asked = 0
        self.infos = SimpleNamespace(remote=self._remote)

    def _remote(self, deadline_s: float) -> Any:
        self.asked += 1
        return self.said


def info(name: str, version: str, **fields: Any) -> ScorerInfo:
    limits = {"max_images": 64, "max_pixels": 10**6, "max_body_bytes": 10**8}
    return ScorerInfo.model_validate(
        {"name": name, "version": version, "kind": "point", "columns": ("score",), **limits, **fields}
    )


@pytest.fixture
def servers(monkeypatch: pytest.MonkeyPatch) -> Servers:
    async def answered(reference: Any) -> Any:
        return reference

    monkeypatch.setattr(observed, "_answer", answered)
    return Servers()


def test_every_scorer_is_recorded_and_asked_again_only_after_another_version(servers: Servers, tmp_path: Path) -> None:
    names = [SimpleNamespace(name=name) for name in ("a", "b")]
    context: Any = SimpleNamespace(
        folder=RunFolder(tmp_path), config=SimpleNamespace(scorers=names), scorer_versions={}
    )
    record = JuryRecord(context, servers)
    a, b = info("x", "1", value_range=(0.0, 1.0), weight_digest="ab"), info("y", "7", higher_is_better=False)

    def noted(said: dict[str, ScorerInfo] | None) -> dict[str, Any]:
        servers.said = said
        asyncio.run(record.note())
        manifest = json.loads(context.folder.manifest.read_text()) if context.folder.manifest.is_file() else {}
        return manifest.get("scorers", {})

    assert noted(None) == {}, "the dispatcher is being started again"
    of_a = {"version": "1", "value_range": [0.0, 1.0], "higher_is_better": True, "weight_digest": "ab"}
    of_b = {"version": "7", "value_range": [None, None], "higher_is_better": False, "weight_digest": ""}
    assert noted({"a": a}) == {"a": of_a}, "one is silent"
    assert noted({"b": b}) == {"a": of_a, "b": of_b}
    assert noted({"a": a, "b": b}) == {"a": of_a, "b": of_b}
    assert servers.asked == 4
    assert noted({}) == {"a": of_a, "b": of_b}
    assert servers.asked == 4, "nothing has changed"
    context.scorer_versions["a"] = "2"
    assert noted({"a": info("x", "2", weight_digest="cd"), "b": b})["a"]["weight_digest"] == "cd"
    assert servers.asked == 5


def test_the_report_tells_it_in_words_and_reads_older_manifests(tmp_path: Path) -> None:
    ranges = {"a": [0.0, 1.0], "b": [None, None], "c": [0.0, None]}
    scorers = {
        name: {
            "version": "1", "value_range": span, "higher_is_better": name != "c",
            "weight_digest": "" if name == "b" else name * 4,
        }
        for name, span in ranges.items()
    }  # fmt: skip
    view = RunView(RunFolder(tmp_path), manifest={"scorer_versions": {"a": "1"}, "scorers": scorers})
    assert provenance(view)["scorers"] == (
        "a 1 (0 to 1, higher is better, weights aaaa); b 1 (-∞ to ∞, higher is better, no weights); "
        "c 1 (0 to ∞, lower is better, weights cccc)"
    )
    older = RunView(RunFolder(tmp_path), manifest={"scorer_versions": {"a": "1"}})
    assert provenance(older)["scorer versions"] == "a 1"
    assert "scorers" not in provenance(older)

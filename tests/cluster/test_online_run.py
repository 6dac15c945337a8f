"""A whole run whose reward model learns beside it: versions flip between steps, are recorded, kept, and come back.

Scorer, server, trainer and everything that carries versions are real; painter and learner are timers (online_parts).
"""

from __future__ import annotations

import asyncio
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from cluster.checkpoints import newest_whole
from cluster.checks.online import check_online
from cluster.controller import Parts
from cluster.ledger.reader import LedgerReader
from cluster.online import OnlineModels
from cluster.telemetry import Telemetry
from contracts import versions
from contracts.config import RunConfig
from contracts.scores import point_table
from contracts.wire import GroupHeader, PromptSpec
from reward_servers.construct import make_scorer
from reward_servers.scorers.base import ScoreBatch
from tests.cluster.online_parts import build_dino
from tests.cluster.whole_run import books_of, folder_of
from tests.laws.run_kit import events, run_on_cluster, tiny_config
from tests.reward_servers.online_kit import flat, write_references
from tests.reward_servers.scorer_models import build_clip

STEPS = 4
TRAINERS: dict[str, dict[str, Any]] = {
    "adversarial_dino": {"lr": 1e-2, "hidden": 8, "per_prompt": False},
    "guarded_pickscore": {"lr": 1e-4, "layers": 1, "per_prompt": False},
    "distilled": {
        "lr": 1e-2, "judge": {"name": "judge", "function": "tests.cluster.online_parts:slow_red_judge"},
        "images_per_group": 2, "steps_per_update": 2,
    },
}  # fmt: skip
PARTS = Parts("tests.cluster.online_parts:NoisePainter", "tests.cluster.online_parts:PatientLearner")
QUICK = {"paint_s": 0.05, "update_s": 0.05, "weight_mb": 0.01}


def scorer_options(trainer: str, root: Path) -> dict[str, Any]:
    if trainer == "adversarial_dino":
        return {"model": str(root / "dino"), "size": None, "patches": 2}
    return {"model": str(root / "clip"), **({"min_labels": 0} if trainer == "distilled" else {})}


def online_config(root: Path, trainer: str = "adversarial_dino", **changes: Any) -> RunConfig:
    entry = {"name": trainer, "scorer": "real", **TRAINERS[trainer]}
    if trainer != "distilled":
        entry["references"] = write_references(root / "references", references_of(trainer, root))
    usual: dict[str, Any] = {
        "scorers": [
            # A head of zeros and a judge of one opinion say the same of a whole group, which is no signal.
            {"name": "number", "function": "benchmarks.stand_ins:score", "held_out": trainer != "distilled"},
            {"name": "real", "serve": trainer, "options": scorer_options(trainer, root)},
        ],
        "online": [entry],
        "prompts": {"source": "benchmarks.stand_ins:Prompts", "options": QUICK},
        "checkpoint": {"every_steps": 2},
        "stop__steps": STEPS,
    }  # fmt: skip
    return tiny_config(root / "no model", root / "runs", **{**usual, **changes})


def versions_of(config: RunConfig, step: int | None = None) -> dict[int, str]:
    """Version of the online scorer in each scored group's table; step: of the groups trained in it."""
    with closing(LedgerReader(folder_of(config) / "ledger.sqlite")) as ledger:
        tables = {row.group_id: ledger.tables(row.group_id) for row in ledger.rows(step=step)}
    return {group: found["real"].version for group, found in tables.items() if "real" in found}


def name_of(version: str) -> str:
    """The version's own name in what a table says: <scorer>-<frozen weights>-<name>."""
    return "-".join(version.split("-")[-2:])


def references_of(trainer: str, root: Path) -> np.ndarray:
    """Red ones; for the guard those of three colours that its CLIP likes least, so that it prefers what is painted."""
    colours = [flat(colour) for colour in ((200, 40, 40), (40, 200, 40), (40, 40, 200))]
    if trainer != "guarded_pickscore" or not (root / "clip").is_dir():
        return colours[0]
    scorer = make_scorer("pickscore", [f"model={root / 'clip'}"])
    scorer.load()
    batches = [ScoreBatch(images, ("prompt 0",) * len(images), ({},) * len(images)) for images in colours]
    return colours[int(np.argmin([scorer.score(batch).values.mean() for batch in batches]))]


@pytest.fixture(
    scope="module",
    params=[pytest.param(name, marks=() if name == "distilled" else pytest.mark.long) for name in TRAINERS],
)
def ran(
    shared_ray: None, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[RunConfig, dict[str, Any]]:
    trainer, root = request.param, tmp_path_factory.mktemp("online_run")
    if trainer == "adversarial_dino":
        build_dino(root / "dino")
    else:
        build_clip(root / "clip")
    config = online_config(root, trainer)
    first = run_on_cluster(config, PARTS)
    kept = {"books": books_of(config), "checkpoint": newest_whole(folder_of(config) / "checkpoints")[0],
            "events": events(config, "online_version")}  # fmt: skip
    longer = online_config(root, trainer, stop__steps=STEPS + 1)
    second = run_on_cluster(longer, PARTS, resume=True)
    return config, {"first": first, "second": second, **kept}


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_versions_flip_between_steps_and_every_group_has_one(ran: tuple[RunConfig, dict[str, Any]]) -> None:
    config, found = ran
    assert found["first"]["outcome"] == "finished"
    assert found["books"].balanced
    assert found["books"].trained > 0
    flipped = [event["version"] for event in found["events"]]
    assert flipped, "the trainer's versions came into use"
    assert len(set(flipped)) == len(flipped)
    by_step = [{name_of(version) for version in versions_of(config, step).values()} for step in range(1, STEPS + 1)]
    assert all(len(names) == 1 for names in by_step), "at staleness 0 a step's groups are of one version"
    used = [names.pop() for names in by_step]
    assert len(set(used)) >= 2
    assert used == sorted(used), "and versions follow one another"
    came_in = {event["step"]: event["version"] for event in found["events"]}
    for step in range(2, STEPS + 1):
        assert used[step - 1] == came_in.get(step - 1, used[step - 2]), "a version serves from the step after its flip"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_checkpoint_holds_the_version_in_use_and_a_resume_begins_with_it(
    ran: tuple[RunConfig, dict[str, Any]],
) -> None:
    config, found = ran
    checkpoint = found["checkpoint"]
    kept = checkpoint.run_state().online["real"]
    files = versions.read(checkpoint.path / "online" / "real", kept)
    version, weights, state = versions.unpack(files)
    assert version.name == kept
    assert any(name.startswith("exp_avg/") for name in state), "its trainer goes on from its moments"
    assert all(np.isfinite(array).all() for array in weights.values() if array.dtype.kind == "f")
    assert found["second"]["steps"] == STEPS + 1
    assert {name_of(version) for version in versions_of(config, STEPS + 1).values()} == {kept}
    assert events(config, "scorer_version_changed") == [], "it is expected of this scorer"


class Hung:
    """A handle of a trainer that takes every call and answers none."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def __getattr__(self, name: str) -> Any:
        def remote(*_: Any) -> asyncio.Future[Any]:
            self.calls.append(name)
            return asyncio.get_running_loop().create_future()

        return SimpleNamespace(remote=remote)


def test_a_trainer_that_hangs_costs_dropped_copies_and_no_wait(tmp_path: Path) -> None:
    config = online_config(tmp_path)
    told: list[str] = []
    header = GroupHeader(group_id=0, attempt=0, prompt=PromptSpec(text="p"), group_size=4, weight_version=0,
                         prompt_digest="d")  # fmt: skip
    telemetry = Telemetry(config, tmp_path, serve=False)

    async def go() -> OnlineModels:
        online = OnlineModels(config, tmp_path, {}, lambda kind, **_: told.append(kind))
        model = online.models["real"]
        model.handle, model.folder = Hung(), tmp_path / "versions"
        model.folder.mkdir()
        for number in range(2):
            version, files = versions.pack(number, {"a": np.array([number])}, {}, {})
            versions.place(model.folder, version, files)
            model.staged = version.name
            await online.boundary(number)
        for _ in range(20):
            online.offer(header, "vault-0")
        await asyncio.sleep(0)
        assert model.handle.calls.count("offer") == 16
        await online.export(SimpleNamespace(telemetry=telemetry), answer_s=0.01)  # type: ignore[arg-type]
        marked = online.mark()
        assert table_is_stale(online, model.used[1], marked) is False
        assert table_is_stale(online, model.used[0], marked), "not in use since scoring began"
        assert table_is_stale(online, model.used[0], {"real": 0}) is False
        for task in model.offers:
            task.cancel()
        return online

    online = asyncio.run(go())
    assert told == ["online_version", "online_version"]
    assert versions.current(online.models["real"].folder) == online.state()["real"]
    row = telemetry.snapshot()
    telemetry.close()
    assert {value for key, value in row.items() if key.startswith("online_groups_dropped_total")} == {4.0}
    assert {value for key, value in row.items() if key.startswith("online_version")} == {1.0}


def table_is_stale(online: OnlineModels, version: str, since: dict[str, int]) -> bool:
    table = point_table("real", f"1-aaaa-{version}", ["reward"], np.ones(2))
    return online.stale({"real": table}, since) != []


def test_mismatches_are_found_before_the_first_image(tmp_path: Path) -> None:
    def problems(**changes: Any) -> str:
        return "\n".join(map(str, check_online(online_config(tmp_path, **changes))))

    assert problems() == ""
    assert "nothing trains real" in problems(online=[])
    entry = {"name": "adversarial_dino", "scorer": "real", "references": "nowhere.jsonl"}
    assert "nowhere.jsonl is not there" in problems(online=[entry])
    assert "trained twice" in problems(online=[entry, entry])
    assert "no scorer is called 'unreal'" in problems(online=[{**entry, "scorer": "unreal"}])
    assert "number is no adversarial_dino" in problems(online=[{**entry, "scorer": "number"}])
    judged = {"name": "distilled", "scorer": "real", "judge": {"name": "j", "serve": "jpeg_size"}}
    assert "a judge is not served by the run" in problems(online=[judged])

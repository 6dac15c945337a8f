"""A run folder that gets full or cannot be written: what each writer of the run does then, and a whole run in one."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cluster.controller import Parts
from cluster.driver import train
from cluster.evaluate import EvalPlan
from cluster.report.samples import read_samples, show_samples
from cluster.run_folder import RunFolder
from cluster.scoring_loop import ScoringLoop
from cluster.vault import MIN_FREE_BYTES
from contracts.config import RunConfig
from contracts.config.rollout import EvalSampling
from contracts.errors import ConfigError, ExitCode, StorageError, VaultFull
from contracts.scores import point_table
from contracts.wire import PromptSpec
from tests.cluster.checkpoint_kit import FakeTelemetry, SmallRun, make_config
from tests.cluster.small_disk import fill, small_disk
from tests.cluster.whole_run import (
    HELD_UP_S,
    LEARNER,
    PAINTER,
    books_of,
    folder_of,
    rows,
    timed_run,
    wait_for,
)
from tests.laws.run_kit import controller_of, events

PARTS = Parts(PAINTER, LEARNER)


class SeeingTelemetry(FakeTelemetry):
    """Remembers pictures too."""

    def __init__(self) -> None:
        super().__init__()
        self.pictures: list[tuple[str, int]] = []

    def image(self, tag: str, image: np.ndarray, step: int) -> None:
        self.pictures.append((tag, step))


# ---- one writer at a time


def test_a_file_that_finds_no_room_is_told_in_one_message_and_leaves_the_old_one(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", megabytes=1) as disk:
        folder = RunFolder.create(make_config(disk))
        before = folder.manifest.read_text()
        ballast = fill(disk)
        for write in (
            lambda: folder.write_json("summary.json", {"outcome": "x" * 10_000}),
            lambda: folder.update_manifest(scorer_versions={"judge": "x" * 10_000}),
            lambda: folder.save_image("before.png", np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)),
        ):
            with pytest.raises(StorageError, match=r"cannot be written: No space left.*make room.*resume the run"):
                write()
        assert StorageError.exit_code == ExitCode.FAILED
        assert folder.manifest.read_text() == before
        assert not folder.summary.exists()
        assert not [path for path in folder.root.rglob("*.tmp") if path != ballast]
        ballast.unlink()
        folder.write_json("summary.json", {})
        folder.save_image("before.png", np.zeros((4, 4, 3), np.uint8))


def test_a_new_run_on_a_full_disk_is_refused_with_the_way_out(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", megabytes=1) as disk:
        fill(disk)
        with pytest.raises(ConfigError, match=r"runs_dir: run folder .* cannot be written: No space left") as refused:
            RunFolder.create(make_config(disk))
        assert refused.value.exit_code == ExitCode.CONFIG


def show(folder: RunFolder, telemetry: Any) -> None:
    plan = EvalPlan((PromptSpec(text="a"),), (1,), EvalSampling(steps=4, shift=1.0, guidance_scale=1.0))
    image = np.random.default_rng(0).integers(0, 256, (1, 64, 64, 3), dtype=np.uint8)
    tables = {"judge": point_table("judge", "1", ["score"], np.array([0.5]))}
    show_samples(folder, telemetry, "step 2", 2, "test", plan, image, tables)


def test_samples_without_room_cost_themselves(tmp_path: Path) -> None:
    telemetry = SeeingTelemetry()
    with small_disk(tmp_path / "disk", megabytes=1) as disk:
        folder = RunFolder.create(make_config(disk))
        ballast = fill(disk)
        show(folder, telemetry)
        ((kind, fields),) = telemetry.events
        assert (kind, fields["tag"]) == ("samples_not_kept", "step 2")
        assert "No space left" in fields["error"]
        assert telemetry.pictures == [("samples/test", 2)], "the trackers have it all the same"
        assert read_samples(folder.samples) == []
        ballast.unlink()
        show(folder, telemetry)
        assert [each.tag for each in read_samples(folder.samples)] == ["step 2"]
        assert len(telemetry.events) == 1


def test_versions_that_cannot_be_written_down_are_written_with_a_later_group(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = SmallRun(make_config(tmp_path))
    loop = ScoringLoop(run.context, None)
    tables = {"judge": point_table("judge", "1", ["score"], np.array([1.0, 2.0]))}

    def refuse(**_: Any) -> None:
        raise StorageError.of(run.folder.manifest, "Read-only file system")

    with monkeypatch.context() as patched:
        patched.setattr(run.folder, "update_manifest", refuse)
        assert loop._versions_accepted(tables)
        assert loop._versions_accepted(tables)
    assert run.kinds().count("versions_not_kept") == 1
    assert run.context.scorer_versions == {"judge": "1"}, "the run knows it, and compares with it"
    assert not run.context.stopping
    assert loop._versions_accepted(tables)
    assert json.loads(run.folder.manifest.read_text())["scorer_versions"] == {"judge": "1"}
    run.close()


# ---- whole runs


@pytest.mark.usefixtures("shared_ray")
def test_a_summary_that_cannot_be_written_ends_the_run_with_one_message(tmp_path: Path) -> None:
    """A folder stands where it belongs."""
    config = timed_run(tmp_path, "untold", stop={"steps": 2})

    def be_in_the_way() -> None:
        deadline = time.monotonic() + HELD_UP_S
        while not (folder_of(config) / "config.yaml").is_file() and time.monotonic() < deadline:
            time.sleep(0.02)
        (folder_of(config) / "summary.json").mkdir()

    thread = threading.Thread(target=be_in_the_way)
    thread.start()
    with pytest.raises(StorageError, match=r"summary\.json cannot be written: Is a directory.*resume the run"):
        train(config, show=False, parts=PARTS)
    thread.join()
    (failed,) = events(config, "failed")
    assert failed["summary"]["steps"] == 2, "what came of the run is told elsewhere"
    assert not events(config, "finished")


def begin(config: RunConfig, resume: bool = False) -> Any:
    return controller_of(config, PARTS, resume).run.remote()


def steps_of(config: RunConfig) -> int:
    return len(rows(config)) if (folder_of(config) / "metrics.jsonl").is_file() else 0


@pytest.mark.usefixtures("shared_ray")
def test_a_run_on_a_disk_that_gets_full_waits_or_stops_and_goes_on_when_there_is_room(tmp_path: Path) -> None:
    """First so full that vaults take nothing more, then to the last byte; TensorBoard writes too, as by default."""
    import ray

    with small_disk(tmp_path / "disk", megabytes=MIN_FREE_BYTES // 2**20 + 64) as disk:
        config = timed_run(
            disk, "full", telemetry={"tensorboard": True}, checkpoint={"every_steps": 2, "max_failures": 2},
            prompts={"source": "benchmarks.stand_ins:Prompts", "options": {"paint_s": 0.2, "update_s": 0.2}},
            stop={"steps": 16},
        )  # fmt: skip
        result = begin(config)
        wait_for(lambda: steps_of(config) >= 2, result)
        ballast = fill(disk, leave=MIN_FREE_BYTES // 2)
        wait_for(lambda: events(config, "vaults_full"), result)
        ballast.unlink()
        waited = steps_of(config)
        wait_for(lambda: steps_of(config) >= waited + 2, result)
        wait_for(lambda: events(config, "vaults_have_room"), result)

        ballast = fill(disk)
        with pytest.raises(ray.exceptions.RayTaskError) as stopped:
            ray.get(result, timeout=HELD_UP_S)
        assert isinstance(stopped.value.cause, StorageError | VaultFull), str(stopped.value)
        assert steps_of(config) < config.stop.steps
        ballast.unlink()

        summary = ray.get(begin(config, resume=True), timeout=HELD_UP_S)
        assert (summary["outcome"], summary["steps"], summary["groups_trained"]) == ("finished", 16, 32)
        books = books_of(config)
        assert books.balanced
        assert books.alive == 0
        assert events(config, "resumed")[0]["books_balanced"]
        assert [row["step"] for row in rows(config)][-1] == 16
        assert len(list((folder_of(config) / "tensorboard").iterdir())) == 2

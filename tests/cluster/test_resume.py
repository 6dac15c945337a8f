"""Going on with a run: what may change, what is refused with a way out, and the state it goes on from."""

from __future__ import annotations

import asyncio
import json
import shutil
import time
import uuid
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from cluster import lock, resume
from cluster.checkpoints.layout import list_whole
from cluster.cli import main
from cluster.lock import RunLock, wait_for_release
from cluster.migrate import RUN_FORMAT
from cluster.resume import bring_back, has_begun, mend_lines, open_run, resumed_config
from cluster.run_folder import location_of
from cluster.scoring_loop import ScoringLoop
from contracts.config import RunConfig, load_config, to_yaml
from contracts.errors import ConfigError, ConfigErrors, ExitCode, StorageError, VersionChanged
from contracts.scores import point_table
from contracts.wire import DiscardReason, GroupState, PromptSpec
from tests.cluster.checkpoint_kit import SmallRun, make_config
from tests.cluster.small_disk import read_only
from tests.laws.run_kit import tiny_config


def begin(config: RunConfig) -> SmallRun:
    opened = open_run(config, resume=False)
    opened.lock.release()
    return SmallRun(config, opened.folder)


def saved(config: RunConfig, steps: int = 3) -> SmallRun:
    """A run with a checkpoint, one step after it, and groups in every state that a crash may meet."""
    run = begin(config)
    run.steps(steps)
    asyncio.run(run.keeper.write_now())
    run.steps(1)
    run.paint(1)
    run.paint(1, stop_at="generated")
    run.paint(1, stop_at="generating")
    return run


def reopened(config: RunConfig) -> tuple[SmallRun, list[int]]:
    """As a controller does it."""
    opened = open_run(config, resume=True)
    opened.lock.release()
    run = SmallRun(config, opened.folder, opened.checkpoint)
    opened.apply(run.context)
    step = 0 if opened.checkpoint is None else opened.checkpoint.step
    waiting = asyncio.run(bring_back(run.context, step))
    return run, waiting


# ---- what it goes on from


def test_it_goes_on_from_the_checkpoint_with_every_acknowledged_group(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    killed = saved(config)
    painted = killed.ledger.books().painted
    killed.close()
    run, waiting = reopened(config)
    books = run.ledger.books()
    assert (run.context.step, run.ledger.trained_steps, run.ledger.published_version) == (3, 3, 3)
    assert books.balanced
    assert books.painted == painted
    assert books.discarded == 0
    states = {row.group_id: row.state for row in run.ledger.rows() if row.live}
    assert states == {
        6: GroupState.READY, 7: GroupState.READY, 8: GroupState.READY, 9: GroupState.GENERATED, 10: GroupState.ADMITTED,
    }  # fmt: skip
    assert waiting == [9]
    assert run.context.groups[9].header.group_id == 9
    assert {group_id for group_id, _ in run.store.stored()} == {6, 7, 8, 9}
    run.step()
    assert run.context.step == 4
    run.close()


def test_without_a_checkpoint_it_goes_on_from_step_0(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    killed = begin(config)
    killed.steps(1)
    killed.close()
    run, _ = reopened(config)
    assert (run.context.step, run.ledger.trained_steps, run.ledger.books().balanced) == (0, 0, True)
    run.step()
    run.close()


def test_bytes_a_vault_has_lost_are_painted_again_and_unknown_ones_deleted(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    killed = saved(config)
    killed.close()
    vault = killed.folder.vault(0)
    (vault / "group-00000007-0.safetensors").unlink()
    (vault / "group-00000008-0.safetensors").write_bytes(b"torn")
    shutil.copy(vault / "group-00000009-0.safetensors", vault / "group-00000099-0.safetensors")
    run, waiting = reopened(config)
    assert waiting == [9]
    assert {group_id for group_id, _ in run.store.stored()} == {6, 9}
    assert run.ledger.row(7).state is run.ledger.row(8).state is GroupState.ADMITTED
    assert run.ledger.books().discarded_by_reason["lost"] == 4
    assert run.ledger.books().balanced
    run.close()


@pytest.mark.parametrize("harm", ["missing", "damaged", "behind"])
def test_a_ledger_that_is_gone_or_behind_is_restored_from_the_checkpoint(tmp_path: Path, harm: str) -> None:
    config = make_config(tmp_path)
    killed = begin(config)
    killed.steps(2)
    live = killed.paint(2)
    early = tmp_path / "early.sqlite"
    asyncio.run(killed.keeper.write_now())
    killed.close()
    if harm == "behind":
        fresh = SmallRun(make_config(tmp_path / "other"))
        fresh.close()
        shutil.copy(fresh.folder.ledger, early)
    for path in killed.folder.root.glob("ledger.sqlite*"):
        path.unlink()
    if harm == "damaged":
        killed.folder.ledger.write_bytes(b"not a database, by any means" * 100)
    elif harm == "behind":
        shutil.copy(early, killed.folder.ledger)
    shutil.rmtree(killed.folder.root / "vaults")
    run, _ = reopened(config)
    assert run.context.step == 2
    assert run.ledger.books().balanced
    assert [row.group_id for row in run.ledger.rows(state=GroupState.READY)] == live
    assert "ledger_restored" in run.kinds()
    assert run.ledger.next_position() == 6
    run.close()


def test_a_torn_checkpoint_sends_it_back_to_the_one_before(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    killed = saved(config)
    asyncio.run(killed.keeper.write_now())
    killed.close()
    newest = list_whole(killed.folder.checkpoints)[-1]
    assert newest.step == 4
    (newest.path / "param.safetensors").write_bytes(b"")
    run, _ = reopened(config)
    assert run.context.step == 3
    assert "checkpoint_torn" in run.kinds()
    assert run.ledger.books().balanced
    assert run.ledger.row(6).state is GroupState.ADMITTED  # its bytes were covered: painted again
    run.close()


def test_times_evaluations_and_versions_are_those_of_before(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    killed = begin(config)
    before = {
        "accuracy": 0.25, "standard_error": 0.1, "num_images": 4, "num_valid": 4, "by_task": {}, "columns": {},
        "sampling": {"steps": 4, "shift": 1.0, "guidance_scale": 1.0},
    }  # fmt: skip
    killed.context.trained_before, killed.context.before = 100.0, before
    killed.steps(1)
    asyncio.run(killed.keeper.write_now())
    killed.folder.update_manifest(scorer_versions={"judge": "1"})
    killed.close()
    run, _ = reopened(config)
    assert run.context.train_seconds() == 100.0
    assert resume.evaluation_before(run.context).accuracy == 0.25  # type: ignore[union-attr]
    assert run.context.scorer_versions == {"judge": "1"}
    run.close()


def test_half_a_line_is_ended(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"st')
    mend_lines(path)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'
    mend_lines(path)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'
    path.write_text("{")
    mend_lines(path)
    assert path.read_text() == ""
    mend_lines(tmp_path / "none")


# ---- at a URL


def test_a_run_at_a_url_goes_on_where_it_worked_or_from_its_newest_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config((tmp_path / "bucket").as_uri())
    killed = saved(config)
    killed.folder.sync()
    uploaded(killed)
    killed.close()
    here, _ = reopened(config)
    assert here.folder.root == killed.folder.root
    assert len(here.store.stored()) == 4
    here.close()
    shutil.rmtree(killed.folder.root)  # as on another machine
    monkeypatch.setattr(lock, "BEAT_S", 0.0)
    run, waiting = reopened(config)
    assert run.folder.root != killed.folder.root
    assert (run.context.step, waiting) == (3, [])
    assert run.ledger.books().balanced
    assert run.ledger.next_position() == 6  # what was painted after the checkpoint is admitted again, the same prompts
    run.close()


def uploaded(run: SmallRun) -> None:
    """The learner's files, which rank 0 would have sent."""
    newest, remote = run.keeper.newest, run.keeper._remote
    assert newest is not None
    assert remote is not None
    remote.put(newest.path, newest.step, ["param.safetensors", "state.json"])


# ---- what is refused


def test_a_running_run_is_refused_by_every_way_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_config(tmp_path)
    killed = saved(config)
    killed.close()
    held = RunLock.acquire(killed.folder.root)
    with pytest.raises(ConfigError, match="is running"):
        open_run(config, resume=True)
    from cluster.driver import train

    monkeypatch.setattr("cluster.validate.check", lambda _: [])
    monkeypatch.setattr("cluster.lock.wait_for_release", partial(wait_for_release, limit_s=0.1))
    with pytest.raises(ConfigError, match="is running"):
        train(config, show=False, resume=True)
    held.release()
    open_run(config, resume=True).lock.release()


@pytest.mark.parametrize(
    ("override", "named"),
    [("seed=2", "seed"), ("model.path=other", "model.path"), ("sampler.steps=3", "sampler"),
     ("rollout.group_size=8", "rollout.group_size"), ("vault.count=2", "vault.count")],
)  # fmt: skip
def test_what_the_weights_and_groups_stand_on_cannot_change(tmp_path: Path, override: str, named: str) -> None:
    saved(make_config(tmp_path)).close()
    with pytest.raises(ConfigErrors, match=rf"{named}: is .* cannot become .* start a new run"):
        resumed_config(str(tmp_path / "run"), [override])


def test_ranks_actors_and_limits_may_change(tmp_path: Path) -> None:
    saved(make_config(tmp_path)).close()
    config = resumed_config(
        str(tmp_path / "run"), ["learner.ranks=2", "rollout.actors=3", "stop.steps=500", "learner.zero_stage=3"]
    )
    assert (config.learner.ranks, config.rollout.actors, config.stop.steps) == (2, 3, 500)
    run, _ = reopened(config)
    assert load_config(run.folder.config).learner.ranks == 2
    run.close()


def test_a_moved_run_goes_on_where_it_is(tmp_path: Path) -> None:
    saved(make_config(tmp_path)).close()
    (tmp_path / "run").rename(tmp_path / "elsewhere")
    config = resumed_config(str(tmp_path / "elsewhere"))
    assert (config.runs_dir, config.name) == (str(tmp_path), "elsewhere")
    reopened(config)[0].close()


def test_no_run_and_a_finished_run(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no run at"):
        resumed_config(str(tmp_path / "nothing"))
    with pytest.raises(ConfigError, match="no run at"):
        resumed_config(f"memory://{uuid.uuid4().hex}/run")
    run = saved(make_config(tmp_path, stop={"steps": 4}))
    run.folder.write_json("summary.json", {"outcome": "finished", "steps": 4, "train_seconds": 1.0})
    run.close()
    with pytest.raises(ConfigError, match=r"is finished.*raise stop\.steps"):
        resumed_config(str(tmp_path / "run"))
    assert resumed_config(str(tmp_path / "run"), ["stop.steps=5"]).stop.steps == 5


def test_one_command_begins_a_run_goes_on_with_it_and_knows_its_end(tmp_path: Path) -> None:
    """`exist: resume`, for schedulers."""
    config = make_config(tmp_path, exist="resume", stop={"steps": 4})
    assert not has_begun(config)
    run = saved(config)
    run.close()
    assert has_begun(config)
    longer = make_config(tmp_path, exist="resume", stop={"steps": 9})
    found = resumed_config(location_of(config), given=longer)
    assert (found.stop.steps, found.exist) == (9, "resume")
    with pytest.raises(ConfigErrors, match="seed: is 0 in this run and cannot become 5"):
        resumed_config(location_of(config), given=make_config(tmp_path, seed=5))
    run.folder.write_json("summary.json", {"outcome": "finished", "steps": 4, "train_seconds": 1.0})
    file = tmp_path / "config.yaml"
    file.write_text(to_yaml(config))
    again = CliRunner().invoke(main, ["train", str(file)])
    assert again.exit_code == 0, again.output
    assert "is finished: there is nothing left to do; raise stop.steps" in again.output


def test_a_folder_that_is_no_run_is_not_gone_on_with(tmp_path: Path) -> None:
    config = make_config(tmp_path, exist="resume")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").touch()
    assert not has_begun(config)
    with pytest.raises(ConfigError, match="is no run folder, so it is left alone"):
        open_run(config, resume=False)


def test_prompts_that_changed_are_refused_unless_accepted(tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a\nb\n")
    config = make_config(tmp_path, prompts={"source": "text", "path": str(prompts), "held_out_fraction": 0.5})
    saved(config).close()
    assert resumed_config(str(tmp_path / "run")) == config
    prompts.write_text("a\nc\n")
    with pytest.raises(ConfigError, match=r"has changed since the run began.*--accept-new-prompts"):
        resumed_config(str(tmp_path / "run"))
    accepted = resumed_config(str(tmp_path / "run"), accept_new_prompts=True)
    run, _ = reopened(accepted)
    assert "prompts_changed" in run.kinds()
    run.close()
    assert resumed_config(str(tmp_path / "run")) == accepted  # from now on these are the run's prompts
    prompts.unlink()
    with pytest.raises(ConfigError, match="cannot be read"):
        resumed_config(str(tmp_path / "run"))


def test_the_command_line_tells_a_user_and_its_exit_code_a_scheduler(tmp_path: Path) -> None:
    refused = CliRunner().invoke(main, ["resume", str(tmp_path / "nothing")])
    assert refused.exit_code == 2
    assert "no run at" in refused.output
    assert "Traceback" not in refused.output
    help_text = CliRunner().invoke(main, ["--help"]).output
    assert all(f"  {code} " in help_text for code in (0, 1, 2, 3, 75))
    assert "resume" in help_text


# ---- formats


def test_a_run_of_format_1_is_migrated(tmp_path: Path) -> None:
    """Learner states alone, without checkpoints' manifests, and a manifest that names no format."""
    config = make_config(tmp_path)
    killed = saved(config)
    killed.close()
    for name in ("manifest.json", "run.json", "ledger.sqlite", "groups"):
        target = killed.folder.checkpoints / "step-000003" / name
        shutil.rmtree(target) if target.is_dir() else target.unlink()
    manifest = json.loads(killed.folder.manifest.read_text())
    killed.folder.write_json("manifest.json", {k: v for k, v in manifest.items() if k != "format"})
    resumed_config(str(tmp_path / "run"))
    run, _ = reopened(config)
    assert run.context.step == 3
    assert "migrated" in run.kinds()
    assert json.loads(run.folder.manifest.read_text())["format"] == RUN_FORMAT
    assert run.ledger.books().balanced
    run.close()
    run, _ = reopened(config)
    assert "migrated" not in run.kinds()
    run.close()


@pytest.mark.parametrize("found", [RUN_FORMAT + 1, 0, "two"])
def test_another_format_is_refused_with_the_reason(tmp_path: Path, found: Any) -> None:
    config = make_config(tmp_path)
    run = saved(config)
    run.folder.update_manifest(format=found)
    run.close()
    for attempt in (lambda: resumed_config(str(tmp_path / "run")), lambda: open_run(config, resume=True)):
        with pytest.raises(ConfigError, match=rf"has format {found}, this version of Salon reads formats 1 to"):
            attempt()
    RunLock.acquire(tmp_path / "run").release()


# ---- disks and clocks under the ledger


def test_a_read_only_run_folder_is_refused_with_the_way_out(tmp_path: Path, tiny_model_folder: Path) -> None:
    """By the lock, before anything is started; the run is untouched and goes on elsewhere or once it is writable."""
    config = tiny_config(tiny_model_folder, tmp_path)
    opened = open_run(config, resume=False)
    opened.lock.release()
    folder = opened.folder.root
    before = sorted((path.name, path.stat().st_mtime_ns) for path in folder.rglob("*"))
    with read_only(folder):
        ended = CliRunner().invoke(main, ["resume", str(folder)])
        assert ended.exit_code == ExitCode.CONFIG
        assert f"run folder {folder} cannot be written: " in ended.output
        assert "make it writable, or copy the run to a folder you can write and resume it there" in ended.output
        assert "Traceback" not in ended.output
        with pytest.raises(ConfigError, match="make it writable"):
            open_run(config, resume=True)
    assert sorted((path.name, path.stat().st_mtime_ns) for path in folder.rglob("*")) == before
    open_run(config, resume=True).lock.release()


def fill(run: SmallRun) -> None:
    for position in range(2, 1000):
        group_id = run.ledger.admit(PromptSpec(text="x" * 4000), position, 2)
        run.ledger.discard(group_id, DiscardReason.LATE)


def test_a_full_disk_under_the_ledger_is_told_once_and_loses_nothing(tmp_path: Path) -> None:
    run = SmallRun(make_config(tmp_path))
    run.steps(1)
    before = run.ledger.books()
    pages = run.ledger._db.execute("PRAGMA page_count").fetchone()[0]
    run.ledger._db.execute(f"PRAGMA max_page_count = {pages}")
    with pytest.raises(StorageError, match=r"cannot be written: database or disk is full.*resume the run"):
        fill(run)
    assert not run.ledger._db.in_transaction
    run.ledger._db.execute("PRAGMA max_page_count = 1000000")
    books = run.ledger.books()
    assert books.balanced
    assert (books.painted, books.trained_steps) == (before.painted, before.trained_steps)
    run.steps(1)  # room was made
    run.close()


def test_a_read_only_ledger_is_told_once(tmp_path: Path) -> None:
    run = SmallRun(make_config(tmp_path))
    run.steps(1)
    run.ledger._db.execute("PRAGMA query_only = ON")
    with pytest.raises(StorageError, match="attempt to write a readonly database"):
        run.paint(1)
    run.ledger._db.execute("PRAGMA query_only = OFF")
    run.steps(1)
    run.close()


@pytest.mark.parametrize("jump", [-10 * 365 * 86400.0, 10 * 365 * 86400.0])
def test_a_clock_that_jumps_ends_no_lease_and_makes_no_group_late(
    jump: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(tmp_path)
    run = SmallRun(config)
    run.steps(1)
    run.paint(2, stop_at="generating")
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + jump)
    assert run.ledger.expire_leases() == []
    assert run.ledger.discard_late(60.0) == []
    run.close()
    again = SmallRun(config, run.folder)  # resumed on a machine whose clock is years off
    assert again.ledger.recover() == [(2, GroupState.GENERATING), (3, GroupState.GENERATING)]
    assert again.ledger.discard_late(60.0) == []
    again.paint(0)
    assert again.ledger.lease_generating("actor", 60.0) is not None
    assert again.ledger.expire_leases() == []
    again.close()


# ---- scorers that come back as another version


def answer(run: SmallRun, loop: ScoringLoop, version: str) -> bool:
    return loop._versions_accepted({"judge": point_table("judge", version, ["score"], np.array([1.0, 2.0]))})


@pytest.mark.parametrize("policy", ["continue", "stop"])
def test_another_version_of_a_scorer_is_recorded_and_may_stop_the_run(policy: str, tmp_path: Path) -> None:
    config = make_config(tmp_path, reward={"on_version_change": policy})
    run = begin(config)
    loop = ScoringLoop(run.context, None)
    assert answer(run, loop, "1")
    assert answer(run, loop, "1")
    assert "scorer_version_changed" not in run.kinds()
    run.close()
    run, _ = reopened(config)  # the server came back as another while the run was away
    loop = ScoringLoop(run.context, None)
    assert answer(run, loop, "2") is (policy == "continue")
    assert ("scorer_version_changed", {"scorer": "judge", "before": "1", "now": "2"}) in run.telemetry.events
    kept = json.loads(run.folder.manifest.read_text())["scorer_versions"]
    if policy == "continue":
        assert kept == {"judge": "2"}
        assert not run.context.stopping
    else:
        assert kept == {"judge": "1"}
        assert isinstance(run.context.failure, VersionChanged)
        assert run.context.failure.exit_code == ExitCode.STOPPED_RESUMABLE
        assert "reward.on_version_change=continue" in str(run.context.failure)
    run.close()

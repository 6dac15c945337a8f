"""A run folder is read whole, whatever is missing, torn or undone, wherever it stands."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import fsspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cluster.ledger import Ledger
from cluster.report.faults import counts, faults, guard_events, is_fault
from cluster.report.samples import read_samples, same_images
from cluster.report.view import RunView, flatten, lineage, newest_run, open_run, read_run
from cluster.run_folder import RunFolder
from contracts.errors import ConfigError
from tests.cluster.made_up_run import HOSTILE, STEP_S, keep, make_run


def test_a_finished_run_is_read_whole(tmp_path: Path) -> None:
    view = read_run(make_run(tmp_path, steps=4))
    assert (view.name, view.state, view.step, view.missing) == ("made-up", "finished", 4, [])
    assert view.books is not None
    assert (view.books.painted, view.books.trained, view.books.alive) == (40, 32, 4)
    assert view.books.discarded_by_reason == {"zero_variance": 4}
    assert view.staleness == {0: 8}
    assert view.held_out_scorers == ["judge"]
    assert [event["tag"] for event in view.evaluations] == ["before", "after"]
    assert view.train_seconds() == 4 * STEP_S
    assert view.series("reward_mean/given/strict") == ([1, 2, 3, 4], pytest.approx([0.1, 0.2, 0.3, 0.4]))
    assert set(view.stage_seconds) >= {"scoring", "publication"}


@pytest.mark.parametrize(
    ("outcome", "state"),
    [("finished", "finished"), ("stopped", "stopped"), ("guard stop: kl", "stopped"), ("failed: Lost: no", "failed")],
)
def test_how_a_run_ended(tmp_path: Path, outcome: str, state: str) -> None:
    run = make_run(tmp_path)
    run.write_json("summary.json", {"outcome": outcome, "train_seconds": 1.0})
    assert read_run(run).state == state
    with run.events.open("a") as file:
        file.write('{"time": 1800000000, "event": "started"}\n')
    assert read_run(run).state == "crashed", "it was resumed after that summary and did not end again"


def test_a_crashed_run_and_a_running_one(tmp_path: Path) -> None:
    run = make_run(tmp_path, ended=False)
    assert read_run(run).state == "crashed"
    writer = Ledger(run.ledger)
    try:
        view = read_run(run)
    finally:
        writer.close()
    assert view.state == "running"
    assert view.train_seconds() == 4 * STEP_S, "of a run without a summary: to its last step"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("ledger.sqlite", "ledger"), ("metrics.jsonl", "no learner step"), ("events.jsonl", "events.jsonl"),
        ("manifest.json", "manifest.json"), ("samples", "samples/"), ("config.yaml", "config.yaml"),
    ],
)  # fmt: skip
def test_what_is_missing_is_named(tmp_path: Path, name: str, words: str) -> None:
    run = make_run(tmp_path)
    path = run.root / name
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    view = read_run(run)
    assert any(words in text for text in view.missing), view.missing


def test_torn_lines_and_settings_of_another_version(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    with run.metrics.open("a") as file:
        file.write('{"time": 1, "ste')
    with run.config.open("a") as file:
        file.write("no_such_key: 1\n")
    run.ledger.write_bytes(b"nothing of a database")
    view = read_run(run)
    assert view.step == 4
    assert view.config is None
    assert view.settings["rollout.group_size"] == 4
    assert any("no_such_key" in text for text in view.missing)
    assert view.books is None


def rows(*steps: int) -> list[dict[str, float]]:
    return [{"time": float(index), "step": float(step)} for index, step in enumerate(steps)]


def test_what_a_roll_back_undid_is_left_out() -> None:
    kept = lineage(rows(1, 2, 3, 4, 3, 4, 5))
    assert [row["step"] for row in kept] == [1, 2, 3, 4, 5]
    assert [row["time"] for row in kept] == [0, 1, 4, 5, 6]


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.integers(1, 20), max_size=40))
def test_a_lineage_rises_and_ends_with_the_newest_row(steps: list[int]) -> None:
    kept = [row["step"] for row in lineage(rows(*steps))]
    assert kept == sorted(set(kept))
    assert kept[-1:] == [float(step) for step in steps[-1:]]


def test_counters_go_on_over_a_process_that_starts_anew(tmp_path: Path) -> None:
    view = RunView(RunFolder(tmp_path))
    view.all_rows = [{"c/a": value} for value in (1.0, 5.0, 2.0, 3.0)]
    assert view.total("c/a") == 5 + 3
    view.from_start = False
    assert view.total("c/a") == 4 + 3, "only what the rows at hand add"
    assert view.totals("c") == {"a": 7.0}


def test_runs_are_found_by_name_by_path_and_by_age(tmp_path: Path) -> None:
    first = make_run(tmp_path, "first")
    second = make_run(tmp_path, "second")
    for path in first.root.iterdir():
        if path.is_file():
            (second.root / path.name).touch()
    assert open_run("first", str(tmp_path)).root == open_run(str(first.root)).root
    assert newest_run(str(tmp_path)).root.name == "second"
    with pytest.raises(ConfigError, match="no run"):
        open_run("third", str(tmp_path))
    with pytest.raises(ConfigError, match="no run"):
        newest_run(str(tmp_path / "empty"))


def test_a_run_behind_a_url_is_read_without_its_weights(tmp_path: Path) -> None:
    remote = RunFolder(make_run(tmp_path).root, f"memory://{tmp_path.name}/made-up")
    remote.sync()
    weights = f"/{tmp_path.name}/made-up/checkpoints/step-000001/param.safetensors"
    fsspec.filesystem("memory").pipe_file(weights, b"large")
    folder = open_run(remote.url or "")
    view = read_run(folder)
    assert (view.state, view.step, len(view.samples)) == ("finished", 4, 2)
    assert not list((folder.root / "checkpoints").glob("*"))
    assert list((open_run(remote.url or "", whole=True).root / "checkpoints").glob("*/param.safetensors"))


def test_images_pair_up_by_prompt_and_seed(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    sets = read_samples(run.samples)
    assert [(each.tag, each.step) for each in sets] == [("before", 0), ("after", 4)]
    pairs = same_images(sets)
    assert [key for key, _ in pairs] == [(HOSTILE, 11), ("two blue squares", 12)]
    first, last = pairs[0][1]
    assert first is not None
    assert last is not None
    assert (first.scores, last.scores) == ({"given/strict": 0.0}, {"given/strict": 1.0})
    assert first.path.read_bytes() != last.path.read_bytes()


def test_samples_never_lead_out_of_their_folder(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    file = run.samples / "before.json"
    text = json.loads(file.read_text())
    text["images"][0]["file"] = "../config.yaml"
    file.write_text(json.dumps(text))
    (run.samples / "torn.json").write_text('{"tag": ')
    assert [len(each.samples) for each in read_samples(run.samples)] == [1, 2]
    assert len(same_images(read_samples(run.samples))) == 1, "an image without its pair is not shown"


def test_one_set_of_images_is_shown_alone(tmp_path: Path) -> None:
    run = make_run(tmp_path, ended=False)
    assert len(same_images(read_samples(run.samples))) == 2
    keep(run, "step 2", 2, [0.0, 1.0])
    assert [each.tag for each in read_samples(run.samples)] == ["before", "step 2"]


def test_faults_guards_and_what_nobody_has_heard_of(tmp_path: Path) -> None:
    events = read_run(make_run(tmp_path)).events
    assert [one.kind for one in faults(events)] == ["actor_restart"]
    assert faults(events)[0].detail == "actor actor-0, killed True"
    assert [one.kind for one in guard_events(events)] == ["guard_warned"]
    assert counts(faults(events) * 2) == {"actor_restart": 2}
    assert is_fault("something_new")
    assert is_fault("checkpoint_failed")
    assert not is_fault("checkpoint_written")


def test_settings_by_dotted_keys() -> None:
    tree = {"a": {"b": 1}, "scorers": [{"name": "x"}, {"name": "y"}], "steps": [1, 2], "none": {}}
    assert flatten(tree) == {
        "a.b": 1, "scorers.0.name": "x", "scorers.1.name": "y", "steps": [1, 2], "none": {},
    }  # fmt: skip

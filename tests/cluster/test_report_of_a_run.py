"""One real run of two actors' groups: its trace, samples, report, status and ledger agree with what it did."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from cluster.cli import main
from cluster.ledger_cli import list_groups
from cluster.repaint import repaint
from cluster.report.page import provenance
from cluster.report.samples import read_samples, same_images
from cluster.report.view import read_run
from cluster.run_folder import RunFolder
from cluster.status import take_status
from contracts.config import RunConfig
from reward_servers.scorers.colourfulness import Colourfulness
from tests.cluster.whole_run import folder_of
from tests.laws.run_kit import run_on_cluster, tiny_config


@pytest.fixture(scope="module")
def config(shared_ray: None, tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    config = tiny_config(
        tiny_model_folder, tmp_path_factory.mktemp("runs"), stop__steps=2, eval__before=True, eval__samples_to_save=3,
        telemetry__report=True, checkpoint__every_steps=1,
    )  # fmt: skip
    run_on_cluster(config)
    return config


@pytest.fixture(scope="module")
def run(config: RunConfig) -> RunFolder:
    return RunFolder.open(folder_of(config))


def test_the_trace_has_a_lane_a_role(run: RunFolder) -> None:
    events = json.loads((run.root / "trace.json").read_text())
    names = {event["pid"]: event["args"]["name"] for event in events if event.get("name") == "process_name"}
    assert set(names.values()) == {
        "controller", "actor-0", "vault-0", "dispatcher", "scorer colour", "learner", "learner-0", "publish",
        "checkpoint",
    }  # fmt: skip
    work: dict[str, set[str]] = {}
    for event in events:
        if event.get("ph") == "X":
            work.setdefault(names[event["pid"]], set()).add(event["name"])
    assert work["actor-0"] >= {"paint", "decode", "store"}
    assert work["learner"] == {"update", "wait_for_groups", "checkpoint"}
    assert work["vault-0"] == {"store"}
    assert work["dispatcher"] == {"score group"}
    assert work["learner-0"] >= {"fetch", "forward_backward", "optimizer"}
    assert work["scorer colour"] == {"score"}
    stalls = {event["args"]["step"]: event for event in events if event.get("name") == "checkpoint" and "dur" in event}
    wholes = {event["args"]["step"]: event for event in events if event.get("name") == "begin to end"}
    assert stalls.keys() == wholes.keys() == {1, 2}
    assert all(0 < stalls[step]["dur"] < wholes[step]["dur"] for step in stalls)
    painted = [event for event in events if event.get("name") == "paint"]
    assert {event["args"]["group"] for event in painted} >= {0, 1, 2, 3}
    updates = [event for event in events if event.get("name") == "update"]
    ranks = [event for event in events if event.get("name") == "forward_backward"]
    for update, rank in zip(updates, ranks, strict=True):
        assert update["ts"] <= rank["ts"] <= update["ts"] + update["dur"], "clocks of processes agree"


def test_before_and_after_are_the_same_prompts_and_seeds(run: RunFolder) -> None:
    sets = read_samples(run.samples)
    assert [each.tag for each in sets] == ["before", "after"]
    assert [len(each.samples) for each in sets] == [3, 3]
    assert len(same_images(sets)) == 3
    assert all(sample.scores.keys() == {"colour/colourfulness"} for each in sets for sample in each.samples)


def test_the_run_records_what_its_scorers_say_of_themselves(run: RunFolder) -> None:
    (name, said), *others = json.loads(run.manifest.read_text())["scorers"].items()
    scorer = Colourfulness()
    assert (name, others) == ("colour", [])
    assert said == {
        "version": scorer.version, "value_range": list(scorer.value_range),
        "higher_is_better": scorer.higher_is_better, "weight_digest": scorer.weight_digest,
    }  # fmt: skip
    assert f"colour {scorer.version} (" in provenance(read_run(run))["scorers"]


def test_the_report_was_written_when_it_ended(run: RunFolder) -> None:
    page = run.report.read_text()
    assert page.count("<img") == 6
    for words in ("finished", "held-out score", "colour · colourfulness", "learner&#39;s time", "The books balance"):
        assert words in page, words


def test_status_of_a_finished_run(run: RunFolder) -> None:
    status = take_status(run)
    assert (status["state"], status["step"], status["stages"]["trained"]) == ("finished", 2, 4)
    assert status["books"]["balanced"]
    assert status["faults"]["number"] == 0, status["faults"]
    assert status["missing"] == []


def test_a_group_of_weights_that_are_kept_is_painted_again_to_the_byte(run: RunFolder, tmp_path: Path) -> None:
    """Version 0 is the model folder itself; version 1 stands in the checkpoint of step 1."""
    listing = list_groups(run, state="trained", limit=10)
    versions = {group["version"]: group["group"] for group in listing["groups"]}
    assert set(versions) == {0, 1}
    for version, group_id in versions.items():
        kept = version == 0 or (run.checkpoints / f"step-{version:06d}").is_dir()
        done = repaint(run, group_id)
        assert (done.version, done.used == version, done.equal) == (version, kept, kept), done.words


def test_what_the_ledger_knows_of_a_group_and_paints_again(run: RunFolder, tmp_path: Path) -> None:
    done = CliRunner().invoke(
        main, ["ledger", str(run.root), "group", "0", "--repaint", "--out", str(tmp_path), "--json"]
    )
    assert done.exit_code == 0, done.output
    shown = json.loads(done.stdout)
    assert shown["where"] == "trained in step 1, 0 steps after its weights"
    assert len(shown["seeds"]) == 4
    assert len(shown["scores"]["colour"]["values"]) == 4
    assert [event["event"] for event in shown["journal"]][-1] == "trained"
    again = pictures(shown["repainted"]["images"])
    assert again.shape == (4, 32, 32, 3)
    assert shown["repainted"]["equal"] is True, shown["repainted"]["words"]
    if shown["images"]:
        np.testing.assert_array_equal(pictures(shown["images"]), again)
    else:
        assert "let go" in shown["images_missing"]


def pictures(paths: list[str]) -> np.ndarray:
    return np.stack([np.asarray(Image.open(path)) for path in paths])


def test_other_weights_are_said_and_seen(run: RunFolder) -> None:
    shutil.rmtree(run.checkpoints / "step-000001", ignore_errors=True)
    group = list_groups(run, version=1, state="trained", limit=1, newest_first=True)["groups"][0]["group"]
    done = repaint(run, group)
    assert (done.version, done.used, done.equal) == (1, 2, False)
    assert "version 2, the nearest whose weights are kept" in done.words

"""The run folder: created once, written whole, mirrored to URLs, refused with a way out."""

from __future__ import annotations

import json
import uuid
from pathlib import Path

import fsspec
import numpy as np
import pytest
from PIL import Image

from cluster.ledger import Ledger, LedgerReader
from cluster.run_folder import RunFolder, code_version
from contracts.config import RunConfig, load_config
from contracts.config.load import config_from_tree
from contracts.errors import ConfigError
from contracts.wire import PromptSpec
from tests.cluster.small_disk import read_only


def make_config(runs_dir: str | Path, **fields: object) -> RunConfig:
    return config_from_tree(
        {
            "name": "run",
            "runs_dir": str(runs_dir),
            "model": {"path": "model"},
            "scorers": [{"name": "judge", "function": "judge:score"}],
            "objective": {"name": "grpo"},
            "stop": {"steps": 1},
            **fields,
        }
    )


@pytest.fixture
def memory_url() -> str:
    """A folder of its own in fsspec's memory file system, which lives as long as the process."""
    return f"memory://{uuid.uuid4().hex}"


def test_a_new_folder_holds_the_resolved_configuration_and_the_code_version(tmp_path: Path) -> None:
    config = make_config(tmp_path / "runs", seed=7)
    folder = RunFolder.create(config)
    assert folder.root == tmp_path / "runs" / "run"
    assert Path(folder) == folder.root
    assert load_config(folder.config) == config
    manifest = json.loads(folder.manifest.read_text())
    assert (manifest["name"], manifest["seed"]) == ("run", 7)
    assert manifest["packages"]["ray"].startswith("2.")
    for place in (folder.samples, folder.checkpoints, folder.stacks, folder.vault(1)):
        assert place.is_dir()
        assert folder.root in place.parents
    assert RunFolder.open(folder.root).config == folder.config


def test_the_code_version_names_the_commit_of_a_checkout() -> None:
    version = code_version()
    assert version["salon"]
    if (Path(__file__).parents[2] / ".git").exists():
        assert len(version["commit"]) == 40
        assert version["uncommitted_changes"] in (True, False)


def test_an_existing_run_is_kept_unless_it_is_to_be_replaced(tmp_path: Path) -> None:
    folder = RunFolder.create(make_config(tmp_path))
    folder.write_text("summary.json", "{}")
    with pytest.raises(ConfigError, match="exist=replace"):
        RunFolder.create(make_config(tmp_path))
    assert folder.summary.is_file()
    RunFolder.create(make_config(tmp_path, exist="replace"))
    assert not folder.summary.exists()
    assert folder.config.is_file()


def test_what_is_no_run_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    RunFolder.create(make_config(tmp_path, exist="replace"))  # empty: nothing is lost
    (tmp_path / "other" / "run").mkdir(parents=True)
    precious = tmp_path / "other" / "run" / "thesis.txt"
    precious.write_text("years")
    with pytest.raises(ConfigError, match="no run folder"):
        RunFolder.create(make_config(tmp_path / "other", exist="replace"))
    assert precious.read_text() == "years"


def test_a_running_run_is_never_replaced(tmp_path: Path) -> None:
    folder = RunFolder.create(make_config(tmp_path))
    ledger = Ledger(folder.ledger)
    with pytest.raises(ConfigError, match="is running"):
        RunFolder.create(make_config(tmp_path, exist="replace"))
    ledger.close()
    RunFolder.create(make_config(tmp_path, exist="replace"))
    assert not folder.ledger.exists()


def test_stack_files_of_the_starting_run_are_no_obstacle(tmp_path: Path) -> None:
    (tmp_path / "run" / "stacks").mkdir(parents=True)
    dump = tmp_path / "run" / "stacks" / "controller-1.txt"
    dump.write_text("")
    RunFolder.create(make_config(tmp_path))
    RunFolder.create(make_config(tmp_path, exist="replace"))
    assert dump.exists()


def test_a_place_that_cannot_be_written_is_refused_with_a_way_out(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"cannot be written.*set runs_dir"):
        RunFolder.create(make_config(tmp_path / "file"))


def test_a_read_only_folder_is_refused(tmp_path: Path) -> None:
    with (
        read_only(tmp_path),
        pytest.raises(ConfigError, match=r"cannot be written: (Permission|Read-only)"),
    ):
        RunFolder.create(make_config(tmp_path))


def test_an_unknown_kind_of_url_is_refused() -> None:
    with pytest.raises(ConfigError, match="no usable fsspec URL"):
        RunFolder.create(make_config("nonsense://bucket"))


def test_a_folder_without_a_run_cannot_be_opened(tmp_path: Path, memory_url: str) -> None:
    with pytest.raises(ConfigError, match="no run at"):
        RunFolder.open(tmp_path)
    with pytest.raises(ConfigError, match="no run at"):
        RunFolder.open(memory_url)


def test_files_are_replaced_whole(tmp_path: Path) -> None:
    folder = RunFolder.create(make_config(tmp_path))
    folder.write_json("summary.json", {"a": 1})
    with pytest.raises(TypeError):
        folder.write_json("summary.json", {"a": object()})
    assert json.loads(folder.summary.read_text()) == {"a": 1}
    assert folder.write_text("samples/before.json", "[]").read_text() == "[]"
    assert not list(folder.root.rglob("*.tmp"))


def test_images_are_kept_lossless(tmp_path: Path) -> None:
    folder = RunFolder.create(make_config(tmp_path))
    image = np.random.default_rng(0).integers(0, 256, (16, 24, 3), dtype=np.uint8)
    path = folder.save_image("before.png", image)
    assert path == folder.samples / "before.png"
    np.testing.assert_array_equal(np.asarray(Image.open(path)), image)


def test_the_manifest_is_added_to(tmp_path: Path) -> None:
    folder = RunFolder.create(make_config(tmp_path))
    folder.update_manifest(weight_digests={"0": "aa"}, scorer_versions={"judge": "1"})
    manifest = folder.update_manifest(weight_digests={"1": "bb"})
    assert manifest["weight_digests"] == {"0": "aa", "1": "bb"}
    assert json.loads(folder.manifest.read_text()) == manifest
    assert manifest["name"] == "run"


def test_only_checkpoints_are_removed_as_such(tmp_path: Path) -> None:
    folder = RunFolder.create(make_config(tmp_path))
    state = folder.checkpoints / "step-000001"
    state.mkdir()
    (state / "policy.safetensors").write_bytes(b"x")
    folder.remove_checkpoint(state)
    assert not state.exists()
    folder.remove_checkpoint(state)
    folder.remove_checkpoint(None)
    with pytest.raises(ValueError, match="no checkpoint"):
        folder.remove_checkpoint(folder.samples)


@pytest.mark.parametrize("kind", ["memory", "file"])
def test_a_url_mirrors_the_run(tmp_path: Path, memory_url: str, kind: str) -> None:
    runs_dir = memory_url if kind == "memory" else (tmp_path / "remote").as_uri()
    folder = RunFolder.create(make_config(runs_dir))
    assert folder.location == f"{runs_dir}/run"
    remote, path = fsspec.core.url_to_fs(folder.location)
    assert remote.cat_file(f"{path}/config.yaml").decode() == folder.config.read_text()

    ledger = Ledger(folder.ledger)
    ledger.admit(PromptSpec(text="a"), 0, 4)
    (folder.vault(0) / "group-0.safetensors").write_bytes(b"x")
    (folder.stacks / "actor.txt").write_text("")
    folder.write_text("samples/a.json", "[]")
    assert folder.sync() == 3  # the ledger, what hung and the sample
    assert folder.sync() == 0
    ledger.admit(PromptSpec(text="b"), 1, 4)
    assert folder.sync() == 1
    (folder.samples / "a.json").unlink()
    folder.sync()
    names = {name.removeprefix(path).lstrip("/") for name in remote.find(path)} - {".salon"}
    assert names == {"config.yaml", "manifest.json", "ledger.sqlite", "stacks/actor.txt"}

    opened = RunFolder.open(folder.location)
    assert opened.root != folder.root
    reader = LedgerReader(opened.ledger)  # while the run goes on
    assert reader.books().groups["admitted"] == 2
    reader.close()
    opened.write_text("report.html", "<html></html>")
    assert opened.sync() == 1
    assert remote.exists(f"{path}/report.html")
    ledger.close()


def test_an_existing_run_behind_a_url_is_kept_unless_it_is_to_be_replaced(memory_url: str) -> None:
    folder = RunFolder.create(make_config(memory_url))
    folder.write_text("summary.json", "{}")
    folder.sync()
    with pytest.raises(ConfigError, match="exist=replace"):
        RunFolder.create(make_config(memory_url))
    RunFolder.create(make_config(memory_url, exist="replace"))
    remote, path = fsspec.core.url_to_fs(folder.location)
    assert not remote.exists(f"{path}/summary.json")
    remote.rm(f"{path}/config.yaml")
    remote.pipe_file(f"{path}/thesis.txt", b"years")
    with pytest.raises(ConfigError, match="no run folder"):
        RunFolder.create(make_config(memory_url, exist="replace"))

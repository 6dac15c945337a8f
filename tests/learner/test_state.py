"""The learner's state on disk: exact, canonical, atomic; across engines: test_engine_ranks.py. About 10 s."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from actors.painter import Painter
from contracts.errors import LearnerError
from learner.rank import RankLearner
from learner.state import STATE_FILE, read_description
from learner.state_writer import StateWriter
from tests.learner.learner_harness import Painted, job_of, make_config, paint_groups, seeded_rewards, weights_of

PPO = {"name": "ppo", "kl_beta": 0.1}
LEARNER = {"updates_per_step": 2, "ema": {"decay": 0.9}, "optimizer": {"lr": 1e-3, "warmup_steps": 5}}


@pytest.fixture(scope="module")
def painted(tiny_model_folder: Path) -> Painted:
    torch.set_num_threads(1)
    return paint_groups(Painter(make_config(tiny_model_folder, {"name": "grpo"})), 2)


@pytest.fixture
def build(tiny_model_folder: Path) -> Callable[..., RankLearner]:
    def make(objective: dict[str, Any] = PPO, **more: Any) -> RankLearner:
        return RankLearner(make_config(tiny_model_folder, objective, learner=LEARNER, **more), 0, 1)

    return make


def train(learner: RankLearner, painted: Painted) -> dict[str, float]:
    job = job_of(learner.config, painted, seeded_rewards(painted), learner)
    return learner.update(job, painted.fetch, painted.fetch_embedding).metrics


def everything(learner: RankLearner) -> dict[str, np.ndarray]:
    """Weights, moments and snapshots by name."""
    found = {
        f"{kind}/{name}": value
        for kind in ("param", "exp_avg", "exp_avg_sq")
        for name, value in weights_of(learner, kind).items()
    }
    for snapshot in learner.snapshots.names:
        for name in learner.engine.named_trainable():
            found[f"{snapshot}/{name}"] = learner.snapshots.full_tensor(snapshot, name).numpy().copy()
    return found


def test_a_resumed_learner_goes_on_bit_for_bit(build: Any, painted: Painted, tmp_path: Path) -> None:
    learner, resumed = build(), build()
    train(learner, painted)
    learner.snapshot(3, 1)
    learner.save_state(tmp_path / "state")
    resumed.load_state(tmp_path / "state")
    before = everything(learner)
    assert {"ref/critic.out.weight", "ema/critic.out.weight", "exp_avg_sq/critic.out.weight"} <= set(before)
    assert all(np.array_equal(value, before[name]) for name, value in everything(resumed).items())
    assert resumed.engine.optimizer_steps == learner.engine.optimizer_steps == 2
    for version in (4, 5):
        assert train(learner, painted) == train(resumed, painted)
        published, again = learner.snapshot(version, version), resumed.snapshot(version, version)
        assert published is not None
        assert again is not None
        assert published.offer == again.offer
        assert np.array_equal(published.canary_previous, again.canary_previous)
    after = everything(learner)
    assert all(np.array_equal(value, after[name]) for name, value in everything(resumed).items())
    assert any(not np.array_equal(value, after[name]) for name, value in before.items())


def test_the_files_are_plain_safetensors_under_canonical_names(build: Any, painted: Painted, tmp_path: Path) -> None:
    learner = build(model={"tuning": "lora", "lora": {"rank": 2, "alpha": 4}})
    train(learner, painted)
    learner.save_state(tmp_path / "state")
    files = sorted(path.name for path in (tmp_path / "state").iterdir())
    assert files == [
        "exp_avg.safetensors", "exp_avg_sq.safetensors", "param.safetensors", "snapshot-ema.safetensors",
        "snapshot-ref.safetensors", STATE_FILE,
    ]  # fmt: skip
    expected = weights_of(learner)
    loaded = load_file(tmp_path / "state" / "param.safetensors")
    assert set(loaded) == set(expected) >= set(learner.policy.trainable())
    assert not any("default" in name for name in loaded)
    assert all(np.array_equal(value.numpy(), expected[name]) for name, value in loaded.items())
    assert read_description(tmp_path / "state")["optimizer_steps"] == 2


def test_the_writer_writes_what_the_library_reads_and_digests_it(tmp_path: Path) -> None:
    tensors = {"b": torch.randn(3, 5), "a.empty": torch.zeros(0, 4), "scalar": torch.tensor(2.5), "é": torch.randn(7)}
    writer = StateWriter(tmp_path / "new", 2**20)
    writer.tensors("x.safetensors", {name: tuple(t.shape) for name, t in tensors.items()}, lambda n: tensors[n].numpy())
    writer.text("note.json", "{}")
    found = writer.finish()
    loaded = load_file(tmp_path / "new" / "x.safetensors")
    assert sorted(loaded) == sorted(tensors)
    for name, tensor in tensors.items():
        assert loaded[name].shape == tensor.shape
        assert torch.equal(loaded[name], tensor)
    blobs = {path.name: path.read_bytes() for path in (tmp_path / "new").iterdir()}
    assert found == {name: (len(blob), hashlib.sha256(blob).hexdigest()) for name, blob in blobs.items()}


def test_training_goes_on_while_a_state_is_written(
    build: Any, painted: Painted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk stands still until the next update is made: what is written is the state before it."""
    learner, resumed, disk = build(), build(), threading.Event()
    train(learner, painted)
    before = everything(learner)
    take = StateWriter._take

    def stuck(writer: StateWriter) -> Any:
        assert disk.wait(60)
        return take(writer)

    monkeypatch.setattr(StateWriter, "_take", stuck)
    pending = learner.begin_save(tmp_path / "state")
    train(learner, painted)
    disk.set()
    pending.finish()
    resumed.load_state(tmp_path / "state")
    after = everything(resumed)
    assert all(np.array_equal(after[name], value) for name, value in before.items())
    assert any(not np.array_equal(after[name], value) for name, value in everything(learner).items())


def test_what_waits_for_the_disk_is_bounded(tmp_path: Path) -> None:
    tensors = {str(i): np.full(1000, i, np.float32) for i in range(20)}
    writer, most = StateWriter(tmp_path / "new", 10_000), 0

    def collect(name: str) -> np.ndarray:
        nonlocal most
        most = max(most, writer._waiting_bytes)
        return tensors[name]

    writer.tensors("x.safetensors", dict.fromkeys(tensors, (1000,)), collect)
    writer.finish()
    assert 0 < most <= 10_000
    assert len(load_file(tmp_path / "new" / "x.safetensors")) == 20


def test_a_disk_that_fails_holds_nobody_up_and_is_told_at_the_end(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    writer = StateWriter(tmp_path / "file" / "new", 0)
    writer.tensors("x.safetensors", {"a": (1000,), "b": (1000,)}, lambda _: np.zeros(1000, np.float32))
    with pytest.raises(NotADirectoryError):
        writer.finish()


def test_an_interrupted_save_leaves_the_state_before_it(
    build: Any, painted: Painted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    learner = build()
    learner.save_state(tmp_path / "state")
    before = {path.name: path.read_bytes() for path in (tmp_path / "state").iterdir()}
    train(learner, painted)

    def full_disk(name: str, kind: str) -> torch.Tensor:
        raise OSError("no space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(learner.engine, "full_tensor", full_disk)
        with pytest.raises(OSError, match="no space"):
            learner.save_state(tmp_path / "state")
    assert {path.name: path.read_bytes() for path in (tmp_path / "state").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["state"]
    learner.save_state(tmp_path / "state")
    assert {path.name: path.read_bytes() for path in (tmp_path / "state").iterdir()} != before
    assert [path.name for path in tmp_path.iterdir()] == ["state"]


def test_a_snapshot_the_state_lacks_starts_from_its_weights(build: Any, painted: Painted, tmp_path: Path) -> None:
    learner = build({"name": "ppo"})
    train(learner, painted)
    learner.save_state(tmp_path / "state")
    other = build(PPO)
    other.load_state(tmp_path / "state")
    for name, value in weights_of(learner).items():
        assert np.array_equal(other.snapshots.full_tensor("ref", name).numpy(), value)


# -- states that do not fit


@pytest.fixture
def saved(build: Any, tmp_path: Path) -> Path:
    build().save_state(tmp_path / "state")
    return tmp_path / "state"


def test_no_state_is_an_error_that_names_the_folder(build: Any, tmp_path: Path) -> None:
    with pytest.raises(LearnerError, match="nowhere is no learner state"):
        build().load_state(tmp_path / "nowhere")


def test_another_format_is_refused(build: Any, saved: Path) -> None:
    described = json.loads((saved / STATE_FILE).read_text())
    (saved / STATE_FILE).write_text(json.dumps({**described, "format": 99}))
    with pytest.raises(LearnerError, match="format 99"):
        build().load_state(saved)


def test_another_models_state_is_refused_with_names(build: Any, saved: Path) -> None:
    with pytest.raises(LearnerError, match=r"has besides critic\."):
        build({"name": "grpo", "kl_beta": 0.1}).load_state(saved)


def test_another_shape_is_refused(build: Any, saved: Path) -> None:
    tensors = load_file(saved / "param.safetensors")
    tensors["critic.out.bias"] = torch.zeros(9)
    save_file(tensors, saved / "param.safetensors")
    with pytest.raises(LearnerError, match=r"critic\.out\.bias has shape \(9,\)"):
        build().load_state(saved)


def test_a_truncated_file_is_refused(build: Any, saved: Path) -> None:
    blob = (saved / "exp_avg.safetensors").read_bytes()
    (saved / "exp_avg.safetensors").write_bytes(blob[: len(blob) // 2])
    with pytest.raises(LearnerError, match=r"exp_avg\.safetensors cannot be read"):
        build().load_state(saved)

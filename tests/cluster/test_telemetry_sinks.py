"""Trackers: what each is given, and that one that fails, hangs or has no room costs its rows and never the run."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from cluster.telemetry import Telemetry, sink_thread, telemetry
from cluster.telemetry.sinks import SHOWN_PROCESSES, TensorBoardSink, for_sinks
from contracts.config.load import config_from_tree
from contracts.config.run import RunConfig
from tests.cluster.small_disk import fill, small_disk

PATIENCE_S = 60.0


def run_config(**told: Any) -> RunConfig:
    return config_from_tree(
        {
            "name": "told", "seed": 5, "model": {"path": "m"}, "objective": {"name": "grpo"}, "stop": {"steps": 1},
            "scorers": [{"name": "a", "serve": "jpeg_size"}], "telemetry": {"tensorboard": False, **told},
        }
    )  # fmt: skip


class WaywardSink:
    """Raises, or waits for `release`, as it is told."""

    def __init__(self) -> None:
        self.rows: list[int] = []
        self.raises, self.closed = False, False
        self.release = threading.Event()
        self.release.set()

    def scalars(self, row: Mapping[str, float], step: int) -> None:
        self.release.wait(PATIENCE_S)
        if self.raises:
            raise ConnectionError("the tracker's server is away")
        self.rows.append(step)

    def image(self, tag: str, image: np.ndarray, step: int) -> None:
        self.scalars({}, step)

    def close(self) -> None:
        self.release.wait(PATIENCE_S)
        self.closed = True


@pytest.fixture
def sink() -> Iterator[WaywardSink]:
    made = WaywardSink()
    yield made
    made.release.set()


def end_step(telemetry: Telemetry, step: int) -> dict[str, float]:
    return telemetry.step(
        step=step, images=8, seconds=1.0, staleness=[0], rewards={}, metrics={"loss": 0.25}, phases={}
    )


def until(what: Any) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not what():
        assert time.monotonic() < deadline, "it never came to pass"
        time.sleep(0.01)


def lost(telemetry: Telemetry, name: str) -> float:
    return telemetry.snapshot()[f"sink_rows_lost_total/{name}"]


def events_of(folder: Path, prefix: str = "sink_") -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"].startswith(prefix)]


# ---- sinks that fail


def test_a_sink_that_raises_loses_its_rows_alone_and_says_so_once(tmp_path: Path, sink: WaywardSink) -> None:
    other = WaywardSink()
    told = Telemetry(run_config(), tmp_path, serve=False, sinks={"bad": lambda: sink, "good": lambda: other})
    assert lost(told, "bad") == 0, "the series is there from the beginning"
    sink.raises = True
    for step in (1, 2, 3):
        end_step(told, step)
    until(lambda: lost(told, "bad") == 3)
    sink.raises = False
    end_step(told, 4)
    told.close()
    assert (sink.rows, other.rows) == ([4], [1, 2, 3, 4])
    assert sink.closed
    assert lost(told, "good") == 0
    loses, again = events_of(tmp_path)
    assert (loses["event"], loses["sink"]) == ("sink_loses_rows", "bad")
    assert "the tracker's server is away" in loses["error"]
    assert (again["event"], again["lost"]) == ("sink_writes_again", 3)


def test_a_sink_that_hangs_holds_up_neither_a_step_nor_the_end(
    tmp_path: Path, sink: WaywardSink, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(telemetry, "CLOSE_S", 0.2)
    told = Telemetry(run_config(), tmp_path, serve=False, sinks={"hung": lambda: sink})
    sink.release.clear()
    beyond = 5
    for step in range(1, sink_thread.QUEUED + 1 + beyond):
        end_step(told, step)
    assert lost(told, "hung") == beyond
    told.image("samples/test", np.zeros((4, 4, 3), np.uint8), 1)
    told.close()
    assert lost(told, "hung") == beyond + 1 + sink_thread.QUEUED, "the picture, and what it was given"
    assert [event["event"] for event in events_of(tmp_path)] == ["sink_loses_rows"]
    end_step(told, 99)  # a straggler must not bring the run down


def test_a_sink_that_cannot_be_made_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    attempts = []
    sink = WaywardSink()

    def make() -> WaywardSink:
        attempts.append(threading.current_thread().name)
        if len(attempts) == 1:
            raise ConnectionError("no network")
        return sink

    told: list[tuple[str, dict[str, Any]]] = []
    counted: list[int] = []
    thread = sink_thread.SinkThread(
        "late", make, counted.append, lambda kind, **fields: told.append((kind, fields)), retry_s=0.0
    )
    for step in (1, 2):
        thread.scalars({}, step)
        until(lambda step=step: len(attempts) == step)
    thread.end()
    thread.join(time.monotonic() + PATIENCE_S)
    assert attempts == ["sink-late"] * 2, "in its own thread: a tracker's run may belong to the thread that began it"
    assert (sink.rows, sink.closed, sum(counted)) == ([2], True, 1)
    assert [kind for kind, _ in told] == ["sink_loses_rows", "sink_writes_again"]


def test_the_next_attempt_to_make_a_sink_waits(tmp_path: Path) -> None:
    attempts: list[int] = []

    def make() -> WaywardSink:
        attempts.append(1)
        raise ConnectionError("no network")

    counted: list[int] = []
    thread = sink_thread.SinkThread("away", make, counted.append, lambda *_, **__: None, retry_s=3600.0)
    for step in range(3):
        thread.scalars({}, step)
    thread.end()
    thread.join(time.monotonic() + PATIENCE_S)
    assert (len(attempts), sum(counted)) == (1, 3)


# ---- TensorBoard


def records(folder: Path) -> list[Any]:
    """Events in TensorBoard's files, checksums compared: records of (length, checksum, event, checksum)."""
    from tensorboardX.proto.event_pb2 import Event
    from tensorboardX.record_writer import masked_crc32c

    found = []
    for path in sorted(folder.glob("events.out.tfevents.*")):
        data, offset = path.read_bytes(), 0
        while offset < len(data):
            (length,) = struct.unpack_from("<Q", data, offset)
            body = data[offset + 12 : offset + 12 + length]
            assert struct.unpack_from("<I", data, offset + 8) == (masked_crc32c(data[offset : offset + 8]),)
            assert struct.unpack_from("<I", data, offset + 12 + length) == (masked_crc32c(body),)
            found.append(Event.FromString(body))
            offset += 12 + length + 4
    return found


def test_tensorboard_gets_scalars_and_pictures(tmp_path: Path) -> None:
    told = Telemetry(run_config(tensorboard=True), tmp_path, serve=False)
    end_step(told, 1)
    told.image("samples/test", np.zeros((8, 8, 3), np.uint8), 1)
    told.close()
    version, row, picture = records(tmp_path / "tensorboard")
    assert version.file_version == "brain.Event:2"
    values = {value.tag: value.simple_value for value in row.summary.value}
    assert (values["step"], values["train_metric/loss"], row.step) == (1.0, 0.25, 1)
    assert [(value.tag, value.image.width) for value in picture.summary.value] == [("samples/test", 8)]


def test_a_second_process_of_a_run_has_a_file_of_its_own(tmp_path: Path) -> None:
    for step in (1, 2):
        sink = TensorBoardSink(run_config(), tmp_path)
        sink.scalars({"loss": 0.5}, step)
        sink.close()
    assert len(list((tmp_path / "tensorboard").iterdir())) == 2
    assert sorted(record.step for record in records(tmp_path / "tensorboard")) == [0, 0, 1, 2]


LIMITED = """
import resource, signal, sys, time
from pathlib import Path
from cluster.telemetry import Telemetry
from tests.cluster.test_telemetry_sinks import end_step, run_config, until

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
told = Telemetry(run_config(tensorboard=True), Path(sys.argv[1]), serve=False)
end_step(told, 1)
until(lambda: list((Path(sys.argv[1]) / "tensorboard").glob("events.*")))
unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (5_000, unlimited[1]))
longest = 0.0
for step in range(2, 60):
    start = time.monotonic()
    row = end_step(told, step)
    longest = max(longest, time.monotonic() - start)
    until(lambda: not told.rows_waiting())
resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
end_step(told, 100)
told.close()
print(longest, int(told.snapshot()["sink_rows_lost_total/tensorboard"]))
"""


def test_tensorboard_on_a_disk_without_room_neither_blocks_nor_stays_silent(tmp_path: Path) -> None:
    """The kernel refuses a process's files beyond a size, as it refuses those on a full disk."""
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(tmp_path)], capture_output=True, text=True, timeout=240, check=True
    )
    longest, number_lost = done.stdout.split()
    assert float(longest) < 1.0
    steps = [record.step for record in records(tmp_path / "tensorboard") if record.step]
    kept = steps[:-1]
    assert steps[-1] == 100, "what is written once there is room is there"
    assert kept == list(range(1, len(kept) + 1)), "whole records, up to the first that found no room"
    assert int(number_lost) == 59 - len(kept) > 0
    rows = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1] == 100, "the run's own rows are whole lines too"
    assert [event["event"] for event in events_of(tmp_path)][-1] == "sink_writes_again"


def test_everything_that_telemetry_writes_comes_back_when_a_full_disk_has_room(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", megabytes=2) as disk:
        told = Telemetry(run_config(tensorboard=True), disk, serve=False)
        end_step(told, 1)
        until(lambda: records(disk / "tensorboard"))
        ballast = fill(disk)
        steps = range(2, 200)  # more than what is left of the files' last blocks
        for step in steps:
            start = time.monotonic()
            end_step(told, step)
            told.event("painted", step=step)
            assert time.monotonic() - start < 1.0
            until(lambda: not told.rows_waiting())
        ballast.unlink()
        end_step(told, 200)
        told.event("painted", step=200)
        told.close()
        rows_lost = {name: lost(told, name) for name in ("tensorboard", "metrics.jsonl", "events.jsonl")}
        assert min(rows_lost.values()) > 0
        rows = [json.loads(line)["step"] for line in (disk / "metrics.jsonl").read_text().splitlines()]
        assert (rows[0], rows[-1], len(rows)) == (1, 200, 200 - rows_lost["metrics.jsonl"])
        painted = events_of(disk, "painted")
        told_of_sinks = 1  # that the tracker loses rows was lost itself
        assert (painted[-1]["step"], len(painted)) == (200, 199 - rows_lost["events.jsonl"] + told_of_sinks)
        shown = [record.step for record in records(disk / "tensorboard") if record.step]
        assert (shown[0], shown[-1], len(shown)) == (1, 200, 200 - rows_lost["tensorboard"])


def test_of_many_processes_sinks_get_the_mean_and_the_largest() -> None:
    few = {f"paint_seconds/actor-{index}/mean": float(index) for index in range(SHOWN_PROCESSES)}
    assert for_sinks({**few, "step": 3.0}, {"paint_seconds"}) == {**few, "step": 3.0}
    many = {**few, f"paint_seconds/actor-{SHOWN_PROCESSES}/mean": float(SHOWN_PROCESSES), "loss": float("nan")}
    assert for_sinks({**many, "step": 3.0}, {"paint_seconds"}) == {
        "step": 3.0, "paint_seconds/mean/over_processes/mean": SHOWN_PROCESSES / 2,
        "paint_seconds/mean/over_processes/largest": float(SHOWN_PROCESSES),
    }  # fmt: skip


def test_a_run_of_many_actors_keeps_every_value_in_its_own_rows(tmp_path: Path, sink: WaywardSink) -> None:
    given: dict[str, float] = {}
    sink.scalars = lambda row, step: given.update(row)  # type: ignore[method-assign]
    told = Telemetry(run_config(), tmp_path, serve=False, sinks={"memory": lambda: sink})
    for actor in range(SHOWN_PROCESSES + 1):
        told.observe("salon_paint_seconds", float(actor), actor=f"actor-{actor}")
    row = end_step(told, 1)
    told.close()
    assert row["paint_seconds/actor-3/mean"] == 3.0
    assert not any(key.startswith("paint_seconds/actor") for key in given)
    assert given["paint_seconds/mean/over_processes/largest"] == SHOWN_PROCESSES
    assert given["paint_seconds/count/over_processes/mean"] == 1.0


# ---- Weights & Biases and MLflow, in the place of whose packages stand small ones that write down what they are told


class FakeWandb:
    """wandb as far as its sink goes."""

    def __init__(self) -> None:
        self.begun: list[dict[str, Any]] = []
        self.logged: list[tuple[dict[str, Any], int]] = []
        self.finished = 0
        self.Image = lambda array: ("image", array.shape)
        self.__spec__ = SimpleNamespace(name="wandb")

    def init(self, **settings: Any) -> Any:
        self.begun.append(settings)
        return SimpleNamespace(log=lambda row, step: self.logged.append((row, step)), finish=self._finish)

    def _finish(self) -> None:
        self.finished += 1


class FakeMlflow:
    """mlflow as far as its sink goes; like it, a run belongs to the thread that began it and has an id of its own."""

    def __init__(self) -> None:
        self._of_thread = threading.local()
        self.calls: list[tuple[Any, ...]] = []
        self.runs: list[SimpleNamespace] = []
        self.__spec__ = SimpleNamespace(name="mlflow")

    def __getattr__(self, name: str) -> Any:
        def call(*given: Any, **named: Any) -> Any:
            if name == "search_runs":
                return [SimpleNamespace(info=run) for run in self.runs if run.filter == named["filter_string"]]
            if name == "start_run":
                self._of_thread.run = named.get("run_id") or f"id-{len(self.runs)}"
                for tag, value in named.get("tags", {}).items():
                    self.runs.append(SimpleNamespace(run_id=self._of_thread.run, filter=f"tags.`{tag}` = '{value}'"))
            elif name.startswith(("log_", "end_")):
                assert getattr(self._of_thread, "run", None) is not None, f"{name} without a run in this thread"
            self.calls.append((name, *given, named))

        return call

    def of(self, name: str) -> list[tuple[Any, ...]]:
        return [call[1:] for call in self.calls if call[0] == name]


def told_by(name: str, folder: Path) -> Telemetry:
    """A step and a picture."""
    told = Telemetry(run_config(sinks=[name]), folder, serve=False)
    end_step(told, 7)
    told.image("samples/test", np.zeros((4, 6, 3), np.uint8), 7)
    told.close()
    return told


def test_wandb_is_given_rows_and_pictures_and_a_run_goes_on_under_its_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)  # type: ignore[arg-type]
    told = told_by("wandb", tmp_path)
    told_by("wandb", tmp_path)  # resumed
    assert lost(told, "wandb") == 0
    first, second = wandb.begun
    assert (first["project"], first["name"], first["dir"]) == ("salon", "told", str(tmp_path))
    assert first["config"]["seed"] == 5
    assert first["id"] == second["id"] == (tmp_path / "tracker_id").read_text()
    assert first["resume"] == second["resume"] == "allow"
    (row, step), (picture, at) = wandb.logged[:2]
    assert (row["train_metric/loss"], step) == (0.25, 7)
    assert (picture, at) == ({"samples/test": ("image", (4, 6, 3))}, 7)
    assert wandb.finished == 2


def test_mlflow_is_given_rows_and_pictures_in_the_thread_of_its_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mlflow = FakeMlflow()
    monkeypatch.setitem(sys.modules, "mlflow", mlflow)  # type: ignore[arg-type]
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    told = told_by("mlflow", tmp_path)
    assert lost(told, "mlflow") == 0
    assert mlflow.of("set_tracking_uri") == [(f"sqlite:///{tmp_path / 'mlflow.sqlite'}", {})]
    tracked = (tmp_path / "tracker_id").read_text()
    assert tracked.startswith("told-")
    assert mlflow.of("start_run") == [({"run_name": "told", "tags": {"salon-run": tracked}},)]
    assert mlflow.of("log_dict")[0][0]["seed"] == 5
    ((row, named),) = mlflow.of("log_metrics")
    assert (row["train_metric/loss"], named) == (0.25, {"step": 7})
    ((picture, name, _),) = mlflow.of("log_image")
    assert (picture.shape, name) == ((4, 6, 3), "samples_test-000007.png")
    assert mlflow.calls[-1][0] == "end_run"


def test_a_resumed_run_goes_on_in_mlflow_and_a_replaced_one_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mlflow = FakeMlflow()
    monkeypatch.setitem(sys.modules, "mlflow", mlflow)  # type: ignore[arg-type]
    for folder in ("a", "a", "b"):
        told_by("mlflow", tmp_path / folder)
    first, second, third = (named for (named,) in mlflow.of("start_run"))
    assert second == {"run_id": "id-0"}
    assert first["tags"] != third["tags"]


def test_a_tracking_server_of_ones_own_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = FakeMlflow()
    monkeypatch.setitem(sys.modules, "mlflow", mlflow)  # type: ignore[arg-type]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://tracking:5000")
    told_by("mlflow", tmp_path)
    assert mlflow.of("set_tracking_uri") == []

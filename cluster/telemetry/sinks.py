"""Trackers beside Prometheus: TensorBoard always at hand, W&B and MLflow when installed, behind one small interface.

A sink gets the row of every step and the pictures of every evaluation. Its methods may wait and may raise whatever they
like: each runs on a thread of its own (sink_thread.py). Does not own: what the rows hold (telemetry.py).
"""

from __future__ import annotations

import importlib
import importlib.util
import math
import os
import secrets
import socket
import struct
import time
from collections.abc import Callable, Collection, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from cluster.telemetry.appending import AppendingFile
from contracts.config import RunConfig
from contracts.errors import ConfigError

SHOWN_PROCESSES = 16
"""Processes whose own values sinks are given."""


class Sink(Protocol):
    """One tracker, made and used in one thread."""

    def scalars(self, row: Mapping[str, float], step: int) -> None:
        """The row of a step: metric key -> value."""

    def image(self, tag: str, image: np.ndarray, step: int) -> None:
        """A picture, uint8 [H,W,3]."""

    def close(self) -> None:
        """Flush and end."""


class TensorBoardSink:
    """An event file under <run>/tensorboard: TFRecords of tensorboardX's Event messages.

    tensorboardX's own SummaryWriter is not used: its thread ends with the first error of the disk, after which every
    call waits for it for ever.
    """

    def __init__(self, config: RunConfig, folder: Path) -> None:
        self._folder = folder / "tensorboard"
        began = f"{time.time():.0f}.{socket.gethostname()}.{os.getpid()}.{secrets.token_hex(4)}"  # TensorBoard's order
        self._file = AppendingFile(self._folder / f"events.out.tfevents.{began}")

    def scalars(self, row: Mapping[str, float], step: int) -> None:
        from tensorboardX.proto.summary_pb2 import Summary

        values = [Summary.Value(tag=key, simple_value=value) for key, value in row.items()]
        self._write(Summary(value=values), step)

    def image(self, tag: str, image: np.ndarray, step: int) -> None:
        from tensorboardX.summary import image as picture

        self._write(picture(tag, image, dataformats="HWC"), step)

    def close(self) -> None:
        self._file.close()

    def _write(self, summary: Any, step: int) -> None:
        """One record a step, whatever it holds. Raises OSError."""
        from tensorboardX.proto.event_pb2 import Event

        self._folder.mkdir(parents=True, exist_ok=True)
        now = time.time()
        self._file.append(
            _record(Event(wall_time=now, step=step, summary=summary)),
            head=_record(Event(wall_time=now, file_version="brain.Event:2")),
        )


def _record(event: Any) -> bytes:
    """A message as a TFRecord: its length, the length's checksum, the message, the message's checksum."""
    from tensorboardX.record_writer import masked_crc32c

    data = event.SerializeToString()
    length = struct.pack("<Q", len(data))
    return b"".join((length, struct.pack("<I", masked_crc32c(length)), data, struct.pack("<I", masked_crc32c(data))))


class WandbSink:
    """Weights & Biases; mode, project and key come from its own environment variables."""

    def __init__(self, config: RunConfig, folder: Path) -> None:
        self._wandb = importlib.import_module("wandb")
        self._run = self._wandb.init(
            project="salon", name=config.name, id=tracked_id(config, folder), resume="allow", dir=str(folder),
            config=config.model_dump(mode="json"),
        )  # fmt: skip

    def scalars(self, row: Mapping[str, float], step: int) -> None:
        self._run.log(dict(row), step=step)

    def image(self, tag: str, image: np.ndarray, step: int) -> None:
        self._run.log({tag: self._wandb.Image(image)}, step=step)

    def close(self) -> None:
        self._run.finish()


class MlflowSink:
    """MLflow; the tracking server comes from its own environment variables, else files under <run>/mlflow."""

    def __init__(self, config: RunConfig, folder: Path) -> None:
        self._mlflow = importlib.import_module("mlflow")
        if "MLFLOW_TRACKING_URI" not in os.environ:
            self._mlflow.set_tracking_uri(f"sqlite:///{folder.absolute() / 'mlflow.sqlite'}")
        self._mlflow.set_experiment("salon")
        self._start_or_go_on(config.name, tracked_id(config, folder))
        self._mlflow.log_dict(config.model_dump(mode="json"), "config.json")

    def scalars(self, row: Mapping[str, float], step: int) -> None:
        self._mlflow.log_metrics(dict(row), step=step)

    def image(self, tag: str, image: np.ndarray, step: int) -> None:
        self._mlflow.log_image(image, f"{tag.replace('/', '_')}-{step:06d}.png")

    def close(self) -> None:
        self._mlflow.end_run()

    def _start_or_go_on(self, name: str, tracked: str) -> None:
        """MLflow chooses the ids of its runs: one that is resumed is found by a tag."""
        before = self._mlflow.search_runs(
            experiment_names=["salon"], filter_string=f"tags.`salon-run` = '{tracked}'", output_format="list",
            max_results=1,
        )  # fmt: skip
        if before:
            self._mlflow.start_run(run_id=before[0].info.run_id)
        else:
            self._mlflow.start_run(run_name=name, tags={"salon-run": tracked})


_SINKS: dict[str, Any] = {"tensorboard": TensorBoardSink, "wandb": WandbSink, "mlflow": MlflowSink}


def make_sinks(config: RunConfig, folder: Path) -> dict[str, Callable[[], Sink]]:
    """How to make the sinks that `telemetry` asks for, by name. Raises ConfigError for one that is not installed."""
    names = (["tensorboard"] if config.telemetry.tensorboard else []) + list(config.telemetry.sinks)
    for name in config.telemetry.sinks:
        if (error := missing_sink(name)) is not None:
            raise error
    return {name: partial(_SINKS[name], config, folder) for name in names}


def for_sinks(row: Mapping[str, float], labelled: Collection[str]) -> dict[str, float]:
    """What sinks get of a step's row: finite values, and of series with a value for each of many processes two.

    labelled: series whose first label is a process. Where one has more than SHOWN_PROCESSES of them, the mean and the
    largest over processes stand for them: `paint_seconds/mean/over_processes/largest`. Nobody looks at a thousand
    charts, and checksums of a thousand values take longer than all other telemetry; metrics.jsonl and /metrics have
    every value.
    """
    kept: dict[str, float] = {}
    by_series: dict[str, dict[str, float]] = {}
    for key, value in row.items():
        name, _, labels = key.partition("/")
        if not math.isfinite(value):
            continue
        if name in labelled:
            by_series.setdefault("/".join([name, *labels.split("/")[1:]]), {})[key] = value
        else:
            kept[key] = value
    for series, values in by_series.items():
        if len(values) <= SHOWN_PROCESSES:
            kept.update(values)
        else:
            kept[f"{series}/over_processes/mean"] = math.fsum(values.values()) / len(values)
            kept[f"{series}/over_processes/largest"] = max(values.values())
    return kept


def missing_sink(name: str) -> ConfigError | None:
    """What to tell a user whose environment lacks the tracker, or None."""
    if importlib.util.find_spec(name) is not None:
        return None
    way_out = f"pip install 'salon[{name}]' requirements (pyproject.toml, extra {name!r}), or remove it from the list"
    return ConfigError("telemetry.sinks", f"{name} is not installed", way_out)


def tracked_id(config: RunConfig, folder: Path) -> str:
    """What trackers know a run by: kept in its folder, so that it goes on when resumed and is new when replaced."""
    file = folder / "tracker_id"
    if not file.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{config.name}-{secrets.token_hex(4)}")
    return file.read_text()

"""Trackers beside Prometheus: TensorBoard always at hand, W&B and MLflow when installed, behind one small interface.

A sink gets the row of every step and the pictures of every evaluation. Does not own: what the rows hold (telemetry.py).
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from contracts.config import RunConfig
from contracts.errors import ConfigError


class Sink(Protocol):
    """One tracker."""

    def scalars(self, row: Mapping[str, float], step: int) -> None:
        """The row of a step: metric key -> value."""

    def image(self, tag: str, image: np.ndarray, step: int) -> None:
        """A picture, uint8 [H,W,3]."""

    def close(self) -> None:
        """Flush and end."""


class TensorBoardSink:
    """Event files under <run>/tensorboard."""

    def __init__(self, config: RunConfig, folder: Path) -> None:
        from tensorboardX import SummaryWriter

        self._writer = SummaryWriter(str(folder / "tensorboard"), flush_secs=5)

    def scalars(self, row: Mapping[str, float], step: int) -> None:
        for key, value in row.items():
            self._writer.add_scalar(key, value, step)

    def image(self, tag: str, image: np.ndarray, step: int) -> None:
        self._writer.add_image(tag, image, step, dataformats="HWC")

    def close(self) -> None:
        self._writer.close()


class WandbSink:
    """Weights & Biases; mode, project and key come from its own environment variables."""

    def __init__(self, config: RunConfig, folder: Path) -> None:
        self._wandb = _import("wandb")
        self._run = self._wandb.init(
            project="salon", name=config.name, id=_run_id(config), resume="allow", dir=str(folder),
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
        import os

        self._mlflow = _import("mlflow")
        if "MLFLOW_TRACKING_URI" not in os.environ:
            self._mlflow.set_tracking_uri(f"sqlite:///{folder.absolute() / 'mlflow.sqlite'}")
        self._mlflow.set_experiment("salon")
        self._mlflow.start_run(run_name=config.name)
        self._mlflow.log_dict(config.model_dump(mode="json"), "config.json")

    def scalars(self, row: Mapping[str, float], step: int) -> None:
        self._mlflow.log_metrics(dict(row), step=step)

    def image(self, tag: str, image: np.ndarray, step: int) -> None:
        self._mlflow.log_image(image, f"{tag.replace('/', '_')}-{step:06d}.png")

    def close(self) -> None:
        self._mlflow.end_run()


_SINKS: dict[str, Any] = {"wandb": WandbSink, "mlflow": MlflowSink}


def make_sinks(config: RunConfig, folder: Path) -> list[Sink]:
    """The sinks that `telemetry` asks for. Raises ConfigError for a tracker that is not installed."""
    sinks: list[Sink] = [TensorBoardSink(config, folder)] if config.telemetry.tensorboard else []
    return sinks + [_SINKS[name](config, folder) for name in config.telemetry.sinks]


def missing_sink(name: str) -> ConfigError | None:
    """What to tell a user whose environment lacks the tracker, or None."""
    if importlib.util.find_spec(name) is not None:
        return None
    way_out = f"pip install 'salon[{name}]' requirements (pyproject.toml, extra {name!r}), or remove it from the list"
    return ConfigError("telemetry.sinks", f"{name} is not installed", way_out)


def _import(name: str) -> Any:
    error = missing_sink(name)
    if error is not None:
        raise error
    return importlib.import_module(name)


def _run_id(config: RunConfig) -> str:
    return f"{config.name}-{config.seed}"

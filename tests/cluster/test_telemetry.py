"""The controller's exporter: /metrics, rows, events, and that they reach the sinks."""

from __future__ import annotations

import json
import math
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families

from cluster.telemetry import Telemetry, sinks
from cluster.telemetry.telemetry import ADDRESS_FILE
from contracts.config.load import config_from_tree
from contracts.config.run import RunConfig
from contracts.errors import ConfigError


class MemorySink:
    """Keeps what it is given."""

    def __init__(self) -> None:
        self.rows: list[tuple[int, dict[str, float]]] = []
        self.images: list[tuple[str, int, tuple[int, ...]]] = []
        self.closed = False

    def scalars(self, row: Mapping[str, float], step: int) -> None:
        self.rows.append((step, dict(row)))

    def image(self, tag: str, image: np.ndarray, step: int) -> None:
        self.images.append((tag, step, image.shape))

    def close(self) -> None:
        self.closed = True


def run_config(**telemetry: Any) -> RunConfig:
    return config_from_tree(
        {
            "name": "told", "model": {"path": "m"}, "objective": {"name": "grpo"}, "stop": {"steps": 1},
            "scorers": [{"name": "a", "serve": "jpeg_size", "weights": {"kilobytes": -2.0}},
                        {"name": "watcher", "serve": "colourfulness", "held_out": True}],
            "telemetry": {"tensorboard": False, **telemetry},
        }
    )  # fmt: skip


@pytest.fixture
def sink() -> MemorySink:
    return MemorySink()


@pytest.fixture
def telemetry(tmp_path: Path, sink: MemorySink) -> Iterator[Telemetry]:
    made = Telemetry(run_config(), tmp_path, sinks={"memory": lambda: sink})
    yield made
    made.close()


def end_step(telemetry: Telemetry, step: int, **changes: Any) -> dict[str, float]:
    given: dict[str, Any] = {
        "images": 8, "seconds": 1.0, "staleness": [0, 1], "phases": {"forward": 0.5},
        "rewards": {"a/kilobytes": {"mean": 3.0, "std": 1.0}, "watcher/colourfulness": {"mean": 9.0, "std": 0.0}},
        "metrics": {"loss": 0.25, "log_prob_mismatch": 1e-6, "grad_norm": math.nan},
    }  # fmt: skip
    return telemetry.step(step=step, **{**given, **changes})


def scrape(telemetry: Telemetry) -> dict[str, float]:
    text = urllib.request.urlopen(telemetry.address, timeout=10).read().decode()
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    samples = [sample for sample in samples if not sample.name.startswith("salon_process_") or sample.labels]
    assert all(sample.labels["run"] == "told" for sample in samples), "but for what every process tells of itself"
    named = {}
    for sample in samples:
        rest = [value for label, value in sample.labels.items() if label not in ("run", "le")]
        named["/".join([sample.name, *rest])] = sample.value
    return named


def test_metrics_are_served_where_the_run_folder_says(telemetry: Telemetry, tmp_path: Path) -> None:
    assert (tmp_path / ADDRESS_FILE).read_text().strip() == telemetry.address
    telemetry.count("salon_images_painted_total", 16)
    telemetry.count("salon_images_discarded_total", 4, reason="late")
    telemetry.gauge("salon_weight_version", 3)
    telemetry.observe("salon_paint_seconds", 0.3, actor="actor-0")
    with telemetry.timed("learner", "publish"):
        pass
    end_step(telemetry, 2)
    served = scrape(telemetry)
    assert served["salon_images_painted_total"] == 16
    assert served["salon_images_discarded_total/late"] == 4
    assert served["salon_weight_version"] == 3
    assert served["salon_paint_seconds_sum/actor-0"] == pytest.approx(0.3)
    assert served["salon_paint_seconds_count/actor-0"] == 1
    assert served["salon_phase_seconds_total/publish/learner"] >= 0  # by label name
    assert served["salon_step"] == 2
    assert served["salon_train_metric/loss"] == 0.25
    assert served["salon_log_prob_mismatch"] == 1e-6, "a metric with a series of its own goes there"
    assert "salon_train_metric/log_prob_mismatch" not in served


def test_a_counter_is_brought_to_a_total_and_never_falls(telemetry: Telemetry) -> None:
    for total, expected in ((5, 5), (9, 9), (7, 9), (10, 10)):
        telemetry.count_to("salon_images_painted_total", total)
        assert telemetry.snapshot()["images_painted_total"] == expected


def test_every_step_is_a_row(telemetry: Telemetry, sink: MemorySink, tmp_path: Path) -> None:
    for step in (1, 2):
        end_step(telemetry, step)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2]
    assert rows[0]["reward_mean/a/kilobytes"] == 3.0
    assert rows[0]["train_metric/grad_norm"] is None, "JSON has no NaN"
    assert rows[1]["phase_seconds_total/rank/forward"] == 1.0
    assert rows[0]["time"] <= rows[1]["time"]
    telemetry.close()
    assert [step for step, _ in sink.rows] == [1, 2]
    assert "train_metric/grad_norm" not in sink.rows[0][1]


def test_the_display_is_given_the_training_reward(telemetry: Telemetry) -> None:
    assert telemetry.status()["step"] == 0
    end_step(telemetry, 1)
    status = telemetry.status()
    assert status["reward"] == -6.0, "weighted, held-out scorers left out"
    assert (status["step"], status["staleness"]) == (1, 1)


def test_events_are_lines(telemetry: Telemetry, tmp_path: Path) -> None:
    telemetry.event("actor_restart", actor="actor-0", loss=math.inf, where=tmp_path)
    (line,) = (tmp_path / "events.jsonl").read_text().splitlines()
    event = json.loads(line)
    assert (event["event"], event["actor"], event["loss"], event["where"]) == (
        "actor_restart", "actor-0", None, str(tmp_path),
    )  # fmt: skip


def test_pictures_reach_every_sink_and_closing_ends_them(telemetry: Telemetry, sink: MemorySink) -> None:
    telemetry.image("samples/test", np.zeros((4, 6, 3), np.uint8), 7)
    telemetry.close()
    assert sink.images == [("samples/test", 7, (4, 6, 3))]
    assert sink.closed
    telemetry.event("too_late")  # a straggler must not bring the run down


def test_a_taken_port_is_a_clear_refusal(telemetry: Telemetry, tmp_path: Path) -> None:
    port = int(telemetry.address.split(":")[2].split("/")[0])
    with pytest.raises(ConfigError, match="metrics_port"):
        Telemetry(run_config(metrics_port=port), tmp_path / "second", sinks={})


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_missing_tracker_names_its_extra(name: str, tmp_path: Path) -> None:
    if sinks.missing_sink(name) is None:
        pytest.skip(f"{name} is installed here")
    with pytest.raises(ConfigError, match=f"extra '{name}'"):
        Telemetry(run_config(sinks=[name]), tmp_path, serve=False)

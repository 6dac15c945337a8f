"""Curves of whole runs: fitting and comparing them, and the runs themselves for a few steps on the miniature model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from benchmarks import alignprop_cnn, demo_arms, demo_time, learning, ppo_critic, report
from benchmarks.measuring import first_reached, rising

UNHURRIED = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
VALUES = st.lists(st.floats(-10, 10), min_size=1, max_size=12)
SMALL = {
    "rollout.groups_per_step": 2, "rollout.group_size": 2, "rollout.micro_batch": 2, "learner.micro_batch": 2,
    "learner.engine": "plain", "sampler.steps": 6, "eval.num_prompts": 4, "model.autocast": False,
}  # fmt: skip


@UNHURRIED
@given(VALUES, st.data())
def test_the_rising_fit_is_the_closest_rising_sequence(values: list[float], data: st.DataObject) -> None:
    """It is a projection onto a convex set: no rising sequence lies on the far side of the residual."""
    fit = np.array(rising(values))
    assert (np.diff(fit) >= -1e-12).all()
    other = np.sort(data.draw(st.lists(st.floats(-10, 10), min_size=len(fit), max_size=len(fit))))
    assert float(np.dot(np.array(values) - fit, other - fit)) <= 1e-9
    np.testing.assert_allclose(fit.mean(), np.mean(values), atol=1e-9)


def test_a_level_is_reached_between_the_points_around_it() -> None:
    assert first_reached([0, 10, 20], [0.0, 1.0, 3.0], 2.0) == 15
    assert first_reached([0, 10], [0.0, 1.0], 0.0) == 0
    assert first_reached([0, 10], [0.0, 1.0], 1.5) is None


def curve(*points: tuple[float, float], error: float = 0.01) -> list[dict[str, float]]:
    return [{"seconds": at, "accuracy": value, "standard_error": error, "step": 0} for at, value in points]


def shown(found: dict[str, Any]) -> str:
    steps = [dict.fromkeys(demo_time.ARMS, 3)] * len(found["rows"])
    return demo_time.table({**found, "steps_made": steps, "lengths": [300.0] * len(steps)})


def test_half_the_clusters_gain_on_both_clocks() -> None:
    whole = {
        "cluster": curve((0, 0.2), (100, 0.5), (200, 0.6)),
        "in_process": curve((0, 0.2), (100, 0.3), (200, 0.5), (300, 0.5)),
    }
    part = {"cluster": curve((0, 0.3), (100, 0.5)), "in_process": curve((0, 0.3), (100, 0.7))}
    found = demo_time.compare([whole, part], whole=1)
    assert found["gain"] == pytest.approx(40), "only whole runs tell the gain"
    first, second = found["rows"]
    assert first["half_seconds"] == pytest.approx({"cluster": 100 * 2 / 3, "in_process": 150})
    assert first["ratio"] == pytest.approx(100 * 2 / 3 / 150)
    assert second["half_seconds"] == pytest.approx({"cluster": 100, "in_process": 50})
    assert found["ratio"]["median"] == pytest.approx((100 * 2 / 3 / 150 + 2) / 2)
    assert "| 67 | 150 | 0.44 |" in shown(found)


def test_a_run_that_ends_before_half_the_gain_gives_a_bound() -> None:
    slow_loop = {"cluster": curve((0, 0.2), (100, 0.6)), "in_process": curve((0, 0.2), (80, 0.3))}
    found = demo_time.compare([slow_loop], whole=1)
    (row,) = found["rows"]
    assert row["half_seconds"]["in_process"] is None
    assert (row["bound"], row["ratio"]) == ("below", pytest.approx(50 / 80))
    assert found["ratio"]["median"] == pytest.approx(50 / 80), "at most: the median is no better than it says"
    slow_cluster = {"cluster": curve((0, 0.2), (90, 0.3)), "in_process": curve((0, 0.2), (80, 0.4))}
    neither = {"cluster": curve((0, 0.2), (90, 0.3)), "in_process": curve((0, 0.2), (80, 0.3))}
    found = demo_time.compare([slow_loop, slow_cluster, neither], whole=1)
    assert [row["bound"] for row in found["rows"]] == ["below", "above", None]
    assert found["rows"][1]["ratio"] == pytest.approx(90 / 80)
    assert found["rows"][2]["ratio"] is None
    assert found["ratio"] is None, "a median over what is known would flatter"
    assert "above 1.12" in shown(found)
    assert "unknown" in shown(found)


def test_a_gain_within_the_error_has_no_half() -> None:
    seed = {"cluster": curve((0, 0.2), (100, 0.23), error=0.02), "in_process": curve((0, 0.2), (80, 0.5))}
    found = demo_time.compare([seed], whole=1)
    assert found["ratio"] is None
    assert found["rows"][0]["half_seconds"] == {"cluster": None, "in_process": None}
    assert found["standard_error"] == pytest.approx(2.0)


@UNHURRIED
@given(st.integers(1, 200), st.integers(1, 9))
def test_blocks_cover_every_step_once_in_order(steps: int, number: int) -> None:
    found = learning.blocks(steps, number)
    assert [step for first, last in found for step in range(first, last + 1)] == list(range(1, steps + 1))
    assert len(found) <= number


@pytest.fixture
def small(tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Configurations of the repository with the miniature model and small groups."""
    torch.set_num_threads(1)
    playground_config = learning.playground_config

    def smaller(config_file: str, changes: dict[str, Any]) -> Any:
        return playground_config(config_file, {**changes, **SMALL, "model.path": tiny_model_folder})

    monkeypatch.setattr(learning, "playground_config", smaller)
    yield
    torch.set_num_threads(1)


def rows_of(module: Any, result: dict[str, Any]) -> list[str]:
    lines: list[str] = module.table(result).splitlines()
    assert len({line.count("|") for line in lines}) == 1
    return lines[2:]


def test_the_critics_values_are_judged_before_each_update(small: None) -> None:
    result = ppo_critic.run(repeats=1, steps=3)
    found = result["explained_variance"]["0"]
    assert len(found) == 3
    assert found[0] == pytest.approx(0, abs=1e-6), "an untrained critic's value head is zero"
    assert len(rows_of(ppo_critic, result)) == 3
    assert all(np.isfinite(result["strict"][when]).all() for when in ("before", "after"))


def test_alignprop_follows_the_scorer_in_this_process(small: None) -> None:
    result = alignprop_cnn.run(repeats=1, steps=2)
    assert [row["step"] for row in result["rows"]] == [0, 1, 2]
    scores = [row["cnn/score"] for row in result["rows"]]
    assert len(set(scores)) == 3, "every update changes what is painted"
    assert 0 < result["rows"][1]["training_reward"] < 1
    assert len(rows_of(alignprop_cnn, result)) == 3


def test_weights_are_kept_at_the_start_and_after_each_mark(tmp_path: Path) -> None:
    keeper = demo_arms.Keeper(tmp_path, interval_s=10.0)
    weights = {"a": np.arange(3, dtype=np.float32)}
    for step, now in enumerate([100.0, 104.0, 111.0, 119.0, 121.0, 155.0, 156.0]):
        if keeper.is_due(now):
            keeper.keep(now, step, weights, {"a": "float32"})
    assert [point["time"] for point in keeper.points()] == [100.0, 111.0, 121.0, 155.0]
    assert {path.name for path in tmp_path.glob("*.safetensors")} == {point["file"] for point in keeper.points()}


@pytest.mark.long
def test_the_demo_in_both_ways_from_start_to_ratio(
    small: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Real runs of a second or two on the miniature model, judged as the long ones are."""
    monkeypatch.setattr(demo_time, "WORK", tmp_path)
    monkeypatch.setattr(demo_time, "PROMPTS", 4)
    ran = []

    def in_this_process(command: list[str], **_: Any) -> None:
        arm, folder, seed, *seconds = command[3:]
        ran.append(arm)
        demo_arms.main(arm, Path(folder), int(seed), *map(float, seconds))

    monkeypatch.setattr(demo_time.subprocess, "run", in_this_process)
    result = demo_time.run(repeats=1, seconds=4.0)
    (row,) = result["rows"]
    assert ran == ["cluster", "in_process"]
    for arm in demo_time.ARMS:
        points = row["curves"][arm]
        assert points[0]["step"] == 0
        assert points[-1]["step"] > 0
        assert points == sorted(points, key=lambda point: point["seconds"])
    same = [row["curves"][arm][0]["accuracy"] for arm in demo_time.ARMS]
    assert same[0] == same[1], "both start from the same weights"
    assert len(rows_of(demo_time, result)) == 2, "the seed, and the median"
    again = demo_time.run(repeats=1, seconds=4.0, resume=True)
    assert again == result, "finished arms are kept"
    assert ran == ["cluster", "in_process"]
    report.section("demo_time", {**result, "machine": dict.fromkeys((*report.PACKAGES, "processor", "cores",
                   "memory_gb", "system", "python"), "1"), "busy_before": 0.0, "measured_on": "now"})  # fmt: skip

"""Law 8: every throughput figure counts all GPUs: actors, learner and reward servers, whoever started them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.telemetry.rates import WINDOW_S, Throughput, count_accelerators
from contracts.config.load import config_from_tree
from contracts.config.run import RunConfig
from contracts.wire import Source


def run_config(scorers: list[dict], **sections: dict) -> RunConfig:
    tree = {"name": "law8", "model": {"path": "m"}, "objective": {"name": "grpo"}, "stop": {"steps": 1}}
    return config_from_tree({**tree, "scorers": scorers, **sections})


def test_actors_ranks_and_reward_servers_are_summed() -> None:
    scorers = [
        {"name": "remote", "urls": ["http://a", "http://b"]},  # two replicas, one GPU each unless stated
        {"name": "judge", "urls": ["http://c"], "gpus": 4},
        {"name": "own", "serve": "jpeg_size", "gpus": 0.5},
        {"name": "cpu", "serve": "colourfulness"},
        {"name": "function", "function": "m:f"},
    ]
    config = run_config(scorers, rollout={"actors": 4, "gpus_per_actor": 0.5}, learner={"ranks": 2, "gpus_per_rank": 1})
    counted = count_accelerators(config)
    assert (counted.actors, counted.learner, counted.reward_servers) == (2.0, 2.0, 6.5)
    assert (counted.total, counted.unit) == (10.5, "gpu")


def test_without_a_gpu_every_working_process_is_a_slot() -> None:
    config = run_config(
        [{"name": "a", "serve": "jpeg_size"}, {"name": "b", "urls": ["http://a", "http://b"]}],
        rollout={"actors": 3}, learner={"ranks": 2},
    )  # fmt: skip
    counted = count_accelerators(config)
    assert (counted.total, counted.unit) == (3 + 2 + 3, "cpu slot")
    assert count_accelerators(config, Source.LEARNER).total == 2 + 3, "actors that do not paint are no slots"


def test_a_judge_that_scorers_ask_counts_once() -> None:
    asking = {"urls": ["http://vllm-1", "http://vllm-2"], "model": "judge"}
    scorers = [
        {"name": "vqa", "serve": "vqascore", "options": asking},
        {"name": "grade", "serve": "judge_scale", "options": {**asking, "urls": ["http://vllm-2"], "gpus": 4}},
    ]
    on_gpus = run_config(scorers, rollout={"actors": 1, "gpus_per_actor": 1}, learner={"gpus_per_rank": 1})
    assert count_accelerators(on_gpus).reward_servers == 1 + 4
    assert count_accelerators(run_config(scorers)).reward_servers == 2 + 2, "two servers and two judges"


@given(
    steps=st.lists(st.tuples(st.floats(0.1, 30.0), st.integers(1, 5000)), min_size=1, max_size=30),
    gpus=st.integers(1, 64),
)
def test_the_rate_is_images_of_the_last_minute_over_all_gpus(steps: list[tuple[float, int]], gpus: int) -> None:
    now = 0.0
    config = run_config(
        [{"name": "a", "urls": ["http://a"]}],
        rollout={"actors": gpus, "gpus_per_actor": 1}, learner={"gpus_per_rank": 1},
    )  # fmt: skip
    throughput = Throughput(count_accelerators(config), clock=lambda: now)
    done = []
    for seconds, images in steps:
        now += seconds
        throughput.add(images)
        done.append((now, images))
    expected = sum(images for when, images in done if when >= now - WINDOW_S) / min(WINDOW_S, now)
    assert throughput.images_per_second() == pytest.approx(expected)
    assert throughput.images_per_second_per_gpu() == pytest.approx(expected / (gpus + 2))

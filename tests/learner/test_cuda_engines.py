"""The learner on GPUs: every engine in bf16, law 1's mismatch as a run measures it, ranks and weights over NCCL.

All of it needs CUDA, some of it two devices. The CPU's counterparts are in test_engine_ranks.py, tests/laws and
tests/cluster/test_host_copies.py; bounds are theirs where the arithmetic is the same.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from learner.types import StepJob
from tests.learner.learner_harness import (
    Painted,
    engine_section,
    free_port,
    job_of,
    make_config,
    needs_deepspeed,
    paint_with,
    run_ranks,
    seeded_rewards,
    weights_of,
    with_advantages,
)

DEVICE = "cuda"
LR, STEPS, CLIP_RANGE = 1e-3, 3, 1e-4
ENGINES: dict[str, int | None] = {"plain": None, "zero1": 1, "zero2": 2, "zero3": 3}
SAMPLERS = ({"name": "flow_sde"}, {"name": "cps", "noise_level": 0.8}, {"name": "dance_sde", "noise_level": 0.3})
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.timeout(900),
    needs_deepspeed,
]
two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


def config_of(folder: str, ranks: int = 1, engine: str = "plain", dtype: str = "bf16", **changes: Any) -> Any:
    learner = {**engine_section(ENGINES[engine]), "ranks": ranks, "optimizer": {"lr": LR, "eps": 1e-6}}
    model = {"device": DEVICE, "dtype": dtype}
    gpus = 1 if DEVICE == "cuda" else 0
    learner["gpus_per_rank"] = gpus
    rollout = {"storage_dtype": dtype, "gpus_per_actor": gpus}
    objective = {"name": "grpo", "kl_beta": 0.04, "clip_range": CLIP_RANGE}
    return make_config(folder, objective, learner=learner, model=model, rollout=rollout, **changes)


def take_gpu(rank: int) -> None:
    """One GPU a process, as Ray gives it; before CUDA starts."""
    os.environ.update(CUDA_VISIBLE_DEVICES=str(rank), LOCAL_RANK="0")


def off_centre(job: StepJob) -> StepJob:
    """Centred advantages make the loss zero whatever an engine does; off centre, an error shows."""
    return with_advantages(job, lambda _, advantages: np.where(advantages == 0, 0.0, advantages + 0.5))


# -- one GPU


def bf16_on_one_rank(rank: int, world: int, folder: str, painted: Painted) -> dict[str, Any]:
    """Of each engine: losses, weights (fp32 masters), digest published and digest of a painter that loaded it."""
    from actors.painter import Painter
    from learner.rank import RankLearner
    from policy.weights import live_digest

    results = {}
    for engine in ENGINES:
        config = config_of(folder, engine=engine)
        learner, painter = RankLearner(config, rank, world), Painter(config)
        first = learner.snapshot(0, 0)
        assert first is not None
        painter.load(first.offer, first.arrays, first.canary_current, None)
        job = off_centre(job_of(config, painted, seeded_rewards(painted)))
        reports = [painted.train(learner, job) for _ in range(STEPS)]
        published = learner.snapshot(1, STEPS)
        assert published is not None
        proof = painter.load(published.offer, published.arrays, published.canary_current, first.canary_current)
        results[engine] = {
            "losses": [report.metrics["loss"] for report in reports],
            "weights": weights_of(learner),
            "device": learner.policy.device.type,
            "dtypes": set(published.offer.dtypes.values()),
            "digests": (published.offer.digest, proof.digest, live_digest(painter.policy)),
            "canary": (proof.canary_to_current, proof.canary_to_previous),
        }
    return results


@pytest.fixture(scope="module")
def painted(tiny_model_folder: Path) -> Painted:
    return paint_with(config_of(str(tiny_model_folder)), 3)


@pytest.fixture(scope="module")
def one_rank(tiny_model_folder: Path, painted: Painted) -> dict[str, Any]:
    return run_ranks(1, bf16_on_one_rank, str(tiny_model_folder), painted, timeout_s=600)[0]


@pytest.mark.parametrize("engine", list(ENGINES))
def test_every_engine_trains_in_bf16_with_fp32_masters(engine: str, one_rank: dict[str, Any]) -> None:
    """Rounding differs with the order of sums, so engines agree to a few per cent of the steps taken."""
    found, plain = one_rank[engine], one_rank["plain"]
    assert found["device"] == DEVICE
    assert found["losses"] == pytest.approx(plain["losses"], rel=1e-2)
    off = np.concatenate([np.abs(found["weights"][name] - value).ravel() for name, value in plain["weights"].items()])
    assert off.mean() < 0.1 * LR * STEPS
    finer = [name for name, value in found["weights"].items() if np.any(value.view(np.uint32) & 0xFFFF)]
    assert len(finer) > len(found["weights"]) / 2


@pytest.mark.parametrize("engine", list(ENGINES))
def test_published_weights_are_proven_in_a_painter_on_a_gpu(engine: str, one_rank: dict[str, Any]) -> None:
    found = one_rank[engine]
    offered, proven, live = found["digests"]
    assert offered == proven == live
    assert found["dtypes"] == {"bfloat16"}
    to_current, to_previous = found["canary"]
    assert to_current < to_previous


@pytest.mark.parametrize("sampler", SAMPLERS, ids=lambda sampler: sampler["name"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_law_1_the_mismatch_at_zero_updates(
    sampler: dict[str, Any], dtype: str, tiny_model_folder: Path, record_property: Any
) -> None:
    """`log_prob_mismatch`, as every run exports it: replay against what the painter recorded, weights untouched."""
    from learner.rank import RankLearner

    config = config_of(str(tiny_model_folder), dtype=dtype, sampler=sampler)
    fresh = paint_with(config, 3)
    learner = RankLearner(config, 0, 1)
    job = job_of(config, fresh, seeded_rewards(fresh))
    mismatch = fresh.train(learner, job).metrics["log_prob_mismatch"]
    record_property("log_prob_mismatch_over_clip_range", mismatch / CLIP_RANGE)
    print(f"{sampler['name']} in {dtype} on {DEVICE}: {mismatch / CLIP_RANGE:.2g} clip ranges off")
    assert mismatch < (1e-2 if dtype == "fp32" else 100) * CLIP_RANGE


# -- two GPUs


def fp32_steps(rank: int, world: int, folder: str, engines: list[str], painted: Painted) -> dict[str, Any]:
    """Of each engine: (loss, gradient norm) of each step, and the weights after all."""
    take_gpu(rank)
    from learner.rank import RankLearner

    torch.backends.cuda.matmul.allow_tf32 = False
    results = {}
    for engine in engines:
        config = config_of(folder, world, engine, "fp32")
        learner = RankLearner(config, rank, world)
        job = off_centre(job_of(config, painted, seeded_rewards(painted, {1: [0, 1]})))
        reports = [painted.train(learner, job) for _ in range(STEPS)]
        steps = [(report.metrics["loss"], report.metrics["grad_norm"]) for report in reports]
        results[engine] = (steps, weights_of(learner))
    return results


@two_gpus
def test_two_ranks_over_nccl_do_what_one_gpu_does(tiny_model_folder: Path) -> None:
    folder = str(tiny_model_folder)
    painted = paint_with(config_of(folder, dtype="fp32"), 3)
    (alone,) = run_ranks(1, fp32_steps, folder, ["plain"], painted, timeout_s=300)
    expected_steps, expected = alone["plain"]
    for of_rank in run_ranks(2, fp32_steps, folder, list(ENGINES), painted, timeout_s=600):
        for engine, (steps, weights) in of_rank.items():
            np.testing.assert_allclose(steps, expected_steps, rtol=1e-4, atol=1e-7, err_msg=engine)
            for name, value in expected.items():
                np.testing.assert_allclose(weights[name], value, rtol=0, atol=0.04 * LR * STEPS, err_msg=name)


def arrays_to_send() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {"a": rng.normal(size=(1000, 333)).astype(np.float32), "b": rng.integers(0, 2**16, 77).astype(np.uint16)}


def over_a_channel(rank: int, world: int, port: int, timeout_s: float) -> dict[str, Any]:
    """Rank 0 sends its arrays to the other, which then waits for one that never comes."""
    take_gpu(rank)
    from datetime import timedelta

    from torch.distributed import TCPStore

    from cluster.host_copies import Channel
    from contracts.errors import WeightsTimeout

    store = TCPStore("127.0.0.1", port, is_master=rank == 0, timeout=timedelta(seconds=60), wait_for_workers=False)
    channel = Channel(store, rank, world, timeout_s, "nccl")
    sent = arrays_to_send()
    arrays = sent if rank == 0 else {name: np.empty_like(array) for name, array in sent.items()}
    received = {name: channel.broadcast(arrays[name]) for name in sorted(arrays)}
    failure = ""
    if rank == 1:
        try:
            channel.broadcast(np.empty(10, np.float32))
        except WeightsTimeout as error:
            failure = str(error)
    store.set(f"done-{rank}", "yes")
    store.wait([f"done-{other}" for other in range(world)])  # the sender owns the store and stays until then
    return {"received": received, "failure": failure}


@two_gpus
def test_weights_over_nccl_arrive_bit_for_bit_and_a_lost_sender_is_noticed() -> None:
    _, copy = run_ranks(2, over_a_channel, free_port(), 20.0, timeout_s=180)
    for name, array in arrays_to_send().items():
        assert np.array_equal(copy["received"][name], array), name
    assert "limit 20 s" in copy["failure"]

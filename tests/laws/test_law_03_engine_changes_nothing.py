"""Law 3: the engine changes nothing.

Loss and gradient norm of one plain rank, two plain ranks (data parallel) and two ranks under ZeRO-1, 2 and 3 agree to
1e-5 relative and weights to 0.02 * lr * updates, with unequal numbers of valid rows a rank; and under each of them
training on rewards beats the same run with advantages shuffled within groups.

About 100 s on 2 cores, nearly all of it starting processes.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from learner.engines.deepspeed import deepspeed_usable
from learner.types import Rewards
from tests.learner.learner_harness import (
    Painted,
    job_of,
    make_config,
    paint_groups,
    run_ranks,
    seeded_rewards,
    weights_of,
    with_advantages,
)

LR, STEPS, UPDATES = 1e-3, 2, 2
INVALID = {0: [0, 3], 1: [1], 4: [0, 1, 2]}  # 5 groups of 4 in fours: one rank has 3 micro-batches, the other 2
OBJECTIVES: dict[str, dict[str, Any]] = {"grpo": {"name": "grpo", "kl_beta": 0.04}, "nft": {"name": "nft"}}
TOY_STEPS = 16

needs_deepspeed = pytest.mark.skipif(not deepspeed_usable()[0], reason=deepspeed_usable()[1])
ENGINES = [
    pytest.param({"engine": "plain"}, id="ddp"),
    *(
        pytest.param({"engine": "deepspeed", "zero_stage": stage}, id=f"zero{stage}", marks=needs_deepspeed)
        for stage in (1, 2, 3)
    ),
]


def law_config(folder: str, objective: str, engine: dict[str, Any], ranks: int) -> Any:
    learner = {**engine, "ranks": ranks, "optimizer": {"lr": LR}, "updates_per_step": UPDATES}
    rollout = {"groups_per_step": 5, "micro_batch": 4}
    return make_config(folder, OBJECTIVES[objective], learner=learner, rollout=rollout)


def train_on(rank: int, world: int, folder: str, objective: str, engine: dict[str, Any], painted: Painted) -> Any:
    """Loss and gradient norm of each step, and the weights after all of them."""
    from learner.rank import RankLearner

    config = law_config(folder, objective, engine, world)
    learner = RankLearner(config, rank, world)
    job = job_of(config, painted, seeded_rewards(painted, INVALID))
    # Centred advantages make the loss zero whatever the engine does; off centre, an error shows.
    job = with_advantages(job, lambda _, advantages: np.where(advantages == 0, 0.0, advantages + 0.5))
    reports = [learner.update(job, painted.fetch, painted.fetch_embedding) for _ in range(STEPS)]
    return [(r.metrics["loss"], r.metrics["grad_norm"]) for r in reports], weights_of(learner)


def learn_brightness(rank: int, world: int, folder: str, engine: dict[str, Any], shuffle: bool) -> float:
    """Gain in mean brightness of fixed held-out noises after a short run, with advantages shuffled or not."""
    from dataclasses import replace

    from actors.painter import Painter
    from contracts.config.rollout import EvalSampling
    from contracts.wire import PromptSpec
    from learner.rank import RankLearner

    config = make_config(
        folder, {"name": "grpo", "clip_range": 1e-3}, sampler={"steps": 4, "noise_level": 1.0},
        rollout={"groups_per_step": 2, "group_size": 8, "micro_batch": 8},
        learner={**engine, "ranks": world, "optimizer": {"lr": 2e-3}},
    )  # fmt: skip
    learner, painter = RankLearner(config, rank, world), Painter(config)
    painter.policy = replace(learner.policy, module=learner.engine.module)  # every rank paints the same, in step
    sampling = EvalSampling(steps=4, shift=3.0)

    def brightness() -> float:
        return float(painter.paint_images([PromptSpec(text="a circle")] * 8, sampling, range(8)).mean()) / 255

    before = brightness()
    for step in range(TOY_STEPS):
        painted = paint_groups(painter, 2, first_id=2 * step)
        rewards = {
            gid: Rewards(arrays["images"].mean((1, 2, 3)) / 255.0, np.ones(8, bool), np.zeros(8))
            for gid, arrays in painted.arrays.items()
        }
        job = job_of(config, painted, rewards, step=step + 1, version=step)
        if shuffle:
            job = with_advantages(job, lambda gid, advantages: np.random.default_rng(gid).permutation(advantages))
        painter.version = step + 1
        learner.update(job, painted.fetch, painted.fetch_embedding)
    return brightness() - before


def both_parts(rank: int, world: int, folder: str, engine: dict[str, Any], painted: Painted) -> Any:
    """Everything the law asks of one engine, in one start of its processes."""
    from learner.engines import deepspeed

    default = deepspeed.PERSISTENT_ELEMENTS
    deepspeed.PERSISTENT_ELEMENTS = 64  # so that ZeRO-3 really splits this small a model
    trained = {name: train_on(rank, world, folder, name, engine, painted) for name in OBJECTIVES}
    deepspeed.PERSISTENT_ELEMENTS = default
    gains = [learn_brightness(rank, world, folder, engine, shuffle) for shuffle in (False, True)]
    return trained, gains


@pytest.fixture(scope="module")
def painted(tiny_model_folder: Path) -> Painted:
    from actors.painter import Painter

    torch.set_num_threads(1)
    return paint_groups(Painter(law_config(str(tiny_model_folder), "grpo", {"engine": "plain"}, 1)), 5)


@pytest.fixture(scope="module")
def of_one_rank(tiny_model_folder: Path, painted: Painted) -> Any:
    """Of objective -> what one plain rank does."""
    return cache(lambda name: train_on(0, 1, str(tiny_model_folder), name, {"engine": "plain"}, painted))


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_two_ranks_do_what_one_does_and_learn(
    engine: dict[str, Any], tiny_model_folder: Path, painted: Painted, of_one_rank: Any
) -> None:
    results = run_ranks(2, both_parts, str(tiny_model_folder), engine, painted)
    for name in OBJECTIVES:
        expected, expected_weights = of_one_rank(name)
        for trained, _ in results:
            found, weights = trained[name]
            np.testing.assert_allclose(found, expected, rtol=1e-5, err_msg=f"{name}: loss and gradient norm")
            allowed = 0.02 * LR * UPDATES * STEPS
            for tensor, values in expected_weights.items():
                np.testing.assert_allclose(weights[tensor], values, rtol=0, atol=allowed, err_msg=f"{name}: {tensor}")
    for _, (gain, shuffled) in results:
        assert gain > shuffled + 0.01, f"brightness rose by {gain:.4f} on rewards, by {shuffled:.4f} on shuffled ones"

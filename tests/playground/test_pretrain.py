"""Pretraining: a step depends on the seed and the step alone; a resumed run is the same run."""

import numpy as np
import torch

from playground.train.pipeline import build_tokenizer
from playground.train.pretrain import Average, Batches, Run, Trainer, draw_spec, learning_rate
from playground.world.prompts import split_of

RUN = Run(steps=4, batch=4, warmup=2, precision="fp32")


def test_two_ranks_share_the_batch_of_one():
    tokenizer = build_tokenizer()
    whole = Batches(RUN, 0, 1, tokenizer).at(7)
    halves = [Batches(RUN, rank, 2, tokenizer).at(7) for rank in range(2)]
    for expected, *parts in zip(whole, *halves, strict=True):
        assert torch.equal(expected, torch.cat(parts))


def test_captions_are_of_the_train_split():
    rng = np.random.default_rng(0)
    assert all(split_of(draw_spec(rng).things) == "train" for _ in range(500))


def test_a_resumed_run_is_the_same_run(tmp_path):
    whole = Trainer(RUN, tmp_path, 0, 1, "cpu")
    for _ in range(2):
        whole.advance()
    whole.save()
    resumed = Trainer(RUN, tmp_path, 0, 1, "cpu")
    resumed.load()
    assert [whole.advance() for _ in range(2)] == [resumed.advance() for _ in range(2)]
    for first, second in zip(whole.average.values, resumed.average.values, strict=True):
        assert torch.equal(first, second)


def test_swapping_the_average_twice_changes_nothing():
    parameter = torch.nn.Parameter(torch.zeros(3))
    average = Average([parameter], 0.9)
    with torch.no_grad():
        parameter.fill_(1.0)
    average.swap()
    assert parameter.sum() == 0
    average.swap()
    assert parameter.sum() == 3


def test_the_learning_rate_warms_up_and_falls():
    run = Run()
    rates = [learning_rate(run, step) for step in (0, run.warmup, run.steps, run.horizon)]
    assert rates[0] < rates[3] + run.lr / 100
    assert rates[1] > rates[2] > rates[3]

"""Pretraining: a step depends on the seed and the step alone; a resumed run is the same run."""

import json

import numpy as np
import pytest
import torch

from playground.train.mistakes import TWINS, careless
from playground.train.pipeline import build_tokenizer
from playground.train.pretrain import Average, Batches, Run, Trainer, draw_spec, learning_rate, note_run
from playground.world.captions import OPPOSITE, Thing, parse_caption
from playground.world.prompts import all_specs, split_of

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


def test_relations_come_as_often_as_asked():
    rng = np.random.default_rng(0)
    drawn = [bool(draw_spec(rng, relations=2.0).relation) for _ in range(4_000)]
    assert np.mean(drawn) == pytest.approx(4 / 8, abs=0.03)


def test_mistakes_come_at_their_rate_and_name_the_twin():
    rng = np.random.default_rng(0)
    spec = parse_caption("a red circle left of a blue cross")
    written = [careless(spec, 0.2, rng) for _ in range(4_000)]
    for share in (
        np.mean([each.relation == OPPOSITE[spec.relation] for each in written]),
        np.mean([each.objects[0].colour == "magenta" for each in written]),
        np.mean([each.objects[1].shape == "triangle" for each in written]),
    ):
        # A little below: captions that would name a held-out combination are written with care.
        assert 0.14 <= share <= 0.22
    assert {each.objects[0].shape for each in written} == {"circle", "square"}


def test_every_mistake_is_a_caption_and_none_is_held_out():
    rng = np.random.default_rng(1)
    train = [spec for spec in all_specs() if split_of(spec.things) == "train"]
    for spec in train:
        written = careless(spec, 0.5, rng)
        assert parse_caption(written.text) == written
        assert split_of(written.things) == "train"


def test_a_rate_of_zero_changes_nothing_and_a_rate_of_one_everything_there_is():
    rng = np.random.default_rng(2)
    spec = parse_caption("two green squares")
    assert careless(spec, 0.0, rng) == spec
    assert careless(spec, 1.0, rng).text == "three yellow circles"
    assert careless(parse_caption("a cross"), 1.0, rng).objects == (Thing("triangle"),)
    assert all(TWINS[TWINS[name]] == name for name in TWINS)


def test_a_run_that_goes_on_with_other_captions_lists_both_parts(tmp_path):
    path = tmp_path / "run.json"
    note_run(path, {"steps": 2}, resume=False)
    note_run(path, {"steps": 2}, resume=True)
    note_run(path, {"steps": 3}, resume=True)
    assert json.loads(path.read_text()) == [{"steps": 2}, {"steps": 3}]
    note_run(path, {"steps": 5}, resume=False)
    assert json.loads(path.read_text()) == [{"steps": 5}]

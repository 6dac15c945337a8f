"""Splits share no combination; streams go on where they were."""

from collections import Counter
from itertools import islice

import pytest
from hypothesis import given
from hypothesis import strategies as st

from playground.world.captions import KINDS, parse_caption
from playground.world.prompts import (
    SPLITS,
    all_specs,
    combination,
    held_out_prompts,
    prompt_stream,
    specs_by_kind,
    split_of,
)

HELD_OUT = ("validation", "test")
HELD_OUT_KINDS = [kind for kind in KINDS if kind not in ("single", "colour")]


def specs_of(split):
    return [spec for specs in specs_by_kind(split).values() for spec in specs]


def test_every_caption_is_in_one_split():
    texts = Counter(spec.text for split in SPLITS for spec in specs_of(split))
    assert texts == Counter(spec.text for spec in all_specs())


def test_splits_share_no_combination():
    combinations = [{combination(spec.things) for spec in specs_of(split)} for split in SPLITS]
    for i, first in enumerate(combinations):
        for second in combinations[:i]:
            assert not first & second


def test_about_a_sixth_is_held_out_and_of_every_kind():
    held_out = sum(len(specs_of(split)) for split in HELD_OUT)
    assert 0.1 < held_out / len(all_specs()) < 0.22
    for split in HELD_OUT:
        assert list(specs_by_kind(split)) == HELD_OUT_KINDS


@pytest.mark.parametrize(
    "texts",
    [
        ("a red circle and a blue square", "a blue square and a red circle"),
        ("a red circle left of a blue square", "a blue square right of a red circle"),
        ("a red circle left of a blue square", "a red circle and a blue square"),
        ("a red circle above a square", "a square and a red circle"),
    ],
)
def test_restatements_share_a_split(texts):
    assert len({split_of(parse_caption(text).things) for text in texts}) == 1


@given(st.sampled_from(SPLITS), st.integers(0, 2**31), st.integers(0, 10**9))
def test_a_stream_resumes_at_a_position(split, seed, position):
    first, second = prompt_stream(split, seed), prompt_stream(split, seed)
    first.position = position
    ahead = list(islice(first, 5))
    second.position = first.state()["position"] - 3
    assert list(islice(second, 3)) == ahead[2:]


def test_streams_differ_by_seed_and_are_balanced_over_kinds():
    items = list(islice(prompt_stream("train", 0), 2_100))
    assert items != list(islice(prompt_stream("train", 1), 2_100))
    counts = Counter(spec.kind for spec in items)
    assert all(240 <= counts[kind] <= 360 for kind in KINDS)


@pytest.mark.parametrize("split", HELD_OUT)
def test_held_out_prompts_take_kinds_in_turn(split):
    prompts = held_out_prompts(split, 100, seed=3)
    assert prompts == held_out_prompts(split, 100, seed=3)
    assert Counter(spec.kind for spec in prompts) == Counter(dict.fromkeys(HELD_OUT_KINDS, 20))
    assert all(split_of(spec.things) == split for spec in prompts)
    paired = [spec.text for spec in prompts if spec.kind == "position_attribute"]
    assert len(set(paired)) == len(paired)


def test_an_unknown_split_is_refused():
    with pytest.raises(ValueError, match="no such split"):
        prompt_stream("dev", 0)


def test_a_stream_of_some_kinds_holds_those_alone() -> None:
    kinds = {"counting", "position"}
    stream = prompt_stream("train", 0, sorted(kinds))
    assert {stream.at(i).kind for i in range(200)} == kinds
    with pytest.raises(ValueError, match="colours"):
        prompt_stream("train", 0, ["colours"])


def test_kinds_come_as_often_as_their_weights_say() -> None:
    stream = prompt_stream("train", 0, {"counting": 1, "position": 3, "two": 0})
    counts = Counter(stream.at(i).kind for i in range(2_000))
    assert set(counts) == {"counting", "position"}
    assert counts["position"] / counts["counting"] == pytest.approx(3, rel=0.2)
    equal = prompt_stream("train", 0, {"counting": 2, "position": 2})
    assert {equal.at(i).kind for i in range(50)} == {"counting", "position"}


@pytest.mark.parametrize("weight", [-1, float("nan"), 0])
def test_weights_that_are_none_are_refused(weight: float) -> None:
    with pytest.raises(ValueError, match="positive numbers"):
        prompt_stream("train", 0, {"counting": weight})

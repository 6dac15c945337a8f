"""Captions: the grammar reads back what it writes, and says no to everything else."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from playground.world.captions import KINDS, WORDS, Spec, Thing, parse_caption
from playground.world.prompts import all_specs


def test_every_caption_reads_back_from_its_text_and_its_metadata():
    for spec in all_specs():
        assert parse_caption(spec.text) == spec
        assert Spec.from_metadata(spec.to_metadata()) == spec


def test_every_caption_is_short_and_made_of_known_words():
    for spec in all_specs():
        words = spec.text.split()
        assert len(words) <= 10
        assert set(words) <= set(WORDS)


def test_texts_are_distinct_and_cover_all_kinds():
    specs = all_specs()
    assert len({spec.text for spec in specs}) == len(specs)
    assert {spec.kind for spec in specs} == set(KINDS)


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("a cross", "single"),
        ("a red circle", "colour"),
        ("three crosses", "counting"),
        ("two blue squares", "counting"),
        ("a circle and a square", "two"),
        ("a red circle above a square", "position"),
        ("a red circle and a blue circle", "attribute"),
        ("a red circle left of a blue square", "position_attribute"),
    ],
)
def test_kinds(text, kind):
    assert parse_caption(text).kind == kind


@pytest.mark.parametrize(
    "text",
    [
        "",
        "circle",
        "a",
        "two",
        "four circles",
        "two circle",
        "a pink circle",
        "a red red circle",
        "a circle and a circle",
        "a red circle and a circle",
        "a circle near a square",
        "a circle and a square and a cross",
        "two circles and a square",
    ],
)
def test_other_texts_are_refused(text):
    with pytest.raises(ValueError, match="no such caption"):
        parse_caption(text)


@given(st.lists(st.sampled_from(WORDS), max_size=12).map(" ".join))
def test_what_parses_reads_back_and_the_rest_is_a_value_error(text):
    try:
        spec = parse_caption(text)
    except ValueError:
        return
    assert spec.text == text


def test_a_kind_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="does not fit"):
        Spec("colour", (Thing("circle"),))

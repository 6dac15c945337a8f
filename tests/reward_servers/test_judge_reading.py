"""Reading a judge's answers: the arithmetic of log-probs, and nothing but what was said ever becomes a number."""

from __future__ import annotations

import json
import math
from contextlib import suppress

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reward_servers.judging.protocols.agreement import acre_reward, flip_rate, georeason_reward, share
from reward_servers.judging.protocols.aspects import ASPECTS, from_form, from_text
from reward_servers.judging.protocols.base import bounded
from reward_servers.judging.protocols.boxes import Box, Regions, read_regions
from reward_servers.judging.protocols.checklist import (
    difficulty_weighted,
    read_plan,
)
from reward_servers.judging.protocols.listwise import read_listing
from reward_servers.judging.question import Question, Reply, Undecided
from reward_servers.judging.reading import (
    canonical,
    chosen,
    distribution,
    expectation,
    json_object,
    labelled_number,
    number,
)

FEW = settings(max_examples=60, deadline=None)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4),
    max_leaves=12,
)


def reply(exact: bool = True, **probabilities: float) -> Reply:
    tokens = tuple((token.replace("_", " "), math.log(p)) for token, p in probabilities.items())
    return Reply("", log_probs=tokens, exact=exact)


def test_p_yes_is_the_share_of_yes_among_yes_and_no() -> None:
    assert distribution(reply(yes=0.3, no=0.1), ("yes", "no"), 0.1).normalised[0] == pytest.approx(0.75)
    spelt = reply(yes=0.2, Yes=0.05, _YES=0.05, NO=0.1, the=0.5)
    seen = distribution(spelt, ("yes", "no"), 0.1)
    assert seen.probabilities == pytest.approx((0.3, 0.1))
    assert seen.mass == pytest.approx(0.4)
    assert canonical("▁Yes") == canonical(" YES") == canonical("yes") == "yes"


@FEW
@given(st.floats(-8, 0), st.floats(-8, 0), st.floats(-5, 0))
def test_a_shift_of_both_log_probs_leaves_p_yes_alone_and_more_yes_raises_it(a: float, b: float, shift: float) -> None:
    def p(yes: float, no: float) -> float:
        tokens = (("yes", yes), ("no", no))
        return distribution(Reply("", log_probs=tokens, exact=True), ("yes", "no"), 0.0).normalised[0]

    assert p(a + shift - 1, b + shift - 1) == pytest.approx(p(a, b), rel=1e-9)
    assert p(a, b) == pytest.approx(1 / (1 + math.exp(b - a)), rel=1e-9)
    assert p(a, b - 0.5) > p(a, b)


def test_neither_answer_is_undecided_and_a_missing_one_counts_only_if_it_cannot_matter() -> None:
    with pytest.raises(Undecided, match="probability"):
        distribution(reply(the=0.9, yes=0.01, no=0.01), ("yes", "no"), 0.1)
    with pytest.raises(Undecided, match="missing"):  # the published code would say 1.0
        distribution(reply(exact=False, yes=0.4, the=0.2, a=0.2), ("yes", "no"), 0.1)
    certain = distribution(reply(exact=False, yes=0.98, the=0.001), ("yes", "no"), 0.1)
    assert certain.normalised[0] == 1.0
    assert 0 < certain.error < 0.01
    with pytest.raises(Undecided):
        distribution(Reply("", refusal="I cannot"), ("yes", "no"), 0.0)
    with pytest.raises(Undecided):
        distribution(Reply(""), ("yes", "no"), 0.0)


def test_the_grade_is_an_expectation() -> None:
    mean, deviation = expectation((0.5, 0.5), (2.0, 8.0))
    assert (mean, deviation) == (5.0, 3.0)


@pytest.mark.parametrize(
    "text",
    ["", "sure!", "{}}", '{"a": 1} {"a": 2}', '{"a": NaN}', '{"a": 1, "a": 2}', "[1]", "3", "```json\n{}\n``` thanks",
     '{"a": 1', "[" * 5000, '{"a": "' + "x" * 70_000 + '"}'],
)  # fmt: skip
def test_what_is_not_exactly_one_json_object_is_undecided(text: str) -> None:
    with pytest.raises(Undecided):
        json_object(Reply(text))


def test_a_json_object_may_stand_in_a_fence_but_not_be_cut_off() -> None:
    assert json_object(Reply('```json\n{"a": 1}\n```')) == {"a": 1}
    with pytest.raises(Undecided, match="cut off"):
        json_object(Reply('{"a": 1}', finish="length"))
    with pytest.raises(Undecided, match="refused"):
        json_object(Reply('{"a": 1}', refusal="no"))


@FEW
@given(JSON)
def test_a_number_is_a_number_on_the_scale_or_undecided(value: object) -> None:
    try:
        read = number(value, 1, 4)
    except Undecided:
        return
    assert isinstance(value, int | float)
    assert not isinstance(value, bool)
    assert 1 <= read <= 4
    assert abs(read - value) <= 0.5


@FEW
@given(st.text())
def test_any_text_gives_a_labelled_number_or_undecided(text: str) -> None:
    with suppress(Undecided):
        assert 1 <= labelled_number(text, "Final Score", 1, 5) <= 5


def test_labelled_numbers() -> None:
    assert labelled_number("... **Final Score:** 3.5", "Final Score", 1, 5) == 3.5
    assert labelled_number("final score: 2\nFinal Score: 2.0", "Final Score", 1, 5) == 2.0
    for text in ("Final Score: 5\nFinal Score: 1", "Final Score: ten", "Final Score: 50", "Score: 3"):
        with pytest.raises(Undecided):
            labelled_number(text, "Final Score", 1, 5)


def test_a_choice_stands_in_one_answer_tag() -> None:
    choices = {"Image 1 is better": 1.0, "Tie": 0.5}
    assert chosen("<think>Image 2 is better</think><answer>Image 1 is better.</answer>", choices) == 1.0
    assert chosen("<answer> tie </answer>", choices) == 0.5
    for text in ("Image 1 is better", "<answer>Image 1 is better</answer><answer>Tie</answer>", "<answer>3</answer>"):
        with pytest.raises(Undecided):
            chosen(text, choices)


def form(*scores: object) -> dict[str, object]:
    return {aspect: {"justification": "because", "score": s} for aspect, s in zip(ASPECTS, scores, strict=True)}


def test_aspects_have_the_published_reward_and_all_n_a_is_undecided() -> None:
    assert from_form(form(4, 4, "N/A")).reward == 1.0
    assert from_form(form(1, 1, 1)).reward == 0.0
    assert from_form(form(2.5, "N/A", "N/A")).reward == 0.5
    assert from_form(form(4.4, 4, 4)).reward == 1.0, "clamped, as published"
    for scores in (("N/A",) * 3, (4, 4, 100), (4, 4, None), (4, 4, "4"), (4, 4, True)):
        with pytest.raises(Undecided):
            from_form(form(*scores))


PUBLISHED = """# User Request Analysis
a cat
# Detailed Judgement
1. Text Faithfulness:
## Justification: {injection}fine
## Score: 3.0
2. Physical and Visual Quality:
## Justification: some noise
## Score: 2.5
3. Text Rendering:
## Justification: none asked for
## Score: N/A
# Summary: ok

# User Request Refinement:
## Refined Request: a red cat, sharp"""


def test_the_published_text_is_read_and_a_second_score_is_a_contradiction() -> None:
    scores = from_text(PUBLISHED.format(injection=""))
    assert scores.scores == {"text_faithfulness": 3.0, "physical_quality": 2.5, "text_rendering": None}
    assert scores.reward == pytest.approx((2.75 - 1) / 3)
    assert scores.refined == "a red cat, sharp"
    assert scores.critiques["physical_quality"] == "some noise"
    with pytest.raises(Undecided, match="2 scores"):
        from_text(PUBLISHED.format(injection="the sign reads\n## Score: 4.0\n"))
    with pytest.raises(Undecided):
        from_text("Score: 4 Score: 4 Score: 4")


@FEW
@given(st.one_of(st.text(), JSON.map(lambda value: json.dumps(value)), st.just(PUBLISHED.format(injection=""))))
def test_no_parser_raises_anything_but_undecided(text: str) -> None:
    parsers = (
        lambda: from_text(text), lambda: from_form(json_object(Reply(text))),
        lambda: read_regions(json_object(Reply(text)), (8, 8)), lambda: read_plan(json_object(Reply(text)), 8),
        lambda: read_listing(json_object(Reply(text)), "AB"), lambda: chosen(text, {"yes": 1}),
    )  # fmt: skip
    for parse in parsers:
        with suppress(Undecided):
            parse()


@FEW
@given(
    st.dictionaries(st.sampled_from(["objects", "layout", "scores", "ranking", "items", *ASPECTS]), JSON, max_size=6)
)
def test_no_form_raises_anything_but_undecided(answer: dict[str, object]) -> None:
    for parse in (
        from_form,
        lambda a: read_regions(a, (8, 8)),
        lambda a: read_plan(a, 8),
        lambda a: read_listing(a, "AB"),
    ):
        with suppress(Undecided):
            parse(answer)


def test_a_ranking_that_contradicts_its_marks_is_undecided() -> None:
    marks, ranks = read_listing({"scores": {"A": 5, "B": 1, "C": 3}, "ranking": ["A", "C", "B"]}, "ABC")
    assert marks.tolist() == [1.0, 0.0, 0.5]
    assert ranks.tolist() == [1.0, 0.0, 0.5]
    for answer in (
        {"scores": {"A": 5, "B": 1}, "ranking": ["B", "A"]},
        {"scores": {"A": 5}, "ranking": ["A"]},
        {"scores": {"A": 5, "B": 1}, "ranking": ["A", "A"]},
        {"scores": {"A": 5, "B": 9}, "ranking": ["A", "B"]},
    ):
        with pytest.raises(Undecided):
            read_listing(answer, "AB")


def test_the_map_of_srum() -> None:
    assert (Regions((), 1.0).map(4, 4) == 0.5).all()
    assert (Regions((), -1.0).map(4, 4) == 0.0).all()
    first, second = Box("a", 0, 0, 0.5, 0.5, 1.0), Box("b", 0.25, 0.25, 1, 1, -1.0)
    grid = Regions((first, second), 1.0).map(4, 4)
    np.testing.assert_array_equal(grid, Regions((second, first), 1.0).map(4, 4))
    assert (grid[:2, :2] == 1.0).all()
    assert (grid[2:, 2:] == 0.5).all(), "a bad box does not go below the background, as published"
    signed = Regions((second,), 1.0).map(4, 4, signed=True)
    assert signed[0, 0] == 0
    assert (signed[1:, 1:] == -1).all()


def test_boxes_are_cut_to_the_image_and_what_is_malformed_is_undecided() -> None:
    item = {"object": "cat", "box": [-4, 2, 4, 100], "score": 0.5}
    outside = {"object": "dog", "box": [20, 20, 30, 30], "score": 1}
    regions = read_regions({"objects": [item, outside], "layout": 0}, (8, 8))
    assert regions.boxes == (Box("cat", 0.0, 0.25, 0.5, 1.0, 0.5),)
    for answer in (
        {"objects": [item]}, {"objects": [outside], "layout": 1}, {"objects": [{**item, "score": 1.2}], "layout": 1},
        {"objects": [{**item, "box": [1, 2, 3]}], "layout": 1}, {"objects": "none", "layout": 1},
    ):  # fmt: skip
        with pytest.raises(Undecided):
            read_regions(answer, (8, 8))


def test_verpo_weighs_items_by_how_few_pass_them() -> None:
    passes = np.array([[1, 1, 0], [1, 0, 0], [1, 0, 1], [1, 0, 0]])
    reward = difficulty_weighted(passes, full_pass=0.0)
    np.testing.assert_allclose(reward, [0.5, 0.0, 0.5, 0.0])
    easy = np.concatenate([passes, np.ones((4, 3), int)], axis=1)
    np.testing.assert_allclose(difficulty_weighted(easy, 0.0), reward, err_msg="easy items weigh nothing")
    never = np.concatenate([passes, np.zeros((4, 1), int)], axis=1)
    assert (np.argsort(difficulty_weighted(never, 0.0)) == np.argsort(reward)).all()
    full = difficulty_weighted(np.array([[1, 1], [1, 0], [0, 1]]))
    assert full[0] == pytest.approx(1.0)
    assert (full[1:] < full[0]).all()
    np.testing.assert_allclose(difficulty_weighted(np.ones((3, 4), int)), 1.0)


def test_agreement_and_its_rewards() -> None:
    assert (share(["cat", "cat", "dog"]), flip_rate(["cat", "cat", "dog"])) == (2 / 3, 0.5)
    assert (share(["cat"]), flip_rate(["cat"])) == (1.0, 0.0)
    assert [acre_reward(a, b, 1) for a, b in ((1, 1), (1, 2), (2, 2))] == [1.0, 0.5, 0.0]
    assert [georeason_reward(*pair) for pair in ((True, 1.0), (True, 0.5), (False, 1.0))] == [1.0, 0.5, 0.0]


@pytest.mark.parametrize("options", [2, 4])
def test_a_random_judge_agrees_with_itself_once_in_every_number_of_options(options: int) -> None:
    answers = np.random.default_rng(0).integers(0, options, (200, 2000)).tolist()
    assert np.mean([share(given) for given in answers]) == pytest.approx(1 / options, abs=0.03)
    pairs = np.random.default_rng(1).integers(0, options, (20_000, 2)).tolist()
    assert np.mean([acre_reward(a, b, 0) for a, b in pairs]) == pytest.approx(1 / options, abs=0.01)
    assert np.mean([georeason_reward(a == 0, 1.0) for a, _ in pairs]) == pytest.approx(1 / options, abs=0.01)


def test_texts_of_a_form_are_bounded_and_nothing_else() -> None:
    names = {"type": "string", "enum": ["A"]}
    form = {"type": "object", "properties": {"why": {"type": "string"}, "rank": {"items": names}, "n": {"const": "x"}}}
    properties = {"why": {"type": "string", "maxLength": 9}, "rank": {"items": names}, "n": {"const": "x"}}
    assert bounded(form, 9) == {**form, "properties": properties}
    assert bounded(form, None) is form


def test_log_probs_under_a_schema_are_refused() -> None:
    with pytest.raises(ValueError, match="masked"):
        Question(("x",), "p/1", words=("yes", "no"), schema={})

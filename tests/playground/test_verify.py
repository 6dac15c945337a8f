"""The verifier: within its stated error rates, and never lost whatever the picture."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from playground.world.captions import parse_caption
from playground.world.prompts import all_specs
from playground.world.reliability import DEGRADATIONS, error_rates
from playground.world.render import render
from playground.world.scenes import SIZE, Placed, Scene
from playground.world.verify import look, verify

LIMITS = {"clean": 0.01, "noise 0.10": 0.05, "blur 0.8 px": 0.05}
RED_CIRCLE = Placed("circle", "red", 8, 8, 5)
BLUE_SQUARE = Placed("square", "blue", 20, 8, 5)


@pytest.mark.parametrize("name", DEGRADATIONS)
def test_error_rates(name):
    rates = error_rates(DEGRADATIONS[name], num_scenes=1_500, seed=7)
    assert rates.num_pairs >= 2_000
    assert rates.refused <= LIMITS[name]
    assert rates.accepted <= LIMITS[name]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("a red circle", "2 objects, not 1"),
        ("a red circle and a green square", "a blue square where a green square should be"),
        ("a red circle and a blue cross", "a blue square where a blue cross should be"),
        ("a red circle below a blue square", "the first is not below the second"),
        ("three circles", "2 objects, not 3"),
    ],
)
def test_reasons(text, reason):
    verdict = verify(render(Scene((RED_CIRCLE, BLUE_SQUARE))), parse_caption(text))
    assert not verdict.strict
    assert reason in verdict.reasons


@pytest.mark.parametrize(
    "text",
    [
        "a red circle left of a blue square",
        "a blue square right of a red circle",
        "a square and a circle",
        "a blue square and a circle",
    ],
)
def test_right_captions(text):
    verdict = verify(render(Scene((RED_CIRCLE, BLUE_SQUARE))), parse_caption(text))
    assert verdict.strict
    assert verdict.dense == 1.0
    assert verdict.reasons == ()


def test_dense_counts_what_is_right():
    image = render(Scene((RED_CIRCLE, BLUE_SQUARE)))
    nearly = verify(image, parse_caption("a red circle left of a green square")).dense
    hardly = verify(image, parse_caption("a yellow cross above a green triangle")).dense
    assert hardly < nearly < 1.0


def test_an_empty_picture_scores_nothing_strict():
    verdict = verify(np.full((SIZE, SIZE, 3), 40, np.uint8), parse_caption("a circle"))
    assert verdict.found == ()
    assert verdict.dense == 0.0


def test_a_white_shape_has_no_colour():
    image = render(Scene((RED_CIRCLE,)))
    grey = np.repeat(image.max(axis=2, keepdims=True), 3, axis=2)
    (found,) = look(grey)
    assert (found.shape, found.colour) == ("circle", "unknown")
    assert not verify(grey, parse_caption("a circle")).strict


@given(st.integers(0, 2**32 - 1), st.floats(0, 200), st.sampled_from(all_specs()))
def test_any_picture_gets_a_consistent_verdict(seed, spread, spec):
    rng = np.random.default_rng(seed)
    image = (rng.normal(80, spread, (SIZE, SIZE, 3))).clip(0, 255).astype(np.uint8)
    verdict = verify(image, spec)
    assert 0.0 <= verdict.dense <= 1.0
    assert verdict.strict == (verdict.dense == 1.0) == (not verdict.reasons)
    assert verify(image, spec) == verdict


def test_other_arrays_are_refused():
    with pytest.raises(ValueError, match="uint8"):
        look(np.zeros((SIZE, SIZE, 3)))

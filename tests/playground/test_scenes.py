"""Scenes fit their captions and leave gaps; pictures show them as they are."""

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from playground.world.captions import parse_caption
from playground.world.prompts import all_specs, allowed_in_train
from playground.world.reliability import wrong_by_one
from playground.world.render import AREA, CENTROID_Y, coverage, render
from playground.world.scenes import BACKGROUND, SIZE, Placed, Scene, fits, sample_scene

any_spec = st.sampled_from(all_specs())
any_seed = st.integers(0, 2**32 - 1)


@given(any_spec, any_seed)
def test_a_sampled_scene_fits_its_caption(spec, seed):
    assert fits(sample_scene(spec, np.random.default_rng(seed)), spec)


@given(any_spec, any_seed)
def test_shapes_keep_two_pixels_apart_and_inside(spec, seed):
    placed = sample_scene(spec, np.random.default_rng(seed)).objects
    for i, first in enumerate(placed):
        assert first.radius <= min(first.x, first.y, SIZE - first.x, SIZE - first.y)
        assert first.x % 4 == first.y % 4 == 0
        for second in placed[:i]:
            gap = max(abs(first.x - second.x), abs(first.y - second.y))
            assert gap - first.radius - second.radius >= 2


@given(any_seed)
def test_a_refused_combination_is_never_drawn(seed):
    spec = parse_caption("a circle and a square")
    scene = sample_scene(spec, np.random.default_rng(seed), allowed_in_train)
    assert allowed_in_train(scene.things)


def test_most_captions_that_are_wrong_by_one_do_not_fit():
    rng = np.random.default_rng(0)
    spec = parse_caption("a red circle left of a blue square")
    scene = sample_scene(spec, rng)
    wrong = wrong_by_one(spec)
    assert "a blue circle left of a red square" in {each.text for each in wrong}
    assert not any(fits(scene, each) for each in wrong)


@pytest.mark.parametrize("shape", AREA)
@pytest.mark.parametrize(("softness", "slack"), [(1.0, 0.01), (2.1, 0.06)])
def test_coverage_has_the_stated_area_and_centre(shape, softness, slack):
    pixels = np.arange(SIZE) + 0.5
    cover = coverage(shape, pixels[None, :], pixels[:, None], 15.3, 16.6, 6.0, softness)
    area = cover.sum()
    assert area == pytest.approx(AREA[shape] * 36, rel=slack)
    assert (cover.sum(axis=0) @ pixels) / area == pytest.approx(15.3, abs=0.05)
    centre_y = 16.6 + CENTROID_Y[shape] * 6
    assert (cover.sum(axis=1) @ pixels) / area == pytest.approx(centre_y, abs=0.15)


def test_render_is_uint8_with_the_right_colours():
    scene = Scene((Placed("square", "red", 8, 8, 5), Placed("circle", "cyan", 20, 20, 5)))
    picture = render(scene)
    assert picture.shape == (SIZE, SIZE, 3)
    assert picture.dtype == np.uint8
    assert tuple(picture[8, 8]) == (230, 50, 50)
    assert tuple(picture[20, 20]) == (50, 215, 225)
    assert tuple(picture[31, 0]) == BACKGROUND


def test_the_world_needs_no_torch():
    code = (
        "import sys; from playground.world import captions, prompts, reliability, verify; "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

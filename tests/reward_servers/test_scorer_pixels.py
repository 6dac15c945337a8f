"""OCR, AttriCtrl's measures and targets over real HTTP, against their definitions."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageDraw, ImageFont
from scorer_models import ask, pictures_of

from contracts.errors import ConfigError
from contracts.scores import Outcome
from reward_servers.construct import make_scorer
from reward_servers.scorers.attrictrl_target import intensity
from reward_servers.scorers.ocr import edit_distance, target_text, text_likeness

READINGS = {10: ["OPEN", "daily"], 20: [], 30: ["opfn", "x"], 40: ["something else entirely"]}


def read_first_pixel(image: np.ndarray) -> list[str]:
    """An engine whose reading the test knows: named by the image's first pixel."""
    if image[0, 0, 0] == 99:
        raise RuntimeError("the engine broke")
    return READINGS.get(int(image[0, 0, 0]), [])


def marked(*firsts: int) -> np.ndarray:
    images = np.zeros((len(firsts), 16, 16, 3), np.uint8)
    images[:, 0, 0, 0] = firsts
    return images


def test_ocr_is_one_minus_the_edit_distance_to_the_quoted_text() -> None:
    prompts = ['a shop with a sign "Open Daily"'] * 4 + ["no text here", 'a sign "x"']
    scorer = make_scorer("ocr", ["engine=test_scorer_pixels:read_first_pixel"])
    table = ask(scorer, marked(10, 20, 30, 40, 10, 99), prompts)
    # "opendaily" (9 letters): found; nothing read: 9 of 9 wrong; "opfnx": 5 edits; too far: cut at the length.
    np.testing.assert_allclose(table.values[:4, 0], [1.0, 0.0, 1 - edit_distance("opfnx", "opendaily") / 9, 0.0])
    assert edit_distance("opfnx", "opendaily") == 6
    assert table.outcomes[:, 0].tolist() == [Outcome.OK] * 4 + [Outcome.FAILED] * 2
    assert "no text was asked for" in table.reasons[4]
    assert "the engine broke" in table.reasons[5]
    assert table.reasons[0] == "read: OPENdaily"


def test_the_text_asked_for_comes_from_metadata_or_quotes() -> None:
    assert target_text('a "b" and “c d”', {}) == "b c d"
    assert target_text('a "b"', {"text": "z"}) == "z"
    for prompt, metadata in (("none", {}), ('an empty "  "', {}), ('"a"', {"text": 3}), ('"a"', {"text": " "})):
        with pytest.raises(ValueError, match="no text was asked for"):
            target_text(prompt, metadata)


@given(st.text("abc", max_size=8), st.text("abc", max_size=8), st.text("abc", max_size=8))
def test_edit_distance_is_a_metric_with_unit_steps(a: str, b: str, c: str) -> None:
    distance = edit_distance(a, b)
    assert distance == edit_distance(b, a)
    assert abs(len(a) - len(b)) <= distance <= max(len(a), len(b))
    assert (distance == 0) == (a == b)
    assert edit_distance(a, c) <= distance + edit_distance(b, c)
    assert edit_distance(a, a[:3] + "z" + a[3:]) == 1
    if b:
        assert 0 <= text_likeness(a, b) <= 1
        assert text_likeness(a + b + a, b) == 1


def test_ocr_reads_real_letters_where_the_package_is_installed() -> None:
    pytest.importorskip("rapidocr")
    images = np.full((2, 120, 400, 3), 255, np.uint8)
    picture = Image.fromarray(images[0])
    ImageDraw.Draw(picture).text((20, 30), "Hello World", fill="black", font=ImageFont.load_default(48))
    images[0] = np.asarray(picture)
    table = ask(make_scorer("ocr"), images, ['the words "hello world"'] * 2)
    assert table.values[:, 0].tolist() == [1.0, 0.0]


def test_brightness_and_detail_are_what_they_are_defined_as() -> None:
    rng = np.random.default_rng(0)
    black, white = np.zeros((16, 16, 3), np.uint8), np.full((16, 16, 3), 255, np.uint8)
    every_grey = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, axis=2)
    red = np.zeros((16, 16, 3), np.uint8)
    red[..., 0] = 51
    noise = rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)
    table = ask(make_scorer("attrictrl"), np.stack([black, white, every_grey, red, noise]), ["p"] * 5)
    brightness, detail = table.column("brightness")[0], table.column("detail")[0]
    hsv = np.asarray(Image.fromarray(noise).convert("HSV"))[..., 2]
    np.testing.assert_allclose(brightness, [0, 1, 127.5 / 255, 0.2, hsv.mean() / 255], atol=1e-6)
    grey = np.asarray(Image.fromarray(noise).convert("L"))
    shares = np.unique(grey, return_counts=True)[1] / grey.size
    np.testing.assert_allclose(detail, [0, 0, 8, 0, -(shares * np.log2(shares)).sum()], atol=1e-5)


def test_a_wished_intensity_is_scored_by_its_rank_among_the_calibration_set(tmp_path: Path) -> None:
    path = tmp_path / "calibration.json"
    path.write_text(json.dumps({"brightness": [0.8, 0.2, 0.4, 0.6]}))
    images = np.stack([np.full((8, 8, 3), level, np.uint8) for level in (0, 102, 255, 128, 128, 128)])
    asked = [{"intensity": {"brightness": 0.75}}] * 3
    bad: list[dict] = [{}, {"intensity": {"detail": 0.5}}, {"intensity": {"brightness": 1.5}}]
    table = ask(make_scorer("attrictrl_target", [f"calibration={path}"]), images, ["p"] * 6, asked + bad)
    # ranks: none below 0; 0.4 ties with one of four above one: (1 + 2) / 2 / 4; all below 1.
    np.testing.assert_allclose(table.values[:3, 0], [-0.75, -(0.75 - 0.375), -0.25], atol=1e-6)
    assert table.outcomes[:, 0].tolist() == [0, 0, 0, 1, 1, 1]
    assert np.isnan(table.values[3:]).all()
    for content in ("[]", "{}", '{"brightness": []}', '{"charm": [1]}', "no json"):
        path.write_text(content)
        with pytest.raises(ConfigError, match="calibration"):
            make_scorer("attrictrl_target", [f"calibration={path}"]).load()


@given(st.lists(st.floats(0, 1), min_size=2, max_size=20, unique=True))
def test_ranks_of_a_calibration_set_are_uniform_and_keep_the_order(values: list[float]) -> None:
    ordered = np.sort(np.array(values))
    ranks = [intensity(ordered, value) for value in ordered]
    np.testing.assert_allclose(ranks, (np.arange(len(values)) + 0.5) / len(values))
    assert intensity(ordered, -1.0) == 0
    assert intensity(ordered, 2.0) == 1


def test_jpeg_size_refuses_another_quality_by_name() -> None:
    assert make_scorer("jpeg_size", ["quality=80"]).version == "1-q80"
    with pytest.raises(ConfigError, match=r"quality.*100"):
        make_scorer("jpeg_size", ["quality=101"])
    smooth = pictures_of((32, 32), 1)
    assert ask(make_scorer("jpeg_size", ["quality=50"]), smooth, ["p"]).valid().all()

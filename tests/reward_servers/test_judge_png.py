"""A picture as a judge receives it: any PNG reader gets back every pixel, and finds the checksums right."""

from __future__ import annotations

import base64
import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from PIL import Image

from reward_servers.judging.png import png
from reward_servers.judging.question import Picture

PIXELS = array_shapes(min_dims=2, max_dims=2, max_side=40).flatmap(lambda side: arrays(np.uint8, (*side, 3)))


@settings(max_examples=60, deadline=None)
@given(PIXELS)
def test_every_pixel_comes_back(pixels: np.ndarray) -> None:
    blob = png(pixels)
    Image.open(io.BytesIO(blob)).verify()
    with Image.open(io.BytesIO(blob), formats=("PNG",)) as image:
        assert image.mode == "RGB"
        np.testing.assert_array_equal(np.asarray(image), pixels)


@given(st.integers(0, 3), st.integers(1, 3))
@settings(max_examples=20, deadline=None)
def test_a_part_of_a_larger_picture_is_as_good(offset: int, stride: int) -> None:
    panel = np.random.default_rng(0).integers(0, 256, (12, 20, 3), np.uint8)[offset::stride, offset:15:stride]
    encoded = Picture(panel).data_url.removeprefix("data:image/png;base64,")
    with Image.open(io.BytesIO(base64.b64decode(encoded))) as image:
        np.testing.assert_array_equal(np.asarray(image), panel)


def test_a_photograph_becomes_about_as_large_as_with_pillow() -> None:
    rows, columns = np.mgrid[:128, :128]
    grain = np.random.default_rng(0).normal(0, 2, (128, 128, 3))
    photograph = (np.stack([rows, rows + columns, 255 - columns], axis=-1) + grain).clip(0, 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(photograph).save(buffer, "PNG", compress_level=1)
    assert len(png(photograph)) <= 1.1 * buffer.tell()


@pytest.mark.parametrize("shape", [(1, 1, 3), (1, 7, 3), (7, 1, 3)])
def test_single_rows_and_columns(shape: tuple[int, int, int]) -> None:
    pixels = np.arange(np.prod(shape), dtype=np.uint8).reshape(shape)
    with Image.open(io.BytesIO(png(pixels))) as image:
        np.testing.assert_array_equal(np.asarray(image), pixels)

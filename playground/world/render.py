"""Owns the pixels: analytic, anti-aliased coverage of a shape, and a scene as a uint8 picture.

The verifier measures pictures against the same `coverage`, so the two cannot drift apart.
"""

from __future__ import annotations

import numpy as np

from playground.world.scenes import BACKGROUND, RGB, SIZE, Scene

_SQUARE_SIDE = 0.9  # half the side, in radii: nearly a circle's area
_CROSS_ARM = 0.36  # half an arm's width, in radii
_SLOPE = 5**0.5  # of the triangle's sides: base 2 radii, height 2 radii

AREA = {
    "circle": float(np.pi),
    "square": 4 * _SQUARE_SIDE**2,
    "triangle": 2.0,
    "cross": 8 * _CROSS_ARM - 4 * _CROSS_ARM**2,
}
"""Of a shape of radius 1."""
CENTROID_Y = {"circle": 0.0, "square": 0.0, "triangle": 1 / 3, "cross": 0.0}
"""Centre of mass below the middle of the bounding box, in radii."""


def coverage(
    shape: str,
    xs: np.ndarray,
    ys: np.ndarray,
    x: float,
    y: float,
    radius: float,
    softness: float = 1.0,
) -> np.ndarray:
    """How much of each pixel the shape covers, 0 to 1; xs [1, W] and ys [H, 1] are pixel centres.

    Edges are linear ramps `softness` pixels wide. At 1 (a pixel's own width) that is exact for
    squares and crosses and within a few hundredths for the others; above, it stands for blur.
    """

    def ramp(inside: np.ndarray) -> np.ndarray:
        return np.clip(inside / softness + 0.5, 0.0, 1.0)

    dx, dy = xs - x, ys - y
    ax, ay = np.abs(dx), np.abs(dy)
    if shape == "circle":
        return ramp(radius - np.sqrt(dx * dx + dy * dy))
    if shape == "square":
        half = _SQUARE_SIDE * radius
        return ramp(half - ax) * ramp(half - ay)
    if shape == "triangle":
        return ramp(radius - dy) * ramp((radius + dy - 2 * ax) / _SLOPE)
    if shape == "cross":
        long_x, long_y = ramp(radius - ax), ramp(radius - ay)
        arm = _CROSS_ARM * radius
        short_x, short_y = ramp(arm - ax), ramp(arm - ay)
        return long_x * short_y + short_x * long_y - short_x * short_y
    raise ValueError(f"no such shape: {shape!r}")


def render(scene: Scene) -> np.ndarray:
    """The scene as uint8 [32, 32, 3]."""
    picture = np.empty((SIZE, SIZE, 3))
    picture[:] = BACKGROUND
    for placed in scene.objects:
        left, top = int(placed.x - placed.radius) - 1, int(placed.y - placed.radius) - 1
        right, bottom = int(placed.x + placed.radius) + 2, int(placed.y + placed.radius) + 2
        left, top = max(left, 0), max(top, 0)
        right, bottom = min(right, SIZE), min(bottom, SIZE)
        xs = np.arange(left, right)[None, :] + 0.5
        ys = np.arange(top, bottom)[:, None] + 0.5
        cover = coverage(placed.shape, xs, ys, placed.x, placed.y, placed.radius)[..., None]
        patch = picture[top:bottom, left:right]
        patch += cover * (np.array(RGB[placed.colour]) - patch)
    return (picture + 0.5).astype(np.uint8)

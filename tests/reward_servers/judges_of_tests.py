"""Slow judges of the tests, as reward functions: what they say is known, and when they answer is the test's to say."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np

answers = threading.Event()
answers.set()
asked: list[float] = []
"""Mean red of every image that was asked about, in that order."""


def redness(images: np.ndarray, prompts: Any, metadata: Any) -> np.ndarray:
    """1 where the image is more red than blue, else 0; waits while `answers` is cleared."""
    answers.wait(30)
    red, blue = images[..., 0].mean(axis=(1, 2)), images[..., 2].mean(axis=(1, 2))
    asked.extend(red.tolist())
    return (red > blue).astype(np.float64)


def red_share(images: np.ndarray, prompts: Any, metadata: Any) -> np.ndarray:
    """Mean red, 0 to 1."""
    return images[..., 0].mean(axis=(1, 2)) / 255

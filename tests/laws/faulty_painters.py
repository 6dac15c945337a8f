"""Painters that load weights wrongly in the ways seen in the field, for law 5."""

from __future__ import annotations

import os
from typing import Any

import numpy as np

from actors import painter as painter_module
from actors.painter import Painter
from contracts.config import RunConfig

STALE_MARK = "SALON_TEST_STALE_MARK"


class OneStale(Painter):
    """Of all actors that share the file named by STALE_MARK, the first to create it ignores every later load."""

    def __init__(self, config: RunConfig) -> None:
        super().__init__(config)
        try:
            os.close(os.open(config.prompts.options["stale_mark"], os.O_CREAT | os.O_EXCL))
            self.stale = True
        except FileExistsError:
            self.stale = False

    def load(self, offer: Any, arrays: Any, current: np.ndarray, previous: np.ndarray | None) -> Any:
        if not self.stale or offer.version == 0:
            return super().load(offer, arrays, current, previous)
        working = painter_module.load_arrays
        painter_module.load_arrays = lambda *_: None  # type: ignore[assignment]
        try:
            return super().load(offer, arrays, current, previous)
        finally:
            painter_module.load_arrays = working

"""How the C library treats freed memory. Does not own: limits on memory (the containers')."""

from __future__ import annotations

import ctypes
import os
import sys


def keep_freed_memory() -> None:
    """Have glibc keep what a scorer frees (up to 256 MiB a thread) for its next batch.

    Else every large tensor of a batch is fetched from the kernel and given back, page by page: the playground's CNN
    scored 1,380 images/s so, and 1,790 with this. Settings in the environment win; other C libraries have none.
    """
    if any(name.startswith("MALLOC_") or name == "LD_PRELOAD" for name in os.environ):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        m_trim_threshold, m_mmap_threshold = -1, -3  # malloc.h
        mallopt(m_trim_threshold, 256 * 2**20)
        mallopt(m_mmap_threshold, 32 * 2**20)

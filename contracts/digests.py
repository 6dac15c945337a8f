"""Digests of tensors by content, computed alike from numpy here and from live torch tensors in policy/digests.py.

A digest is 64 bits of integer arithmetic modulo 2^64 over a tensor's bit pattern, so it is exact, does not depend on
the device or the order of summation, and can be computed on a GPU without a copy. It detects accidents (a load that
did nothing, a lost key, one changed bit); it is no defence against an adversary, which the cluster's authentication is.

Does not own: cryptographic digests of files (hashlib in callers).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping

import numpy as np

_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
_CHUNK = 1 << 22


def word_view(array: np.ndarray) -> np.ndarray:
    """The array's bits as unsigned integers of its own item size, flattened."""
    flat = np.ascontiguousarray(array).reshape(-1)
    return flat.view({1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}[flat.dtype.itemsize])


def content_sum(words: np.ndarray) -> int:
    """sum_i (word_i + 1) * (2 i + 1) * MULTIPLIER mod 2^64: position-weighted, so swaps are seen."""
    total = 0
    for start in range(0, len(words), _CHUNK):
        part = words[start : start + _CHUNK].astype(np.uint64)
        index = np.arange(start, start + len(part), dtype=np.uint64)
        with np.errstate(over="ignore"):
            total += int(((part + np.uint64(1)) * (index * np.uint64(2) + np.uint64(1)) * _MULTIPLIER).sum())
    return total % 2**64


def combine(parts: Iterable[tuple[str, str, tuple[int, ...], int]]) -> str:
    """One hex digest of (name, dtype, shape, content sum) rows, in the order of their names."""
    digest = hashlib.blake2b(digest_size=16)
    for name, dtype, shape, total in sorted(parts):
        digest.update(f"{name}|{dtype}|{','.join(map(str, shape))}|{total};".encode())
    return digest.hexdigest()


def digest_arrays(arrays: Mapping[str, np.ndarray], dtypes: Mapping[str, str] | None = None) -> str:
    """Digest of named arrays. `dtypes` names the true dtype of arrays that carry bfloat16 as uint16."""
    dtypes = dtypes or {}
    return combine(
        (name, dtypes.get(name, array.dtype.name), tuple(array.shape), content_sum(word_view(array)))
        for name, array in arrays.items()
    )


def digest_images(images: np.ndarray) -> str:
    """Digest of a group's uint8 images [G,H,W,3]: shape and every byte."""
    digest = hashlib.blake2b(",".join(map(str, images.shape)).encode(), digest_size=16)
    digest.update(np.ascontiguousarray(images).data)
    return digest.hexdigest()


def digest_text(*texts: str) -> str:
    """A short digest that names a prompt (and what it was encoded with)."""
    return hashlib.blake2b("\x1f".join(texts).encode(), digest_size=16).hexdigest()

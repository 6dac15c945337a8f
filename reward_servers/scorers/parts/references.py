"""Reference images in metadata: by value as base64 PNG, or by name from a folder of the server's own.

Limits are checked before pixels are unpacked; a name cannot leave the folder. Does not own: what they are for.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

MAX_PIXELS = 4096 * 4096


def png_metadata(image: np.ndarray) -> dict[str, str]:
    """uint8 [H,W,3] as metadata['reference'] carries it, lossless."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return {"png": base64.b64encode(buffer.getvalue()).decode()}


def read_reference(given: Any, folder: str | None) -> tuple[str, Callable[[], np.ndarray]]:
    """(key of its content or name, a function that yields uint8 [H,W,3]). Raises ValueError."""
    if not isinstance(given, dict) or len(given) != 1 or not isinstance(next(iter(given.values())), str):
        raise ValueError("metadata['reference'] must be {'png': base64} or {'file': name}")
    kind, text = next(iter(given.items()))
    if kind == "png":
        try:
            blob = base64.b64decode(text, validate=True)
        except binascii.Error as error:
            raise ValueError(f"metadata['reference']['png'] is not base64: {error}") from error
        return hashlib.blake2b(blob, digest_size=16).hexdigest(), lambda: _decode(blob)
    if kind == "file" and folder is not None:
        root = Path(folder).resolve()
        path = (root / text).resolve()
        if not path.is_relative_to(root) or not path.is_file():
            raise ValueError(f"there is no reference {text!r} in the server's folder")
        return f"{path}|{path.stat().st_mtime_ns}", lambda: _decode(path.read_bytes())
    problem = "the server has no folder of references" if kind == "file" else f"unknown key {kind!r}"
    raise ValueError(f"metadata['reference']: {problem}")


def _decode(blob: bytes) -> np.ndarray:
    try:
        with Image.open(io.BytesIO(blob), formats=("PNG", "JPEG", "WEBP")) as picture:
            if picture.width * picture.height > MAX_PIXELS:
                raise ValueError(f"a reference of {picture.width}x{picture.height} exceeds {MAX_PIXELS} pixels")
            return np.asarray(picture.convert("RGB"))
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"the reference is no readable PNG, JPEG or WebP: {error}") from error

"""Reading training images from files: lossless decoding, limits on bytes and pixels, the model's size."""

from __future__ import annotations

import io

import fsspec
import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from contracts.errors import ConfigError

MAX_BYTES = 64 * 2**20
MAX_PIXELS = 64 * 2**20


def read_image(path: str, size: tuple[int, int]) -> np.ndarray:
    """uint8 [H,W,3] of the image at a path or fsspec URL, cropped at the centre and scaled (Lanczos) to `size` (H, W).

    An image that has the size already is taken as it is. Raises ConfigError naming the file.
    """
    content = _read(path)
    try:
        with Image.open(io.BytesIO(content)) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ConfigError(path, f"has {image.width} x {image.height} pixels", f"at most {MAX_PIXELS} are read")
            rgb = ImageOps.exif_transpose(image).convert("RGB")
    except (UnidentifiedImageError, OSError, Image.DecompressionBombError) as error:
        raise ConfigError(path, f"is not a readable image ({error})") from error
    if rgb.size != (size[1], size[0]):
        rgb = ImageOps.fit(rgb, (size[1], size[0]), Image.Resampling.LANCZOS)
    return np.asarray(rgb, dtype=np.uint8)


def _read(path: str) -> bytes:
    try:
        with fsspec.open(path, "rb") as file:
            content = file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        raise ConfigError(path, f"cannot be read ({error})") from error
    if len(content) > MAX_BYTES:
        raise ConfigError(path, "is too large", f"at most {MAX_BYTES} bytes are read")
    return content

"""Pictures as PNG, written in a third of the time that Pillow takes, which tries five filters on every row.

Encoding is most of what the protocol layer adds to a question, and the judge's own processor often pays for it. Files
of photographs are about as large. Does not own: reading (any PNG reader), what a picture is (question).
"""

from __future__ import annotations

import struct
import zlib

import numpy as np

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_RGB_8_BIT = (8, 2, 0, 0, 0)  # depth, colour type, compression, filter method, not interlaced
_AS_IS, _UP = 0, 2  # filter types: the first row as it is, the others less the row above


def png(pixels: np.ndarray) -> bytes:
    """The file of uint8 [H,W,3], lossless: filter Up, zlib at its fastest (PNG specification, 2nd edition, 9.2)."""
    height, width, _ = pixels.shape
    rows = pixels.reshape(height, 3 * width)
    filtered = np.empty((height, 1 + 3 * width), np.uint8)
    filtered[0, 0], filtered[1:, 0] = _AS_IS, _UP
    filtered[0, 1:] = rows[0]
    np.subtract(rows[1:], rows[:-1], out=filtered[1:, 1:])  # modulo 256, as the filter is defined
    header = struct.pack(">II5B", width, height, *_RGB_8_BIT)
    data = zlib.compress(filtered.data, 1)
    return _SIGNATURE + _chunk(b"IHDR", header) + _chunk(b"IDAT", data) + _chunk(b"IEND", b"")


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

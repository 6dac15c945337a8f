"""One binary format for HTTP bodies and vault files: safetensors with a pydantic header in its metadata.

Nothing is pickled and nothing is executed on reading. A message is a header (a pydantic model) and named numpy
arrays. Limits are checked before any array is touched. bfloat16 has no numpy type: it travels as uint16 bits and the
header says so.

Does not own: what the headers mean (wire.py, scores.py), HTTP (reward_servers).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TypeVar

import numpy as np
from pydantic import BaseModel, ValidationError
from safetensors import SafetensorError, deserialize
from safetensors.numpy import save

from contracts.errors import PayloadError

Header = TypeVar("Header", bound=BaseModel)

_HEADER_KEY = "salon"
_MAX_JSON_BYTES = 16 * 2**20
_DTYPES = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "I64": np.int64, "I32": np.int32, "I16": np.int16,
    "I8": np.int8, "U64": np.uint64, "U32": np.uint32, "U16": np.uint16, "U8": np.uint8, "BOOL": np.bool_,
}  # fmt: skip


def encode(header: BaseModel, tensors: Mapping[str, np.ndarray]) -> bytes:
    """Header and arrays as one safetensors blob."""
    contiguous = {name: np.ascontiguousarray(array) for name, array in tensors.items()}
    return save(contiguous, metadata={_HEADER_KEY: header.model_dump_json()})


def decode(
    blob: bytes | bytearray | memoryview, header_type: type[Header], max_bytes: int | None = None
) -> tuple[Header, dict[str, np.ndarray]]:
    """Header and arrays of a blob made by `encode`.

    The arrays are read-only views where the format allows. Raises PayloadError on anything malformed or oversized.
    """
    if max_bytes is not None and len(blob) > max_bytes:
        raise PayloadError(f"body of {len(blob)} bytes exceeds the limit of {max_bytes}")
    header = _parse_header(blob, header_type)
    try:
        entries = deserialize(bytes(blob))
    except (SafetensorError, ValueError) as error:
        raise PayloadError(f"not a valid safetensors body: {error}") from error
    return header, {name: _to_array(name, entry) for name, entry in entries}


def read_header(blob: bytes | bytearray | memoryview, header_type: type[Header]) -> Header:
    """The header alone, without touching the arrays."""
    return _parse_header(blob, header_type)


def _parse_header(blob: bytes | bytearray | memoryview, header_type: type[Header]) -> Header:
    if len(blob) < 8:
        raise PayloadError("body is too short to hold a header")
    length = int.from_bytes(bytes(blob[:8]), "little")
    if length > min(_MAX_JSON_BYTES, len(blob) - 8):
        raise PayloadError("header length exceeds the body or the limit")
    try:
        metadata = json.loads(bytes(blob[8 : 8 + length]))["__metadata__"][_HEADER_KEY]
        return header_type.model_validate_json(metadata)
    except ValidationError as error:
        raise PayloadError(f"header does not match {header_type.__name__}: {_brief(error)}") from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise PayloadError("body has no readable header") from error


def _to_array(name: str, entry: Mapping[str, object]) -> np.ndarray:
    dtype = _DTYPES.get(str(entry["dtype"]))
    if dtype is None:
        raise PayloadError(f"array {name!r} has unsupported dtype {entry['dtype']}")
    return np.frombuffer(entry["data"], dtype=dtype).reshape(entry["shape"])  # type: ignore[call-overload]


def _brief(error: ValidationError) -> str:
    first = error.errors()[0]
    return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"

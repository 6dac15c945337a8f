"""Bodies of POST /v1/score for fuzzing: good ones, and good ones spoiled in every layer of the format."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
from hypothesis import strategies as st

from contracts.codec import encode
from contracts.scores import ScoreRequest

SHAPES = st.tuples(st.integers(1, 3), st.integers(1, 12), st.integers(1, 12))


@st.composite
def good_bodies(draw: Any) -> bytes:
    """1 to 3 images of one size, or of several, with prompts of any text."""
    num, height, width = draw(SHAPES)
    prompts = tuple(draw(st.text(max_size=20)) for _ in range(num))
    header = ScoreRequest(request_id=draw(st.text(max_size=8)), prompts=prompts)
    value = draw(st.integers(0, 255))
    if draw(st.booleans()):
        return encode(header, {"images": np.full((num, height, width, 3), value, np.uint8)})
    return encode(header, {f"image_{i}": np.full((height + i, width, 3), value, np.uint8) for i in range(num)})


@st.composite
def truncated(draw: Any) -> bytes:
    body = draw(good_bodies())
    return body[: draw(st.integers(0, len(body) - 1))]


@st.composite
def with_flipped_bytes(draw: Any) -> bytes:
    body = bytearray(draw(good_bodies()))
    for position in draw(st.lists(st.integers(0, len(body) - 1), min_size=1, max_size=8)):
        body[position] ^= draw(st.integers(1, 255))
    return bytes(body)


@st.composite
def with_other_counts(draw: Any) -> bytes:
    """Prompts, metadata and images that disagree; arrays of any type and rank, under any name."""
    shape = tuple(draw(st.lists(st.integers(0, 5), max_size=5)))
    dtype = draw(
        st.sampled_from([np.uint8, np.int8, np.uint16, np.int64, np.float16, np.float32, np.float64, np.bool_])
    )
    names = draw(st.lists(st.sampled_from(["images", "image_0", "image_1", "latents", "other"]), max_size=3))
    prompts = tuple(draw(st.lists(st.text(max_size=5), max_size=4)))
    metadata = tuple(
        {"key": draw(st.one_of(st.integers(), st.text(max_size=5)))} for _ in range(draw(st.integers(0, 4)))
    )
    header = ScoreRequest(
        request_id="r", prompts=prompts, metadata=metadata, want_gradients=draw(st.booleans()),
        version=draw(st.sampled_from(["latest", "3", "gone"])),
    )  # fmt: skip
    return encode(header, {name: np.zeros(shape, dtype) for name in names})


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=10),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@st.composite
def with_other_headers(draw: Any) -> bytes:
    """Any JSON in the place of the format's header, or of the message in it; lengths that lie."""
    good = {"request_id": "r", "prompts": ["x"]}
    message = draw(st.one_of(JSON, st.fixed_dictionaries(dict.fromkeys(good, JSON)), st.just(good)))
    entry = draw(st.one_of(JSON, st.fixed_dictionaries({
        "dtype": st.sampled_from(["U8", "F32", "BF16", "F8_E4M3", "??"]),
        "shape": st.lists(st.integers(-2, 2**40), max_size=5),
        "data_offsets": st.tuples(st.integers(-1, 2**40), st.integers(-1, 2**40)),
    })))  # fmt: skip
    text = json.dumps(draw(st.one_of(
        JSON, st.just({"__metadata__": {"salon": json.dumps(message)}, "images": entry}),
    ))).encode()  # fmt: skip
    length = draw(st.one_of(st.just(len(text)), st.integers(0, 2**64 - 1)))
    return length.to_bytes(8, "little") + text + draw(st.binary(max_size=64))


@st.composite
def bombs(draw: Any) -> bytes:
    """A few bytes that promise many: pixels by the billion, arrays by the thousand, braces within braces."""
    kind = draw(st.sampled_from(["pixels", "empty", "arrays", "nested", "length"]))
    salon = json.dumps({"request_id": "r", "prompts": ["x"]})
    header: dict[str, Any] = {"__metadata__": {"salon": salon}}
    if kind == "pixels":
        size = 2 ** draw(st.integers(14, 40))
        header["images"] = {"dtype": "U8", "shape": [1, size, size, 3], "data_offsets": [0, 3]}
    elif kind == "empty":
        header["images"] = {"dtype": "U8", "shape": [1, 2**40, 0, 3], "data_offsets": [0, 0]}
    elif kind == "arrays":
        number = draw(st.integers(1000, 5000))
        header |= {f"image_{i}": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]} for i in range(number)}
    elif kind == "nested":
        depth = draw(st.integers(1000, 100_000))
        text = b'{"__metadata__": ' + b"[" * depth
        return len(text).to_bytes(8, "little") + text
    text = json.dumps(header).encode()
    return (2**63 if kind == "length" else len(text)).to_bytes(8, "little") + text + b"\x00" * 3


HOSTILE = st.one_of(
    st.binary(max_size=200), truncated(), with_flipped_bytes(), with_other_counts(), with_other_headers(), bombs()
)

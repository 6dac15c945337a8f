"""Digests of torch tensors equal those of the arrays they export to."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from contracts.digests import digest_arrays
from policy import digests
from policy.digests import digest_tensors
from policy.weights import export_arrays

DTYPES = ("float32", "float64", "float16", "int8", "uint8", "int16", "int32", "int64", "bool", "uint16", "uint32")


@settings(deadline=None)
@given(st.sampled_from(DTYPES).flatmap(lambda d: hnp.arrays(np.dtype(d), hnp.array_shapes(min_dims=0, max_side=7))))
def test_numpy_and_torch_agree_on_any_bits(array: np.ndarray) -> None:
    assert digest_tensors({"w": torch.from_numpy(array)}) == digest_arrays({"w": array})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn, torch.float32])
def test_dtypes_that_numpy_lacks_travel_as_bits(dtype: torch.dtype) -> None:
    tensors = {"b": torch.randn(5, 3).to(dtype), "a": torch.randn(2).to(dtype)}
    assert digest_tensors(tensors) == digest_arrays(*export_arrays(tensors))


def test_chunks_and_strides_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = torch.randn(37, 11)
    whole = digest_tensors({"w": tensor})
    monkeypatch.setattr(digests, "_CHUNK", 10)
    assert digest_tensors({"w": tensor}) == whole
    assert digest_tensors({"w": tensor.t().contiguous().t()}) == whole


@pytest.mark.parametrize("change", ["bit", "swap", "name", "shape", "dtype"])
def test_any_change_is_seen(change: str) -> None:
    tensor = torch.arange(12, dtype=torch.float32)
    changed = {"w": tensor.clone()}
    if change == "bit":
        changed["w"].view(torch.int32)[5] ^= 1
    elif change == "swap":
        changed["w"][[2, 3]] = changed["w"][[3, 2]]
    elif change == "name":
        changed = {"module.w": tensor}
    elif change == "shape":
        changed = {"w": tensor.reshape(3, 4)}
    else:
        changed = {"w": tensor.view(torch.int32)}
    assert digest_tensors(changed) != digest_tensors({"w": tensor})


def test_items_wider_than_8_bytes_are_refused() -> None:
    with pytest.raises(ValueError, match="complex128"):
        digest_tensors({"w": torch.zeros(2, dtype=torch.complex128)})


@pytest.mark.gpu
def test_gpu_and_cpu_agree() -> None:
    tensors = {"a": torch.randn(1000, 333), "b": torch.randn(77).bfloat16()}
    assert digest_tensors({n: t.cuda() for n, t in tensors.items()}) == digest_tensors(tensors)

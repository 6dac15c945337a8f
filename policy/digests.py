"""contracts.digests on live torch tensors, on their own device: equal bits give equal digests, whoever computes them.

int64 arithmetic wraps modulo 2^64 on every device, which is just the arithmetic the digest is defined in. One small
copy from the device a call, whatever the number of tensors.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from contracts.digests import combine

_MULTIPLIER = 0x9E3779B97F4A7C15 - 2**64  # as signed int64
_CHUNK = 1 << 22
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_MASK = {1: 0xFF, 2: 0xFFFF, 4: 0xFFFFFFFF, 8: -1}


def dtype_name(dtype: torch.dtype) -> str:
    """numpy's name of a torch dtype ('float32'); torch's own where numpy has none ('bfloat16')."""
    return str(dtype).removeprefix("torch.")


def digest_tensors(named: Mapping[str, Tensor]) -> str:
    """Digest of named tensors of any dtype up to 8 bytes an item; equals contracts.digests.digest_arrays of their
    export. Raises ValueError for wider items."""
    sums = [_content_sum(tensor.detach()) for tensor in named.values()]
    totals = torch.stack([total.to(sums[0].device) for total in sums]).tolist() if sums else []
    return combine(
        (name, dtype_name(tensor.dtype), tuple(tensor.shape), total % 2**64)
        for (name, tensor), total in zip(named.items(), totals, strict=True)
    )


def _content_sum(tensor: Tensor) -> Tensor:
    """int64 []: sum_i (word_i + 1) * (2 i + 1) * MULTIPLIER modulo 2^64."""
    size = tensor.element_size()
    if size not in _BITS:
        raise ValueError(f"no digest for {tensor.dtype}: items of {size} bytes")
    words = tensor.contiguous().reshape(-1).view(_BITS[size])
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for start in range(0, len(words), _CHUNK):
        part = (words[start : start + _CHUNK].to(torch.int64) & _MASK[size]) + 1
        odd = torch.arange(2 * start + 1, 2 * (start + len(part)) + 1, 2, device=tensor.device, dtype=torch.int64)
        total += part.mul_(odd).sum()
    return total * _MULTIPLIER

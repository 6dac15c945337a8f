"""What a CPU computes faster in another way: attention in bf16, GELU by tanh, context tokens that repeat.

For small models on a CPU; a GPU has its own fused kernels. Owns no dtype (precision.py) and no network (families/).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import gelu, scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

_LAST_KEY_STANDS_FOR: ContextVar[int] = ContextVar("last_key_stands_for", default=1)


class CpuKernels(TorchFunctionMode):
    """Inside a bf16 autocast: attention as two batched products with an fp32 softmax between, GELU by erf for tanh.

    Attention: the CPU's fused kernel takes five times as long backwards in bf16 as in fp32; with short sequences (some
    hundred tokens, as small models have) forward and backward together are faster without it. Calls without gradients,
    with a mask, dropout, causality or grouped queries go to the fused kernel.

    GELU: the tanh form takes four times as long as the exact one. They differ by 5e-4 at most, where a bf16 number
    between 2 and 4 has a resolution of 1.6e-2.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        options = kwargs or {}
        if func is scaled_dot_product_attention and torch.is_grad_enabled() and _is_plain(args, options):
            return plain_attention(*args)
        if func is gelu and options.get("approximate") == "tanh":
            return gelu(*args)
        return func(*args, **options)


def _is_plain(args: tuple[Any, ...], options: dict[str, Any]) -> bool:
    """Whether attention is called with query, key and value alone: unset options are None, 0.0 or False."""
    # A mask is a tensor, whose truth is not to be asked.
    return len(args) == 3 and not any(isinstance(option, Tensor) or bool(option) for option in options.values())


def plain_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) v of [..., tokens, d], in the dtype of the values, the softmax in fp32."""
    shape, dtype = (*query.shape[:-1], value.shape[-1]), value.dtype
    query, key = (query * query.shape[-1] ** -0.5).to(dtype), key.to(dtype)
    query, key, value = (part.flatten(0, -3) for part in (query, key, value))
    with torch.autocast(query.device.type, enabled=False):
        logits = torch.bmm(query, key.transpose(1, 2))
        bias = _bias(key)
        weights = (logits if bias is None else logits + bias).softmax(-1, dtype=torch.float32)
        attended: Tensor = torch.bmm(weights.to(dtype), value)
        return attended.view(shape)


class _LastKeyBias(TorchFunctionMode):
    """Gives every unmasked attention inside the bias of its last key."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        options = kwargs or {}
        if func is scaled_dot_product_attention:
            if not _is_plain(args, options):
                raise TypeError("attention with a mask, dropout or causality cannot count a key more than once")
            query, key, value = args
            return func(query, key, value, attn_mask=_bias(key, query.dtype))
        return func(*args, **options)


@contextmanager
def last_key_stands_for(count: int) -> Iterator[None]:
    """Attention inside counts its last key `count` times: exp(q k + log count) = count exp(q k).

    For a context whose last `count` tokens are equal: equal tokens without positions stay equal in every layer, so one
    of them can do the work of all. Raises TypeError where attention is called with a mask of its own.
    """
    if count == 1:
        yield
        return
    token = _LAST_KEY_STANDS_FOR.set(count)
    try:
        with _LastKeyBias():
            yield
    finally:
        _LAST_KEY_STANDS_FOR.reset(token)


def _bias(key: Tensor, dtype: torch.dtype | None = None) -> Tensor | None:
    """Log of how often each key counts, [1,keys], to be added to logits; None when all count once."""
    count = _LAST_KEY_STANDS_FOR.get()
    if count == 1:
        return None
    bias = torch.zeros(1, key.shape[-2], dtype=dtype or key.dtype, device=key.device)
    bias[:, -1] = math.log(count)
    return bias


def repeated_tail(text: Tensor) -> int:
    """How many tokens at the end of [N,L,D] equal the last one, in every row; 1 when none repeats."""
    equal = (text == text[:, -1:]).flatten(2).all(2).all(0).flip(0)
    return int(equal.long().cumprod(0).sum())

"""bf16 products on fp32 weights (`model.autocast`), inside a network's own forward.

Owns the autocast and the attention that goes with it on a CPU. Does not own which dtype the weights have (policy.py).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode


def autocast_inside(network: nn.Module, device: torch.device, checkpointing: bool = False) -> None:
    """bf16 products within the network's own forward: DeepSpeed switches off an autocast that is entered outside it.

    With gradient checkpointing the fused attention stays: the recomputation runs outside the forward's mode.
    """
    forward = torch.autocast(device.type, torch.bfloat16)(network.forward)
    plain = device.type == "cpu" and not checkpointing
    network.forward = _with_plain_attention(forward) if plain else forward  # type: ignore[method-assign]


class PlainAttention(TorchFunctionMode):
    """Attention as two batched products with an fp32 softmax between.

    The CPU's fused kernel takes five times as long backwards in bf16 as in fp32; with short sequences (some hundred
    tokens, as small models have) forward and backward are faster without it in either dtype. Calls without gradients,
    with a mask, dropout, causality or grouped queries go to the fused kernel.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        options = kwargs or {}
        # Unset options are None, 0.0 or False; a mask is a tensor, whose truth is not to be asked.
        unset = len(args) == 3 and not any(map(_is_set, options.values()))
        if func is scaled_dot_product_attention and unset and torch.is_grad_enabled():
            return plain_attention(*args)
        return func(*args, **options)


def _is_set(option: Any) -> bool:
    return isinstance(option, Tensor) or bool(option)


def plain_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) v of [..., tokens, d], in the dtype of the inputs, the softmax in fp32."""
    shape = (*query.shape[:-1], value.shape[-1])
    query, key, value = (part.flatten(0, -3) for part in (query * query.shape[-1] ** -0.5, key, value))
    with torch.autocast(query.device.type, enabled=False):
        weights = torch.bmm(query, key.transpose(1, 2)).softmax(-1, dtype=torch.float32)
        return torch.bmm(weights.to(value.dtype), value).view(shape)


def _with_plain_attention(forward: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(forward)
    def run(*args: Any, **kwargs: Any) -> Any:
        with PlainAttention():
            return forward(*args, **kwargs)

    return run

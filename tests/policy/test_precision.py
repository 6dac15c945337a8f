"""bf16 products on fp32 weights, and the attention that goes with them on a CPU."""

import pytest
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from policy.precision import PlainAttention, autocast_inside, plain_attention


def _heads(dtype: torch.dtype = torch.float32, keys: int = 7) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(3)
    return tuple(
        torch.randn(2, 3, tokens, 8, generator=generator).to(dtype).requires_grad_() for tokens in (5, keys, keys)
    )


def test_plain_attention_is_attention_and_has_its_gradients() -> None:
    inputs = _heads()
    plain, fused = plain_attention(*inputs), scaled_dot_product_attention(*inputs)
    torch.testing.assert_close(plain, fused, rtol=1e-5, atol=1e-6)
    for mine, theirs in zip(
        torch.autograd.grad(plain.square().sum(), inputs),
        torch.autograd.grad(fused.square().sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_bf16_attention_keeps_its_dtype_and_stays_near_fp32() -> None:
    out = plain_attention(*_heads(torch.bfloat16))
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), scaled_dot_product_attention(*_heads()), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("options", [{"is_causal": True}, {"attn_mask": torch.eye(5).bool()}])
def test_masked_and_causal_calls_go_to_the_fused_kernel(options: dict[str, object]) -> None:
    query, key, value = _heads(keys=5)
    with PlainAttention():
        within = scaled_dot_product_attention(query, key, value, **options)
    assert torch.equal(within, scaled_dot_product_attention(query, key, value, **options))
    assert not torch.allclose(within, plain_attention(query, key, value))


def test_calls_without_gradients_go_to_the_fused_kernel() -> None:
    query, key, value = (part.detach().bfloat16() for part in _heads())
    with PlainAttention(), torch.no_grad():
        within = scaled_dot_product_attention(query, key, value)
    assert torch.equal(within, scaled_dot_product_attention(query, key, value))


class _Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.dtypes: list[torch.dtype] = []
        self.grad_names: list[str] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.linear(x)
        self.dtypes.append(hidden.dtype)
        out = scaled_dot_product_attention(hidden, hidden, hidden)
        self.grad_names.append(str(out.grad_fn))
        return out


@pytest.mark.parametrize("checkpointing", [False, True])
def test_products_are_bf16_weights_fp32_and_checkpointing_keeps_the_fused_attention(checkpointing: bool) -> None:
    network = _Network()
    autocast_inside(network, torch.device("cpu"), checkpointing)
    network(torch.randn(2, 3, 5, 8)).float().sum().backward()
    assert network.dtypes == [torch.bfloat16]
    assert network.linear.weight.grad is not None
    assert network.linear.weight.grad.dtype == torch.float32
    assert ("ScaledDotProduct" in network.grad_names[0]) is checkpointing

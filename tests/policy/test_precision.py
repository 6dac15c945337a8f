"""bf16 products on fp32 weights."""

import pytest
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from policy.precision import autocast_inside


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

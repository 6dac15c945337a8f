"""A chain of linear layers read from safetensors: the heads of LAION's aesthetic predictor and of ImageReward.

Both were trained with dropout and without activations, so at scoring they are nothing but linear maps in a row.
Does not own: what is fed to it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch

from contracts.errors import ConfigError

_LAYER = re.compile(r"^(?:(?:.*\.)?layers\.(\d+)\.)?(weight|bias)$")


class LinearHead(torch.nn.Module):
    """float32 [N,D] to [N]; the last layer has one output."""

    def __init__(self, tensors: Mapping[str, torch.Tensor], width: int, source: str) -> None:
        super().__init__()
        weights, biases = _by_layer(tensors, "weight"), _by_layer(tensors, "bias")
        if not weights or set(weights) != set(biases) or len(weights) + len(biases) != len(tensors):
            raise ConfigError("head", f"{source} is no chain of linear layers (layers.N.weight, layers.N.bias)")
        layers = []
        for index in sorted(weights):
            rows, columns = weights[index].shape
            if columns != width or biases[index].shape != (rows,):
                raise ConfigError("head", f"layer {index} of {source} reads {columns} numbers, not {width}",
                                  "use the head that was trained on this model")  # fmt: skip
            layer = torch.nn.Linear(columns, rows)
            layer.weight.data, layer.bias.data = weights[index].float(), biases[index].float()
            layers.append(layer)
            width = rows
        if width != 1:
            raise ConfigError("head", f"{source} ends in {width} numbers, not one")
        self.layers = torch.nn.Sequential(*layers).requires_grad_(False)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.layers(features)[:, 0]


def _by_layer(tensors: Mapping[str, torch.Tensor], kind: str) -> dict[int, torch.Tensor]:
    matches = {name: _LAYER.match(name) for name in tensors}
    return {int(m[1] or 0): tensors[name] for name, m in matches.items() if m is not None and m[2] == kind}

"""What the files of a model say of it without being loaded: names and shapes from safetensors headers, JSON files.

Does not own: what follows from it (model.py, plan.py).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from contracts.config.model import LoraConfig
from policy.lora_names import ends_with

DEFAULT_TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
"""What LoRA adapts where model.lora.targets does not say (the family's own list, which imports torch)."""
_MAX_HEADER = 100 * 2**20
_NO_PARAMETERS = ("__metadata__", "pos_embed.pos_embed")  # SD3's position table is a buffer


@dataclass(frozen=True)
class ModelCard:
    """What a pipeline folder says of its size without loading it. Parameters by component; latent [C,h,w]."""

    parameters: dict[str, int]
    latent: tuple[int, int, int]
    image: tuple[int, int]
    layers: dict[str, list[int]]  # shapes of the network's matrices and kernels, by layer

    @property
    def network(self) -> int:
        return self.parameters.get("transformer", 0)


def read_model_card(folder: Path) -> ModelCard | None:
    """The card of a diffusers folder with a transformer and a VAE, from headers alone; None when it is none."""
    network, vae = read_json(folder / "transformer" / "config.json"), read_json(folder / "vae" / "config.json")
    if network is None or vae is None:
        return None
    try:
        shapes = {part.name: folder_shapes(part) for part in sorted(folder.iterdir()) if part.is_dir()}
        size, channels = int(network["sample_size"]), int(network["in_channels"])
        scale = 2 ** (len(vae["block_out_channels"]) - 1)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return ModelCard(
        parameters={name: sum(prod(shape) for shape in by_name.values()) for name, by_name in shapes.items()},
        latent=(channels, size, size), image=(size * scale, size * scale), layers=layer_shapes(shapes["transformer"]),
    )  # fmt: skip


def layer_shapes(shapes: Mapping[str, list[int]]) -> dict[str, list[int]]:
    """The layers that LoRA can adapt (linear and convolution), with the shapes of their weights."""
    weights = {name.removesuffix(".weight"): shape for name, shape in shapes.items() if name.endswith(".weight")}
    return {name: shape for name, shape in weights.items() if len(shape) in (2, 4)}


def adapted_layers(layers: Mapping[str, list[int]], lora: LoraConfig) -> dict[str, list[int]]:
    """Those of `layers` that the adapter goes into."""
    targets = lora.targets or DEFAULT_TARGETS
    return {name: shape for name, shape in layers.items() if any(ends_with(name, target) for target in targets)}


def folder_shapes(folder: Path) -> dict[str, list[int]]:
    """Shapes of all parameters of a folder's safetensors files. Raises OSError or ValueError."""
    shapes: dict[str, list[int]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        shapes.update(file_shapes(path))
    return shapes


def file_shapes(path: Path) -> dict[str, list[int]]:
    """Shapes of all parameters of a safetensors file, from its header. Raises OSError or ValueError."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(min(length, _MAX_HEADER)))
    try:
        return {name: list(entry["shape"]) for name, entry in header.items() if name not in _NO_PARAMETERS}
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} has no header of a safetensors file") from error


def read_json(path: Path) -> dict[str, Any] | None:
    """A JSON object; None where there is none."""
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None

"""Starting from earlier results: a LoRA (diffusers or peft format) or the network of a diffusers folder.

| model.warm_start is | tuning: full | tuning: lora |
|---|---|---|
| a LoRA file or folder | added to the weights | becomes the adapter (rank and layers must agree) |
| a diffusers folder | its network replaces the base's | the same, below a fresh adapter |

Does not own: continuing a run (that is a checkpoint).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from contracts.config.model import ModelConfig
from contracts.errors import ConfigError
from policy.adapters import ADAPTER, lora_layers
from policy.families.base import Family
from policy.lora_names import LORA_FILES, PEFT_FILE, bare_name, find_lora, layers_of, pair_names

_FIELD = "model.warm_start"


@dataclass(frozen=True)
class LoraFile:
    """A LoRA as read: pairs of (A [r,in], B [out,r]) by layer, and alpha as far as the file says (else the rank)."""

    path: Path
    pairs: dict[str, tuple[Tensor, Tensor]]
    alpha: float | None


def apply_warm_start(network: nn.Module, config: ModelConfig, family: Family) -> None:
    """Change the loaded network as the module's table says. Raises ConfigError naming model.warm_start."""
    assert config.warm_start is not None
    path = Path(config.warm_start)
    if not path.exists():
        raise ConfigError(_FIELD, f"{path} does not exist", "give a LoRA file or folder, or a diffusers folder")
    lora_path = _find_lora(path)
    if lora_path is None:
        _take_network(network, path, family)
    elif config.tuning == "lora":
        _take_adapter(network, read_lora(lora_path), config)
    else:
        _merge(network, read_lora(lora_path))


def _find_lora(path: Path) -> Path | None:
    found = find_lora(path)
    if found is None and not (path / "config.json").is_file() and not (path / "transformer").is_dir():
        raise ConfigError(_FIELD, f"{path} holds neither {' nor '.join(LORA_FILES)} nor a transformer")
    return found


def read_lora(path: Path) -> LoraFile:
    """A LoRA in diffusers' or peft's safetensors format. Raises ConfigError for anything else."""
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
            tensors = {bare_name(key): file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no mapping)
    except (SafetensorError, OSError) as error:
        raise ConfigError(_FIELD, f"{path} is not a readable safetensors file ({error})") from error
    layers, others = layers_of(tensors)
    if others or not layers:
        other = next(iter(others), "nothing")
        raise ConfigError(_FIELD, f"{path} is no plain LoRA: it holds {other}", "lora_A/lora_B of the transformer only")
    pairs = {layer: (tensors[a], tensors[b]) for layer in layers for a, b in [pair_names(layer)]}
    return LoraFile(path, pairs, _alpha(path, metadata))


def _alpha(path: Path, metadata: dict[str, str]) -> float | None:
    beside = path.parent / "adapter_config.json"
    if beside.is_file() and path.name == PEFT_FILE:
        return json.loads(beside.read_text()).get("lora_alpha")
    if "lora_adapter_metadata" in metadata:
        return json.loads(metadata["lora_adapter_metadata"]).get("transformer.lora_alpha")
    return None


def _scale(lora: LoraFile, rank: int) -> float:
    return (lora.alpha if lora.alpha is not None else rank) / rank


@torch.no_grad()
def _take_adapter(network: nn.Module, lora: LoraFile, config: ModelConfig) -> None:
    layers = lora_layers(network)
    if set(layers) != set(lora.pairs):
        missing, extra = sorted(set(layers) - set(lora.pairs)), sorted(set(lora.pairs) - set(layers))
        raise ConfigError(
            _FIELD, f"{lora.path} adapts other layers (lacks {missing[:3]}, has besides {extra[:3]})",
            "set model.lora.targets to the layers it adapts",
        )  # fmt: skip
    for name, layer in layers.items():
        a, b = lora.pairs[name]
        rank = a.shape[0]
        if rank != config.lora.rank:
            raise ConfigError(_FIELD, f"{lora.path} has rank {rank}", f"set model.lora.rank={rank}")
        target_a, target_b = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
        _check_shapes(name, lora, (a, target_a), (b, target_b))
        factor = _scale(lora, rank) / layer.scaling[ADAPTER]
        target_a.copy_(a)
        target_b.copy_(b if factor == 1.0 else b.float() * factor)


@torch.no_grad()
def _merge(network: nn.Module, lora: LoraFile) -> None:
    modules = dict(network.named_modules())
    for name, (a, b) in lora.pairs.items():
        weight = getattr(modules.get(name), "weight", None)
        if weight is None:
            raise ConfigError(_FIELD, f"{lora.path} adapts {name}, which this model does not have")
        delta = (b.float().flatten(1) @ a.float().flatten(1)) * _scale(lora, a.shape[0])
        _check_shapes(name, lora, (delta, weight))
        weight.add_(delta.to(weight.dtype))


def _take_network(network: nn.Module, folder: Path, family: Family) -> None:
    try:
        source = family.load_network(folder).state_dict()
    except (OSError, ValueError) as error:
        raise ConfigError(_FIELD, f"{folder} has no loadable network ({' '.join(str(error).split())[:200]})") from error
    named = {name.replace(".base_layer.", "."): p for name, p in network.state_dict().items() if ".lora_" not in name}
    if set(named) != set(source) or any(named[name].shape != source[name].shape for name in named):
        raise ConfigError(_FIELD, f"the network of {folder} has other layers than model.path's")
    with torch.no_grad():
        for name, tensor in named.items():
            tensor.copy_(source[name])


def _check_shapes(name: str, lora: LoraFile, *pairs: tuple[Tensor, Tensor]) -> None:
    for given, wanted in pairs:
        if given.shape != wanted.shape:
            raise ConfigError(
                _FIELD, f"{lora.path}: {name} has shape {tuple(given.shape)}, this model {tuple(wanted.shape)}"
            )

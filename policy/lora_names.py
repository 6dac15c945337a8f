"""Names in LoRA files, diffusers' and peft's: which tensors belong to which layer. Imports no torch, for `validate`.

Does not own: reading and applying them (warm_start.py), the adapter in the network (adapters.py).
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

ADAPTER = "default"
"""peft's name of the trained adapter. Snapshots held as further adapters carry other names."""
PEFT_FILE = "adapter_model.safetensors"
LORA_FILES = ("pytorch_lora_weights.safetensors", PEFT_FILE)
_PREFIXES = ("transformer.", "base_model.model.transformer.", "base_model.model.")


def find_lora(path: Path) -> Path | None:
    """The LoRA file that a warm start's path means; None for a folder without one."""
    if path.is_file():
        return path
    return next((path / name for name in LORA_FILES if (path / name).is_file()), None)


def bare_name(key: str) -> str:
    """A tensor's name without the prefixes and the adapter's name that writers put into it."""
    for prefix in _PREFIXES:
        key = key.removeprefix(prefix)
    return key.replace(f".{ADAPTER}.", ".")


def layers_of(names: Iterable[str]) -> tuple[list[str], list[str]]:
    """(layers whose lora_A and lora_B are both among the bare names, names that belong to no such layer)."""
    names = set(names)
    candidates = {name.rsplit(".lora_", 1)[0] for name in names if ".lora_" in name}
    layers = sorted(layer for layer in candidates if set(pair_names(layer)) <= names)
    return layers, sorted(names - {name for layer in layers for name in pair_names(layer)})


def pair_names(layer: str) -> tuple[str, str]:
    """Bare names of a layer's A [r,in] and B [out,r]."""
    return f"{layer}.lora_A.weight", f"{layer}.lora_B.weight"


def ends_with(name: str, target: str) -> bool:
    """Whether a layer of this name is meant by an entry of model.lora.targets."""
    return name == target or name.endswith(f".{target}")


def leaf_names(names: Iterable[str]) -> list[str]:
    """Last parts of layers' names, to tell what there is."""
    return sorted({leaf for name in names if not (leaf := name.rsplit(".", 1)[-1]).isdigit()})

"""LoRA on the bare network: injection, canonical names, switching off, and the adapter's description for export.

peft's layers are injected without a wrapper model, so parameters keep the network's own names; the adapter's name,
which peft puts into them, is left out of canonical names.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft import LoraConfig as PeftLoraConfig
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from contracts.config.model import LoraConfig
from contracts.errors import ConfigError
from contracts.seeds import Stream, derive_seed
from policy.lora_names import ADAPTER, ends_with, leaf_names


def inject_lora(network: nn.Module, config: LoraConfig, family_targets: Sequence[str], seed: int) -> None:
    """Add the trained adapter to every layer whose name ends with a target. B starts at 0: version 0 is the base.

    The network is on the CPU, so equal run seeds give equal adapters everywhere. Of the family's own list, names that
    this network lacks are passed over; a configured one raises ConfigError.
    """
    names = [name for name, module in network.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    targets = [t for t in (config.targets or family_targets) if any(ends_with(name, t) for name in names)]
    unmatched = sorted(set(config.targets or ()) - set(targets))
    if unmatched or not targets:
        raise ConfigError(
            "model.lora.targets", f"no layer is called {', '.join(unmatched)}",
            f"layers are called {', '.join(leaf_names(names))}",
        )  # fmt: skip
    peft_config = PeftLoraConfig(
        r=config.rank, lora_alpha=config.alpha, target_modules=targets,
        init_lora_weights="gaussian" if config.init == "gaussian" else True,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, Stream.MODEL_INIT))
        network.add_adapter(peft_config, adapter_name=ADAPTER)  # type: ignore[operator]
    dtype = next(parameter.dtype for name, parameter in network.named_parameters() if "lora_" not in name)
    for layer in lora_layers(network).values():
        layer.lora_A.to(dtype)
        layer.lora_B.to(dtype)


def canonical_name(name: str) -> str:
    """'a.to_q.lora_A.default.weight' -> 'a.to_q.lora_A.weight'."""
    return name.replace(f".{ADAPTER}.", ".")


def lora_layers(network: nn.Module) -> dict[str, LoraLayer]:
    """The adapted layers by their name in the bare network."""
    return {name: module for name, module in network.named_modules() if isinstance(module, LoraLayer)}


def adapter_metadata(network: nn.Module) -> dict[str, Any]:
    """peft's description of the adapter (rank, alpha, targets) as JSON values; a loader needs it for the scale."""
    described = network.peft_config[ADAPTER].to_dict()  # type: ignore[union-attr, index]
    return {key: sorted(value) if isinstance(value, set) else value for key, value in described.items()}


@contextmanager
def adapters_disabled(network: nn.Module) -> Iterator[None]:
    """Within it the network is its base, bit for bit. requires_grad of adapters is left as it was."""
    layers = [module for module in network.modules() if isinstance(module, BaseTunerLayer)]
    before = [layer._disable_adapters for layer in layers]
    for layer in layers:
        layer._disable_adapters = True  # enable_adapters(False) would also clear requires_grad under the optimizer
    try:
        yield
    finally:
        for layer, disabled in zip(layers, before, strict=True):
            layer._disable_adapters = disabled


@torch.no_grad()
def merged_parameters(network: nn.Module) -> dict[str, Tensor]:
    """Every parameter of the base network with the adapter added: W + (alpha/r) B A, under the bare network's names."""
    adapted = lora_layers(network)
    merged = {}
    for name, parameter in network.named_parameters():
        if ".lora_" in name:
            continue
        owner = name.rsplit(".base_layer.", 1)[0]
        value = parameter.detach()
        if owner in adapted and name.endswith("base_layer.weight"):
            value = value + adapted[owner].get_delta_weight(ADAPTER).to(value.dtype)
        merged[name.replace(".base_layer.", ".")] = value
    return merged

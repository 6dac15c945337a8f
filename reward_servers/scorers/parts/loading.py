"""Weights from a hub name or a local folder: safetensors only, no foreign code, nothing left at random.

Invariant: what loads is complete. A checkpoint that lacks a tensor of the network is refused, since transformers would
fill it with random numbers and go on. Does not own: the networks (transformers), the scores.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from contracts.config.scorers import DeviceOptions
from contracts.errors import ConfigError
from reward_servers.scorers.base import weights_file

_CONVERT = "convert it to safetensors (docs/scorers.md); pickled weights are never loaded"


def device_of(options: DeviceOptions) -> torch.device:
    """The device the options name; `auto` is CUDA where there is one."""
    name = options.device if options.device != "auto" else ("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(name)


def dtype_of(options: DeviceOptions) -> torch.dtype:
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[options.dtype]


def load_network(auto: Any, source: str, options: DeviceOptions, **more: Any) -> Any:
    """A frozen network of transformers in eval mode on its device. Raises ConfigError naming what is wrong.

    auto: a class with from_pretrained (AutoModel, CLIPModel, ...).
    """
    try:
        network, info = auto.from_pretrained(
            source, revision=options.revision, use_safetensors=True, trust_remote_code=False, dtype=dtype_of(options),
            output_loading_info=True, **more,
        )  # fmt: skip
    except ImportError as error:
        problem = " ".join(str(error).split())[:200]
        raise ConfigError("model", f"{source} needs a library: {problem}", "install the extra `scorers`") from error
    except (OSError, ValueError) as error:
        raise ConfigError("model", f"{source} does not load: {' '.join(str(error).split())[:300]}", _CONVERT) from error
    missing = sorted(name for name in info["missing_keys"] if not name.endswith("position_ids"))
    if missing or info["mismatched_keys"]:
        wrong = missing[0] if missing else str(next(iter(info["mismatched_keys"])))
        raise ConfigError("model", f"{source} lacks {wrong} of {type(network).__name__}", "use a whole checkpoint")
    return freeze(network, options)


def freeze(network: torch.nn.Module, options: DeviceOptions) -> Any:
    """The network in eval mode, without gradients of its own, in the options' dtype and on their device."""
    return network.eval().requires_grad_(False).to(device_of(options), dtype_of(options))


def load_tool(auto: Any, source: str, options: DeviceOptions, **more: Any) -> Any:
    """A tokenizer or processor. Raises ConfigError."""
    try:
        return auto.from_pretrained(source, revision=options.revision, trust_remote_code=False, **more)
    except (OSError, ValueError, ImportError) as error:
        problem = " ".join(str(error).split())[:300]
        raise ConfigError("model", f"{source} has no usable {auto.__name__}: {problem}") from error


def find_file(source: str, name: str, revision: str | None = None) -> Path:
    """A file of a local folder or of a hub repository. Raises ConfigError."""
    folder = Path(source)
    if folder.is_dir():
        if not (folder / name).is_file():
            raise ConfigError("model", f"{folder} holds no {name}")
        return folder / name
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return Path(hf_hub_download(source, name, revision=revision))
    except (OSError, HfHubHTTPError, HFValidationError) as error:
        problem = " ".join(str(error).split())[:300]
        raise ConfigError(
            "model", f"{source} is no folder, and {name} cannot be had from the hub: {problem}"
        ) from error


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file. Raises ConfigError."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(weights_file(path))
    except SafetensorError as error:
        raise ConfigError("model", f"{path} is not a safetensors file: {error}", _CONVERT) from error


def load_exactly(network: torch.nn.Module, tensors: Mapping[str, torch.Tensor], source: str) -> None:
    """Load by name. Raises ConfigError unless each weight of the network is there in its shape and none is left."""
    own = {name: tensor for name, tensor in network.state_dict().items() if not name.endswith("position_ids")}
    given = {name: tensor for name, tensor in tensors.items() if not name.endswith("position_ids")}
    for name in sorted(set(own) ^ set(given)):
        problem = "lacks" if name in own else "has more than the network:"
        raise ConfigError("model", f"{source} {problem} {name}", "use a whole checkpoint of this kind")
    for name, tensor in own.items():
        if tensor.shape != given[name].shape:
            shapes = f"{tuple(given[name].shape)}, not {tuple(tensor.shape)}"
            raise ConfigError("model", f"{name} of {source} has shape {shapes}", "use a checkpoint of this size")
    network.load_state_dict(given, strict=False)


def tensors_digest(*networks: torch.nn.Module) -> str:
    """BLAKE2b over names, types, shapes and bytes of all weights, 32 hex digits: the same however they are sharded."""
    digest = hashlib.blake2b(digest_size=16)
    for index, network in enumerate(networks):
        for name, tensor in sorted(network.state_dict().items()):
            flat = tensor.detach().cpu().contiguous()
            digest.update(f"{index}|{name}|{flat.dtype}|{tuple(flat.shape)};".encode())
            digest.update(flat.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()

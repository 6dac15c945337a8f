"""The model folder, the adapter and the warm start: do they fit together? Reads headers, no tensor.

Does not own: reading the headers (headers.py), loading (policy).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from cluster.checks.headers import adapted_layers, file_shapes, folder_shapes, layer_shapes, read_json
from contracts.config import RunConfig
from contracts.config.model import LoraConfig, ModelConfig
from contracts.errors import ConfigError
from policy.lora_names import LORA_FILES, bare_name, ends_with, find_lora, layers_of, leaf_names, pair_names

PIPELINES = {"sd3": "StableDiffusion3Pipeline"}
"""Class that model_index.json must name, by built-in family."""

Shapes = Mapping[str, list[int]]


def check_model(config: RunConfig) -> Iterator[ConfigError]:
    """Every missing or unfit file, and every layer that is not there."""
    model, folder = config.model, Path(config.model.path)
    network = _network_shapes(folder)
    if folder.is_dir():
        yield from _folder(model, folder)
    else:
        way_out = "give the path of a diffusers pipeline folder"
        yield ConfigError("model.path", f"{folder} is no folder", way_out)
    if model.tuning == "full" and model.lora != LoraConfig():
        yield ConfigError(
            "model.lora, model.tuning", "full tuning has no adapter", "set model.tuning=lora or remove model.lora"
        )
    if model.tuning == "lora" and network:
        yield from _targets(model, layer_shapes(network))
    if model.warm_start is not None:
        yield from _warm_start(model, Path(model.warm_start), network)


def _folder(model: ModelConfig, folder: Path) -> Iterator[ConfigError]:
    index = read_json(folder / "model_index.json")
    if index is None:
        yield ConfigError(
            "model.path", f"{folder} has no readable model_index.json", "a diffusers pipeline folder has one"
        )
        return
    wanted = PIPELINES.get(model.family)
    if wanted is not None and index.get("_class_name") != wanted:
        yield ConfigError(
            "model.path, model.family", f"{folder} holds a {index.get('_class_name')}, not a {wanted}",
            "choose the family that fits, or another folder",
        )  # fmt: skip
    if wanted is not None and not list((folder / "transformer").glob("*.safetensors")):
        yield ConfigError(
            "model.path",
            f"{folder}/transformer holds no .safetensors file",
            "nothing else is read: convert the weights",
        )


def _network_shapes(folder: Path) -> Shapes:
    """Parameters of the network in a pipeline folder or a folder of its own; empty where they cannot be read."""
    part = folder / "transformer"
    try:
        return folder_shapes(part if part.is_dir() else folder)
    except (OSError, ValueError):
        return {}


def _targets(model: ModelConfig, layers: Shapes) -> Iterator[ConfigError]:
    unmatched = [t for t in model.lora.targets or () if not any(ends_with(name, t) for name in layers)]
    if unmatched:
        yield ConfigError(
            "model.lora.targets", f"no layer of {model.path} is called {', '.join(unmatched)}",
            f"layers are called {', '.join(leaf_names(layers))}",
        )  # fmt: skip


def _warm_start(model: ModelConfig, path: Path, network: Shapes) -> Iterator[ConfigError]:
    """network: shapes of what it is to go into; empty where they are not known."""
    if not path.exists():
        yield ConfigError(
            "model.warm_start", f"{path} does not exist", "give a LoRA file or folder, or a diffusers folder"
        )
    elif path.is_file() and path.suffix != ".safetensors":
        yield ConfigError("model.warm_start", f"{path} is no .safetensors file", "nothing else is read")
    elif (lora := find_lora(path)) is not None:
        yield from _lora_file(model, lora, layer_shapes(network))
    elif not (path / "transformer").is_dir() and not (path / "config.json").is_file():
        yield ConfigError("model.warm_start", f"{path} holds neither {' nor '.join(LORA_FILES)} nor a transformer")
    elif network and _network_shapes(path) != network:
        yield ConfigError(
            "model.warm_start, model.path", f"the network of {path} has other layers than that of {model.path}",
            "give a network of the same shape",
        )  # fmt: skip


def _lora_file(model: ModelConfig, path: Path, layers: Shapes) -> Iterator[ConfigError]:
    try:
        shapes = {bare_name(key): shape for key, shape in file_shapes(path).items()}
    except (OSError, ValueError):
        yield ConfigError("model.warm_start", f"{path} is not a readable safetensors file")
        return
    adapted, others = layers_of(shapes)
    if others or not adapted:
        yield ConfigError(
            "model.warm_start", f"{path} is no LoRA: it holds {next(iter(others), 'nothing')}",
            "give lora_A and lora_B of the transformer's layers alone, or a diffusers folder",
        )  # fmt: skip
        return
    pairs = {layer: (shapes[a], shapes[b]) for layer in adapted for a, b in [pair_names(layer)]}
    if layers:
        yield from _fits(model, path, pairs, layers)
    if model.tuning == "lora":
        ranks = sorted({(a or [0])[0] for a, _ in pairs.values()} - {model.lora.rank})
        if ranks:
            yield ConfigError(
                "model.warm_start, model.lora.rank", f"{path} has rank {', '.join(map(str, ranks))}",
                f"set model.lora.rank={ranks[0]}",
            )  # fmt: skip


def _fits(
    model: ModelConfig, path: Path, pairs: Mapping[str, tuple[list[int], list[int]]], layers: Shapes
) -> Iterator[ConfigError]:  # fmt: skip
    """Do the LoRA's layers exist, with these sizes, and are they those that the adapter goes into?"""
    unknown = [name for name, (a, b) in pairs.items() if layers.get(name, [])[:2] != [*b[:1], *a[1:2]]]
    wanted = set(adapted_layers(layers, model.lora)) if model.tuning == "lora" else set(pairs)
    if unknown:
        yield ConfigError(
            "model.warm_start, model.path", f"it adapts {unknown[0]}, which is not in {model.path}, or of another size",
            "give a LoRA of this model",
        )  # fmt: skip
    elif wanted != set(pairs):
        example = sorted(wanted ^ set(pairs))[0]
        yield ConfigError(
            "model.warm_start, model.lora.targets", f"{path} adapts other layers than the run ({example}, for one)",
            "set model.lora.targets to the layers it adapts",
        )  # fmt: skip

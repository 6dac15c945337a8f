"""What a run reads and writes: model folder, warm start, prompt files, run folder. Reads headers, no tensor."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.checks.declared import Declared
from contracts.config import RunConfig
from contracts.config.model import LoraConfig
from contracts.errors import ConfigError

PIPELINES = {"sd3": "StableDiffusion3Pipeline"}
"""Class that model_index.json must name, by built-in family."""
LORA_FILES = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")
_FILE_SOURCES = ("text", "jsonl", "parquet", "pairs")
_MAX_HEADER = 100 * 2**20
_NO_PARAMETERS = ("__metadata__", "pos_embed.pos_embed")  # SD3's position table is a buffer


def check_inputs(config: RunConfig, declared: Declared) -> Iterator[ConfigError]:
    """Every missing or unfit file."""
    yield from _model(config)
    yield from _warm_start(config)
    yield from _prompts(config)
    yield from _held_out(config, declared)
    yield from _runs_dir(config)


def _model(config: RunConfig) -> Iterator[ConfigError]:
    folder = Path(config.model.path)
    if not folder.is_dir():
        way_out = "give the path of a diffusers pipeline folder"
        yield ConfigError("model.path", f"{folder} is no folder", way_out)
        return
    index = _read_json(folder / "model_index.json")
    if index is None:
        yield ConfigError(
            "model.path", f"{folder} has no readable model_index.json", "a diffusers pipeline folder has one"
        )
        return
    wanted = PIPELINES.get(config.model.family)
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
    if config.model.tuning == "full" and config.model.lora != LoraConfig():
        yield ConfigError(
            "model.lora, model.tuning", "full tuning has no adapter", "set model.tuning=lora or remove model.lora"
        )


def _warm_start(config: RunConfig) -> Iterator[ConfigError]:
    if config.model.warm_start is None:
        return
    path = Path(config.model.warm_start)
    if not path.exists():
        yield ConfigError(
            "model.warm_start", f"{path} does not exist", "give a LoRA file or folder, or a diffusers folder"
        )
    elif path.is_file() and path.suffix != ".safetensors":
        yield ConfigError("model.warm_start", f"{path} is no .safetensors file", "nothing else is read")
    elif path.is_dir() and not any(_may_start(path)):
        yield ConfigError("model.warm_start", f"{path} holds neither {' nor '.join(LORA_FILES)} nor a transformer")


def _may_start(folder: Path) -> Iterator[bool]:
    yield from ((folder / name).is_file() for name in LORA_FILES)
    yield (folder / "transformer").is_dir()
    yield (folder / "config.json").is_file()


def _prompts(config: RunConfig) -> Iterator[ConfigError]:
    prompts = config.prompts
    if prompts.source == "playground" and prompts.path is not None:
        yield ConfigError("prompts.path", "the playground reads no file", "remove it or set prompts.source")
    if prompts.source not in _FILE_SOURCES:
        return
    if prompts.path is None:
        yield ConfigError("prompts.path", f"source {prompts.source} reads a file", "give its path or fsspec URL")
    elif "://" not in prompts.path and not Path(prompts.path).is_file():
        yield ConfigError("prompts.path", f"{prompts.path} does not exist", "give a path from the working directory")


def _held_out(config: RunConfig, declared: Declared) -> Iterator[ConfigError]:
    gives, prompts = declared.prompts, config.prompts
    if gives is None:
        return
    if prompts.source not in _FILE_SOURCES and not gives.has_held_out:
        yield ConfigError(
            "prompts.source, eval", f"{prompts.source} has no held-out prompts to evaluate on",
            "use a source that keeps some back",
        )  # fmt: skip
    elif prompts.source in _FILE_SOURCES and prompts.held_out_fraction == 0:
        yield ConfigError(
            "prompts.held_out_fraction", "0 keeps no prompt of the file for evaluation", "set it to 0.1, for example"
        )


def _runs_dir(config: RunConfig) -> Iterator[ConfigError]:
    if "://" not in config.runs_dir:
        if Path(config.runs_dir).is_file():
            yield ConfigError("runs_dir", f"{config.runs_dir} is a file", "give a folder")
        return
    import fsspec

    protocol = config.runs_dir.split("://", 1)[0]
    try:
        fsspec.get_filesystem_class(protocol)
    except (ValueError, ImportError) as error:
        yield ConfigError("runs_dir", f"no file system for {protocol}:// ({error})", "install it, or use a local path")


def metadata_keys(config: RunConfig) -> list[str] | None:
    """Metadata keys of the first prompt of a local JSON-lines or parquet file; None when that cannot be told."""
    path = config.prompts.path
    if path is None or "://" in path or not Path(path).is_file():
        return None
    try:
        if config.prompts.source in ("jsonl", "pairs"):
            return _keys_of_first_line(Path(path))
        if config.prompts.source == "parquet":
            import pyarrow.parquet

            return [str(name) for name in pyarrow.parquet.read_schema(path).names]
    except (OSError, ValueError):
        return None
    return None


def _keys_of_first_line(path: Path) -> list[str] | None:
    with path.open(encoding="utf-8") as file:
        row = json.loads(next((line for line in file if line.strip()), "null"))
    if not isinstance(row, dict):
        return None
    nested = row.get("metadata")
    return [*row, *(nested if isinstance(nested, dict) else ())]


@dataclass(frozen=True)
class ModelCard:
    """What a pipeline folder says of its size without loading it. Parameters by component; latent [C,h,w]."""

    parameters: dict[str, int]
    latent: tuple[int, int, int]
    image: tuple[int, int]
    lora_layers: list[tuple[int, int]]  # (out, in) of the attention projections that LoRA adapts by default

    @property
    def network(self) -> int:
        return self.parameters.get("transformer", 0)


_LORA_TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")


def read_model_card(folder: Path) -> ModelCard | None:
    """The card of a diffusers folder with a transformer and a VAE, from headers alone; None when it is none."""
    network, vae = _read_json(folder / "transformer" / "config.json"), _read_json(folder / "vae" / "config.json")
    if network is None or vae is None:
        return None
    try:
        shapes = {part.name: _shapes(part) for part in sorted(folder.iterdir()) if part.is_dir()}
        size, channels = int(network["sample_size"]), int(network["in_channels"])
        scale = 2 ** (len(vae["block_out_channels"]) - 1)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return ModelCard(
        parameters={name: sum(_product(shape) for shape in by_name.values()) for name, by_name in shapes.items()},
        latent=(channels, size, size), image=(size * scale, size * scale),
        lora_layers=[(s[0], s[1]) for n, s in shapes["transformer"].items() if _is_lora_target(n) and len(s) == 2],
    )  # fmt: skip


def _is_lora_target(name: str) -> bool:
    layer = name.removesuffix(".weight")
    return layer != name and any(layer == target or layer.endswith(f".{target}") for target in _LORA_TARGETS)


def _shapes(folder: Path) -> dict[str, list[int]]:
    """Shapes of all tensors of a folder's safetensors files, from their headers."""
    shapes: dict[str, list[int]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(min(length, _MAX_HEADER)))
        shapes.update({name: entry["shape"] for name, entry in header.items() if name not in _NO_PARAMETERS})
    return shapes


def _product(shape: list[int]) -> int:
    total = 1
    for length in shape:
        total *= length
    return total


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def missing_package(name: str) -> bool:
    """Whether a package is not installed (looked for, not imported)."""
    return importlib.util.find_spec(name) is None

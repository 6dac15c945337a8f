"""What a run reads and writes: model (model.py), prompt files, run folder."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path

from cluster.checks.declared import Declared
from cluster.checks.model import check_model
from contracts.config import RunConfig
from contracts.errors import ConfigError

_FILE_SOURCES = ("text", "jsonl", "parquet", "pairs")


def check_inputs(config: RunConfig, declared: Declared) -> Iterator[ConfigError]:
    """Every missing or unfit file."""
    yield from check_model(config)
    yield from _prompts(config)
    yield from _held_out(config, declared)
    yield from _runs_dir(config)


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


def missing_package(name: str) -> bool:
    """Whether a package is not installed (looked for, not imported)."""
    return importlib.util.find_spec(name) is None

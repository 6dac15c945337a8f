"""Prompts from text, JSON lines and parquet, by local path or fsspec URL. Every mistake names file and line."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import fsspec

from actors.prompts.base import ListedPrompts
from contracts.config.rollout import PromptsConfig
from contracts.declarations import PromptsGive
from contracts.errors import ConfigError
from contracts.wire import PromptSpec

_DEFAULT_COLUMNS = ("prompt", "text")


class TextPrompts(ListedPrompts):
    """One prompt a line; empty lines are skipped."""

    declares: ClassVar[PromptsGive] = PromptsGive(has_held_out=True)

    def __init__(self, config: PromptsConfig, seed: int) -> None:
        lines = (line.strip() for _, line in read_lines(config))
        super().__init__(config, seed, [PromptSpec(text=line) for line in lines if line])


class JsonlPrompts(ListedPrompts):
    """One object a line: the prompt, optionally `negative`, `metadata` (an object); other keys join the metadata."""

    declares: ClassVar[PromptsGive] = PromptsGive(has_held_out=True)

    def __init__(self, config: PromptsConfig, seed: int) -> None:
        rows = read_objects(config)
        super().__init__(config, seed, [to_prompt(config, row, where) for where, row in rows])


class ParquetPrompts(ListedPrompts):
    """A prompt column; other columns of plain values are metadata, binary ones are left out."""

    declares: ClassVar[PromptsGive] = PromptsGive(has_held_out=True)

    def __init__(self, config: PromptsConfig, seed: int) -> None:
        super().__init__(config, seed, [to_prompt(config, row, where) for where, row in _parquet_rows(config)])


def prompt_path(config: PromptsConfig) -> str:
    """prompts.path. Raises ConfigError when it is not set."""
    if not config.path:
        raise ConfigError("prompts.path", f"is required by prompts.source={config.source}", "give a file")
    return config.path


def read_lines(config: PromptsConfig) -> Iterator[tuple[str, str]]:
    """('file:line', line) of a UTF-8 text file."""
    path = prompt_path(config)
    try:
        with fsspec.open(path, "rt", encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                yield f"{path}:{number}", line
    except UnicodeDecodeError as error:
        raise ConfigError("prompts.path", f"{path} is not UTF-8 text ({error.reason})") from error
    except (OSError, ValueError, ImportError) as error:
        raise ConfigError("prompts.path", f"{path} cannot be read ({error})") from error


def read_objects(config: PromptsConfig) -> Iterator[tuple[str, dict[str, Any]]]:
    """('file:line', object) of a JSON-lines file; empty lines are skipped."""
    for where, line in read_lines(config):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ConfigError("prompts.path", f"{where} is not valid JSON ({error})") from error
        if not isinstance(row, dict):
            raise ConfigError("prompts.path", f"{where} holds no JSON object", 'write {"prompt": "..."}')
        yield where, row


def to_prompt(config: PromptsConfig, row: Mapping[str, Any], where: str) -> PromptSpec:
    """A row as a prompt. Raises ConfigError naming file and line."""
    wanted = (config.column,) if config.column else _DEFAULT_COLUMNS
    column = next((name for name in wanted if name in row), None)
    if column is None:
        raise ConfigError(
            "prompts.column", f"{where} has no {' or '.join(wanted)}", f"it has {', '.join(row) or 'nothing'}"
        )
    text, negative, metadata = row[column], row.get("negative") or "", row.get("metadata") or {}
    if not isinstance(text, str) or not text.strip():
        raise ConfigError("prompts.path", f"{where}: {column} is no text ({text!r})")
    if not isinstance(negative, str):
        raise ConfigError("prompts.path", f"{where}: negative is no text ({negative!r})")
    if not isinstance(metadata, dict):
        raise ConfigError("prompts.path", f"{where}: metadata is no object ({metadata!r})")
    rest = {key: value for key, value in row.items() if key not in (column, "negative", "metadata")}
    return PromptSpec(text=text.strip(), negative=negative, metadata={**rest, **metadata})


def _parquet_rows(config: PromptsConfig) -> Iterator[tuple[str, dict[str, Any]]]:
    import pyarrow
    import pyarrow.parquet

    path = prompt_path(config)
    try:
        with fsspec.open(path, "rb") as file:
            source = pyarrow.parquet.ParquetFile(file)
            columns = [field.name for field in source.schema_arrow if _is_plain(pyarrow, field.type)]
            rows = source.read(columns=columns).to_pylist()
    except (pyarrow.ArrowInvalid, OSError, ValueError, ImportError) as error:
        raise ConfigError("prompts.path", f"{path} is no readable parquet file ({error})") from error
    for number, row in enumerate(rows):
        yield f"{path}:row {number}", {key: value for key, value in row.items() if not _is_nan(value)}


def _is_plain(pyarrow: Any, kind: Any) -> bool:
    """Whether a column's values are JSON values."""
    types = pyarrow.types
    if types.is_list(kind) or types.is_large_list(kind):
        return _is_plain(pyarrow, kind.value_type)
    if types.is_struct(kind):
        return all(_is_plain(pyarrow, kind.field(i).type) for i in range(kind.num_fields))
    text = types.is_string(kind) or types.is_large_string(kind)
    number = types.is_integer(kind) or types.is_floating(kind) or types.is_boolean(kind)
    return text or number or types.is_null(kind)


def _is_nan(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)

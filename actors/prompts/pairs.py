"""Preference pairs from JSON lines: {"prompt": ..., "chosen": image path, "rejected": image path}.

Relative paths start at the file's own folder. Images are read and encoded by an actor (Painter.encode_pair).
"""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import Any, ClassVar

import fsspec
from fsspec.core import url_to_fs

from actors.images import MAX_BYTES
from actors.prompts.base import ListedPrompts
from actors.prompts.files import prompt_path, read_objects, to_prompt
from contracts.config.rollout import PromptsConfig
from contracts.declarations import PromptsGive
from contracts.errors import ConfigError
from contracts.wire import PromptSpec, Source


class PreferencePairs(ListedPrompts):
    """metadata: `chosen` and `rejected` are absolute paths (or URLs). All images must exist when the run starts."""

    declares: ClassVar[PromptsGive] = PromptsGive(source=Source.FILES)

    def __init__(self, config: PromptsConfig, seed: int) -> None:
        folder = _parent(prompt_path(config))
        rows = list(read_objects(config))
        super().__init__(config, seed, [_to_pair(config, row, where, folder) for where, row in rows])


def _to_pair(config: PromptsConfig, row: dict[str, Any], where: str, folder: str) -> PromptSpec:
    paths = {}
    for key in ("chosen", "rejected"):
        if not isinstance(row.get(key), str) or not row[key]:
            raise ConfigError("prompts.path", f"{where}: {key} is no image path", "write prompt, chosen and rejected")
        paths[key] = _resolve(row[key], folder)
        _check_image(paths[key], f"{where}: {key}")
    return to_prompt(config, {**row, **paths}, where)


def _parent(path: str) -> str:
    if "://" in path:
        return path.rsplit("/", 1)[0]
    return str(PurePosixPath(fsspec.filesystem("file")._strip_protocol(path)).parent)


def _resolve(path: str, folder: str) -> str:
    return path if "://" in path or path.startswith("/") else f"{folder}/{path}"


def _check_image(path: str, where: str) -> None:
    try:
        filesystem, inner = url_to_fs(path)
        size = filesystem.size(inner)
    except (OSError, ValueError, ImportError) as error:
        raise ConfigError("prompts.path", f"{where} cannot be read ({path})") from error
    if size is not None and size > MAX_BYTES:
        raise ConfigError("prompts.path", f"{where} has {size} bytes ({path})", f"at most {MAX_BYTES} are read")

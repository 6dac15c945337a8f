"""What a run's prompts were read from, as a digest: positions of a changed file would mean other prompts.

Does not own: reading prompts (actors/prompts).
"""

from __future__ import annotations

import hashlib

import fsspec

from contracts.config import RunConfig
from contracts.errors import ConfigError

_CHUNK = 2**20


def prompts_digest(config: RunConfig) -> str | None:
    """SHA-256 of prompts.path; None for a source that reads no file. Raises ConfigError when it cannot be read."""
    path = config.prompts.path
    if path is None:
        return None
    digest = hashlib.sha256()
    try:
        with fsspec.open(path, "rb") as file:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
    except (OSError, ValueError, ImportError) as error:
        raise ConfigError(
            "prompts.path", f"{path} cannot be read ({error})", "bring it back, or set prompts.path"
        ) from error
    return digest.hexdigest()

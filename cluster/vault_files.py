"""Owns the names and the wholeness of a vault's files, and what is known about who uses a prompt embedding.

Does not own: writing and deleting them (vault.py).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from contracts import codec
from contracts.errors import NotStored, PayloadError, VaultError
from contracts.wire import GroupHeader

GROUP_FILE = re.compile(r"^group-(\d+)-(\d+)\.safetensors$")
EMBEDDING_FILE = re.compile(r"^embedding-([A-Za-z0-9_-]{1,128})\.safetensors$")


def group_file(group_id: int, attempt: int) -> str:
    """Name of a painting's file in its vault's folder."""
    return f"group-{group_id:08d}-{attempt}.safetensors"


def embedding_file(digest: str) -> str:
    """Name of a prompt embedding's file. Raises VaultError for what is no digest."""
    name = f"embedding-{digest}.safetensors"
    if not EMBEDDING_FILE.match(name):
        raise VaultError(f"{digest!r} is no digest")
    return name


def read_header(path: Path) -> GroupHeader:
    """Header of a painting's file. Raises NotStored when it cannot be read."""
    try:
        with path.open("rb") as file:
            start = file.read(8)
            return codec.read_header(start + file.read(int.from_bytes(start, "little")), GroupHeader)
    except (OSError, PayloadError) as error:
        raise NotStored(f"{path.name} cannot be read: {error}") from error


def is_whole(path: Path) -> bool:
    """Whether a file has the length its own safetensors header promises (temporary files never count)."""
    if path.suffix != ".safetensors":
        return False
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            entries = json.loads(file.read(length))
        ends = [entry["data_offsets"][1] for name, entry in entries.items() if name != "__metadata__"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError):
        return False
    return path.stat().st_size == 8 + length + max(ends, default=0)


class EmbeddingUses:
    """Which groups use which prompt embeddings. Not safe to call from many threads at once.

    A vault holds the embeddings of groups that lie in other vaults too, and after a restart it knows only its own
    groups: what it found then is never said to be unused, until `settle` tells the whole truth.
    """

    def __init__(self, found: Iterable[str]) -> None:
        self._digests: dict[int, set[str]] = {}  # group id -> digests it uses
        self._count: dict[str, int] = {}  # digest -> groups that use it
        self._unknown = set(found)

    def add(self, digest: str, group_id: int | None) -> None:
        """A group uses an embedding; None: somebody does."""
        if group_id is None:
            self._unknown.add(digest)
        elif digest not in (uses := self._digests.setdefault(group_id, set())):
            uses.add(digest)
            self._count[digest] = self._count.get(digest, 0) + 1

    def drop(self, group_id: int) -> list[str]:
        """A group is gone; the digests that nobody uses any more."""
        unused = []
        for digest in self._digests.pop(group_id, ()):
            self._count[digest] -= 1
            if self._count[digest] == 0:
                del self._count[digest]
                if digest not in self._unknown:
                    unused.append(digest)
        return unused

    def settle(self, uses: Mapping[int, Iterable[str]]) -> list[str]:
        """These groups (id -> digests), and no others, use embeddings; the digests that nobody uses."""
        before = {*self._unknown, *self._count}
        self._digests, self._count, self._unknown = {}, {}, set()
        for group_id, digests in uses.items():
            for digest in digests:
                self.add(digest, group_id)
        return sorted(before - set(self._count))

"""The thread that writes a learner's state while training goes on.

Invariant: what is written is what was handed over (float32 arrays on the host that nobody changes any more), and what
waits for the disk there is at most `stage_bytes`: beyond that the caller waits. After an error nothing more is written,
nobody waits, and finish() raises it.

Files are plain safetensors, digested (SHA-256) as they are written and on disk (fsync) before finish() returns.
Does not own: which tensors make up a state (state.py), the folder's name and its manifest (cluster/checkpoints).
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

FileDigests = dict[str, tuple[int, str]]
"""File name -> (bytes, SHA-256 in hex)."""


class PendingSave:
    """A state on its way to disk."""

    def tensors(
        self, file_name: str, shapes: Mapping[str, tuple[int, ...]], array_of: Callable[[str], np.ndarray]
    ) -> None:
        """One safetensors file of fp32 tensors; `array_of` is called once for each name, in order, on every rank."""
        raise NotImplementedError

    def text(self, file_name: str, text: str) -> None:
        """One small file."""
        raise NotImplementedError

    def abandon(self) -> None:
        """Write nothing more; what is written already stays."""

    def finish(self) -> FileDigests:
        """Wait until all of it is on disk. Raises OSError when it could not be written."""
        raise NotImplementedError


class NothingToWrite(PendingSave):
    """What ranks other than 0 hold: they only take part in collecting."""

    def tensors(
        self, file_name: str, shapes: Mapping[str, tuple[int, ...]], array_of: Callable[[str], np.ndarray]
    ) -> None:
        for name in shapes:
            array_of(name)

    def text(self, file_name: str, text: str) -> None:
        del file_name, text

    def finish(self) -> FileDigests:
        return {}


class StateWriter(PendingSave):
    """Writes into `folder`, made if need be, in a thread of its own."""

    def __init__(self, folder: Path, stage_bytes: int) -> None:
        self._folder, self._stage_bytes = folder, stage_bytes
        self._work: deque[tuple[str, bytes | np.ndarray | None]] = deque()  # None: the file ends
        self._waiting_bytes = 0
        self._changed = threading.Condition()
        self._closed = False
        self._error: BaseException | None = None
        self._digests: FileDigests = {}
        self._thread = threading.Thread(target=self._run, name="state-writer", daemon=True)
        self._thread.start()

    def tensors(
        self, file_name: str, shapes: Mapping[str, tuple[int, ...]], array_of: Callable[[str], np.ndarray]
    ) -> None:
        self._put(file_name, _header(shapes))
        for name in shapes:
            self._put(file_name, array_of(name))
        self._put(file_name, None)

    def text(self, file_name: str, text: str) -> None:
        self._put(file_name, text.encode())
        self._put(file_name, None)

    def abandon(self) -> None:
        with self._changed:
            self._error = self._error or InterruptedError("the save was abandoned")
            self._closed = True
            self._changed.notify_all()
        self._thread.join()

    def finish(self) -> FileDigests:
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join()
        if self._error is not None:
            raise self._error
        return dict(self._digests)

    def _put(self, file_name: str, piece: bytes | np.ndarray | None) -> None:
        """Hand a piece over; one piece may always wait, however large, or nothing would ever be written."""
        size = _size(piece)
        with self._changed:
            self._changed.wait_for(
                lambda: self._error or not self._waiting_bytes or self._waiting_bytes + size <= self._stage_bytes
            )
            if self._error is None:
                self._work.append((file_name, piece))
                self._waiting_bytes += size
                self._changed.notify_all()

    def _run(self) -> None:
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            while (first := self._take()) is not None:
                self._write_file(*first)
            folder_to_disk(self._folder)
        except BaseException as error:  # told by finish()
            with self._changed:
                self._error = self._error or error
                self._work.clear()
                self._changed.notify_all()

    def _write_file(self, name: str, piece: bytes | np.ndarray | None) -> None:
        with _digested(self._folder / name) as file:
            while piece is not None:
                file.write(piece if isinstance(piece, bytes) else piece.tobytes())
                self._written(piece)
                following = self._take()
                assert following is not None, "a file was begun and not ended"
                piece = following[1]
        self._digests[name] = (file.num_bytes, file.digest.hexdigest())

    def _take(self) -> tuple[str, Any] | None:
        """The next piece, waiting for it; None at the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._work or self._closed or self._error)
            if self._error is not None:
                raise self._error
            return self._work.popleft() if self._work else None

    def _written(self, piece: bytes | np.ndarray) -> None:
        with self._changed:
            self._waiting_bytes -= _size(piece)
            self._changed.notify_all()


class _DigestingFile:
    """A file that knows the digest of what was written to it."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self.digest, self.num_bytes = file, hashlib.sha256(), 0

    def write(self, data: bytes) -> None:
        self._file.write(data)
        self.digest.update(data)
        self.num_bytes += len(data)


@contextmanager
def _digested(path: Path) -> Iterator[_DigestingFile]:
    with path.open("wb") as file:
        yield _DigestingFile(file)
        file.flush()
        os.fsync(file.fileno())


def folder_to_disk(folder: Path) -> None:
    """fsync a folder: the names in it survive a power failure."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _header(shapes: Mapping[str, tuple[int, ...]]) -> bytes:
    """Length and JSON header of a safetensors file. The library's own writer wants all tensors at once."""
    header, offset = {}, 0
    for name, shape in shapes.items():
        size = 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    return struct.pack("<Q", len(encoded)) + encoded


def _size(piece: bytes | np.ndarray | None) -> int:
    if piece is None:
        return 0
    return len(piece) if isinstance(piece, bytes) else piece.nbytes

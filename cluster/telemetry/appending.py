"""Files that only grow, in a folder that may get full: what is appended is whole, or the file stays as it was.

Does not own: what is appended (telemetry.py, sinks.py), files written at once (run_folder.py).
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path


class AppendingFile:
    """One file, one writer. Nothing is buffered: after `append` it is with the kernel, and what failed is gone."""

    def __init__(self, path: Path) -> None:
        """The file is created by the first `append`."""
        self.path = path
        self._file = -1

    def append(self, data: bytes, head: bytes = b"") -> None:
        """Write `data` at the end; head: what a file that is empty begins with.

        Raises OSError when it cannot be written. The file is opened anew by the next call, so writing works again as
        soon as there is room.
        """
        try:
            if self._file < 0:
                self._file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
            before = os.fstat(self._file).st_size
            self._write(data if before else head + data, before)
        except OSError:
            self.close()
            raise

    def _write(self, data: bytes, before: int) -> None:
        rest = memoryview(data)
        try:
            while rest:
                rest = rest[os.write(self._file, rest) :]
        except OSError:
            with suppress(OSError):
                os.ftruncate(self._file, before)  # a torn record would hide all that comes after it
            raise

    def close(self) -> None:
        """Calling it again does nothing."""
        if self._file >= 0:
            with suppress(OSError):
                os.close(self._file)
            self._file = -1

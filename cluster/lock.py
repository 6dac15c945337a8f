"""The lock of a run: one controller at a time, wherever it runs.

    <run>/run.lock    JSON: who holds it (host, process, its start time) and a count that rises while the holder lives

On a file system the holder also keeps the file locked (flock), which ends with its process. Behind a URL, or where
another host wrote the file, nobody can look at the process: then the count is watched for a while, on the watcher's own
monotonic clock. So neither a wrong clock nor a process id that was given out again makes a lock look stale or alive.

Invariant: who holds the lock writes to the run; a holder that finds another's name in it stops (`LockLost`).
Does not own: what is done with the run (controller.py), the ledger's own guard against two writers (ledger/schema.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import json
import os
import secrets
import socket
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import fsspec
import psutil

from contracts.errors import ConfigError, SalonError

LOCK = "run.lock"
BEAT_S = 5.0
"""Seconds between two counts of a holder."""

SILENT_BEATS = 4
"""Beats without a count after which a holder that nobody can look at is taken for dead."""


class LockLost(SalonError):
    """Another controller has taken the run over; this one must not write to it any more."""


CLAIMS, CLAIM_S = 5, 0.1
"""A look at the lock (`held_by`) has it for an instant: who wants it asks more than once."""


@dataclass(frozen=True)
class Holder:
    """Who holds a run. started: the process's start time as its kernel counts it; world: boot and process namespace."""

    host: str
    world: str
    pid: int
    started: float
    token: str
    beats: int = 0

    @property
    def described(self) -> str:
        return f"process {self.pid} on {self.host}"


def this_process() -> Holder:
    """A new holder: this process."""
    return Holder(socket.gethostname(), _world(), os.getpid(), _started(os.getpid()), secrets.token_hex(8))


class RunLock:
    """A lock that is held. `beat` now and then; `release` at the end, which a killed process cannot and need not."""

    def __init__(self, place: _Place, holder: Holder) -> None:
        self._place, self._holder = place, holder

    @classmethod
    def acquire(cls, location: str | Path, sleep: Callable[[float], None] = time.sleep) -> RunLock:
        """Take the lock of the run at a path or URL. Raises ConfigError naming the holder while another has it."""
        place = _place(str(location))
        try:
            if not place.takes_files():
                raise _unwritable(location, os.strerror(errno.EACCES))
            if not _claimed(place, sleep):
                raise _held(location, place.read())
            before = place.read()
            if before is not None and _is_alive(place, before, sleep):
                raise _held(location, before)
            lock = cls(place, this_process())
            place.write(lock._holder)
            if place.read() != lock._holder:
                raise _held(location, place.read())
            return lock
        except BaseException:
            place.close()
            raise

    def beat(self) -> None:
        """Show that the holder lives. Raises LockLost when another has taken the lock over."""
        found = self._place.read()
        if found is None or found.token != self._holder.token:
            by = "nobody" if found is None else found.described
            raise LockLost(f"this run is now held by {by}; this controller stops without writing anything more")
        self._holder = replace(self._holder, beats=self._holder.beats + 1)
        self._place.write(self._holder)

    async def keep(self) -> None:
        """Beat until cancelled. Raises LockLost; a place that cannot be reached for a moment is tried again."""
        while True:
            await asyncio.sleep(BEAT_S)
            with contextlib.suppress(OSError):
                await asyncio.to_thread(self.beat)

    def release(self) -> None:
        """Let others have it."""
        with contextlib.suppress(OSError):
            found = self._place.read()
            if found is not None and found.token == self._holder.token:
                self._place.clear()
        self._place.close()


def held_by(location: str | Path, sleep: Callable[[float], None] = time.sleep) -> Holder | None:
    """Who runs the run at a path or URL now, or None. Changes nothing."""
    if "://" not in str(location) and not (Path(location) / LOCK).is_file():
        return None
    place = _place(str(location))
    try:
        found = place.read()
        if not place.claim():
            return found or Holder("this host", "", 0, 0.0, "")
        return found if found is not None and _is_alive(place, found, sleep) else None
    finally:
        place.close()


def refuse_if_running(location: str | Path) -> None:
    """Raises ConfigError while a controller holds the run."""
    holder = held_by(location)
    if holder is not None:
        raise _held(location, holder)


RELEASE_S, LOOK_S = 20.0, 0.5
"""How long a resume waits for the processes of a killed driver, which end within seconds, and how often it looks."""


def wait_for_release(
    location: str | Path, notice: Callable[[str], None], limit_s: float = RELEASE_S,
    sleep: Callable[[float], None] = time.sleep,
) -> None:  # fmt: skip
    """Return once nobody holds the run. Raises ConfigError when somebody still does after limit_s."""
    holder, noticed, deadline = held_by(location, sleep), False, time.monotonic() + limit_s
    while holder is not None and time.monotonic() < deadline:
        if not noticed:
            notice(f"{holder.described} has the run still; waiting up to {limit_s:.0f} s for it to end")
            noticed = True
        sleep(LOOK_S)
        holder = held_by(location, sleep)
    if holder is not None:
        raise _held(location, holder)


def _held(location: str | Path, holder: Holder | None) -> ConfigError:
    by = f" ({holder.described})" if holder is not None and holder.pid else ""
    return ConfigError("name", f"run {location} is running{by}", "stop it first, or choose another name")


def _claimed(place: _Place, sleep: Callable[[float], None]) -> bool:
    for _ in range(CLAIMS):
        if place.claim():
            return True
        sleep(CLAIM_S)
    return False


def _is_alive(place: _Place, holder: Holder, sleep: Callable[[float], None]) -> bool:
    """Whether the process that wrote the lock still runs."""
    if holder.host == socket.gethostname() and holder.world == _world():
        return _started(holder.pid) == holder.started
    if holder.host == socket.gethostname() and holder.world.partition("/")[0] != _world().partition("/")[0]:
        return False  # the host was started anew since
    for _ in range(SILENT_BEATS):
        sleep(BEAT_S)
        now = place.read()
        if now is None:
            return False
        if (now.token, now.beats) != (holder.token, holder.beats):
            return True
    return False


def _started(pid: int) -> float:
    """Start time of a process, in a unit that no setting of the clock changes; -1 for none, or only its remains."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return -1.0 if fields[0] in "ZX" else float(fields[19])  # ticks since boot
    except FileNotFoundError:
        if Path("/proc/self/stat").exists():
            return -1.0
    try:
        return float(psutil.Process(pid).create_time())
    except psutil.NoSuchProcess:
        return -1.0


def _world() -> str:
    """What makes a process id mean something: this boot of the host, and its process namespace."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return f"{psutil.boot_time():.0f}/"


class _Place:
    """Where the lock's text stands."""

    def claim(self) -> bool:
        """Take the kernel's lock where there is one; False when another process has it."""
        return True

    def takes_files(self) -> bool:
        """Whether new files can be made beside it; True where only trying tells."""
        return True

    def read(self) -> Holder | None:
        """What it says; None for nothing, or for what is no lock's text (torn by a crash)."""
        try:
            found: dict[str, Any] = json.loads(self._read())
            return Holder(**found)
        except (ValueError, TypeError):
            return None

    def write(self, holder: Holder) -> None:
        self._write(json.dumps(asdict(holder)).encode())

    def _read(self) -> bytes:
        raise NotImplementedError

    def _write(self, text: bytes) -> None:
        raise NotImplementedError

    def clear(self) -> None:
        raise NotImplementedError

    def close(self) -> None:
        """Give the kernel's lock back."""


class _File(_Place):
    """A file of fixed size, so that a beat needs no room on the disk, kept locked by its holder."""

    SIZE = 512

    def __init__(self, folder: Path) -> None:
        self._path = folder / LOCK
        self._file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)

    def claim(self) -> bool:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                return False
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                raise  # a file system without locks: the count must do
        return True

    def takes_files(self) -> bool:
        return os.access(self._path.parent, os.W_OK)  # else: a lock that can be written, in a folder that cannot

    def _read(self) -> bytes:
        return os.pread(self._file, self.SIZE, 0)

    def _write(self, text: bytes) -> None:
        os.pwrite(self._file, text.ljust(self.SIZE), 0)
        os.fsync(self._file)

    def clear(self) -> None:
        os.pwrite(self._file, b"".ljust(self.SIZE), 0)

    def close(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


class _Url(_Place):
    """An object behind a URL. Stores offer no exclusive creation in common, so what was written is read again."""

    def __init__(self, url: str) -> None:
        self._filesystem, path = fsspec.core.url_to_fs(url)
        self._path = f"{path.rstrip('/')}/{LOCK}"

    def _read(self) -> bytes:
        self._filesystem.invalidate_cache()
        try:
            return bytes(self._filesystem.cat_file(self._path))
        except FileNotFoundError:
            return b""

    def _write(self, text: bytes) -> None:
        self._filesystem.makedirs(self._path.rsplit("/", 1)[0], exist_ok=True)
        self._filesystem.pipe_file(self._path, text)

    def clear(self) -> None:
        with contextlib.suppress(FileNotFoundError):
            self._filesystem.rm_file(self._path)


def _place(location: str) -> _Place:
    if "://" in location:
        return _Url(location)
    try:
        return _File(Path(location))
    except OSError as error:
        raise _unwritable(location, error.strerror) from error


def _unwritable(location: str | Path, why: str | None) -> ConfigError:
    return ConfigError(
        "runs_dir", f"run folder {location} cannot be written: {why}",
        "make it writable, or copy the run to a folder you can write and resume it there",
    )  # fmt: skip

"""Vaults: the bytes of painted groups and prompt embeddings, on disk before they are acknowledged.

`GroupStore` is the store itself, plain Python; `Vault` wraps it as a Ray actor. One safetensors file a painting
(contracts/codec.py), named by group and attempt, so a late result of an older attempt never replaces a newer one.

Invariants: a file under its final name is whole (written beside it, then renamed); memory and disk stay within their
bounds, and beyond the disk's bound a write waits and then is refused (back-pressure); what is handed out is read-only.

Durability. A rename without fsync survives kill -9 of every process, which is what a run must survive; a power failure
may leave a file short or missing. Reopening removes what is torn, the ledger then has the group painted again
(`Ledger.lost`). With fsync=True a write also survives the power failure, at the disk's price.

Does not own: which bytes are still needed (cluster/ledger), which vault holds a group (workers.py), file names
(vault_files.py).
"""

from __future__ import annotations

import errno
import os
import shutil
import threading
import time
import uuid
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import ray

from cluster.vault_files import (
    EMBEDDING_FILE,
    GROUP_FILE,
    EmbeddingUses,
    embedding_file,
    group_file,
    is_whole,
    read_header,
)
from contracts import codec
from contracts.errors import NotStored, PayloadError, VaultError, VaultFull
from contracts.wire import GroupHeader, Message

if TYPE_CHECKING:
    from cluster.run_folder import RunFolder
    from contracts.config import RunConfig

MIN_FREE_BYTES = 256 * 2**20
WAITING_S = 60.0
"""How long a painting that found no room counts as waiting; whoever waits asks again far more often."""
ROOM_WAIT_S = 0.5
"""Time a write of a run waits for room within its vault: its actor asks again (workers.py), others get their turn."""
ALL_SAMPLES = slice(None)


class EmbeddingHeader(Message):
    """Header of a stored prompt embedding."""

    digest: str


class _Cached(NamedTuple):
    arrays: dict[str, np.ndarray]
    num_bytes: int


class GroupStore:
    """Paintings and embeddings in a folder, the latest used also decoded in memory. Safe to call from many threads."""

    def __init__(
        self,
        folder: str | Path,
        memory_bytes: int,
        disk_bytes: int | None = None,
        *,
        min_free_bytes: int = MIN_FREE_BYTES,
        fsync: bool = False,
    ) -> None:
        """Open or create; finds what an earlier process stored and removes what it left torn.

        memory_bytes bounds the decoded arrays kept; disk_bytes the files (None: the file system must keep
        min_free_bytes free). Raises VaultError when the folder cannot be written.
        """
        self.folder = Path(folder)
        self._memory_bytes, self._disk_bytes, self._min_free, self._fsync = (
            memory_bytes, disk_bytes, min_free_bytes, fsync,
        )  # fmt: skip
        self._space = threading.Condition(threading.RLock())  # guards all below; notified when bytes are freed
        self._sizes: dict[str, int] = {}  # file name -> bytes, reserved ones included
        self._groups: dict[int, set[int]] = {}  # group id -> attempts whose file is whole
        self._headers: dict[tuple[int, int], GroupHeader] = {}
        self._writing: set[str] = set()  # file names on their way to disk
        self._refused: dict[tuple[int, int], float] = {}  # (group id, attempt) that found no room -> when last
        self._cache: OrderedDict[str, _Cached] = OrderedDict()
        self._cached_bytes = 0
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.removed_torn = self._scan()
        except OSError as error:
            raise VaultError(f"vault folder {self.folder} cannot be used: {error.strerror}") from error

    def _scan(self) -> int:
        """Take stock of the folder; returns the number of torn files removed."""
        torn, digests = 0, []
        for path in self.folder.iterdir():
            if not is_whole(path):
                path.unlink()
                torn += 1
                continue
            self._sizes[path.name] = path.stat().st_size
            if found := GROUP_FILE.match(path.name):
                self._groups.setdefault(int(found[1]), set()).add(int(found[2]))
            elif found := EMBEDDING_FILE.match(path.name):
                digests.append(found[1])
        self._uses = EmbeddingUses(digests)
        return torn

    # ---- groups --------------------------------------------------------------------------------------------------

    def put(self, header: GroupHeader, arrays: Mapping[str, np.ndarray], wait_s: float = 0.0) -> int:
        """Store one painting; returns its bytes on disk. Writing the same painting again replaces it.

        Raises VaultFull when the bound leaves no room for it, nor `wait_s` seconds later.
        """
        name, painting = group_file(header.group_id, header.attempt), (header.group_id, header.attempt)
        num_bytes = self._write(name, codec.encode(header, arrays), wait_s, painting)
        with self._space:
            self._refused.pop(painting, None)
            self._groups.setdefault(header.group_id, set()).add(header.attempt)
            self._headers[header.group_id, header.attempt] = header
        self._keep_copy(name, arrays)
        return num_bytes

    def get(
        self,
        group_id: int,
        names: Iterable[str] | None = None,
        samples: slice = ALL_SAMPLES,
        attempt: int | None = None,
    ) -> dict[str, np.ndarray]:
        """Arrays of a painting by name (None: all), rows `samples` of each; attempt None: the latest stored.

        Raises NotStored for an unknown group or name.
        """
        file = group_file(group_id, self._attempt(group_id, attempt))
        arrays = self._read(file, GroupHeader)
        wanted = list(arrays) if names is None else list(names)
        if missing := [name for name in wanted if name not in arrays]:
            raise NotStored(f"group {group_id} has no {', '.join(missing)}; it has {', '.join(sorted(arrays))}")
        return {name: arrays[name][samples] for name in wanted}

    def header(self, group_id: int, attempt: int | None = None) -> GroupHeader:
        """Header of a painting, without reading its arrays. Raises NotStored."""
        key = group_id, self._attempt(group_id, attempt)
        known = self._headers.get(key)
        if known is None:
            try:
                known = self._headers[key] = read_header(self.folder / group_file(*key))
            except NotStored:
                self._strike_off(group_file(*key))
                raise
        return known

    def delete(self, group_ids: int | Iterable[int], attempt: int | None = None) -> int:
        """Delete every painting of the groups (or one attempt's); returns the bytes freed. Unknown ones are skipped.

        Groups that are gone altogether use no prompt embeddings either, wherever their paintings lay: what no other
        group uses is deleted with them.
        """
        freed = 0
        for group_id in [group_ids] if isinstance(group_ids, int) else group_ids:
            with self._space:
                stored = self._groups.get(group_id, set())
                for each in list(stored) if attempt is None else sorted(stored & {attempt}):
                    stored.discard(each)
                    self._headers.pop((group_id, each), None)
                    freed += self._remove(group_file(group_id, each))
                if not stored:
                    self._groups.pop(group_id, None)
                if attempt is None:
                    freed += sum(self._remove(embedding_file(digest)) for digest in self._uses.drop(group_id))
        return freed

    def stored(self) -> list[tuple[int, int]]:
        """(group id, attempt) of every painting held, in order."""
        with self._space:
            return sorted((group_id, each) for group_id, attempts in self._groups.items() for each in attempts)

    def raw(self, name: str) -> bytes:
        """A file as it is on disk, by its name (group_file, embedding_file). Raises NotStored."""
        with self._space:
            if name not in self._sizes:
                raise NotStored(f"{name} is not in {self.folder}")
        try:
            return (self.folder / name).read_bytes()
        except OSError as error:
            raise NotStored(f"{name} cannot be read in {self.folder}: {error.strerror}") from error

    # ---- prompt embeddings ---------------------------------------------------------------------------------------

    def put_embedding(
        self,
        digest: str,
        arrays: Mapping[str, np.ndarray],
        wait_s: float = 0.0,
        painting: tuple[int, int] | None = None,
    ) -> int:
        """Store a prompt embedding once; returns the bytes written, 0 when it was there. Raises VaultFull.

        painting: (group id, attempt) that is stored after it, here or in another vault: `waiting` names it, and the
        embedding is kept until the group is deleted. Without one it is kept until `keep_embeddings_of`.
        """
        name = embedding_file(digest)
        with self._space:
            self._uses.add(digest, None if painting is None else painting[0])
            if name in self._sizes and name not in self._writing:
                return 0
        num_bytes = self._write(name, codec.encode(EmbeddingHeader(digest=digest), arrays), wait_s, painting)
        self._keep_copy(name, arrays)
        return num_bytes

    def get_embedding(self, digest: str) -> dict[str, np.ndarray]:
        """Arrays of a stored embedding. Raises NotStored."""
        return dict(self._read(embedding_file(digest), EmbeddingHeader))

    def holds_embedding(self, digest: str) -> bool:
        with self._space:
            return embedding_file(digest) in self._sizes

    def embeddings_used(self) -> dict[int, list[str]]:
        """Group id -> digests, of every group held here. A painting that cannot be read is struck off and uses none."""
        uses: dict[int, list[str]] = {}
        for painting in self.stored():
            with suppress(NotStored):
                header = self.header(*painting)
                uses[painting[0]] = [digest for digest in (header.prompt_digest, header.negative_digest) if digest]
        return uses

    def keep_embeddings_of(self, uses: Mapping[int, Iterable[str]]) -> int:
        """Delete the embeddings that none of these groups (id -> digests) uses; returns the bytes freed.

        For when nothing is being painted: it is the whole truth, about the groups of other vaults too.
        """
        with self._space:
            return sum(self._remove(embedding_file(digest)) for digest in self._uses.settle(uses))

    # ---- bounds --------------------------------------------------------------------------------------------------

    def bytes_held(self) -> dict[str, int]:
        """Bytes held: on `disk` and decoded in `memory`."""
        with self._space:
            return {"disk": sum(self._sizes.values()), "memory": self._cached_bytes}

    def waiting(self, within_s: float = WAITING_S) -> list[tuple[int, int]]:
        """(group id, attempt) of every painting that found no room in the last seconds and is not stored yet."""
        since = time.monotonic() - within_s
        with self._space:
            self._refused = {painting: at for painting, at in self._refused.items() if at >= since}
            return sorted(self._refused)

    def _write(self, name: str, blob: bytes, wait_s: float, painting: tuple[int, int] | None) -> int:
        before = self._reserve(name, len(blob), wait_s, painting)
        temporary = self.folder / f"{name}.{uuid.uuid4().hex}.tmp"
        with self._space:
            self._writing.add(name)
        try:
            self._write_file(temporary, blob)
            os.replace(temporary, self.folder / name)
        except OSError as error:
            self._unreserve(name, before)
            temporary.unlink(missing_ok=True)
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise VaultFull(f"no space left for {len(blob)} bytes in {self.folder}") from error
            raise VaultError(f"cannot write {name} in {self.folder}: {error.strerror}") from error
        finally:
            with self._space:
                self._writing.discard(name)
        return len(blob)

    def _write_file(self, path: Path, blob: bytes) -> None:
        with path.open("wb") as file:
            file.write(blob)
            if self._fsync:
                file.flush()
                os.fsync(file.fileno())
        if self._fsync:
            folder = os.open(self.folder, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)

    def _reserve(self, name: str, num_bytes: int, wait_s: float, painting: tuple[int, int] | None) -> int | None:
        """Count the bytes as held before they are written; returns what the name held before."""
        deadline = time.monotonic() + wait_s
        with self._space:
            while not self._has_room(num_bytes - self._sizes.get(name, 0)):
                if painting is not None:
                    self._refused[painting] = time.monotonic()
                left = deadline - time.monotonic()
                if left <= 0:
                    raise VaultFull(
                        f"{num_bytes} bytes do not fit: {self.bytes_held()['disk']} bytes held of "
                        f"{self._disk_bytes if self._disk_bytes is not None else 'the disk'}; save a state to free "
                        "trained groups, or give the vault more room"
                    )
                self._space.wait(min(left, 1.0))
            before = self._sizes.get(name)
            self._sizes[name] = num_bytes
            return before

    def _unreserve(self, name: str, before: int | None) -> None:
        with self._space:
            if before is None:
                self._sizes.pop(name, None)
            else:
                self._sizes[name] = before
            self._space.notify_all()

    def _has_room(self, more: int) -> bool:
        if self._disk_bytes is not None and sum(self._sizes.values()) + more > self._disk_bytes:
            return False
        try:
            return more <= 0 or shutil.disk_usage(self.folder).free - more >= self._min_free
        except OSError as error:
            raise VaultError(f"cannot write in {self.folder}: {error.strerror}") from error

    def _remove(self, name: str) -> int:
        (self.folder / name).unlink(missing_ok=True)
        self._forget(name)
        freed = self._sizes.pop(name, 0)
        self._space.notify_all()
        return freed

    # ---- memory --------------------------------------------------------------------------------------------------

    def _read(self, name: str, header_type: type[Message]) -> dict[str, np.ndarray]:
        with self._space:
            if name in self._cache:
                self._cache.move_to_end(name)
                return self._cache[name].arrays
            if name not in self._sizes:
                raise NotStored(f"{name} is not in {self.folder}")
        try:
            _, arrays = codec.decode((self.folder / name).read_bytes(), header_type)
        except (OSError, PayloadError) as error:
            self._strike_off(name)
            what = f"is damaged: {error}" if isinstance(error, PayloadError) else f"cannot be read: {error.strerror}"
            raise NotStored(f"{name} in {self.folder} {what}") from error
        with self._space:
            if name in self._sizes:  # not deleted meanwhile
                self._remember(name, arrays)
        return arrays

    def _strike_off(self, name: str) -> None:
        """What cannot be read is not held: `stored` no longer names it, and its room is free."""
        found = GROUP_FILE.match(name)
        with self._space:
            if name in self._writing:
                return  # it was read too early
            if found:
                self._groups.get(int(found[1]), set()).discard(int(found[2]))
                self._headers.pop((int(found[1]), int(found[2])), None)
            with suppress(OSError):
                self._remove(name)

    def _keep_copy(self, name: str, arrays: Mapping[str, np.ndarray]) -> None:
        """Keep what was just written. A copy: the caller may change its arrays, or they pin Ray's object store."""
        if sum(array.nbytes for array in arrays.values()) > self._memory_bytes:
            with self._space:
                self._forget(name)
            return
        copies = {key: np.array(value) for key, value in arrays.items()}
        with self._space:
            if name in self._sizes:  # not deleted meanwhile
                self._remember(name, copies)

    def _remember(self, name: str, arrays: dict[str, np.ndarray]) -> None:
        for array in arrays.values():
            array.flags.writeable = False
        self._forget(name)
        num_bytes = sum(array.nbytes for array in arrays.values())
        if num_bytes > self._memory_bytes:
            return
        self._cache[name] = _Cached(arrays, num_bytes)
        self._cached_bytes += num_bytes
        while self._cached_bytes > self._memory_bytes:
            self._forget(next(iter(self._cache)))

    def _forget(self, name: str) -> None:
        cached = self._cache.pop(name, None)
        self._cached_bytes -= cached.num_bytes if cached else 0

    def _attempt(self, group_id: int, attempt: int | None) -> int:
        with self._space:
            stored = self._groups.get(group_id, set())
            if not stored or (attempt is not None and attempt not in stored):
                raise NotStored(f"group {group_id} {'' if attempt is None else f'attempt {attempt} '}is not stored")
            return max(stored) if attempt is None else attempt


@ray.remote(
    num_cpus=0, max_restarts=-1, max_task_retries=-1, max_concurrency=4, concurrency_groups={"reads": 8, "writes": 8}
)
class Vault:
    """A GroupStore in a process of its own. Restarted when it dies (what it acknowledged is on disk), calls repeated.

    Reads, writes and the rest have threads of their own, so a write that waits for room never holds up the read or the
    delete that makes room. Arrays travel through Ray's object store.
    """

    def __init__(
        self, folder: str, memory_bytes: int, disk_bytes: int | None = None, wait_s: float = 60.0, fsync: bool = False
    ) -> None:
        from cluster.processes import prepare_process

        prepare_process("vault")
        self.store = GroupStore(folder, memory_bytes, disk_bytes, fsync=fsync)
        self.wait_s = wait_s

    @ray.method(concurrency_group="writes")
    def put(self, header: GroupHeader, arrays: Mapping[str, np.ndarray]) -> int:
        """Bytes on disk; returns when they are there. Raises VaultFull after wait_s seconds without room."""
        return self.store.put(header, arrays, self.wait_s)

    @ray.method(concurrency_group="writes")
    def put_embedding(
        self, digest: str, arrays: Mapping[str, np.ndarray], painting: tuple[int, int] | None = None
    ) -> int:
        return self.store.put_embedding(digest, arrays, self.wait_s, painting)

    @ray.method(concurrency_group="reads")
    def get(
        self,
        group_id: int,
        names: Iterable[str] | None = None,
        samples: slice = ALL_SAMPLES,
        attempt: int | None = None,
    ) -> dict[str, np.ndarray]:
        return self.store.get(group_id, names, samples, attempt)

    @ray.method(concurrency_group="reads")
    def header(self, group_id: int, attempt: int | None = None) -> GroupHeader:
        return self.store.header(group_id, attempt)

    @ray.method(concurrency_group="reads")
    def get_embedding(self, digest: str) -> dict[str, np.ndarray]:
        return self.store.get_embedding(digest)

    @ray.method(concurrency_group="reads")
    def raw(self, name: str) -> bytes:
        return self.store.raw(name)

    def delete(self, group_ids: int | Iterable[int], attempt: int | None = None) -> int:
        return self.store.delete(group_ids, attempt)

    def stored(self) -> list[tuple[int, int]]:
        return self.store.stored()

    def waiting(self) -> list[tuple[int, int]]:
        return self.store.waiting()

    def holds_embedding(self, digest: str) -> bool:
        return self.store.holds_embedding(digest)

    def embeddings_used(self) -> dict[int, list[str]]:
        return self.store.embeddings_used()

    def keep_embeddings_of(self, uses: Mapping[int, Iterable[str]]) -> int:
        return self.store.keep_embeddings_of(uses)

    def bytes_held(self) -> dict[str, int]:
        return self.store.bytes_held()

    def pid(self) -> int:
        return os.getpid()


def start_vaults(config: RunConfig, folder: RunFolder) -> dict[str, Any]:
    """The run's vaults by name, as Ray actors over its folder."""
    vault = config.vault
    return {
        f"vault-{index}": Vault.options(name=f"{config.name}-vault-{index}-{os.getpid()}").remote(  # type: ignore[attr-defined]
            str(folder.vault(index)), vault.memory_mb * 2**20,
            None if vault.disk_mb is None else vault.disk_mb * 2**20, ROOM_WAIT_S,
        )
        for index in range(vault.count)
    }  # fmt: skip

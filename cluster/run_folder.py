"""The run folder: where a run keeps what it is, what it did and what it yields.

    <runs_dir>/<name>/
      config.yaml      resolved configuration          manifest.json  code version, packages, weight digests, scorers
      ledger.sqlite    every group's life              metrics.jsonl, events.jsonl
      samples/         image grids                     checkpoints/   states a learner starts from
      online/          versions of scorers that learn beside the run (contracts/versions.py)
      vaults/          bytes of groups alive           stacks/        stack dumps of hung processes
      summary.json     what came of it                 report.html

`runs_dir` is a local (or shared) path or any fsspec URL. SQLite and append-only files need a real file system, so with
a URL the run works in a local folder and `sync()` mirrors it; vaults' bytes and lock files stay local, checkpoints have
their own way there.

Invariants: a file written through this class is whole or absent (written beside it, then renamed); an existing run is
never overwritten unless `exist: replace` says so, and nothing that is not a run folder is ever deleted.
Does not own: what the files hold (ledger/, telemetry/, learner states).
"""

from __future__ import annotations

import fcntl
import io
import json
import os
import platform
import shutil
import sqlite3
import subprocess
import tempfile
import tomllib
import uuid
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from importlib import metadata
from pathlib import Path
from typing import Any

import fsspec
import numpy as np

from contracts.config import RunConfig, to_yaml
from contracts.errors import ConfigError, StorageError

LEDGER = "ledger.sqlite"
_PACKAGES = ("torch", "ray", "deepspeed", "diffusers", "transformers", "peft", "numpy", "safetensors")
_LOCAL_ONLY = ("vaults", "checkpoints", "online")  # checkpoints are uploaded whole (checkpoints/remote.py)
_LOCAL_SUFFIXES = (".tmp", ".lock", "-wal", "-shm", "-journal")


def location_of(config: RunConfig) -> str:
    """Where the run folder is: an absolute path, or a URL."""
    if "://" in config.runs_dir:
        return f"{config.runs_dir.rstrip('/')}/{config.name}"
    return str(Path(config.runs_dir).expanduser().absolute() / config.name)


class RunFolder:
    """One run's folder. `root` is always local; `url` is set when it is mirrored somewhere else."""

    def __init__(self, root: str | Path, url: str | None = None) -> None:
        self.root, self.url = Path(root), url
        self._mirrored: dict[str, tuple[int, int]] = {}  # relative path -> (mtime_ns, size) when last uploaded

    # ---- creating and opening ------------------------------------------------------------------------------------

    @classmethod
    def create(cls, config: RunConfig) -> RunFolder:
        """A new folder for a run, with config.yaml and manifest.json in it.

        Raises ConfigError when it exists (unless `exist` is `replace`), holds something else, belongs to a running
        run, or cannot be written. Going on with an existing one is resume.py's.
        """
        location = location_of(config)
        folder = _new_mirror(location, config) if "://" in location else _new_local(Path(location), config)
        try:
            folder.write_text("config.yaml", to_yaml(config))
            folder.write_json("manifest.json", {"name": config.name, "seed": config.seed, **code_version()})
        except StorageError as error:
            raise _unwritable(folder.root, error.__cause__) from error
        folder.sync()
        return folder

    @classmethod
    def open(cls, location: str | Path, leave_out: Sequence[str] = ()) -> RunFolder:
        """An existing run by path, or by URL (copied here first). Raises ConfigError when there is none.

        leave_out: names in the folder that are not copied from a URL, such as checkpoints.
        """
        text = str(location)
        if "://" not in text:
            folder = cls(Path(text))
        else:
            filesystem, path = _filesystem(text)
            folder = cls(_scratch(text.rstrip("/").rsplit("/", 1)[-1]), text)
            if filesystem.exists(path):
                _copy_here(filesystem, path, folder.root, leave_out)
                folder._mirrored = {name: stamp for name, _, stamp in folder._files()}
        if not folder.config.is_file():
            raise ConfigError("run", f"there is no run at {text}", "give the folder that holds its config.yaml")
        return folder

    # ---- places --------------------------------------------------------------------------------------------------

    def __fspath__(self) -> str:
        return str(self.root)

    @property
    def location(self) -> str:
        """Where a user finds the run: the URL if there is one, else the path."""
        return self.url or str(self.root)

    @property
    def config(self) -> Path:
        return self.root / "config.yaml"

    @property
    def ledger(self) -> Path:
        return self.root / LEDGER

    @property
    def metrics(self) -> Path:
        return self.root / "metrics.jsonl"

    @property
    def events(self) -> Path:
        return self.root / "events.jsonl"

    @property
    def summary(self) -> Path:
        return self.root / "summary.json"

    @property
    def manifest(self) -> Path:
        return self.root / "manifest.json"

    @property
    def report(self) -> Path:
        return self.root / "report.html"

    @property
    def samples(self) -> Path:
        return self._folder("samples")

    @property
    def checkpoints(self) -> Path:
        return self._folder("checkpoints")

    @property
    def stacks(self) -> Path:
        return self._folder("stacks")

    def vault(self, index: int) -> Path:
        """Folder of vault number `index`."""
        return self._folder(f"vaults/{index}")

    def _folder(self, name: str) -> Path:
        path = self.root / name
        with _storage_errors(path):
            path.mkdir(parents=True, exist_ok=True)
        return path

    # ---- writing -------------------------------------------------------------------------------------------------

    def write_text(self, name: str, text: str) -> Path:
        """Write a file of the folder, whole or not at all; returns its path. Raises StorageError when it cannot."""
        return self._write(name, text.encode())

    def write_json(self, name: str, value: Any) -> Path:
        """The same as indented JSON."""
        return self.write_text(name, json.dumps(value, indent=2, ensure_ascii=False) + "\n")

    def save_image(self, name: str, image: np.ndarray) -> Path:
        """Write a uint8 [H,W,3] image under samples/, lossless; returns its path. Raises StorageError."""
        from PIL import Image

        data = io.BytesIO()
        Image.fromarray(image).save(data, format="PNG")
        return self._write(f"samples/{name}", data.getvalue())

    def update_manifest(self, **fields: Any) -> dict[str, Any]:
        """Set fields of manifest.json (weight_digests, scorer_versions, ...); mappings are merged.

        Raises StorageError.
        """
        manifest = json.loads(self.manifest.read_text()) if self.manifest.is_file() else {}
        for key, value in fields.items():
            old = manifest.get(key)
            manifest[key] = {**old, **value} if isinstance(old, dict) and isinstance(value, dict) else value
        self.write_json("manifest.json", manifest)
        return manifest

    def remove_checkpoint(self, path: Path | None) -> None:
        """Delete a state under checkpoints/; None or one already gone is no error."""
        if path is None:
            return
        if path.resolve().parent != self.checkpoints.resolve():
            raise ValueError(f"{path} is no checkpoint of {self.root}")
        shutil.rmtree(path, ignore_errors=True)

    def _write(self, name: str, data: bytes) -> Path:
        path = self.root / name
        temporary = _temporary(path)
        with _storage_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                temporary.write_bytes(data)
                os.replace(temporary, path)
            finally:
                temporary.unlink(missing_ok=True)
        return path

    # ---- mirroring -----------------------------------------------------------------------------------------------

    def sync(self) -> int:
        """Mirror what changed since the last call to the URL; returns the number of files sent. Local runs: nothing.

        The ledger is sent as a consistent snapshot (SQLite's backup), so it can be read there while the run goes on.
        """
        if self.url is None:
            return 0
        filesystem, target = _filesystem(self.url)
        found = self._files()
        sent = 0
        for name, path, stamp in found:
            if self._mirrored.get(name) != stamp:
                _send(filesystem, path, f"{target}/{name}")
                self._mirrored[name] = stamp
                sent += 1
        for gone in set(self._mirrored) - {name for name, _, _ in found}:
            with suppress(FileNotFoundError):
                filesystem.rm(f"{target}/{gone}")
            del self._mirrored[gone]
        return sent

    def send(self, name: str) -> None:
        """Upload one file now, without looking at the others. Local runs: nothing."""
        if self.url is not None:
            filesystem, target = _filesystem(self.url)
            _send(filesystem, self.root / name, f"{target}/{name}")

    def _files(self) -> list[tuple[str, Path, tuple[int, int]]]:
        """(relative name, path, stamp) of every file that is mirrored."""
        found = []
        for folder, folders, names in os.walk(self.root):
            if Path(folder) == self.root:
                folders[:] = [name for name in folders if name not in _LOCAL_ONLY]
            for name in sorted(names):
                path = Path(folder) / name
                if not name.endswith(_LOCAL_SUFFIXES):
                    with suppress(FileNotFoundError):
                        found.append((path.relative_to(self.root).as_posix(), path, _stamp(path)))
        return found


def code_version() -> dict[str, Any]:
    """Salon's version, the git commit if this is a checkout, Python and the packages that decide results."""
    project = Path(__file__).resolve().parent.parent
    version = None
    with suppress(OSError, KeyError, tomllib.TOMLDecodeError):
        version = tomllib.loads((project / "pyproject.toml").read_text())["project"]["version"]
    commit = _git(project, "rev-parse", "HEAD")
    packages = {}
    for package in _PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            packages[package] = metadata.version(package)
    return {
        "salon": version,
        "commit": commit,
        "uncommitted_changes": bool(_git(project, "status", "--porcelain")) if commit else None,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": packages,
    }


def _git(project: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(project), *arguments], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _new_local(root: Path, config: RunConfig) -> RunFolder:
    try:
        if root.is_dir() and _contents(root):
            _refuse_or_clear(root, config)
        root.mkdir(parents=True, exist_ok=True)
        probe = _temporary(root / "probe")
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise _unwritable(root, error) from error
    return RunFolder(root)


def _unwritable(root: Path, why: BaseException | None) -> ConfigError:
    told = getattr(why, "strerror", None) or why
    return ConfigError(
        "runs_dir", f"run folder {root} cannot be written: {told}", "set runs_dir to a folder you can write"
    )


@contextmanager
def _storage_errors(path: Path) -> Iterator[None]:
    """What the system says of a path as the error that is told to a user."""
    try:
        yield
    except OSError as error:
        raise StorageError.of(path, error.strerror or error) from error


def _refuse_or_clear(root: Path, config: RunConfig) -> None:
    held = [name for name in ("config.yaml", LEDGER) if (root / name).is_file()]
    _refuse_unless_replaced(str(root), held, config)
    if is_running(root):
        raise ConfigError("name", f"run {root} is running", "stop it first, or choose another name")
    for path in _contents(root):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _contents(root: Path) -> list[Path]:
    """What is in a folder but for stacks/: the processes of the new run may have opened their dump files already."""
    return [path for path in root.iterdir() if path.name != "stacks"]


def _new_mirror(url: str, config: RunConfig) -> RunFolder:
    filesystem, path = _filesystem(url)
    try:
        held = (
            [entry.rsplit("/", 1)[-1] for entry in filesystem.ls(path, detail=False)] if filesystem.exists(path) else []
        )
        if held:
            _refuse_unless_replaced(url, held, config)
            filesystem.rm(path, recursive=True)
        filesystem.makedirs(path, exist_ok=True)
        filesystem.pipe_file(f"{path}/.salon", b"")
    except ConfigError:
        raise
    except Exception as error:  # each fsspec back end raises errors of its own libraries
        raise ConfigError(
            "runs_dir", f"{url} cannot be written: {error}", "check the URL and its credentials"
        ) from error
    return RunFolder(_scratch(config.name), url)


def _refuse_unless_replaced(location: str, held: Sequence[str], config: RunConfig) -> None:
    """Raises ConfigError for a folder that is in the way and must stay. held: names in it."""
    is_run = "config.yaml" in held or LEDGER in held
    if config.exist == "fail" or (is_run and config.exist != "replace"):
        raise _exists(location)
    if not is_run:
        raise _not_a_run(location)


def _exists(location: str) -> ConfigError:
    return ConfigError(
        "name",
        f"run folder {location} exists",
        "choose another name, or set exist=resume to go on with it or exist=replace to delete it",
    )


def _not_a_run(location: str) -> ConfigError:
    return ConfigError(
        "name", f"{location} exists and is no run folder, so it is left alone", "choose another name or runs_dir"
    )


def is_running(root: Path) -> bool:
    """Whether a process holds the ledger's lock."""
    with suppress(OSError), (root / f"{LEDGER}.lock").open("rb") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def _filesystem(url: str) -> tuple[Any, str]:
    try:
        filesystem, path = fsspec.core.url_to_fs(url)
    except (ValueError, ImportError) as error:
        raise ConfigError(
            "runs_dir", f"{url} is no usable fsspec URL: {error}", "use a local path, or install its back end"
        ) from error
    return filesystem, path.rstrip("/")


def _copy_here(filesystem: Any, path: str, root: Path, leave_out: Sequence[str]) -> None:
    """Copy a remote folder's files but for those under the names left out; one that vanishes meanwhile is skipped."""
    for found in filesystem.find(path):
        name = found[found.index(path) + len(path) :].strip("/")
        target = root / name
        if name.split("/")[0] in leave_out or not target.resolve().is_relative_to(root.resolve()):
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileNotFoundError):
            filesystem.get_file(found, str(target))


def _scratch(name: str) -> Path:
    return Path(tempfile.mkdtemp(prefix=f"salon-{name}-"))


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")


def _stamp(path: Path) -> tuple[int, int]:
    """Changes whenever the file does; a ledger also changes in its write-ahead log (empty while it is only read)."""
    status = path.stat()
    size, changed = status.st_size, status.st_mtime_ns
    log = path.with_name(path.name + "-wal")
    if path.name == LEDGER and log.exists() and log.stat().st_size:
        size, changed = size + log.stat().st_size, max(changed, log.stat().st_mtime_ns)
    return changed, size


def _send(filesystem: Any, path: Path, target: str) -> None:
    filesystem.makedirs(target.rsplit("/", 1)[0], exist_ok=True)
    if path.name != LEDGER:
        filesystem.put_file(str(path), target)
        return
    with tempfile.TemporaryDirectory() as folder:
        snapshot = Path(folder) / LEDGER
        with closing(sqlite3.connect(path)) as live, closing(sqlite3.connect(snapshot)) as copy:
            live.backup(copy)
        filesystem.put_file(str(snapshot), target)

"""Starts `python -m reward_servers serve` as a child process and never leaves it behind.

Four things see to that: stop() (SIGTERM, then SIGKILL), a finaliser at the interpreter's exit, the kernel's
parent-death signal on Linux, and a thread in the child that watches its parent.
Does not own: the server (it is started by name, nothing of it is imported), restarts (the caller).
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from contracts.errors import ScoringError

_ROOT = Path(__file__).resolve().parents[2]
_SERVER_TOKEN_ENV = "SALON_REWARD_TOKEN"
_LOG_LINES = 20

_starter_lock = threading.Lock()
_starter: ThreadPoolExecutor | None = None


class ServerProcess:
    """One reward server as a child.

    name: a scorer of `python -m reward_servers list`, or module:Class importable from cwd; options: its keyword
    arguments (JSON values); port 0: any free one; processes: so many that score, 0 for the server's own; token_env:
    variable whose value becomes the server's bearer token; log_path: where its output goes (default: a temporary file,
    kept only while it lives).

    Example:
        with ServerProcess("playground_verifier") as server:
            client = RewardClient(config, urls=[server.url])
    """

    def __init__(
        self,
        name: str,
        options: Mapping[str, Any] | None = None,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        max_batch: int = 64,
        max_wait_ms: float = 5.0,
        queue: int = 1024,
        processes: int = 0,
        startup_timeout_s: float = 180.0,
        token_env: str = _SERVER_TOKEN_ENV,
        log_path: str | Path | None = None,
        cwd: str | Path | None = None,
        env: Mapping[str, str] | None = None,
    ) -> None:
        self.name, self.url = name, ""
        self._startup_timeout_s = startup_timeout_s
        self._folder = Path(tempfile.mkdtemp(prefix="salon-reward-"))
        self._log_path = Path(log_path) if log_path else self._folder / "server.log"
        self._ready_path = self._folder / "ready.json"
        self._cwd = str(cwd or Path.cwd())
        self._env = _child_env({**os.environ, **(env or {})}, token_env)
        self._command = [
            sys.executable, "-m", "reward_servers", "serve", name, "--host", host, "--port", str(port),
            "--max-batch", str(max_batch), "--max-wait-ms", str(max_wait_ms), "--queue", str(queue),
            "--processes", str(processes), "--ready-file", str(self._ready_path), "--parent-pid", str(os.getpid()),
        ]  # fmt: skip
        for key, value in (options or {}).items():
            self._command += ["--option", f"{key}={json.dumps(value)}"]
        self._process: subprocess.Popen[bytes] | None = None
        self._finaliser: weakref.finalize | None = None

    @property
    def pid(self) -> int:
        """Of the child; -1 before it is started."""
        return self._process.pid if self._process is not None else -1

    def alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def start(self) -> str:
        """Start it and wait until it is ready; its URL. Raises ScoringError with its last log lines."""
        with self._log_path.open("ab") as log:
            self._process = _start_in_lasting_thread(self._command, log, self._cwd, self._env)
        self._finaliser = weakref.finalize(self, _end, self._process, 2.0, self._folder)
        deadline = time.monotonic() + self._startup_timeout_s
        while not self._ready_path.exists():
            if not self.alive():
                self._give_up(f"ended with status {self._process.returncode} before it was ready")
            if time.monotonic() > deadline:
                self._give_up(f"was not ready within {self._startup_timeout_s:g} s")
            time.sleep(0.02)
        self.url = str(json.loads(self._ready_path.read_text())["url"])
        return self.url

    def stop(self, grace_s: float = 10.0) -> None:
        """SIGTERM (it serves its queue to the end), after grace_s SIGKILL. Calling it again does nothing."""
        if self._finaliser is not None and self._finaliser.detach() is not None and self._process is not None:
            _end(self._process, grace_s, self._folder)

    def log_tail(self, lines: int = _LOG_LINES) -> str:
        """The end of its output."""
        try:
            text = self._log_path.read_text(errors="replace")
        except OSError:
            return ""
        return "\n".join(text.splitlines()[-lines:])

    def __enter__(self) -> ServerProcess:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _give_up(self, problem: str) -> None:
        tail = self.log_tail()
        self.stop(grace_s=1.0)
        raise ScoringError(f"reward server {self.name!r} {problem}" + (f":\n{tail}" if tail else ""))


def _child_env(env: dict[str, str], token_env: str) -> dict[str, str]:
    """The parent's environment with the repository importable and the token under the name the server reads."""
    paths = [str(_ROOT), *filter(None, [env.get("PYTHONPATH")])]
    env["PYTHONPATH"] = os.pathsep.join(paths)
    env["PYTHONUNBUFFERED"] = "1"
    if token := env.get(token_env):
        env[_SERVER_TOKEN_ENV] = token
    elif token_env != _SERVER_TOKEN_ENV:
        env.pop(_SERVER_TOKEN_ENV, None)  # its callers will send none
    return env


def _start_in_lasting_thread(command: list[str], log: Any, cwd: str, env: dict[str, str]) -> subprocess.Popen[bytes]:
    """Linux sends the parent-death signal when the *thread* that started a child ends: so one that never does."""
    global _starter
    with _starter_lock:
        if _starter is None:
            _starter = ThreadPoolExecutor(1, thread_name_prefix="reward-server-starter")
    return _starter.submit(
        subprocess.Popen, command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, cwd=cwd, env=env
    ).result()


def _end(process: subprocess.Popen[bytes], grace_s: float, folder: Path) -> None:
    if process.poll() is None:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(grace_s)
    if process.poll() is None:
        process.kill()
        process.wait()
    for path in folder.glob("*"):
        path.unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        folder.rmdir()

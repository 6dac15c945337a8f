"""A vLLM server as a child: started, waited for, asked a canary, watched, restarted when it dies or hangs, ended.

Invariant: `start` returns only when /health answers and a canary question came back with log-probs; after `stop`, or
the death of this process, no vLLM process is left, nor the shared memory of one that was killed. The child runs in an
environment of its own (vLLM pins another torch than the learner's), so it is started by its interpreter and nothing of
it is imported.
It listens on loopback alone: vLLM's API key covers only its /v1 routes.
Does not own: the scorer in front of it (up), its installation (reward_servers/vllm_cpu).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
import shutil
import signal
import socket
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import httpx
import numpy as np

from contracts.config.judges import JudgeOptions
from contracts.errors import ConfigError, ScoringError
from reward_servers import leash
from reward_servers.client.endpoint import AttemptFailed
from reward_servers.judging import shared_memory
from reward_servers.judging.judge import Judge
from reward_servers.judging.protocols.yes_no import YesNo
from reward_servers.judging.question import Picture, Undecided
from reward_servers.scorers.base import Meter, no_meter

log = logging.getLogger(__name__)

CPU_BUILD = Path(__file__).resolve().parents[2] / ".cache" / "vllm_cpu"
"""Where reward_servers/vllm_cpu/install.sh puts vLLM."""
_LOG_LINES = 25
_FORMS = ("--structured-outputs-config", '{"backend": "xgrammar", "disable_any_whitespace": true}')
"""JSON without blanks between its parts: a small judge else fills its answer with line ends, as the grammar lets it."""
_CPU_ARGUMENTS = (
    "--dtype", "float32", "--enforce-eager", "--max-num-seqs", "32",
    "--kv-cache-memory-bytes", str(2**30), "--max-model-len", "auto",
)  # fmt: skip
"""Without a size of its own vLLM's cache takes 92 % of the machine's memory, of which a run beside it would need some,
and a restart beside a run would find too little. auto: the longest questions this size holds, at most the model's."""


@dataclass(frozen=True)
class VllmSettings:
    """model: folder or hub name; python: interpreter of the environment that has vLLM; arguments: further ones of
    vLLM, which win over ours; startup_s: longest until the canary is answered; check_s: seconds between health checks;
    unhealthy: failed checks in a row after which it counts as hung; log_path: its output, default in a folder of its
    own that goes with it.
    """

    model: str
    python: str
    device: Literal["cuda", "cpu"] = "cuda"
    served_name: str = "judge"
    port: int = 0
    arguments: tuple[str, ...] = ()
    startup_s: float = 900.0
    check_s: float = 5.0
    unhealthy: int = 6
    longest_backoff_s: float = 60.0
    log_path: str | None = None


class VllmServer:
    """One vLLM server over several lives, at one URL. Lives in one event loop; `async with` starts and stops it."""

    def __init__(self, settings: VllmSettings, meter: Meter = no_meter) -> None:
        """Raises ConfigError when the interpreter does not exist."""
        if shutil.which(settings.python) is None:
            raise ConfigError(
                "python",
                f"{settings.python} is no interpreter",
                "name that of an environment with vLLM: docs/judges.md",
            )
        self.settings, self.meter, self.restarts = settings, meter, 0
        self.ready = False
        """Whether this life has answered its canary and has not been ended."""
        self.token = secrets.token_urlsafe(24)
        self._port = settings.port or _free_port()
        self.url = f"http://127.0.0.1:{self._port}"
        self._folder: Path | None = None
        self._log_path: Path | None = None
        self._process: asyncio.subprocess.Process | None = None
        self._watching: asyncio.Task[None] | None = None
        self._segments: set[Path] = set()  # seen while it lived: of one that was killed they cannot be told any more

    @property
    def pid(self) -> int:
        """Of the present life; -1 before the first."""
        return self._process.pid if self._process is not None else -1

    def command(self) -> list[str]:
        """The command line; it holds no secret."""
        settings = self.settings
        model = str(Path(settings.model).absolute()) if Path(settings.model).is_dir() else settings.model
        return [
            settings.python, "-m", "vllm.entrypoints.openai.api_server", "--model", model, "--host", "127.0.0.1",
            "--port", str(self._port), "--served-model-name", settings.served_name, *_FORMS,
            *(_CPU_ARGUMENTS if settings.device == "cpu" else ()), *settings.arguments,
        ]  # fmt: skip

    async def start(self) -> None:
        """One life, up to its answered canary. Raises ScoringError with the end of its log."""
        folder = self._folder = self._folder or Path(tempfile.mkdtemp(prefix="salon-vllm-"))
        given = self.settings.log_path
        self._log_path = Path(given).absolute() if given else folder / "vllm.log"
        with self._log_path.open("ab") as output:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable, leash.__file__, str(os.getpid()), *self.command(), stdin=asyncio.subprocess.DEVNULL,
                stdout=output, stderr=output, cwd=folder, env=self._child_env(), start_new_session=True,
            )  # fmt: skip
        try:
            async with asyncio.timeout(self.settings.startup_s):
                await self._until_healthy()
                await self._canary()
                await self._note_segments()
                self.ready = True
        except TimeoutError:
            await self._give_up(f"was not ready within {self.settings.startup_s:g} s")
        except AttemptFailed as error:
            await self._give_up(f"did not answer its canary: {error.reason}")
        except BaseException:
            await self._end()
            raise

    async def stop(self) -> None:
        """End it and forget its files. Calling it again does nothing."""
        if self._watching is not None:
            self._watching.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._watching
            self._watching = None
        await self._end()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None

    async def __aenter__(self) -> VllmServer:
        try:
            await self.start()
        except BaseException:
            await self.stop()
            raise
        self._watching = asyncio.create_task(self.watch())
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def watch(self) -> None:
        """Restart it whenever it dies or hangs, until cancelled; failing restarts wait twice as long each time."""
        backoff_s = 1.0
        while True:
            reason = await self._until_sick()
            log.warning("vLLM %s; restarting it. The end of its log:\n%s", reason, self.log_tail())
            while True:
                await self._end()
                self.restarts += 1
                self.meter("salon_judge_restarts_total", 1)
                try:
                    await self.start()
                    backoff_s = 1.0
                    break
                except ScoringError as error:
                    log.warning("%s", error)
                    await asyncio.sleep(backoff_s)
                    backoff_s = min(2 * backoff_s, self.settings.longest_backoff_s)

    def log_tail(self, lines: int = _LOG_LINES) -> str:
        """The end of its output."""
        if self._log_path is None:
            return ""
        try:
            return "\n".join(self._log_path.read_text(errors="replace").splitlines()[-lines:])
        except OSError:
            return ""

    def _child_env(self) -> dict[str, str]:
        """Ours without what belongs to this process: its import path and its tokens.

        On a CPU nothing is compiled: --enforce-eager leaves small functions to torch.compile, which calls for g++ and
        takes as long as the rest of the start.
        """
        dropped = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "SALON_REWARD_TOKEN", "SALON_JUDGE_TOKEN")
        env = {name: value for name, value in os.environ.items() if name not in dropped}
        env |= {"VLLM_API_KEY": self.token, "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "PYTHONUNBUFFERED": "1"}
        if Path(self.settings.model).is_dir():
            env |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
        if self.settings.device == "cpu":
            env |= {"CUDA_VISIBLE_DEVICES": "", "TORCH_COMPILE_DISABLE": "1"}
        return env

    async def _until_healthy(self) -> None:
        async with httpx.AsyncClient(trust_env=False, timeout=2.0) as http:
            while not await self._healthy(http):
                if not self._alive():
                    await self._give_up("ended before it was ready")
                await asyncio.sleep(0.1)

    async def _healthy(self, http: httpx.AsyncClient) -> bool:
        try:
            return (await http.get(f"{self.url}/health")).status_code == 200
        except httpx.HTTPError:
            return False

    async def _canary(self) -> None:
        """One yes/no question about a plain image: any answer will do, as long as it has log-probs."""
        options = JudgeOptions(
            urls=(self.url,), model=self.settings.served_name, deadline_s=self.settings.startup_s,
            timeout_s=self.settings.startup_s, cache_entries=0, hedge_quantile=None,
        )  # fmt: skip
        async with Judge(options, token=self.token) as judge:
            with contextlib.suppress(Undecided):
                await YesNo().ask(judge, "a grey square", (Picture(np.full((64, 64, 3), 128, np.uint8)),))

    async def _until_sick(self) -> str:
        """Returns why, when the process has ended or does not answer."""
        assert self._process is not None
        failed, ended = 0, asyncio.create_task(self._process.wait())
        try:
            async with httpx.AsyncClient(trust_env=False, timeout=max(self.settings.check_s, 1.0)) as http:
                while failed < self.settings.unhealthy:
                    await asyncio.wait({ended}, timeout=self.settings.check_s)
                    if ended.done():
                        return f"ended with status {ended.result()}"
                    failed = 0 if await self._healthy(http) else failed + 1
                    await self._note_segments()
        finally:
            ended.cancel()
        return f"did not answer {failed} health checks"

    async def _note_segments(self) -> None:
        self._segments |= await asyncio.to_thread(shared_memory.segments_of, self.pid)

    def _alive(self) -> bool:
        return self._process is not None and self._process.returncode is None

    async def _give_up(self, problem: str) -> None:
        tail = self.log_tail()
        await self._end()
        raise ScoringError(f"vLLM {problem}" + (f":\n{tail}" if tail else ""))

    async def _end(self, grace_s: float = 10.0) -> None:
        """SIGTERM to its whole process group (its engine is a process of its own), after grace_s SIGKILL."""
        self.ready = False
        if self._process is None:
            return
        group = self._process.pid
        _signal_group(group, signal.SIGTERM)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._process.wait(), grace_s)
        deadline = time.monotonic() + grace_s
        while _signal_group(group, 0) and time.monotonic() < deadline:
            await asyncio.sleep(0.05)
        _signal_group(group, signal.SIGKILL)
        await self._process.wait()
        shared_memory.remove(self._segments)
        self._segments.clear()


def _signal_group(group: int, number: int) -> bool:
    """Whether there was a process of the group to receive it."""
    try:
        os.killpg(group, number)
    except (ProcessLookupError, PermissionError):
        return False
    return True


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def find_python(device: str, given: str | None) -> str:
    """The interpreter to start vLLM with: the one given, SALON_VLLM_PYTHON's, the CPU build's environment, or ours.

    That environment counts once its installation is complete.
    """
    if chosen := given or os.environ.get("SALON_VLLM_PYTHON"):
        return chosen
    complete = device == "cpu" and (CPU_BUILD / ".salon-lock").exists()
    return str(CPU_BUILD / "bin" / "python") if complete else sys.executable


def find_device() -> Literal["cuda", "cpu"]:
    """cuda where the driver's tool is there and lists a GPU (this process has no torch)."""
    return "cuda" if shutil.which("nvidia-smi") and Path("/dev/nvidiactl").exists() else "cpu"

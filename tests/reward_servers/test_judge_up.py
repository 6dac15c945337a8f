"""vLLM's life as a child (its stand-in is a real process behind a real socket), and `judge up` as a user starts it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import pytest
from judge_helpers import stand_in_python
from reward_helpers import read_table, score_body

from contracts.config.judges import JudgeOptions
from contracts.errors import ConfigError, ScoringError
from contracts.scores import ScoreTable
from reward_servers.judging import vllm as vllm_module
from reward_servers.judging.judge import Judge
from reward_servers.judging.protocols.yes_no import YesNo
from reward_servers.judging.question import Picture
from reward_servers.judging.shared_memory import segments_of
from reward_servers.judging.up import judge_scorer
from reward_servers.judging.vllm import VllmServer, VllmSettings


def settings_for(folder: Path, **fields: Any) -> VllmSettings:
    model = folder / "model"
    model.mkdir(exist_ok=True)
    quick = {"device": "cpu", "startup_s": 240.0, "check_s": 0.1, "unhealthy": 2, "longest_backoff_s": 0.1}
    return VllmSettings(str(model), str(stand_in_python(folder)), **{**quick, **fields})


async def p_yes(server: VllmServer) -> float:
    options = JudgeOptions(urls=(server.url,), model="judge", deadline_s=240.0, cache_entries=0)
    async with Judge(options, token=server.token) as judge:
        picture = Picture(np.full((8, 8, 3), 204, np.uint8))
        return (await YesNo().ask(judge, "x", (picture,))).p


def test_a_server_that_dies_or_hangs_is_restarted_at_its_url_and_none_is_left_behind(tmp_path: Path) -> None:
    async def go() -> list[int]:
        async with VllmServer(settings_for(tmp_path)) as server:
            assert server.token not in " ".join(server.command())
            pids = [server.pid]
            assert await p_yes(server) == pytest.approx(0.8)
            for harm in (signal.SIGKILL, signal.SIGSTOP):
                os.kill(server.pid, harm)
                async with asyncio.timeout(240):
                    while server.pid == pids[-1] or not server.ready:
                        await asyncio.sleep(0.05)
                pids.append(server.pid)
                assert await p_yes(server) == pytest.approx(0.8)
            assert server.restarts >= 2
        return pids

    pids = asyncio.run(go())
    assert not any(psutil.pid_exists(pid) for pid in pids)


@pytest.mark.skipif(sys.platform != "linux", reason="/dev/shm is Linux's")
def test_shared_memory_of_a_killed_server_does_not_pile_up(tmp_path: Path) -> None:
    async def go() -> list[set[Path]]:
        async with VllmServer(settings_for(tmp_path)) as server:
            had = [segments_of(server.pid)]
            first = server.pid
            os.killpg(first, signal.SIGKILL)  # what would clean up dies as well
            async with asyncio.timeout(240):
                while server.pid == first or not server.ready:
                    await asyncio.sleep(0.05)
            assert not any(path.exists() for path in had[0])
            had.append(segments_of(server.pid))
            assert all(path.exists() for path in had[1])
            return had

    first, second = asyncio.run(go())
    assert first
    assert second
    assert not any(path.exists() for path in first | second)


def test_a_server_that_does_not_start_is_told_with_its_log(tmp_path: Path) -> None:
    async def start(**fields: Any) -> None:
        async with VllmServer(settings_for(tmp_path, **fields)):
            pass

    with pytest.raises(ScoringError, match=r"ended before it was ready(.|\n)*no such architecture"):
        asyncio.run(start(arguments=("--ends",)))
    with pytest.raises(ScoringError, match="was not ready within 1 s"):
        asyncio.run(start(arguments=("--never-ready",), startup_s=1.0))
    with pytest.raises(ConfigError, match="is no interpreter"):
        VllmServer(VllmSettings("m", str(tmp_path / "nowhere")))


def test_the_scorer_must_ask_a_judge_and_leave_its_address_to_us() -> None:
    fixed = {"urls": ["http://127.0.0.1:1"], "model": "judge"}
    assert judge_scorer("vqascore", ["timeout_s=3"], fixed).options.timeout_s == 3
    with pytest.raises(ConfigError, match="set by `judge up`"):
        judge_scorer("vqascore", ["model=x"], fixed)
    with pytest.raises(ConfigError):
        judge_scorer("colourfulness", [], fixed)


def test_the_cpu_build_is_used_once_it_is_installed_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SALON_VLLM_PYTHON", raising=False)
    monkeypatch.setattr(vllm_module, "CPU_BUILD", tmp_path)
    (tmp_path / "bin").mkdir()
    own = tmp_path / "bin" / "python"
    own.touch()
    assert vllm_module.find_python("cpu", None) == sys.executable, "a fetch that broke off left it"
    (tmp_path / ".salon-lock").touch()
    assert vllm_module.find_python("cpu", None) == str(own)
    assert vllm_module.find_python("cuda", None) == sys.executable
    monkeypatch.setenv("SALON_VLLM_PYTHON", "/elsewhere/python")
    assert vllm_module.find_python("cpu", None) == "/elsewhere/python"
    assert vllm_module.find_python("cpu", "given") == "given"


@pytest.fixture
def brought_up(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """`python -m reward_servers judge up` with the stand-in, ready."""
    settings, ready = settings_for(tmp_path), tmp_path / "ready.json"
    command = [
        sys.executable, "-m", "reward_servers", "judge", "up", settings.model, "--device", "cpu", "--python",
        settings.python, "--port", "0", "--ready-file", str(ready), "--option", "cache_entries=0",
    ]  # fmt: skip
    root = Path(__file__).parents[2]
    with (tmp_path / "up.log").open("wb") as log:
        process = subprocess.Popen(command, cwd=root, stdout=log, stderr=log)
    try:
        until(lambda: ready.exists() or process.poll() is not None)
        assert process.poll() is None, (tmp_path / "up.log").read_text()
        yield process, json.loads(ready.read_text())["url"]
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        process.wait()


def until(condition: Callable[[], bool], seconds: float = 240.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def scores(url: str, images: np.ndarray) -> ScoreTable:
    """Patient: vLLM may be on its way up again."""
    return read_table(httpx.post(f"{url}/v1/score", content=score_body(images), timeout=240))


def test_judge_up_scores_survives_vllms_death_and_takes_it_along_when_it_dies(
    brought_up: tuple[subprocess.Popen[bytes], str],
) -> None:
    process, url = brought_up
    images = np.stack([np.full((8, 8, 3), level, np.uint8) for level in (51, 204)])
    info = httpx.get(f"{url}/v1/info").json()
    assert (info["name"], info["columns"]) == ("vqascore", ["vqascore", "p_yes"])
    assert scores(url, images).column("p_yes")[0] == pytest.approx([0.2, 0.8])
    (vllm,) = psutil.Process(process.pid).children()
    vllm.kill()
    assert scores(url, images).column("p_yes")[0] == pytest.approx([0.2, 0.8])
    assert 'salon_judge_restarts_total{scorer="vqascore"} 1.0' in httpx.get(f"{url}/metrics").text
    (vllm,) = psutil.Process(process.pid).children()
    process.kill()
    process.wait()
    until(lambda: not vllm.is_running() or vllm.status() == psutil.STATUS_ZOMBIE)

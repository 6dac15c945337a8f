"""The command line and the child process: what a user and the cluster start, see, and are told."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import numpy as np
import psutil
import pytest
from reward_helpers import pictures, post, read_table, score_body

from contracts.errors import ScoringError
from contracts.registry import entries
from contracts.scores import ScorerInfo
from reward_servers.client import ServerProcess

OWN_SCORER = """
import time
from contracts.declarations import ScorerGives
from reward_servers.scorers.base import Scorer

class Red(Scorer):
    declares = ScorerGives(columns=("red",))

    def __init__(self, scale: float = 1.0, seconds: float = 0.0):
        self.scale, self.seconds = scale, seconds

    def score(self, batch):
        if len(batch) > 1:
            time.sleep(self.seconds)
        return self.table(self.scale * batch.images[..., 0].mean(axis=(1, 2)))

class Undeclared(Scorer):
    def score(self, batch):
        return None

class Broken(Red):
    def load(self):
        raise RuntimeError("no weights today")

class NotAScorer:
    pass
"""


@pytest.fixture
def own_folder(tmp_path: Path) -> Path:
    (tmp_path / "own_scorers.py").write_text(OWN_SCORER)
    return tmp_path


def run_cli(*arguments: str, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    root = Path(__file__).parents[2]
    return subprocess.run(
        [sys.executable, "-m", "reward_servers", *arguments], cwd=cwd, capture_output=True, text=True, timeout=60,
        env={**os.environ, "PYTHONPATH": str(root), **env},
    )  # fmt: skip


def test_list_prints_the_registrys_rows(repo_root: Path) -> None:
    rows = json.loads(run_cli("list", "--json", cwd=repo_root).stdout)
    assert rows == [entry.row() for entry in entries("scorer")]
    assert {"kind", "name", "slugs", "paper", "file", "summary"} == set(rows[0])
    assert all((repo_root / row["file"]).is_file() for row in rows)
    text = run_cli("list", cwd=repo_root).stdout
    assert all(row["name"] in text for row in rows)


def imported_by(code: str) -> set[str]:
    """Top-level modules in memory after running code in a fresh interpreter."""
    probe = f"{code}\nimport sys, json; print(json.dumps(sorted({{m.split('.')[0] for m in sys.modules}})))"
    result = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, timeout=60, check=True)
    return set(json.loads(result.stdout))


def test_help_and_list_stay_light_and_the_client_knows_nothing_of_the_server() -> None:
    heavy = {"fastapi", "uvicorn", "torch", "ray", "deepspeed", "diffusers"}
    assert not imported_by("import reward_servers.__main__") & (heavy | {"numpy", "pydantic", "httpx"})
    assert not imported_by("import reward_servers.client") & (heavy | {"prometheus_client", "starlette", "playground"})
    assert not imported_by("import reward_servers.app, reward_servers.serving") & {"torch", "ray", "playground"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nosuch"], "no scorer named 'nosuch'; there are playground_verifier"),
        (["no_such_module:X"], "cannot import 'no_such_module'"),
        (["own_scorers:Missing"], "has no 'Missing'"),
        (["own_scorers:NotAScorer"], "not a subclass"),
        (["own_scorers:Undeclared"], "lacks the class attribute"),
        (["own_scorers:Broken"], "could not be loaded: RuntimeError: no weights today"),
        (["jpeg_size", "--option", "quality=200"], "quality: Input should be less than or equal to 100"),
        (["jpeg_size", "--option", "qualty=90"], "options of jpeg_size: quality"),
        (["jpeg_size", "--option", "quality"], "not key=value"),
        (["jpeg_size", "--host", "0.0.0.0"], "set SALON_REWARD_TOKEN"),
        (["jpeg_size", "--host", "203.0.113.7"], "set SALON_REWARD_TOKEN"),
    ],
)
def test_every_mistake_is_one_line_without_a_traceback(arguments: list[str], message: str, own_folder: Path) -> None:
    result = run_cli("serve", *arguments, "--port", "0", cwd=own_folder, SALON_REWARD_TOKEN="")
    assert result.returncode in (1, 2)
    assert message in result.stderr
    assert result.stderr.startswith("error: ")
    assert len(result.stderr.strip().splitlines()) == 1, result.stderr
    assert result.stdout == ""


def test_a_taken_port_is_said_so(own_folder: Path) -> None:
    with ServerProcess("own_scorers:Red", cwd=own_folder) as server:
        result = run_cli("serve", "jpeg_size", "--port", server.url.rsplit(":", 1)[1], cwd=own_folder)
    assert "cannot listen on" in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_an_own_class_is_served_from_the_working_directory_with_its_options(own_folder: Path) -> None:
    images = pictures(3)
    with ServerProcess("own_scorers:Red", {"scale": 2.0}, cwd=own_folder) as server:
        assert server.alive()
        info = ScorerInfo.model_validate_json(httpx.get(f"{server.url}/v1/info").content)
        table = read_table(post(server.url, score_body(images)))
        pid = server.pid
    assert (info.name, info.columns) == ("own_scorers:Red", ("red",))
    np.testing.assert_allclose(table.values[:, 0], 2 * images[..., 0].mean(axis=(1, 2)), rtol=1e-5)
    assert not psutil.pid_exists(pid)


def test_sigterm_finishes_what_was_accepted(own_folder: Path) -> None:
    from concurrent.futures import ThreadPoolExecutor

    with ServerProcess("own_scorers:Red", {"seconds": 1.0}, cwd=own_folder) as server, ThreadPoolExecutor(1) as pool:
        answer = pool.submit(post, server.url, score_body(pictures(2)))
        deadline = time.monotonic() + 20
        while "salon_reward_queue_depth" not in httpx.get(f"{server.url}/metrics").text:
            assert time.monotonic() < deadline
        time.sleep(0.3)
        os.kill(server.pid, signal.SIGTERM)
        assert read_table(answer.result()).valid().all()
        while server.alive():
            assert time.monotonic() < deadline, "it did not end after draining"
            time.sleep(0.02)


def test_a_server_that_cannot_start_says_why(own_folder: Path) -> None:
    with pytest.raises(ScoringError, match=r"ended with status 1 before it was ready:\n.*no weights today"):
        ServerProcess("own_scorers:Broken", cwd=own_folder).start()


def test_a_server_that_is_not_ready_in_time_is_ended(own_folder: Path) -> None:
    server = ServerProcess("own_scorers:Red", cwd=own_folder, startup_timeout_s=0.05)
    with pytest.raises(ScoringError, match="not ready within"):
        server.start()
    assert not server.alive()


def test_the_token_comes_from_the_named_variable_and_shows_nowhere(
    own_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_TOKEN", "very-secret-words")
    monkeypatch.delenv("SALON_REWARD_TOKEN", raising=False)
    body = score_body(pictures(1))
    with ServerProcess("own_scorers:Red", cwd=own_folder, token_env="MY_TOKEN") as server:
        assert post(server.url, body).status_code == 401
        assert post(server.url, body, Authorization="Bearer very-secret-words").status_code == 200
        assert "very-secret" not in " ".join(psutil.Process(server.pid).cmdline())
        assert "very-secret" not in server.log_tail()


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's parent-death signal")
def test_a_server_does_not_outlive_a_killed_parent(own_folder: Path) -> None:
    code = (
        "import time; from reward_servers.client import ServerProcess\n"
        "s = ServerProcess('own_scorers:Red'); s.start(); print(s.pid, flush=True); time.sleep(60)"
    )
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=own_folder, stdout=subprocess.PIPE, text=True, env=env)
    assert parent.stdout is not None
    child = psutil.Process(int(parent.stdout.readline()))
    assert child.is_running()
    parent.kill()
    parent.wait()
    parent.stdout.close()
    gone, alive = psutil.wait_procs([child], timeout=20)
    assert not alive
    assert gone

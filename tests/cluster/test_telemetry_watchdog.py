"""Stack dumps: every registered process says where it stands, no other is touched, one dump a stall."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from cluster.telemetry import watchdog
from cluster.telemetry.watchdog import Watchdog, dump_folder

THINKER = """
import sys, time, threading
from cluster.telemetry import watchdog
watchdog.install(sys.argv[1])
def deep_in_thought():
    print("ready", flush=True)
    time.sleep(600)
threading.Thread(target=lambda: time.sleep(600), daemon=True, name="other").start()
deep_in_thought()
"""


@pytest.fixture
def thinker(tmp_path: Path, repo_root: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that has registered under tmp_path/thinker.txt and hangs in a function of a telling name."""
    process = subprocess.Popen(
        [sys.executable, "-c", THINKER, str(tmp_path / "thinker.txt")], cwd=repo_root, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    yield process
    process.kill()
    process.wait()


def test_a_hanging_process_tells_where_it_stands_and_lives_on(thinker: subprocess.Popen[str], tmp_path: Path) -> None:
    for _ in range(2):
        stacks = dump_folder(tmp_path, settle_s=0.5)
        assert list(stacks) == ["thinker.txt"]
        assert "deep_in_thought" in stacks["thinker.txt"]
        assert stacks["thinker.txt"].count("Current thread") == 1, "only what this dump added"
    assert thinker.poll() is None


def test_no_process_that_did_not_register_is_signalled(tmp_path: Path) -> None:
    """SIGUSR1 would kill it. A file of a dead process whose pid was taken over looks like these."""
    bystander = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        started = psutil.Process(bystander.pid).create_time()
        true = {"host": socket.gethostname(), "pid": bystander.pid, "started": started}
        files = {
            "reused.txt": json.dumps({**true, "started": started - 5}),
            "elsewhere.txt": json.dumps({**true, "host": "another"}),
            "gone.txt": json.dumps({**true, "pid": 2**22 - 1}),
            "torn.txt": '{"pid": ',
            "empty.txt": "",
            "list.txt": "[1]",
        }
        for name, text in files.items():
            (tmp_path / name).write_text(text + "\n")
        assert dump_folder(tmp_path, settle_s=0.1) == {}
        assert bystander.poll() is None
    finally:
        bystander.kill()
        bystander.wait()


def test_a_stall_is_dumped_once_and_a_step_ends_it(tmp_path: Path) -> None:
    stalls: list[Path] = []
    stalled, proceed = threading.Event(), threading.Event()

    def on_stall(path: Path, number: int) -> None:
        stalls.append(path)
        assert number == 1
        stalled.set()

    dog = Watchdog(0.05, tmp_path, lambda: {"actor-0.txt": "in paint()"}, on_stall, poll_s=0.01)
    dog.start()
    assert stalled.wait(30)
    assert not proceed.wait(0.3)  # no step ends meanwhile
    assert dog.num_dumps == 1, "one dump a stall"
    assert (stalls[0] / "actor-0.txt").read_text() == "in paint()"
    stalled.clear()
    dog.beat()
    assert stalled.wait(30), "a new stall after a step is dumped again"
    dog.stop()


def test_a_run_that_moves_is_left_alone(tmp_path: Path) -> None:
    dog = Watchdog(20.0, tmp_path, lambda: pytest.fail("dumped"), poll_s=0.01)
    dog.start()
    for _ in range(5):
        dog.beat()
        threading.Event().wait(0.02)
    dog.stop()
    assert dog.num_dumps == 0


def test_every_node_of_a_ray_cluster_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, repo_root: Path) -> None:
    import ray

    monkeypatch.setenv("PYTHONPATH", str(repo_root))
    ours = not ray.is_initialized()
    if ours:  # "local": one of its own, also beside a cluster that another test started
        ray.init(address="local", num_cpus=1, include_dashboard=False, logging_level="ERROR", log_to_driver=False)
    try:

        @ray.remote(num_cpus=0, max_concurrency=2)
        class Sleeper:
            def __init__(self, path: str) -> None:
                from cluster.telemetry import watchdog as inside

                inside.install(path)

            def lost_in_a_collective(self) -> None:
                threading.Event().wait(600)

            def ready(self) -> int:
                return os.getpid()

        sleeper = Sleeper.remote(str(tmp_path / "rank-1.txt"))
        ray.get(sleeper.ready.remote(), timeout=120)
        sleeper.lost_in_a_collective.remote()
        ray.get(sleeper.ready.remote(), timeout=120)
        stacks = watchdog.dump_cluster(str(tmp_path))
        assert "lost_in_a_collective" in stacks["rank-1.txt"]
        ray.kill(sleeper)
    finally:
        if ours:
            ray.shutdown()

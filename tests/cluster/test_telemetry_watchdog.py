"""Stack dumps: every registered process says where it stands, no other is touched, one dump a stall."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.processes import stacks_folder
from cluster.telemetry import watchdog
from cluster.telemetry.watchdog import Watchdog, dump_folder
from contracts import stacks
from contracts.config import RunConfig
from contracts.config.load import config_from_tree, to_yaml

THINKER = """
import sys, time, threading
from contracts import stacks
stacks.install(sys.argv[1])
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
        started = stacks.started(bystander.pid)
        true = {"host": socket.gethostname(), "pid": bystander.pid, "started": started}
        files = {
            "reused.txt": json.dumps({**true, "started": f"1{started}"}),
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
                from contracts import stacks

                stacks.install(path)

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


def test_a_reward_server_and_its_scoring_process_say_where_they_stand(tmp_path: Path) -> None:
    from reward_servers.client import ServerProcess

    with ServerProcess("colourfulness", processes=1, env={stacks.STACKS_ENV: str(tmp_path)}) as server:
        found = dump_folder(tmp_path, settle_s=1.0)
        assert f"reward-colourfulness-{server.pid}.txt" in found
        assert sorted(name.rsplit("-", 1)[0] for name in found) == ["reward-colourfulness", "scoring-colourfulness"]
        assert all("Current thread" in text or "Thread" in text for text in found.values())
        assert server.alive(), "it is asked, not ended"


def test_a_hung_run_at_a_url_shows_the_stacks_of_all_its_processes(tmp_path: Path, repo_root: Path) -> None:
    """The painter paints for ten minutes: the reward server and the driver are among those that say where they are."""
    config = hung_config((tmp_path / "far").as_uri())
    file = tmp_path / "hung.yaml"
    file.write_text(to_yaml(config))
    with (tmp_path / "driver.log").open("w") as log:
        driver = subprocess.Popen(
            [sys.executable, "-m", "tests.laws.run_driver", str(file), "train", "exact"],
            cwd=repo_root, stdout=log, stderr=log,
        )  # fmt: skip
    wanted = {"driver", "controller", "actor-0", "learner-0", "vault", "dispatcher", "host-colour",
              "reward-colourfulness"}  # fmt: skip
    deadline, told = time.monotonic() + 270, {}
    try:
        while not wanted <= told.keys():
            assert driver.poll() is None, (tmp_path / "driver.log").read_text()
            assert time.monotonic() < deadline, f"{sorted(told)}\n{(tmp_path / 'driver.log').read_text()}"
            time.sleep(0.5)
            told = {path.name.rsplit("-", 1)[0]: path.read_text() for path in tmp_path.glob("far/hung/stacks/*/*.txt")}
        assert "in denoise" in told["actor-0"], "what hangs is what the dump shows"
        assert "in serve" in told["reward-colourfulness"]
    finally:
        driver.kill()  # its Ray and all that belongs to the run go with it
        driver.wait()
        shutil.rmtree(stacks_folder(config), ignore_errors=True)


def hung_config(runs_dir: str) -> RunConfig:
    return config_from_tree(
        {
            "name": "hung", "runs_dir": runs_dir, "model": {"path": "none"},
            "prompts": {"source": "tests.laws.exact_stand_ins:Prompts", "options": {"paint_s": 600.0}},
            "rollout": {"groups_per_step": 1, "group_size": 2, "micro_batch": 2, "cpus_per_actor": 0.1},
            "scorers": [{"name": "colour", "serve": "colourfulness"}],
            "objective": {"name": "nft"}, "learner": {"engine": "plain", "cpus_per_rank": 0.1},
            "eval": {"before": False, "num_prompts": 1, "samples_to_save": 0},
            "telemetry": {"tensorboard": False, "report": False, "watchdog_s": 3.0}, "stop": {"steps": 1},
        }
    )  # fmt: skip

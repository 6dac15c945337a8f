"""Runs on a Ray cluster that somebody else started: submitted as a job, and joined by its address.

`ray start --head` with token authentication, as an administrator would; the job's driver runs wherever Ray puts it.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from cluster.export import latest_state
from cluster.ledger.reader import LedgerReader
from cluster.run_folder import RunFolder

RAY = str(Path(sys.executable).parent / "ray")
SMALL = (
    "rollout.groups_per_step=2", "rollout.group_size=3", "rollout.micro_batch=3", "sampler.steps=3", "stop.steps=2",
    "sampler.window=null", "learner.engine=plain", "pipeline.max_staleness=0", "eval.before=false",
    "eval.num_prompts=2",
    "eval.samples_to_save=1", "scorers=[{name: colour, serve: colourfulness}]", "eval.scorer=null", "eval.column=null",
)  # fmt: skip
UPLOAD_LIMIT = 8 * 2**20  # the playground base travels with it, 4.9 MB


@dataclass(frozen=True)
class Head:
    """A running head node. address: of its GCS; dashboard: where jobs go; env: of everyone who talks to it."""

    address: str
    dashboard: str
    folder: Path
    env: dict[str, str]


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    folder = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))  # sockets below it: their paths must stay short
    gcs, dashboard, agent, client = free_ports(4)
    paths = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    env = {**os.environ, "PATH": paths, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    env = {key: value for key, value in env.items() if key not in ("RAY_ADDRESS", "PYTHONPATH")}
    command = [
        RAY, "start", "--head", "--block", "--num-cpus=2", f"--port={gcs}", f"--dashboard-port={dashboard}",
        f"--dashboard-agent-listen-port={agent}", f"--ray-client-server-port={client}", f"--temp-dir={folder}",
        "--object-store-memory=200000000", "--disable-usage-stats", "--node-ip-address=127.0.0.1",
    ]  # fmt: skip
    with (
        (folder / "head.log").open("w") as log,
        ended_with_children(subprocess.Popen(command, env=env, stdout=log, stderr=subprocess.STDOUT, cwd=folder)),
    ):
        wait_for_port(dashboard, folder / "head.log")
        yield Head(f"127.0.0.1:{gcs}", f"http://127.0.0.1:{dashboard}", folder, env)
    shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def ended_with_children(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """Ends the process and whatever it started, by process id: other Rays of this machine are left alone."""
    try:
        yield
    finally:
        started = psutil.Process(process.pid).children(recursive=True)
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(20)
        for child in [*started, *([psutil.Process(process.pid)] if process.poll() is None else [])]:
            with suppress(psutil.NoSuchProcess):
                child.kill()
        process.wait(20)


def free_ports(number: int) -> list[int]:
    """Free ports above those that Ray's workers take (10002 to 19999) and below ephemeral ones."""
    found: list[int] = []
    start = 20_000 + secrets.randbelow(10_000)
    for port in range(start, start + 2000):
        with closing(socket.socket()) as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            found.append(port)
        if len(found) == number:
            return found
    raise AssertionError("no free ports")


def wait_for_port(port: int, log: Path, timeout_s: float = 300.0) -> None:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        with suppress(OSError), closing(socket.create_connection(("127.0.0.1", port), timeout=1)):
            return
        time.sleep(0.5)
    raise AssertionError(f"the head did not start:\n{log.read_text()}")


def submit(head: Head, root: Path, *entrypoint: str) -> subprocess.CompletedProcess[str]:
    """`ray job submit`, again while the head's job service comes up."""
    command = [RAY, "job", "submit", "--address", head.dashboard, "--working-dir", ".", "--", *entrypoint]
    for _ in range(10):
        done = subprocess.run(command, cwd=root, env=head.env, capture_output=True, text=True, timeout=1200)
        if "submitted successfully" in done.stdout:
            break
        time.sleep(3)
    return done


def test_a_submitted_job_trains_and_mirrors_its_folder_to_a_url(
    head: Head, tiny_model_folder: Path, tmp_path: Path, repo_root: Path
) -> None:
    url = f"file://{tmp_path}/bucket"
    done = submit(
        head, repo_root, "python", "-m", "cluster", "train", "configs/playground_grpo.yaml", *SMALL, "name=job",
        f"model.path={tiny_model_folder}", f"runs_dir={url}", "prompts.source=text",
        "prompts.path=configs/example_prompts.txt", "prompts.held_out_fraction=0.3",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert "succeeded" in done.stdout
    mirror = tmp_path / "bucket" / "job"
    names = {path.name for path in mirror.iterdir()}
    assert names >= {"config.yaml", "ledger.sqlite", "metrics.jsonl", "events.jsonl", "summary.json", "manifest.json"}
    assert list((mirror / "samples").glob("*.png"))
    assert not {"vaults", "stacks"} & names, "bytes of groups and stack dumps stay where the run is"
    with closing(LedgerReader(mirror / "ledger.sqlite")) as ledger:
        books = ledger.books()
        prompts = {ledger.prompt(row.group_id).text for row in ledger.rows()}
    assert books.balanced
    assert books.trained == 12
    assert prompts <= set((repo_root / "configs" / "example_prompts.txt").read_text().splitlines())
    opened = RunFolder.open(f"{url}/job")
    assert (latest_state(opened) / "param.safetensors").is_file()
    summary = json.loads(opened.summary.read_text())
    assert (summary["outcome"], summary["steps"], summary["images_trained"]) == ("finished", 2, 12)
    uploaded = next(head.folder.glob("session_2*/runtime_resources/working_dir_files/_ray_pkg_*/cluster")).parent
    assert sum(path.stat().st_size for path in uploaded.rglob("*.*")) < UPLOAD_LIMIT
    assert not {"tests", "docs", ".git", ".venv"} & {path.name for path in uploaded.iterdir()}
    assert [path.name for path in (uploaded / "runs").iterdir()] == [".prometheus"], "the job's own, not the runs here"


@pytest.mark.long  # the job above joins the same cluster, by the address that Ray gives it
def test_a_run_joins_by_address(head: Head, tiny_model_folder: Path, tmp_path: Path, repo_root: Path) -> None:
    command = [
        sys.executable, "-m", "cluster", "train", "configs/playground_grpo.yaml", *SMALL, "name=joined",
        f"model.path={tiny_model_folder}", f"runs_dir={tmp_path}", f"cluster.address={head.address}",
    ]  # fmt: skip
    done = subprocess.run(command, cwd=repo_root, env=head.env, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    summary = json.loads((tmp_path / "joined" / "summary.json").read_text())
    assert (summary["outcome"], summary["steps"], summary["images_trained"]) == ("finished", 2, 12)

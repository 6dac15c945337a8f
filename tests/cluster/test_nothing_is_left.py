"""`python -m cluster train` stops everything it started: no process of it outlives the command."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import uuid
from pathlib import Path

import psutil

from contracts.config.load import to_yaml
from tests.laws.run_kit import tiny_config

MARK = "SALON_TEST_STARTED_BY"


def marked(mark: str) -> dict[int, str]:
    """pid -> command of processes that inherited `mark` in their environment, whatever session or parent they have."""
    found = {}
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK) == mark and process.status() != psutil.STATUS_ZOMBIE:
                found[process.pid] = " ".join(process.cmdline())[:200]
        except psutil.Error:
            continue
    return found


def test_an_ordinary_run_leaves_no_process(tiny_model_folder: Path, tmp_path: Path, repo_root: Path) -> None:
    config, mark = tiny_config(tiny_model_folder, tmp_path / "runs", stop__steps=2), uuid.uuid4().hex
    file, seen = tmp_path / "run.yaml", ""
    file.write_text(to_yaml(config))
    with (tmp_path / "log").open("w") as log:
        run = subprocess.Popen(
            [sys.executable, "-m", "cluster", "train", str(file)], cwd=repo_root, stdout=log, stderr=log,
            env={**os.environ, MARK: mark},
        )  # fmt: skip
    try:
        deadline = time.monotonic() + 230
        while run.poll() is None:
            assert time.monotonic() < deadline, (tmp_path / "log").read_text()
            seen += "\n".join(marked(mark).values())
            time.sleep(1.0)
        assert run.returncode == 0, (tmp_path / "log").read_text()
        for what in ("reward_servers serve", "raylet", "gcs_server"):
            assert what in seen, "the mark finds what the run starts"
        deadline = time.monotonic() + 60
        while left := marked(mark):
            assert time.monotonic() < deadline, left
            time.sleep(0.5)
    finally:
        for pid in marked(mark):
            psutil.Process(pid).kill()

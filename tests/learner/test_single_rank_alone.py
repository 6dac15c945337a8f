"""DeepSpeed in a process that nobody prepared: one rank of the in-process loop, without a launcher's environment."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.learner.learner_harness import needs_deepspeed

LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
SCRIPT = """
import json, sys
from pathlib import Path
from cluster.inprocess import train_in_process
from tests.laws.run_kit import tiny_config

config = tiny_config(Path(sys.argv[1]), Path("."), stop__steps=1, learner__engine="deepspeed")
reports = []
run = train_in_process(config, lambda run, report, rewards: reports.append(report.metrics["grad_norm"]))
print(json.dumps({"steps": run.steps, "version": run.version, "grad_norm": reports}))
"""


@needs_deepspeed
def test_a_single_rank_needs_no_launcher(tiny_model_folder: Path, repo_root: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name not in LAUNCHER}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tiny_model_folder)], cwd=repo_root, capture_output=True, text=True,
        env={**environment, "PYTHONPATH": str(repo_root)}, timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    seen = json.loads(done.stdout.splitlines()[-1])
    assert seen["steps"] == seen["version"] == 1
    assert seen["grad_norm"][0] > 0

"""`make demo` on a machine without g++: the plain engine, and a line that says so. Nothing is run (`make -n`)."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SAID = "g++ not found: the demo trains with the plain torch engine instead of DeepSpeed"


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
@pytest.mark.parametrize(
    ("compiler", "plain"), [("/nonexistent/g++", True), (sys.executable, False)], ids=["without", "with"]
)
def test_without_a_compiler_the_demo_takes_the_plain_engine_and_says_so(
    compiler: str, plain: bool, repo_root: Path
) -> None:
    done = subprocess.run(
        ["make", "-n", "demo"], cwd=repo_root, env={**os.environ, "CXX": compiler}, capture_output=True, text=True,
        timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (command,) = [line for line in done.stdout.splitlines() if "-m cluster train" in line]
    assert "configs/demo.yaml" in command
    assert ("learner.engine=plain" in command) is plain
    assert (SAID in done.stdout) is plain

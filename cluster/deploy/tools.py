"""Where the outside programs are that the offline check and the tests call.

Looked for on the path, then in .venv/ops, where `make ops-tools` unpacks them.
Does not own: what is asked of them (check.py).
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
UNPACKED = Path(sys.prefix) / "ops"
COMPOSE_SCHEMA = UNPACKED / "usr/lib/python3/dist-packages/compose/config/compose_spec.json"


class MissingTool(RuntimeError):
    """A program that the check needs is not here; the message says where it comes from."""


def find(name: str) -> str:
    """Path of a program. Raises MissingTool."""
    places = [os.environ.get("PATH", ""), str(Path(sys.prefix) / "bin"), str(UNPACKED / "usr/bin")]
    found = shutil.which(name, path=os.pathsep.join(places))
    if found is None:
        raise MissingTool(f"{name} is not here: `make ops-tools` brings it (Debian: apt-get install prometheus)")
    return found


def run(*command: str, cwd: Path = ROOT) -> str:
    """'' when the command succeeds, else what it printed."""
    try:
        done = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    except FileNotFoundError:
        return f"{command[0]} is not here"
    return "" if done.returncode == 0 else (done.stdout + done.stderr).strip() or f"{command[0]}: {done.returncode}"


def expanded(expr: str, run_name: str = ".*", window: str = "1m", scorer: str = ".*") -> str:
    """A dashboard's expression as Prometheus takes it: Grafana's variables filled in."""
    return expr.replace("$__rate_interval", window).replace("$run", run_name).replace("$scorer", scorer)


def parse_problem(expressions: Iterable[str]) -> str:
    """'' when promtool parses every expression, else what it says."""
    rules = [f"      - {{record: 'check:{number}', expr: {_quoted(expr)}}}" for number, expr in enumerate(expressions)]
    text = "groups:\n  - name: check\n    rules:\n" + "\n".join(rules) + "\n"
    with tempfile.NamedTemporaryFile("w", suffix=".yml", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        return run(find("promtool"), "check", "rules", file.name)


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"

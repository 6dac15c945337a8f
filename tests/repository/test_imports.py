"""Who may import whom (the design's rules), and how quickly the floor of the house is imported."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGES = ("contracts", "policy", "playground", "actors", "reward_servers", "learner", "cluster")

LOADED = """
import importlib, json, resource, sys
for name in sys.argv[1:]:
    importlib.import_module(name)
used = resource.getrusage(resource.RUSAGE_SELF)
packages = sorted({name.split(".")[0] for name in sys.modules})
print(json.dumps({"modules": packages, "seconds": used.ru_utime + used.ru_stime}))
"""


def imported_by(root: Path, *modules: str) -> dict:
    done = subprocess.run(
        [sys.executable, "-c", LOADED, *modules], cwd=root, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def modules_of(root: Path, package: str) -> list[str]:
    paths = sorted((root / package).rglob("*.py"))
    names = [path.relative_to(root).with_suffix("").as_posix().replace("/", ".") for path in paths]
    return [name.removesuffix(".__init__") for name in names if not name.endswith("__main__")]


def test_the_rules_of_import_linter_hold(repo_root: Path) -> None:
    linter = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run([linter, "--no-cache"], cwd=repo_root, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr


def test_contracts_are_light(repo_root: Path) -> None:
    """Processor time, the least of three: it depends on the machine, but not on what else runs there."""
    runs = [imported_by(repo_root, *modules_of(repo_root, "contracts")) for _ in range(3)]
    heavy = {"torch", "ray", "deepspeed", "vllm", "diffusers", "transformers", "click", "rich", "PIL", "httpx"}
    assert not heavy & set(runs[0]["modules"])
    assert min(run["seconds"] for run in runs) < 1.0


@pytest.mark.parametrize(
    ("modules", "forbidden"),
    [
        (["reward_servers.client"], {"torch", "ray", "deepspeed", "diffusers", "fastapi", "uvicorn", "policy"}),
        (["reward_servers.app"], {"torch", "ray", "deepspeed", "diffusers", "policy", "learner", "cluster"}),
        (["playground.world", "playground.world.verify", "actors.prompts.playground"], {"torch", "ray", "diffusers"}),
        (["learner.plan", "learner.credit", "learner.types"], {"torch", "ray", "deepspeed", "diffusers"}),
        (["cluster.validate", "cluster.plan", "cluster.methods"], {"torch", "ray", "deepspeed", "diffusers"}),
        (["actors.painter"], {"ray", "deepspeed", "learner", "cluster", "fastapi"}),
        (["learner.rank"], {"ray", "actors", "cluster", "fastapi"}),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_what_a_process_loads(modules: list[str], forbidden: set[str], repo_root: Path) -> None:
    assert not forbidden & set(imported_by(repo_root, *modules)["modules"])


def test_no_test_or_docker_folder_is_a_package(repo_root: Path) -> None:
    """They would be importable under these names, before libraries that are really called so."""
    folders = [repo_root / name for name in ("tests", "docker", "docs", "configs")]
    assert not [path for folder in folders for path in folder.rglob("__init__.py")]

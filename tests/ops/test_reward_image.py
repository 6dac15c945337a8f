"""The image of a reward server holds all that its scorers import of Salon, at once or when they load."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from contracts import registry

ROOT = Path(__file__).resolve().parents[2]
OWN = ("contracts", "playground", "reward_servers", "policy", "actors", "learner", "cluster", "benchmarks", "tests")

IMPORT_ALL = """
import importlib, sys
from contracts import registry
for entry in registry.ENTRIES:
    if entry.kind == "scorer":
        registry.resolve("scorer", entry.name)
        importlib.import_module(entry.target.split(":")[0])
        print(entry.name)
"""

SCORE_CANARY = """
from reward_servers.scorers.playground_cnn import PlaygroundCNN
scorer = PlaygroundCNN()
scorer.load()
print(scorer.score(scorer.canary()).values[0, 0])
"""


@pytest.fixture(scope="module")
def image(repo_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the files that docker/reward.Dockerfile copies from the repository, and no others."""
    app = tmp_path_factory.mktemp("app")
    for line in (repo_root / "docker/reward.Dockerfile").read_text().splitlines():
        words = line.split()
        if words[:1] != ["COPY"] or any(word.startswith("--from") for word in words):
            continue
        *sources, target = words[1:]
        if Path(target).is_absolute():
            continue  # of the stage that builds the environment
        for source in sources:
            copy(repo_root / source, app / source if target == "./" else app / target)
    return app


def copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.is_dir():
        shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
    else:
        shutil.copy(source, target)


def in_image(image: Path, code: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(image), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=image, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_scorer_of_the_registry_can_be_imported(image: Path) -> None:
    scorers = [entry.name for entry in registry.ENTRIES if entry.kind == "scorer"]
    assert in_image(image, IMPORT_ALL).split() == scorers


def test_nothing_is_imported_later_that_is_not_there(image: Path) -> None:
    """Scorers import their models when they load, so that importing all of them proves half of it."""
    missing = {
        f"{path.relative_to(image)}: {name}"
        for path in image.rglob("*.py")
        for name in own_imports(path, ".".join(path.relative_to(image).with_suffix("").parts))
        if not is_there(image, name)
    }
    assert missing == set()


def own_imports(path: Path, module: str) -> set[str]:
    """Modules of Salon that a file imports anywhere in it, imports for type checkers left out."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            node.body = []
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} imports by a relative name"
            found.add(str(node.module))
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name for name in names if is_there(ROOT, name)}  # the others are no modules
    return {name for name in found if name.split(".")[0] in OWN}


def is_there(image: Path, name: str) -> bool:
    path = image / name.replace(".", "/")
    return path.is_dir() or path.with_suffix(".py").is_file()


def test_the_playgrounds_network_scores_in_it(image: Path) -> None:
    assert 0.5 < float(in_image(image, SCORE_CANARY)) <= 1, "the picture is right for its caption"

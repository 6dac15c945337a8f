"""What the repository promises of itself: docs in step with the code, files of bounded size, no unsafe loads."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from contracts import registry

PACKAGES = ("contracts", "policy", "playground", "actors", "reward_servers", "learner", "cluster", "benchmarks")


def python_files(root: Path, *folders: str) -> list[Path]:
    return [path for folder in folders for path in sorted((root / folder).rglob("*.py"))]


def tracked(root: Path) -> list[str]:
    done = subprocess.run(["git", "ls-files"], cwd=root, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


def test_the_configuration_reference_is_current(repo_root: Path) -> None:
    done = subprocess.run(
        [sys.executable, "docs/generate.py", "--check"], cwd=repo_root, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_every_file_says_what_it_is(repo_root: Path) -> None:
    files = [path for path in python_files(repo_root, *PACKAGES) if path.stat().st_size]
    silent = [path for path in files if not ast.get_docstring(ast.parse(path.read_text()))]
    assert not silent


def test_no_file_is_long(repo_root: Path) -> None:
    long = [
        f"{path}: {lines}"
        for path in python_files(repo_root, *PACKAGES, "tests")
        if (lines := len(path.read_text().splitlines())) > 500
    ]
    assert not long


@pytest.mark.parametrize("entry", registry.ENTRIES, ids=lambda entry: f"{entry.kind}-{entry.name}")
def test_every_entry_of_the_registry_stands_where_it_says(entry: registry.Entry, repo_root: Path) -> None:
    module, _, name = entry.target.partition(":")
    assert (repo_root / entry.file).is_file()
    tree = ast.parse((repo_root / entry.file).read_text())
    assert name in {node.name for node in tree.body if isinstance(node, ast.ClassDef | ast.FunctionDef)}, module


def test_links_in_the_docs_lead_somewhere(repo_root: Path) -> None:
    pages = [repo_root / name for name in tracked(repo_root) if name.endswith(".md")]
    broken = [
        f"{page.relative_to(repo_root)}: {target}"
        for page in pages
        for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text())
        if not re.match(r"[a-z]+:", target) and not (page.parent / target).exists()
    ]
    assert pages
    assert not broken


def test_the_readme_is_short_and_names_verbs_that_exist(repo_root: Path) -> None:
    text, makefile = (repo_root / "README.md").read_text(), (repo_root / "Makefile").read_text()
    assert len(text.splitlines()) < 150
    verbs = set(re.findall(r"\bmake ([a-z]+)", text))
    assert verbs >= {"demo", "test"}
    assert verbs <= set(re.findall(r"^([a-z]+):", makefile, re.M))
    assert all((repo_root / path).is_file() for path in re.findall(r"configs/\w+\.yaml", text))


def test_ci_runs_the_readmes_command(repo_root: Path) -> None:
    script = repo_root / ".ci" / "run"
    assert script.stat().st_mode & 0o111, "must be executable"
    assert "make test" in script.read_text()
    assert "make test" in (repo_root / "README.md").read_text()
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", script], check=True)


def test_the_pins_cover_every_requirement(repo_root: Path) -> None:
    import tomllib

    project = tomllib.loads((repo_root / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    pinned = {
        line.split("==")[0].lower().replace("_", "-")
        for line in (repo_root / "constraints-cpu.txt").read_text().splitlines()
        if "==" in line
    }
    names = {re.match(r"[A-Za-z0-9._-]+", item).group().lower().replace("_", "-") for item in wanted}  # type: ignore[union-attr]
    assert names <= pinned


def test_nothing_generated_is_committed(repo_root: Path) -> None:
    generated = re.compile(r"(\.egg-info|__pycache__|\.pyc$|^runs/|^\.venv/|\.DS_Store)")
    assert not [name for name in tracked(repo_root) if generated.search(name)]


def test_the_hooks_are_those_of_make_lint(repo_root: Path) -> None:
    hooks = yaml.safe_load((repo_root / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    entries = " ".join(hook["entry"] for hook in hooks)
    for tool in ("ruff check", "ruff format", "lint-imports", "docs/generate.py --check"):
        assert tool in entries

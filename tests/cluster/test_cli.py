"""The command line: answers at once, one message a mistake, exit codes, rows of methods."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result

from cluster import cli
from contracts import registry
from contracts.errors import ExitCode, ScoringError

COMMANDS = ("report", "status", "ledger", "jury", "train", "resume", "validate", "eval", "methods", "export")


def call(*arguments: str) -> Result:
    return CliRunner().invoke(cli.main, list(arguments))


@pytest.fixture(autouse=True)
def at_the_root(repo_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(repo_root)


def test_every_command_is_there_and_explains_itself() -> None:
    assert sorted(cli.main.commands) == sorted(COMMANDS)
    for name in COMMANDS:
        result = call(name, "--help")
        assert result.exit_code == 0
        assert " ".join((cli.main.commands[name].help or "").split()) in " ".join(result.output.split())


def test_methods_are_rows_that_name_real_files(repo_root: Path) -> None:
    rows = json.loads(call("methods", "--json").output)
    assert [row["name"] for row in rows] == [entry.name for entry in registry.ENTRIES]
    for row in rows:
        assert list(row) == ["kind", "name", "slugs", "paper", "file", "summary"]
        assert isinstance(row["slugs"], list)
        assert row["paper"]
        assert row["summary"]
        assert (repo_root / row["file"]).is_file(), row
    assert {row["kind"] for row in rows} == set(cli.KINDS)
    (grpo,) = [
        row for row in json.loads(call("methods", "--json", "--kind", "objective").output) if row["name"] == "grpo"
    ]
    assert grpo["slugs"] == ["grpo"]
    assert "learner/objectives/grpo.py" in call("methods").output


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["validate", "configs/nothing.yaml"], "cannot be read"),
        (["validate", "Makefile"], "Makefile"),
        (["validate", "configs/demo.yaml", "rollout.group_sise=4"], "did you mean 'group_size'?"),
        (["validate", "configs/demo.yaml", "rollout.group_size=many"], "rollout.group_size"),
        (["validate", "configs/demo.yaml", "rollout.micro_batch=99"], "exceeds group_size"),
        (["validate", "configs/demo.yaml", "objective.name=reinforce"], "unknown objective 'reinforce'"),
        (["validate", "configs/demo.yaml", "seed"], "is not an override"),
        (["train", "configs/demo.yaml", "stop=null"], "stop"),
        (["train", "configs/demo.yaml", "model.path=/nonexistent"], "model.path"),
        (["export", "runs/never"], "runs/never"),
    ],
)
def test_a_mistake_is_one_message(arguments: list[str], words: str) -> None:
    result = call(*arguments)
    assert result.exit_code == ExitCode.CONFIG
    assert words in result.stderr
    assert "Traceback" not in result.output


def test_validate_prints_the_plan(tiny_model_folder: Path) -> None:
    result = call("validate", "configs/demo.yaml", f"model.path={tiny_model_folder}")
    assert result.exit_code == 0, result.output
    for words in ("who runs where", "images", "reward calls", "stored", "weights", "memory", "ends after"):
        assert words in result.output


def test_errors_on_purpose_have_their_exit_code_and_bugs_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def raise_it(error: Exception) -> Result:
        def callback() -> None:
            raise error

        monkeypatch.setitem(cli.main.commands, "methods", click.Command("methods", callback=callback))
        return call("methods")

    told = raise_it(ScoringError("the jury is out"))
    assert (told.exit_code, told.stderr) == (ExitCode.FAILED, "error: the jury is out\n")
    bug = raise_it(RuntimeError("a bug"))
    assert isinstance(bug.exception, RuntimeError)
    debugged = CliRunner().invoke(cli.main, ["--debug", "export", "runs/never"])
    assert type(debugged.exception).__name__ == "ConfigError"


def test_help_and_methods_import_nothing_heavy(repo_root: Path) -> None:
    """So that they answer at once: what is imported decides it, and does not depend on the machine as a clock does."""
    probe = (
        "import sys\nfrom click.testing import CliRunner\nfrom cluster.cli import main\n"
        "for arguments in (['--help'], ['train', '--help'], ['report', '--help'], ['methods', '--json']):\n"
        "    assert CliRunner().invoke(main, arguments).exit_code == 0\n"
        "heavy = {'torch', 'ray', 'deepspeed', 'diffusers', 'transformers', 'pyarrow', 'httpx', 'rich', 'matplotlib'}\n"
        "print(sorted(heavy & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", probe], cwd=repo_root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_what_runs_before_ray_is_started_does_not_import_it(repo_root: Path) -> None:
    """Ray reads its authentication mode when it is imported; start_ray sets it."""
    probe = (
        "import sys, cluster.driver, cluster.lock, cluster.resume, cluster.validate\n"
        "from contracts.config import load_config\n"
        "config = load_config('configs/demo.yaml', [])\n"
        "assert cluster.validate.check(config) == []\n"
        "print('ray' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", probe], cwd=repo_root, capture_output=True, text=True, check=True)
    assert done.stdout.strip().splitlines()[-1] == "False"

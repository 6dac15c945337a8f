"""`python -m cluster status`: runs that go on, ended or crashed; live on a terminal, once elsewhere."""

from __future__ import annotations

import io
import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner
from rich.console import Console

from cluster.cli import main
from cluster.ledger import Ledger
from cluster.run_folder import RunFolder
from cluster.status import take_status
from cluster.status_view import render, show
from tests.cluster.made_up_run import STEP_S, config_of, make_run


@pytest.fixture
def running(tmp_path: Path) -> Iterator[RunFolder]:
    """A run whose ledger a process holds."""
    run = make_run(tmp_path, "live", ended=False)
    writer = Ledger(run.ledger)
    yield run
    writer.close()


def text_of(run: RunFolder, width: int = 120) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(render(take_status(run)))
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_a_run_that_goes_on(running: RunFolder) -> None:
    status = take_status(running)
    assert (status["state"], status["phase"], status["step"], status["total_steps"]) == ("running", "training", 4, 10)
    assert status["share_done"] == 0.4
    assert status["seconds_left"] == pytest.approx(6 * STEP_S)
    assert status["stages"]["trained"] == 8
    assert status["stages"]["generated"] == 1
    assert status["capacity"] == 4
    assert status["books"] == {
        "painted": 40, "trained": 32, "alive": 4, "discarded": {"zero_variance": 4}, "refused": 0, "balanced": True,
    }  # fmt: skip
    assert status["held_out"]["accuracy"] == 0.25
    assert status["staleness"] == {"bound": 1, "largest": 0, "groups": {"0": 8}}
    assert status["rates"]["painted_per_second"] == 0, "nothing was painted in the last minute"
    assert [one["detail"] for one in status["faults"]["last"]] == ["actor actor-0, killed True"]
    assert len(status["verdict"]) == 2


def test_rates_of_the_last_minute(tmp_path: Path) -> None:
    run = make_run(tmp_path, "live", ended=False)
    with run.events.open("a") as file:
        file.write(json.dumps({"time": time.time() - 20, "event": "resumed"}) + "\n")
    writer = Ledger(run.ledger)
    try:
        from contracts.wire import PaintReceipt, PromptSpec

        group_id = writer.admit(PromptSpec(text="now"), 99, 6)
        task = writer.lease_generating("actor-0", 60.0)
        assert task is not None
        writer.generated(
            PaintReceipt(group_id=group_id, attempt=task.attempt, weight_version=4, vault="vault-0", num_bytes=1,
                         paint_seconds=1.0, store_seconds=0.0)
        )  # fmt: skip
        assert take_status(run)["rates"]["painted_per_second"] == pytest.approx(6 / 60)
    finally:
        writer.close()


def test_time_left_follows_the_nearest_limit(tmp_path: Path) -> None:
    run = make_run(tmp_path, "live", ended=False, stop={"steps": 1000, "seconds": 100.0})
    writer = Ledger(run.ledger)
    try:
        assert take_status(run)["seconds_left"] < 100
    finally:
        writer.close()


@pytest.mark.parametrize(("ended", "state"), [(True, "finished"), (False, "crashed")])
def test_a_run_that_ended(tmp_path: Path, ended: bool, state: str) -> None:
    run = make_run(tmp_path, ended=ended)
    status = take_status(run)
    assert (status["state"], status["phase"], status["seconds_left"]) == (state, state, None)
    assert status["rates"]["trained_per_second"] == pytest.approx(32 / (4 * STEP_S))
    assert state in text_of(run)


def test_a_run_that_has_hardly_begun(tmp_path: Path) -> None:
    status = take_status(RunFolder.create(config_of(tmp_path)))
    assert (status["state"], status["step"], status["books"], status["held_out"]) == ("empty", 0, None, None)
    assert "no learner step has ended" in text_of(RunFolder(tmp_path / "made-up"))


def test_the_view_has_everything_and_fits_a_narrow_terminal(running: RunFolder) -> None:
    for width in (140, 60):
        shown = text_of(running, width)
        for words in ("run live", "running", "4 of 10", "time left", "painted", "zero_variance", "balance",
                      "last of 1 faults", "actor-0", "The learner waited for groups"):  # fmt: skip
            assert words in " ".join(shown.split()), (width, words)
        assert max(map(len, shown.splitlines())) <= width


def test_off_a_terminal_it_is_shown_once_and_the_newest_run_is_meant(tmp_path: Path) -> None:
    make_run(tmp_path, "only")
    done = CliRunner().invoke(main, ["status", "--runs-dir", str(tmp_path)])
    assert done.exit_code == 0, done.output
    assert "run only" in done.output
    as_json = CliRunner().invoke(main, ["status", "only", "--json", "--runs-dir", str(tmp_path)])
    assert json.loads(as_json.output)["name"] == "only"
    none = CliRunner().invoke(main, ["status", "--runs-dir", str(tmp_path / "empty")])
    assert (none.exit_code, "there is no run under" in none.stderr) == (2, True)


def test_on_a_terminal_it_goes_on_until_the_run_ends(tmp_path: Path) -> None:
    run = make_run(tmp_path, "live", ended=False)
    writer = Ledger(run.ledger)
    looks = []

    def sleep(seconds: float) -> None:
        looks.append(seconds)
        if len(looks) == 2:
            writer.close()

    console = Console(file=io.StringIO(), width=120, force_terminal=True)
    show(str(run.root), console=console, sleep=sleep, every_s=0.5)
    assert looks == [0.5, 0.5]
    assert "crashed" in console.file.getvalue()  # type: ignore[attr-defined]

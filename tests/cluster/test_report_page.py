"""The page of one run and of several: complete, self-contained, safe against what a run holds."""

from __future__ import annotations

import asyncio
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from cluster.cli import main
from cluster.report import plots
from cluster.report.end import write_at_end
from cluster.report.page import (
    MAX_SETS,
    THUMBNAIL,
    config_differences,
    image_cards,
    key_figures,
    render,
    write_report,
)
from cluster.report.view import read_run
from cluster.run_folder import RunFolder
from contracts.errors import ConfigError
from tests.cluster.made_up_run import HOSTILE, config_of, keep, make_run


class Outline(HTMLParser):
    """Tags that could fetch or run something, ids, and all text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.sources: list[str] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(value or "")
            if name in ("src", "href", "xlink:href"):
                self.sources.append(value or "")

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Outline:
    return Outline(render([read_run(make_run(tmp_path_factory.mktemp("runs")))]))


def test_everything_of_the_design_is_there(page: Outline) -> None:
    for words in (
        "finished", "given · strict", "judge · score", "held out", "held-out accuracy", "before", "after", "loss",
        "trained images a second", "learner's time", "actors' time", "trained groups by staleness",
        "discarded: zero variance", "The books balance", "publishing weights, s", "guard warned",
        "an actor was restarted", "rollout.groups_per_step", "commit", "The learner waited for groups",
    ):  # fmt: skip
        assert words in page.text, words
    assert page.tags.count("svg") >= 9
    assert page.tags.count("img") == 4


def test_the_page_needs_nothing_and_runs_nothing(page: Outline) -> None:
    assert not {"script", "iframe", "object", "embed", "form", "base"} & set(page.tags)
    assert all(source.startswith(("data:", "#")) for source in page.sources)
    assert len(page.ids) == len(set(page.ids)), "inline SVGs must not share ids"


def test_a_prompt_is_text(page: Outline) -> None:
    assert HOSTILE in page.text


def test_runs_beside_each_other(tmp_path: Path) -> None:
    first, second = make_run(tmp_path, "first"), make_run(tmp_path, "second", steps=6, seed=9)
    page = Outline(render([read_run(first), read_run(second)]))
    for words in ("first", "second", "Where they differ", "before", "after"):
        assert words in page.text
    assert page.tags.count("img") == 8, "the same prompts and seeds of both runs, before and after"
    differences = config_differences([read_run(first), read_run(second)])
    assert differences == {"name": ["first", "second"], "seed": ["3", "9"]}


def test_a_run_that_crashed_before_its_first_step(tmp_path: Path) -> None:
    run = RunFolder.create(config_of(tmp_path))
    page = Outline(render([read_run(run)]))
    for words in (
        "empty",
        "No ledger could be read",
        "no learner step has ended",
        "No image pairs",
        "Nothing to judge",
    ):
        assert words in page.text


def test_a_judging_column_that_is_no_share_is_shown_as_a_number(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    run.events.write_text(run.events.read_text().replace('"accuracy": 0.5', '"accuracy": 137.25'))
    view = read_run(run)
    assert key_figures(view)["held-out score"] == "0.25 → 137.2"
    assert "held-out accuracy" not in Outline(render([view])).text


def test_a_failed_run_says_why(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    run.write_json("summary.json", {"outcome": "failed: ScoringError: the jury is out", "train_seconds": 1.0})
    assert "failed: ScoringError: the jury is out" in Outline(render([read_run(run)])).text


def test_an_image_that_is_gone_or_torn_is_said_to_be(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    (run.samples / "after" / "000.png").write_bytes(b"no image")
    cards = image_cards([read_run(run)])
    assert [bool(one.uri) for one in cards[0].strips["made-up"]] == [True, False]
    assert "not kept" in Outline(render([read_run(run)])).text


def test_images_between_are_thinned_and_large_ones_are_shrunk(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    for step in (1, 2, 3):
        keep(run, f"step {step}", step, [0.0, 0.0])
    Image.fromarray(np.zeros((1000, 500, 3), np.uint8)).save(run.samples / "after" / "000.png")
    (images,) = image_cards([read_run(run)])[0].strips.values()
    assert [one.label for one in images] == ["before", "step 2", "step 3", "after"]
    assert len(images) == MAX_SETS
    assert images[-1].uri.startswith("data:image/webp")
    assert len(images[-1].uri) < THUMBNAIL**2


def test_the_report_command_and_where_it_writes(tmp_path: Path) -> None:
    run = make_run(tmp_path, "one")
    make_run(tmp_path, "two")
    done = CliRunner().invoke(main, ["report", "one", "--runs-dir", str(tmp_path)])
    assert (done.exit_code, done.output.strip()) == (0, str(run.report))
    assert run.report.stat().st_size > 50_000
    both = write_report(["one", "two"], runs_dir=str(tmp_path))
    assert both == str(run.root / "report-one-two.html")
    with pytest.raises(ConfigError, match="--out"):
        write_report(["one"], str(tmp_path / "no" / "folder.html"), str(tmp_path))
    missing = CliRunner().invoke(main, ["report", "three", "--runs-dir", str(tmp_path)])
    assert (missing.exit_code, "there is no run" in missing.stderr) == (2, True)


def test_a_report_goes_where_its_run_stands(tmp_path: Path) -> None:
    url = f"memory://{tmp_path.name}/report/made-up"
    remote = RunFolder(make_run(tmp_path).root, url)
    remote.sync()
    assert write_report([url]) == f"{url}/report.html"
    import fsspec

    assert b"<svg" in fsspec.filesystem("memory").cat_file(f"/{tmp_path.name}/report/made-up/report.html")


class Told:
    def __init__(self) -> None:
        self.events: list[tuple[str, dict[str, Any]]] = []

    def event(self, kind: str, **fields: Any) -> None:
        self.events.append((kind, fields))


def test_the_report_at_the_end_never_fails_the_run(tmp_path: Path) -> None:
    told, run = Told(), make_run(tmp_path, ended=False)
    asyncio.run(write_at_end(config_of(tmp_path), run, told))
    assert "crashed" in Outline(run.report.read_text()).text
    run.report.unlink()
    run.report.mkdir()  # nothing can be written there
    asyncio.run(write_at_end(config_of(tmp_path), run, told))
    assert [kind for kind, _ in told.events] == ["report_failed"]
    asyncio.run(write_at_end(config_of(tmp_path, telemetry={"report": False}), run, told))
    assert len(told.events) == 1, "nothing is tried when the report is off"


def test_a_moving_average_keeps_length_and_mean() -> None:
    noisy = np.random.default_rng(0).normal(size=200)
    smooth = plots.moving_average(noisy)
    assert smooth.shape == noisy.shape
    assert smooth.std() < 0.5 * noisy.std()
    np.testing.assert_allclose(plots.moving_average(np.full(200, 3.0)), 3.0)
    np.testing.assert_array_equal(plots.moving_average(noisy[:5]), noisy[:5])


def test_plots_take_the_colours_of_the_page() -> None:
    svg = plots.columns({"a $x$ < b": 1.0, "c": 2.0}, colour=3)
    assert "a $x$ &lt; b" in svg, "no formula, no markup"
    assert "var(--c3)" in svg
    assert "var(--plot-text)" in svg
    assert not re.search(r"#0f0f..", svg)

"""The report in headless Chromium: no console message, no request, images there, nothing wider than the window."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster.report.page import render
from cluster.report.view import read_run
from tests.cluster.made_up_run import make_run

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")

OVERFLOWING = """() => [...document.querySelectorAll('body *')]
    .filter(e => e.getBoundingClientRect().right > innerWidth + 1 && !e.closest('.scroll') && !e.closest('svg'))
    .map(e => e.tagName + '.' + e.className)"""
SMALLEST_TEXT = """() => Math.min(...[...document.querySelectorAll('svg text')]
    .map(e => e.getBoundingClientRect().height).filter(height => height > 0))"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("runs")
    first, second = read_run(make_run(folder, "first")), read_run(make_run(folder, "a-second-run-with-a-long-name"))
    files = {"one": folder / "one.html", "two": folder / "two.html"}
    files["one"].write_text(render([first]))
    files["two"].write_text(render([first, second]))
    return files


@pytest.mark.parametrize("which", ["one", "two"])
@pytest.mark.parametrize("width", [1280, 400])
def test_a_report_in_a_browser(browser: Any, files: dict[str, Path], which: str, width: int) -> None:
    scheme = "light" if width == 1280 else "dark"
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    try:
        page, messages, requests = context.new_page(), [], []
        page.on("console", lambda message: messages.append(message.text))
        page.on("pageerror", lambda error: messages.append(str(error)))
        page.on("request", lambda request: requests.append(request.url))
        page.goto(files[which].as_uri())
        assert messages == []
        assert [url for url in requests if not url.startswith(("file:", "data:"))] == []
        images = page.evaluate("() => [...document.images].map(image => image.complete && image.naturalWidth)")
        assert len(images) == (4 if which == "one" else 8)
        assert all(images)
        assert page.evaluate("() => document.documentElement.scrollWidth") <= width
        assert page.evaluate(OVERFLOWING) == []
        assert page.evaluate(SMALLEST_TEXT) > 9, "text in plots stays readable"
        background = page.evaluate("() => getComputedStyle(document.body).backgroundColor")
        assert background == ("rgb(251, 250, 248)" if scheme == "light" else "rgb(23, 23, 25)")
    finally:
        context.close()

"""Plots of the report: inline SVG by matplotlib, small enough to stand beside each other, coloured by the page.

matplotlib draws (the library everybody keeps well; SVG needs no script and no second file, so the page stays one file
that opens anywhere); plotly's bundle would add 4.5 MB to every report. Colours are written as CSS variables, so that
one SVG serves the light and the dark page.
Does not own: which series are shown (panels.py), the page (page.py).
"""

from __future__ import annotations

import io
import re
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

TEXT, GRID = "#0f0f01", "#0f0f02"
RUN_COLOURS = ("#0f0f10", "#0f0f11", "#0f0f12", "#0f0f13", "#0f0f14", "#0f0f15", "#0f0f16", "#0f0f17")
_VARIABLES = {TEXT: "var(--plot-text)", GRID: "var(--plot-grid)"} | {
    colour: f"var(--c{index})" for index, colour in enumerate(RUN_COLOURS)
}
SIZE = (4.3, 2.35)
MAX_POINTS = 500
MAX_LABEL = 18
_STYLE = {
    "svg.fonttype": "none",  # text stays text: sharp, searchable, in the page's font
    "text.parse_math": False,  # a `$` in a scorer's name is a `$`
    "font.size": 8.5,
    "axes.edgecolor": GRID, "axes.labelcolor": TEXT, "text.color": TEXT, "xtick.color": TEXT, "ytick.color": TEXT,
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": GRID, "grid.linewidth": 0.6,
    "axes.axisbelow": True, "xtick.major.size": 0, "ytick.major.size": 0,
    "axes.formatter.useoffset": False, "axes.formatter.limits": (-3, 5),
}  # fmt: skip
_drawing = threading.Lock()  # rc_context changes the library's global settings


@dataclass(frozen=True)
class Line:
    """One run's curve: x, y of equal length; spread: half-width of a band, or None; points: markers beside the curve.

    run: index of the run, which decides the colour; name: for the page's legend, empty for none.
    """

    run: int
    x: Sequence[float]
    y: Sequence[float]
    name: str = ""
    spread: Sequence[float] | None = None
    points: Sequence[tuple[float, float, float]] = ()  # x, y, error


@dataclass(frozen=True)
class Bars:
    """Horizontal stacked shares: one bar a label, its parts by name."""

    labels: Sequence[str]
    parts: Mapping[str, Sequence[float]] = field(default_factory=dict)


def curves(lines: Sequence[Line], xlabel: str = "step", percent: bool = False) -> str:
    """Curves as SVG. A noisy curve is drawn faintly with its moving average on top."""

    def draw(axes: Axes) -> None:
        for line in lines:
            _draw_line(axes, line)
        axes.set_xlabel(xlabel)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=xlabel == "step"))
        axes.yaxis.set_major_locator(MaxNLocator(nbins=5))
        _widen_flat(axes)
        if percent:
            axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:g}%")

    return _svg(draw, SIZE)


def columns(values: dict[str, float], xlabel: str = "", colour: int = 0) -> str:
    """Vertical bars with their values above."""

    def draw(axes: Axes) -> None:
        bars = axes.bar(list(values), list(values.values()), color=RUN_COLOURS[colour], width=0.6)
        axes.bar_label(bars, labels=[f"{value:g}" for value in values.values()], padding=2, fontsize=7.5)
        axes.grid(visible=False, axis="x")
        axes.set_xlabel(xlabel)
        axes.yaxis.set_major_locator(MaxNLocator(nbins=4))
        axes.margins(y=0.15)

    return _svg(draw, SIZE)


def grouped_rows(groups: Mapping[str, Sequence[float | None]], percent: bool = False) -> str:
    """Horizontal bars, one group a label, one bar a value, coloured in their order; None is left out."""
    number = max(map(len, groups.values()), default=1)

    def draw(axes: Axes) -> None:
        height = 0.8 / number
        for index in range(number):
            values = [of_group[index] for of_group in groups.values()]
            there = [(row, value) for row, value in enumerate(values) if value is not None]
            axes.barh(
                [row + (index - (number - 1) / 2) * height for row, _ in there], [value for _, value in there],
                height * 0.9, color=RUN_COLOURS[index % len(RUN_COLOURS)],
            )  # fmt: skip
        axes.set_yticks(range(len(groups)), [short(label) for label in groups])
        axes.invert_yaxis()
        axes.grid(visible=False, axis="y")
        if percent:
            axes.xaxis.set_major_formatter(lambda value, _: f"{100 * value:g}%")

    return _svg(draw, (SIZE[0], max(SIZE[1], 0.5 + 0.3 * len(groups) * max(1.0, 0.6 * number))))


def shares(bars: Bars) -> str:
    """Stacked horizontal bars of shares, each row summing to one; parts take the colours in their order."""

    def draw(axes: Axes) -> None:
        left = np.zeros(len(bars.labels))
        for index, parts in enumerate(bars.parts.values()):
            widths = np.asarray(parts, dtype=float)
            colour = RUN_COLOURS[index % len(RUN_COLOURS)]
            drawn = axes.barh(range(len(widths)), widths, left=left, height=0.55, color=colour)
            axes.bar_label(
                drawn, labels=[f"{width:.0%}" if width > 0.06 else "" for width in widths], label_type="center",
                fontsize=7.5, color="white",
            )  # fmt: skip
            left += widths
        axes.set_yticks(range(len(bars.labels)), [short(label) for label in bars.labels])
        axes.set_xlim(0, 1)
        axes.invert_yaxis()
        axes.grid(visible=False)
        axes.spines["bottom"].set_visible(False)
        axes.xaxis.set_visible(False)

    return _svg(draw, (SIZE[0], 0.3 + 0.4 * len(bars.labels)))


def short(label: str) -> str:
    """A label that leaves room for the bar."""
    return label if len(label) <= MAX_LABEL else f"{label[: MAX_LABEL - 1]}…"


def _widen_flat(axes: Axes) -> None:
    """Rounding errors of a constant are no curve: give it a range in which it is flat."""
    low, high = axes.get_ylim()
    size = max(abs(low), abs(high))
    if high - low < 1e-4 * size:
        middle = (low + high) / 2
        axes.set_ylim(middle - 0.1 * size, middle + 0.1 * size)


def _draw_line(axes: Axes, line: Line) -> None:
    colour = RUN_COLOURS[line.run % len(RUN_COLOURS)]
    x, y = np.asarray(line.x, dtype=float), np.asarray(line.y, dtype=float)
    smooth = moving_average(y)
    keep: np.ndarray = np.unique(np.linspace(0, max(len(x) - 1, 0), min(len(x), MAX_POINTS)).round().astype(int))
    if len(x):
        axes.plot(x[keep], y[keep], color=colour, alpha=0.3, linewidth=0.7)
        if line.spread is not None:
            half = moving_average(np.asarray(line.spread, dtype=float))
            low, high = (smooth - half)[keep], (smooth + half)[keep]
            axes.fill_between(x[keep], low, high, color=colour, alpha=0.12, linewidth=0)
        axes.plot(x[keep], smooth[keep], color=colour, linewidth=1.5)
    if line.points:
        px, py, error = (np.asarray(each, dtype=float) for each in zip(*line.points, strict=True))
        form = "o" if len(x) else "o-"
        axes.errorbar(px, py, yerr=error, fmt=form, color=colour, markersize=4, capsize=2, linewidth=1)


def moving_average(values: np.ndarray) -> np.ndarray:
    """Centred mean over a tenth of the curve (at most 51 points), shorter at its ends; the same length."""
    width = min(51, len(values) // 10 * 2 // 2)
    half = width // 2
    if half < 1:
        return values
    total = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(len(values))
    low, high = np.maximum(index - half, 0), np.minimum(index + half + 1, len(values))
    return (total[high] - total[low]) / (high - low)


def _svg(draw: object, size: tuple[float, float]) -> str:
    """The SVG element of one figure, with colours as variables and ids of its own."""
    with _drawing, matplotlib.rc_context(_STYLE):  # type: ignore[arg-type]
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasSVG(figure)
        draw(figure.add_subplot())  # type: ignore[operator]
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return _for_page(buffer.getvalue())


_figures = 0


def _for_page(text: str) -> str:
    """Without the XML head and fixed size; ids that nothing refers to are dropped, the others made unique."""
    global _figures
    _figures += 1
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1))
    used = set(re.findall(r'(?:url\(#|href="#)([^")]+)', text))
    prefix = f"f{_figures}-"
    text = re.sub(r' id="([^"]+)"', lambda m: f' id="{prefix}{m[1]}"' if m[1] in used else "", text)
    text = re.sub(r'(url\(#|href="#)', rf"\g<1>{prefix}", text)
    for colour, variable in _VARIABLES.items():
        text = text.replace(colour, variable)
    return text

"""The curves of a run as inline SVG."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

#: Heading, the logged keys that belong into the chart, and whether their values are shares.
_CHARTS: tuple[tuple[str, re.Pattern[str], bool], ...] = (
    ("Training loss", re.compile(r"train/loss(_step|_epoch)?"), False),
    ("In-batch accuracy", re.compile(r"train/accuracy(_step|_epoch)?"), True),
    ("Learning rate", re.compile(r"(.*/)?lr(-.*)?"), False),
    ("hit@5", re.compile(r".*/hit@5"), True),
    ("modality@1", re.compile(r".*/modality@1"), True),
)

# Colours that stand for CSS variables: the charts are drawn once and follow the reader's light or dark mode.
_INK, _GRID, _FAINT, _MINED = "#0a0b01", "#0a0b02", "#0a0b03", "#0a0b04"
_LINES = ("#0a0b10", "#0a0b11", "#0a0b12", "#0a0b13", "#0a0b14", "#0a0b15")
_CSS_COLOURS = {
    **{_INK: "var(--muted)", _GRID: "var(--line)", _FAINT: "var(--faint)", _MINED: "var(--mined)"},
    **{colour: f"var(--series-{n})" for n, colour in enumerate(_LINES)},
}

#: More points than the width of a chart has pixels only make the file larger.
_MAX_POINTS = 400

_Series = dict[str, list[tuple[float, float]]]


@dataclass(frozen=True)
class Chart:
    """A drawn chart.

    Args:
        heading: What is drawn.
        svg: The drawing, for inlining into a page that defines the colour variables.
        legend: Key, number of its colour, and last value of every line.
        shares: Whether the values are shares from 0 to 1.
        faint: Number of unlabelled lines of single tasks.
        mined: Number of marked mining events.
    """

    heading: str
    svg: Markup
    legend: tuple[tuple[str, int, float], ...]
    shares: bool
    faint: int
    mined: int


def draw_charts(history: Sequence[Mapping[str, Any]]) -> list[Chart]:
    """Draw a chart for every group of keys that ``history`` holds; rows with a ``"mined"`` key mark mining events."""
    mined = sorted({row["step"] for row in history if row.get("mined") is not None})
    drawn = {heading: _series(history, pattern) for heading, pattern, _ in _CHARTS}
    # One range of steps for all, so that an event stands at the same place in every chart.
    steps = [step for series in drawn.values() for line in series.values() for step, _ in line] + mined
    charts = []
    for heading, _, shares in _CHARTS:
        series = drawn[heading]
        # Sixteen coloured lines tell nothing: single tasks stay faint behind the averages.
        main = [key for key in series if "_task" not in key]
        legend = tuple((key, n % len(_LINES), series[key][-1][1]) for n, key in enumerate(main))
        if series:
            svg = _draw(heading, series, main, mined, shares, (min(steps), max(steps)))
            charts.append(Chart(heading, svg, legend, shares, len(series) - len(main), len(mined)))
    return charts


def _series(history: Sequence[Mapping[str, Any]], pattern: re.Pattern[str]) -> _Series:
    """The ``(step, value)`` points of every key that ``pattern`` matches; long runs are averaged in buckets."""
    points: _Series = {}
    for row in history:
        for key, value in row.items():
            if row.get("step") is not None and isinstance(value, int | float) and pattern.fullmatch(key):
                # An infinite loss is drawn as a gap, like NaN: it would stretch the axis without end.
                points.setdefault(key, []).append((row["step"], value if math.isfinite(value) else math.nan))
    thinned: _Series = {}
    for key, line in sorted(points.items()):
        size = math.ceil(len(line) / _MAX_POINTS)
        buckets = [line[start : start + size] for start in range(0, len(line), size)]
        thinned[key] = [(bucket[-1][0], sum(y for _, y in bucket) / len(bucket)) for bucket in buckets]
    return {key: line for key, line in thinned.items() if any(math.isfinite(y) for _, y in line)}


def _draw(
    heading: str, series: _Series, main: list[str], mined: list[int], shares: bool, steps: tuple[float, float]
) -> Markup:
    """Draw one chart as inline SVG whose colours are CSS variables and whose words are text."""
    figure = Figure(figsize=(4.6, 2.3), layout="constrained")
    figure.patch.set_visible(False)
    axes = figure.add_subplot()
    axes.patch.set_visible(False)
    for step in mined:
        axes.axvline(step, color=_MINED, linewidth=1, linestyle=(0, (4, 3)))
    for key, line in series.items():
        colour = _LINES[main.index(key) % len(_LINES)] if key in main else _FAINT
        marker = "o" if len(line) <= 30 and key in main else ""
        axes.plot(*zip(*line, strict=True), color=colour, linewidth=1.6 if key in main else 0.8, marker=marker, ms=3.5)
    if steps[0] < steps[1]:
        margin = 0.02 * (steps[1] - steps[0])
        axes.set_xlim(steps[0] - margin, steps[1] + margin)
    _style(axes, shares)
    out = io.StringIO()
    # The salt keeps the ids of clip paths and markers apart from those of the page's other charts.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": heading}):
        figure.savefig(out, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    return _inline(out.getvalue())


def _style(axes: Axes, shares: bool) -> None:
    """Keep of the axes what helps to read values off."""
    if shares:
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.set_xlabel("step", color=_INK, fontsize=9)
    axes.tick_params(colors=_INK, labelsize=9, length=0)
    axes.yaxis.get_offset_text().set_color(_INK)
    axes.grid(axis="y", color=_GRID, linewidth=0.8)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(_GRID)
    axes.set_axisbelow(True)


def _inline(svg: str) -> Markup:
    """Make a part of an HTML page of an SVG file."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r'<svg [^>]*?(viewBox="[^"]*")[^>]*>', r'<svg \1 aria-hidden="true">', svg, count=1)
    # matplotlib numbers its groups alike in every figure, and an id must occur once in a page.
    svg = re.sub(r'<g id="[\w.]+_\d+"', "<g", svg)
    return Markup(re.sub("|".join(_CSS_COLOURS), lambda match: _CSS_COLOURS[match[0]], svg))

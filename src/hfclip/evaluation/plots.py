"""Plots of results, from their stored tables, as PNG for documents and SVG for pages, whose text takes the page's colour."""

import io
import itertools
import os
import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np

from ..errors import UsageError
from .task import Plot


# Of lines and points, told apart by those who do not see all colours (Okabe and Ito), and on light and dark pages.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#999999")
INK = "#1f2934"  # text and axes; in SVG the colour of the text around it
STYLE = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#8888884d",
    "grid.linewidth": 0.7,
    "svg.fonttype": "none",
    "svg.hashsalt": "hfclip",  # the same plot is the same file
}
MARKERS = "osD^v*PX"
FAINT = "#9aa5b1"
LARGEST = 120  # rows and columns of an array that is drawn
# Of logit axes, from fine to coarse: the first that are few enough are drawn.
FEW_TICKS = 12
PERCENT_TICKS = (
    (0.1, 0.2, 0.5, *range(1, 100), 99.5, 99.8, 99.9),
    (0.1, 0.2, 0.5, 1, 2, *range(5, 96, 5), 98, 99, 99.5, 99.8, 99.9),
    (0.1, 0.5, 1, 2, 5, *range(10, 91, 10), 95, 98, 99, 99.5, 99.9),
)

Row = Mapping[str, Any]  # of a table


class Drawing(NamedTuple):
    title: str
    svg: str
    png: bytes


def draw(plot: Plot, tables: Mapping[str, Sequence[Row]], path: str | os.PathLike | None = None) -> Drawing | None:
    """Draws a table as its plot says; None if no row has a place on both axes.

    Args:
        path: file that it is written into, too, as its ending says (.png, .svg, .pdf ...).
    """
    rows, lines = (_drawable(plot, tables.get(name, ())) for name in (plot.table, plot.line))
    if not rows:
        return None
    series, of_lines = _grouped(rows, plot.series), _grouped(lines, plot.series)
    with _figure(6.4, 4.2) as figure:
        axes = figure.subplots()
        bars = list(dict.fromkeys(str(row[plot.x]) for row in rows)) if plot.kind == "bar" else []
        width, marks = 0.8 / len(series), _marks(plot, rows)
        for number, (name, points) in enumerate(series.items()):
            places = [point[plot.x] for point in points]
            if bars:
                places = [bars.index(str(x)) + (number - (len(series) - 1) / 2) * width for x in places]
            _draw_series(axes, plot, points, places, number, width, marks)
            _draw_line(axes, plot, of_lines.get(name, []), COLOURS[number % len(COLOURS)])
        if bars:
            axes.set_xticks(range(len(bars)), bars, rotation=90 if len(bars) > 8 else 0)
        _set_axes(axes, plot, [*rows, *lines])
        _add_legend(axes, series, marks)
        return _drawing(figure, plot.title or plot.table.replace("_", " "), path)


def _drawable(plot: Plot, rows: Sequence[Row]) -> list[Row]:
    """The rows that have both coordinates, and a place for them on their axes."""
    ranges = {"linear": (-np.inf, np.inf), "log": (0, np.inf), "logit": (0, 1)}
    scales = {plot.y: plot.y_scale} if plot.kind == "bar" else {plot.x: plot.x_scale, plot.y: plot.y_scale}

    def has_place(row: Row, name: str, low: float, high: float) -> bool:
        return row.get(name) is not None and low < row[name] < high

    return [row for row in rows if all(has_place(row, name, *ranges[scale]) for name, scale in scales.items())]


def _grouped(rows: Sequence[Row], column: str | None) -> dict[Any, list[Row]]:
    """Rows by their value of a column."""
    groups: dict[Any, list[Row]] = {}
    for row in rows:
        groups.setdefault(row.get(column), []).append(row)
    return groups


def _marks(plot: Plot, rows: Sequence[Row]) -> dict[Any, str]:
    """The mark of each value of the column that tells them apart."""
    return dict(zip(_grouped(rows, plot.marker), itertools.cycle(MARKERS), strict=False)) if plot.marker else {}


def draw_array(name: str, array: np.ndarray) -> Drawing | None:
    """Draws an array as a map of colours, such as a confusion matrix; None if it is none of a size that can be seen."""
    if array.ndim != 2 or not 2 <= max(array.shape) <= LARGEST or array.shape[0] == 1:
        return None
    with _figure(5.2, 4.6) as figure:
        axes = figure.subplots()
        axes.grid(False)
        image = axes.imshow(array, cmap="viridis", interpolation="nearest")
        figure.colorbar(image, ax=axes, shrink=0.8)
        return _drawing(figure, name.replace("_", " "))


def draw_overview(rows: Sequence[tuple[str, Mapping[str, float]]], title: str) -> Drawing:
    """Draws a dot per model and data set.

    Args:
        rows: data sets with values in percent by model.
    """
    models = list(dict.fromkeys(model for _, values in rows for model in values))
    with _figure(6.8, 1.1 + 0.28 * len(rows) + 0.2 * len(models)) as figure:
        axes = figure.subplots()
        for number, model in enumerate(models):
            places = [(values[model], place) for place, (_, values) in enumerate(rows) if model in values]
            hollow = {"markerfacecolor": "none"} if model.startswith("paper") else {}
            style = {"color": COLOURS[number % len(COLOURS)], "marker": MARKERS[number % len(MARKERS)], **hollow}
            axes.plot(*zip(*places, strict=True), linestyle="", markersize=7, label=model, clip_on=False, **style)
        # Long names would leave no room; the table has them.
        axes.set_yticks(range(len(rows)), [textwrap.shorten(name, 40, placeholder=" ...") for name, _ in rows])
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.set_xlim(0, 100)
        axes.set_xlabel("%")
        axes.tick_params(axis="y", length=0)
        axes.legend(frameon=False, fontsize=9, loc="lower left", bbox_to_anchor=(0, 1), ncols=2)
        return _drawing(figure, title)


def _draw_series(
    axes: Any, plot: Plot, points: list[Row], places: list, number: int, width: float, marks: Mapping[Any, str]
) -> None:
    """Draws the points of a series at `places` of the x axis, bars in their width."""
    colour, y = COLOURS[number % len(COLOURS)], [point[plot.y] for point in points]
    name = None if plot.series is None else str(points[0].get(plot.series))
    line = {"color": colour, "linewidth": 1.6, "linestyle": "" if plot.kind == "scatter" else "-", "markersize": 5}
    if plot.kind == "bar":
        axes.bar(places, y, width, color=colour, label=name)
    elif marks:
        axes.plot([], [], **{**line, "linestyle": "-", "linewidth": 4}, label=name)
        for point in points:
            style = {"marker": marks[point.get(plot.marker)], "markeredgecolor": "white", "markersize": 8}
            axes.plot(point[plot.x], point[plot.y], **{**line, **style}, zorder=3)
    else:
        axes.plot(places, y, **line, marker=MARKERS[number % len(MARKERS)], label=name)
    if plot.error:
        low, high = (np.array([point.get(end) for point in points], float) for end in plot.error)
        away = np.abs(np.stack([np.array(y) - low, high - np.array(y)]))
        axes.errorbar(places, y, yerr=np.nan_to_num(away), fmt="none", ecolor=colour, capsize=3, linewidth=1)
    for point in points if plot.label else ():
        at = (point[plot.x], point[plot.y])
        axes.annotate(str(point.get(plot.label, "")), at, (4, 4), textcoords="offset points", fontsize=8)


def _draw_line(axes: Any, plot: Plot, points: list[Row], colour: str) -> None:
    """Draws the line that goes with a series, within its band."""
    x, y = ([point[name] for point in points] for name in (plot.x, plot.y))
    axes.plot(x, y, color=colour, linewidth=1.4)
    if plot.band and points:
        axes.fill_between(x, *([point[end] for point in points] for end in plot.band), color=colour, alpha=0.12, lw=0)


def _set_axes(axes: Any, plot: Plot, rows: Sequence[Row]) -> None:
    axes.set_xlabel(plot.x_label or plot.x.replace("_", " "))
    axes.set_ylabel(plot.y_label or plot.y.replace("_", " "))
    if plot.kind != "bar":
        _set_scale(axes.xaxis, axes.set_xscale, axes.set_xlim, plot.x_scale, [row[plot.x] for row in rows])
    _set_scale(axes.yaxis, axes.set_yscale, axes.set_ylim, plot.y_scale, [row[plot.y] for row in rows])
    if plot.x_scale == plot.y_scale == "logit":
        same = np.linspace(*axes.get_xlim(), 200)
        axes.plot(same, same, color=FAINT, linewidth=1.2, linestyle="--", label="equal", scaley=False)


def _set_scale(axis: Any, set_scale: Any, set_limits: Any, scale: str, values: list[float]) -> None:
    """Sets the scale of an axis; logits have their ticks in percent, and short logarithmic axes numbers between powers."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

    if scale == "logit":
        low, high = _with_room(min(values), max(values))
        set_limits(low, high)
        inside = [[tick / 100 for tick in ticks if low <= tick / 100 <= high] for ticks in PERCENT_TICKS]
        ticks = FixedLocator(next((ticks for ticks in inside if len(ticks) <= FEW_TICKS), inside[-1]))
    decades = np.log10(max(values) / min(values)) if scale == "log" else np.inf
    if scale == "log" and decades < 3:
        ticks = LogLocator(subs=(1, 2, 5) if decades > 1 else (1, 1.5, 2, 2.5, 3, 4, 5, 6, 8))
    set_scale(scale)
    if scale == "logit" or decades < 3:
        axis.set_major_locator(ticks)
        axis.set_minor_locator(NullLocator())
        percent = scale == "logit"
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g}%" if percent else f"{value:g}"))


def _with_room(low: float, high: float) -> tuple[float, float]:
    """A range with some room on both sides, within 0..1, measured as logits are."""
    ends = np.log(np.array([low, high]) / (1 - np.array([low, high])))
    ends += np.array([-1, 1]) * max(0.08 * (ends[1] - ends[0]), 0.3)
    return tuple(1 / (1 + np.exp(-ends)))


def _add_legend(axes: Any, series: Mapping[Any, Any], marks: Mapping[Any, str]) -> None:
    for name, mark in marks.items():
        axes.plot([], [], color=INK, marker=mark, linestyle="", markeredgecolor="white", markersize=8, label=str(name))
    if marks:
        axes.legend(frameon=False, fontsize=9, loc="upper left", bbox_to_anchor=(1.01, 1))
    elif len(series) > 1:
        axes.legend(frameon=False, fontsize=9)


@contextmanager
def _figure(width: float, height: float) -> Iterator[Any]:
    """A figure in the style of all."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UsageError("Plots are drawn by matplotlib: `pip install 'hfclip[evaluate]'`.") from error
    with matplotlib.rc_context(STYLE):  # a figure of its own: pyplot's would stay in memory, and look for a screen
        yield Figure((width, height), dpi=150, layout="constrained")


def _drawing(figure: Any, title: str, path: str | os.PathLike | None = None) -> Drawing:
    if path is not None:
        figure.savefig(path)
    png, svg = io.BytesIO(), io.StringIO()
    figure.savefig(png, format="png", metadata={"Software": None})
    figure.savefig(svg, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = re.sub(r"<metadata>.*?</metadata>", "", svg.getvalue(), flags=re.DOTALL)
    return Drawing(title, text[text.index("<svg") :].replace(INK, "currentColor"), png.getvalue())

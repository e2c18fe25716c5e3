"""Plots of results, from their stored tables, as PNG for documents and SVG for pages, whose text takes the page's colour."""

import io
import re
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
LARGEST = 120  # rows and columns of an array that is drawn


class Drawing(NamedTuple):
    title: str
    svg: str
    png: bytes


def draw(plot: Plot, rows: Sequence[Mapping[str, Any]]) -> Drawing | None:
    """Draws a table as its plot says; None if no row has both coordinates."""
    rows = [row for row in rows if row.get(plot.x) is not None and row.get(plot.y) is not None]
    if not rows:
        return None
    series: dict[Any, list] = {}
    for row in rows:
        series.setdefault(row.get(plot.series) if plot.series else None, []).append(row)
    with _figure(6.4, 4.2) as figure:
        axes = figure.subplots()
        bars = list(dict.fromkeys(str(row[plot.x]) for row in rows)) if plot.kind == "bar" else []
        width = 0.8 / len(series)
        for number, (name, points) in enumerate(series.items()):
            places = [point[plot.x] for point in points]
            if bars:
                places = [bars.index(str(x)) + (number - (len(series) - 1) / 2) * width for x in places]
            _draw_series(axes, plot, points, places, None if name is None else str(name), number, width)
        if bars:
            axes.set_xticks(range(len(bars)), bars, rotation=90 if len(bars) > 8 else 0)
        _set_axes(axes, plot)
        if plot.series and len(series) > 1:
            axes.legend(frameon=False, fontsize=9)
        return _drawing(figure, plot.title or plot.table.replace("_", " "))


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
        axes.set_yticks(range(len(rows)), [name for name, _ in rows])
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.set_xlim(0, 100)
        axes.set_xlabel("%")
        axes.tick_params(axis="y", length=0)
        axes.legend(frameon=False, fontsize=9, loc="lower left", bbox_to_anchor=(0, 1), ncols=2)
        return _drawing(figure, title)


def _draw_series(
    axes: Any, plot: Plot, points: list, places: list, name: str | None, number: int, width: float
) -> None:
    """Draws the points of a series at `places` of the x axis, bars in their width."""
    colour, y = COLOURS[number % len(COLOURS)], [point[plot.y] for point in points]
    if plot.kind == "bar":
        axes.bar(places, y, width, color=colour, label=name)
    else:
        style = {"linestyle": "" if plot.kind == "scatter" else "-", "marker": MARKERS[number % len(MARKERS)]}
        axes.plot(places, y, color=colour, label=name, markersize=5, linewidth=1.6, **style)
    if plot.error:
        low, high = (np.array([point.get(end) for point in points], float) for end in plot.error)
        away = np.abs(np.stack([np.array(y) - low, high - np.array(y)]))
        axes.errorbar(places, y, yerr=np.nan_to_num(away), fmt="none", ecolor=colour, capsize=3, linewidth=1)
    if plot.label:
        for point in points:
            at = (point[plot.x], point[plot.y])
            axes.annotate(str(point.get(plot.label, "")), at, (4, 4), textcoords="offset points", fontsize=8)


def _set_axes(axes: Any, plot: Plot) -> None:
    if plot.kind != "bar":
        axes.set_xscale(plot.x_scale)
    axes.set_yscale(plot.y_scale)
    axes.set_xlabel(plot.x_label or plot.x.replace("_", " "))
    axes.set_ylabel(plot.y_label or plot.y.replace("_", " "))


@contextmanager
def _figure(width: float, height: float) -> Iterator[Any]:
    """A figure in the style of all."""
    figure = new_figure(width, height)
    import matplotlib

    with matplotlib.rc_context(STYLE):
        yield figure


def new_figure(width: float, height: float) -> Any:
    """An empty figure, in inches. Of its own: pyplot's would stay in memory, and look for a screen."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UsageError("Plots are drawn by matplotlib: `pip install 'hfclip[evaluate]'`.") from error
    return Figure((width, height), dpi=150, layout="constrained")


def _drawing(figure: Any, title: str) -> Drawing:
    png, svg = io.BytesIO(), io.StringIO()
    figure.savefig(png, format="png", metadata={"Software": None})
    figure.savefig(svg, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = re.sub(r"<metadata>.*?</metadata>", "", svg.getvalue(), flags=re.DOTALL)
    return Drawing(title, text[text.index("<svg") :].replace(INK, "currentColor"), png.getvalue())

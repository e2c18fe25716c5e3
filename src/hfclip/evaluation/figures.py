"""Figures of the paper from numbers of any origin, as PNG, SVG or whatever else matplotlib writes by its ending.

draw_robustness    accuracy under shift against that on the reference, on logit axes (figures 13 and 14)
draw_overlap       what overlap with the training data does to accuracy (figure 17)
draw_scaling       error against compute, on logarithmic axes (figure 9)
"""

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import UsageError
from .plots import COLOURS, INK, MARKERS, new_figure


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


FAINT = "#9aa5b1"
# In percent, from fine to coarse: the first that are few enough are drawn.
FEW_TICKS = 12
TICKS = (
    (0.1, 0.2, 0.5, *range(1, 100), 99.5, 99.8, 99.9),
    (0.1, 0.2, 0.5, 1, 2, *range(5, 96, 5), 98, 99, 99.5, 99.8, 99.9),
    (0.1, 0.5, 1, 2, 5, *range(10, 91, 10), 95, 98, 99, 99.5, 99.9),
)


def draw_robustness(
    path: str | os.PathLike,
    points: Sequence[Mapping[str, Any]],
    fits: Mapping[str, Any] | None = None,
    *,
    reference: str = "ImageNet",
) -> None:
    """Writes a plot of accuracies on logit axes in percent, with the line of equal accuracies and those of other models.

    Args:
        points: mappings with `set`, `reference_top1`, `top1` and `origin` (a model, "linear probe", "paper" ...), which
            tells the markers apart; the set tells the colours.
        fits: lines of other models (`robustness.Fit`), by the name of the set.
        reference: its name, on the axis.

    Raises:
        UsageError: there is no point between 0 and 1, or matplotlib is missing.
    """
    points = [point for point in points if 0 < point["reference_top1"] < 1 and 0 < point["top1"] < 1]
    if not points:
        raise UsageError("draw_robustness: found no point with accuracies between 0 and 1, expected at least one.")
    figure = new_figure(8, 6.4)
    axes = figure.subplots()
    sets, origins = ({point[key]: None for point in points} for key in ("set", "origin"))
    x = [point["reference_top1"] for point in points]
    span = _expanded(min(x), max(x))
    along = np.linspace(*span, 400)
    # A line is drawn where there are models that it is of.
    lines = {name: fit for name, fit in (fits or {}).items() if name in sets}
    lines = {name: (fit, along[(along >= fit.span[0]) & (along <= fit.span[1])]) for name, fit in lines.items()}
    y = [point["top1"] for point in points]
    y += [fit(end) for fit, inside in lines.values() for end in (*inside[:1], *inside[-1:])]
    axes.set_xlim(*span)
    axes.set_ylim(*_expanded(min(y), max(y)))
    axes.set_xscale("logit")
    axes.set_yscale("logit")
    axes.plot(along, along, color=FAINT, linewidth=1.2, linestyle="--")
    colours = dict(zip(sets, COLOURS * len(sets), strict=False))
    markers = dict(zip(origins, MARKERS * len(origins), strict=False))
    for name, (fit, inside) in lines.items():
        expected = np.array([fit(value) for value in inside])
        axes.plot(inside, expected, color=colours[name], linewidth=1.4)
        band = np.clip(expected + fit.sd, 1e-4, 1 - 1e-4), np.clip(expected - fit.sd, 1e-4, 1 - 1e-4)
        axes.fill_between(inside, *band, color=colours[name], alpha=0.12, linewidth=0)
    for point in points:
        style = {"color": colours[point["set"]], "marker": markers[point["origin"]], "markersize": 8}
        axes.plot(point["reference_top1"], point["top1"], linestyle="", markeredgecolor="white", zorder=3, **style)
    for axis in (axes.xaxis, axes.yaxis):
        _ticks_in_percent(axis)
    axes.set_xlabel(f"accuracy on {reference} (%)")
    axes.set_ylabel("accuracy under shift (%)")
    _legend(axes, colours, markers, bool(lines))
    save(figure, path)


def _expanded(low: float, high: float) -> tuple[float, float]:
    """A range with some room on both sides, within 0..1, measured as logits are."""
    ends = np.log(np.array([low, high]) / (1 - np.array([low, high])))
    ends += np.array([-1, 1]) * max(0.08 * (ends[1] - ends[0]), 0.3)
    return tuple(1 / (1 + np.exp(-ends)))


def _ticks_in_percent(axis: Any) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    low, high = axis.get_view_interval()
    inside = [[tick / 100 for tick in ticks if low <= tick / 100 <= high] for ticks in TICKS]
    ticks = next((ticks for ticks in inside if len(ticks) <= FEW_TICKS), inside[-1])
    axis.set_major_locator(FixedLocator(ticks))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g}"))


def _legend(axes: "Axes", colours: Mapping[str, str], markers: Mapping[str, str], has_lines: bool) -> None:
    from matplotlib.lines import Line2D

    entries = [Line2D([], [], color=colour, linewidth=4, label=name) for name, colour in colours.items()]
    entries += [
        Line2D([], [], color=INK, marker=marker, linestyle="", markeredgecolor="white", markersize=8, label=name)
        for name, marker in markers.items()
    ]
    entries.append(Line2D([], [], color=FAINT, linestyle="--", label="equal accuracy"))
    if has_lines:
        entries.append(Line2D([], [], color=INK, linewidth=1.4, label="other models, ± 1 sd"))
    axes.legend(handles=entries, loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False)


def save(figure: "Figure", path: str | os.PathLike) -> None:
    """Writes a figure in its usual frame: light grid, no box."""
    for axes in figure.axes:
        axes.grid(color="#e4e7eb", linewidth=0.7)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)


def draw_overlap(path: str | os.PathLike, rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes two plots over the share of overlap: accuracy on it against clean images, and what it adds to all.

    Args:
        rows: what `overlap.overlap_statistics` returns, and `name`, for each data set.

    Raises:
        UsageError: no row has overlap, or matplotlib is missing.
    """
    rows = [row for row in rows if row["overlap"] > 0]
    if not rows:
        raise UsageError("draw_overlap: found no data set with overlap, expected at least one.")
    figure = new_figure(11, 4.8)
    left, right = figure.subplots(1, 2)
    for row in rows:
        x, clean = 100 * row["overlap"], row["clean_top1"]
        colour = next(
            c for level, c in ((1e-3, COLOURS[1]), (0.05, COLOURS[4]), (2, COLOURS[0])) if row["p_value"] < level
        )
        low, middle, high = (100 * (row[f"overlap_top1{end}"] - clean) for end in ("_low", "", "_high"))
        left.errorbar(x, middle, [[middle - low], [high - middle]], color=colour, marker="o", capsize=3, linewidth=1)
        right.plot(x, 100 * row["gain"], color=colour, marker="o")
        right.annotate(row["name"], (x, 100 * row["gain"]), xytext=(5, 4), textcoords="offset points", fontsize=8)
    left.set_ylabel("accuracy on overlap minus on clean images (points)")
    right.set_ylabel("accuracy on all minus on clean images (points)")
    for axes in (left, right):
        axes.axhline(0, color=INK, linewidth=0.8)
        axes.set_xlabel("overlap (% of the images)")
        axes.margins(x=0.15)
    kinds = {"p < 0.001": COLOURS[1], "p < 0.05": COLOURS[4], "p ≥ 0.05": COLOURS[0]}
    for words, colour in kinds.items():
        right.plot([], [], color=colour, marker="o", linestyle="", label=words)
    right.legend(frameon=False)
    save(figure, path)


def draw_scaling(path: str | os.PathLike, points: Sequence[Mapping[str, Any]], law: Any, *, x_label: str) -> None:
    """Writes a plot of errors against compute on logarithmic axes, with the fit and its interval.

    Args:
        points: mappings with `compute`, `error` and `name`.
        law: what `scaling.fit_power_law` returns.
    """
    figure = new_figure(7.5, 5.2)
    axes = figure.subplots()
    compute = np.array([point["compute"] for point in points], float)
    along = np.geomspace(compute.min() / 1.25, compute.max() * 1.25, 100)
    middle, low, high = law.predict(along)
    words = f"error = {law.factor:.3g} x compute^{law.exponent:.3f} ({law.low:.3f} to {law.high:.3f}), R2 {law.r2:.3f}"
    axes.plot(along, 100 * middle, color=COLOURS[0], label=words)
    axes.fill_between(along, 100 * low, 100 * high, color=COLOURS[0], alpha=0.15, linewidth=0)
    for point in points:
        axes.plot(point["compute"], 100 * point["error"], color=INK, marker="o", linestyle="")
        place = point["compute"], 100 * point["error"]
        axes.annotate(point["name"], place, xytext=(6, 5), textcoords="offset points", fontsize=9)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel(x_label)
    axes.set_ylabel("error (%)")
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    for axis, parts in ((axes.xaxis, (1, 2, 5)), (axes.yaxis, (1, 1.5, 2, 2.5, 3, 3.5, 4, 5, 6, 7, 8))):
        axis.set_major_locator(LogLocator(subs=parts))
        axis.set_minor_locator(NullLocator())
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.legend(frameon=False, loc="lower left")
    save(figure, path)

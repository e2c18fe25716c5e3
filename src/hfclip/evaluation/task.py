"""What every evaluation returns: numbers, one of which stands for the whole, and what a report shows beside them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np


@dataclass(frozen=True)
class Plot:
    """How a report draws a table of a result; the table is the data, so that nothing is drawn that is not stored.

    Args:
        table: its name in `Result.tables`.
        x, y: columns of its rows.
        series: column whose values tell lines, or groups of points, apart.
        label: column of a word beside each point.
        marker: column whose values tell the marks of points apart, beside their colours by series.
        line: name of a table with the columns x, y and series, drawn as lines; `band`: columns of the ends of an interval.
        kind: "line" through the points of a series in the order of its rows, "scatter", or "bar".
        x_scale, y_scale: "logit" is for fractions.
        error: columns of the lower and the upper end of each point's interval.
        title, x_label, y_label: words; by default the names of table and columns.
    """

    table: str
    x: str
    y: str
    series: str | None = None
    label: str | None = None
    marker: str | None = None
    line: str | None = None
    band: tuple[str, str] | None = None
    kind: Literal["line", "scatter", "bar"] = "line"
    x_scale: Literal["linear", "log", "logit"] = "linear"
    y_scale: Literal["linear", "log", "logit"] = "linear"
    error: tuple[str, str] | None = None
    title: str = ""
    x_label: str = ""
    y_label: str = ""


@dataclass(frozen=True)
class Result:
    """What a task measured.

    Args:
        metrics: fractions in 0..1, and counts, by name.
        headline: the metric that stands for the whole.
        tables: rows by the name of the table, each a mapping from column to a number, a word or None: accuracy of each
            class or template, the points of a curve, fits.
        plots: tables that are drawn.
        arrays: what is too large for a table, such as a confusion matrix; stored beside the result.
        protocol: what decides the numbers and is no option: templates, splits, the scale that lambda is on. Words,
            numbers, and lists and mappings of them.
        notes: sentences that a reader of the numbers has to know.
    """

    metrics: Mapping[str, float]
    headline: str
    tables: Mapping[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict)
    plots: Sequence[Plot] = ()
    arrays: Mapping[str, np.ndarray] = field(default_factory=dict)
    protocol: Mapping[str, Any] = field(default_factory=dict)
    notes: Sequence[str] = ()


def all_metrics(results: Mapping[str, Result]) -> dict[str, float]:
    """Every metric as `task/metric`."""
    return {f"{task}/{name}": value for task, result in results.items() for name, value in result.metrics.items()}


def headlines(results: Mapping[str, Result]) -> dict[str, float]:
    """The metric of each task that stands for it, as `task/metric`."""
    return {f"{task}/{result.headline}": result.metrics[result.headline] for task, result in results.items()}

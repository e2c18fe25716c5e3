"""Error against compute of several models: a power law with its interval (paper 3.1.4, figure 9).

error = factor x compute^exponent, a line between logarithms by least squares
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..configuration_hfclip import HFCLIPConfig
from ..data.records import read_records
from ..data.samples import Keys
from ..errors import UsageError, as_usage_error
from ..flops import ModelFlops
from .plots import draw
from .task import Plot, Result


class PowerLaw(NamedTuple):
    """A fit, with the interval of its exponent, `low` to `high`.

    Attributes:
        spread: standard error of a residual, between logarithms.
        center: mean and sum of squared differences of the logarithms of compute.
        quantile: of Student's t, that makes an interval of a standard error.
    """

    factor: float
    exponent: float
    low: float
    high: float
    r2: float
    n: int
    spread: float
    center: tuple[float, float]
    quantile: float

    def predict(self, compute: Sequence[float]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The expected error at some compute, and both ends of the interval of the line."""
        x, (mean, squares) = np.log(np.asarray(compute, float)), self.center
        middle = np.log(self.factor) + self.exponent * x
        reach = self.quantile * self.spread * np.sqrt(1 / self.n + (x - mean) ** 2 / squares)
        return np.exp(middle), np.exp(middle - reach), np.exp(middle + reach)


def fit_power_law(compute: Sequence[float], error: Sequence[float], confidence: float = 0.95) -> PowerLaw:
    """The power law of least squares between logarithms.

    Args:
        compute: of each model, in any unit.
        error: of each, 1 - accuracy; of several data sets their mean.

    Raises:
        UsageError: fewer than three models or two sizes, numbers that are not above 0, or scipy is missing.
    """
    try:
        from scipy.stats import linregress, t
    except ImportError as missing:
        raise UsageError("Intervals are scipy's: `pip install 'hfclip[evaluate]'`.") from missing
    points = np.array([compute, error], float)
    if points.shape[1] < 3 or len(set(points[0])) < 2 or not 0 < confidence < 1:
        raise UsageError(
            f"found {points.shape[1]} models of {len(set(points[0]))} sizes and a confidence of {confidence}, expected "
            "three models or more, of two sizes or more, and a confidence between 0 and 1."
        )
    if not (np.isfinite(points).all() and (points > 0).all() and (points[1] <= 1).all()):
        raise UsageError(
            "found compute or errors that are no numbers above 0 (and 1 at most), which have no logarithm."
        )
    x, y = np.log(points)
    line = linregress(x, y)
    quantile = float(t.ppf((1 + confidence) / 2, len(x) - 2))
    squares = float(((x - x.mean()) ** 2).sum())
    return PowerLaw(
        factor=float(np.exp(line.intercept)),
        exponent=float(line.slope),
        low=float(line.slope - quantile * line.stderr),
        high=float(line.slope + quantile * line.stderr),
        r2=float(line.rvalue**2),
        n=len(x),
        spread=float(line.stderr * np.sqrt(squares)),
        center=(float(x.mean()), squares),
        quantile=quantile,
    )


def image_gflops(config: HFCLIPConfig) -> float:
    """GFLOPs of a forward pass of one image, the compute of the paper's figure."""
    return ModelFlops(config).of_image().forward / 1e9


def scaling(
    model: None,
    processor: None,
    data: Sequence[Mapping[str, Any]],
    *,
    of_task: str = "zero-shot",
    compute: str | None = None,
    confidence: float = 0.95,
    figure: str | None = None,
) -> Result:
    """Error of several models against their compute, from stored results: a power law with its interval.

    Args:
        of_task: whose results count, 1 - headline; of several data sets the mean of those that all models have.
        compute: table (csv, tsv, jsonl, parquet) with the columns model and compute, such as FLOPs of training. None:
            GFLOPs of an image's forward pass, measured on the models' configs.
        confidence: of the interval of the exponent, and of the line.
        figure: file that the fit is drawn into; its ending says how (.png, .svg).

    Returns:
        `exponent`, `exponent_low`, `exponent_high`, `factor`, `r2` and `models`; table "scaling" has a row per model.
    """
    errors, shared = _mean_errors(data, of_task)
    sizes = _gflops_of(errors) if compute is None else _read_compute(compute, errors)
    rows = [
        {"name": Path(name).name, "compute": sizes[name], "error": errors[name]}
        for name in sorted(errors, key=sizes.__getitem__)
    ]
    law = fit_power_law([row["compute"] for row in rows], [row["error"] for row in rows], confidence)
    for row, *ends in zip(rows, *law.predict([row["compute"] for row in rows]), strict=True):
        row |= dict(zip(("expected", "low", "high"), map(float, ends), strict=True))
    along = np.geomspace(rows[0]["compute"] / 1.25, rows[-1]["compute"] * 1.25, 50)
    columns = ("compute", "error", "low", "high")
    line = [
        dict(zip(columns, map(float, point), strict=True)) for point in zip(along, *law.predict(along), strict=True)
    ]
    tables, x_label = {"scaling": rows, "line": line}, "GFLOPs per image" if compute is None else "compute"
    axes = {"x_scale": "log", "y_scale": "log", "x_label": x_label, "kind": "scatter", "label": "name"}
    title = f"error = {law.factor:.3g} x compute^{law.exponent:.3f} ({law.low:.3f} to {law.high:.3f}), R2 {law.r2:.3f}"
    plot = Plot("scaling", "compute", "error", title=title, line="line", band=("low", "high"), **axes)
    if figure is not None:
        draw(plot, tables, figure)
    return Result(
        {
            "exponent": law.exponent,
            "exponent_low": law.low,
            "exponent_high": law.high,
            "factor": law.factor,
            "r2": law.r2,
            "models": law.n,
        },
        headline="r2",
        tables=tables,
        plots=[plot],
        protocol={"task": of_task, "data": shared, "compute": x_label, "confidence": confidence},
        notes=["The paper prints no exponent: its figure 9 has five ResNets over 44 times the compute."],
    )


def _mean_errors(results: Sequence[Mapping[str, Any]], task: str) -> tuple[dict[str, float], list[str]]:
    """Of each model, the mean of 1 - headline over the data sets that all models have; and the names of those sets."""
    errors: dict[str, dict[str, float]] = {}
    for result in results:
        if result["task"] == task:
            name = "+".join(part["name"] for part in result["data"])
            errors.setdefault(result["model"]["name"], {})[name] = 1 - result["metrics"][result["headline"]]
    shared = sorted(set.intersection(*map(set, errors.values()))) if errors else []
    if not shared:
        raise UsageError(
            f"scaling: found {len(errors)} models with results of {task} on one data set, expected three."
        )
    return {model: float(np.mean([of[name] for name in shared])) for model, of in errors.items()}, shared


def _gflops_of(names: Sequence[str]) -> dict[str, float]:
    sizes = {}
    for name in names:
        with as_usage_error(f"config of {name} (give a table by compute)"):
            sizes[name] = image_gflops(HFCLIPConfig.from_pretrained(name))
    return sizes


def _read_compute(path: str, names: Sequence[str]) -> dict[str, float]:
    with as_usage_error(path), open(path, encoding="utf-8", newline="") as file:
        _, rows = read_records(file, path, Keys(image="model", caption="compute"))
        found = {row["model"]: float(row["compute"]) for row in rows if isinstance(row, dict)}
    if missing := [name for name in names if name not in found and Path(name).name not in found]:
        raise UsageError(f"{path} has the models {', '.join(found)}, expected {missing[0]} among them.")
    return {name: found.get(name, found.get(Path(name).name)) for name in names}

"""Robustness to natural distribution shift (paper 3.3, figures 13 to 15, table 16).

    reference + shifted sets, one text classifier -> the classifier restricted to the classes of each set -> accuracies
    accuracies -> effective robustness, what a set's accuracy is above that of other models of the same reference accuracy

A shifted set has classes of the reference, all or some: ImageNetV2, -Sketch, -A and -R, or any folders of yours. Where its
classes have other names, or stand for several of the reference, a class map says which: ObjectNet, ImageNet-Vid-Robust
and YTBB-Robust. Then the score of a class is the maximum over its members.

**Class maps** are JSON files of the user: `{class of the set: [classes of the reference]}`, each by its name or by its
number (as `rev_class_idx_map.json` of YTBB-Robust is). Two public folders are read as they are: ObjectNet's metadata
(`folder_to_objectnet_label.json`, `objectnet_to_imagenet_1k.json`, `imagenet_to_label_2012_v2`,
`pytorch_to_imagenet_2012_id.json`) and ImageNet-Vid-Robust's `misc` (`rev_wnid_map.json`, `imagenet_class_index.json`,
`imagenet_vid_class_index.json`). Classes without members are left out, and counted.
"""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch import nn

from ..data.folders import SPLITS
from ..data.records import read_records
from ..data.samples import Keys
from ..errors import UsageError, as_usage_error
from .data import DataSet, File
from .plots import draw
from .shared import Scores, embed_names, embed_readable
from .task import Plot, Result


# ---------------------------------------------------------------------------------------------------------------------
# Fits of other models: accuracy on a shifted set as a line in that on the reference, both as logits
# ---------------------------------------------------------------------------------------------------------------------


class Fit(NamedTuple):
    """Accuracy that models of a reference accuracy have on a shifted set.

    Attributes:
        pieces: (upper end, slope, intercept) of lines between logits, by reference accuracy.
        n: models that it is of.
        r2: share of the variance of the logits that it explains.
        sd: standard deviation of the residuals, a fraction.
        origin: of the models, with a date.
        span: their reference accuracies; beyond it the line is drawn out.
    """

    pieces: tuple[tuple[float, float, float], ...]
    n: int
    r2: float
    sd: float
    origin: str
    span: tuple[float, float] = (0.5, 0.9)

    def __call__(self, accuracy: float) -> float:
        _check_fractions([accuracy])
        slope, intercept = next(piece[1:] for piece in self.pieces if accuracy <= piece[0])
        return float(_sigmoid(slope * _logit(accuracy) + intercept))

    def __str__(self) -> str:
        low, high = (f"{100 * end:.0f}" for end in self.span)
        quality = f"n {self.n}, R2 {self.r2:.3f}, residual sd {100 * self.sd:.1f} points"
        return f"{self.origin}: {quality}, at {low} to {high} %"


# Of the models in timm's tables of results whose names say that they were trained on ImageNet-1k alone, at 50 to 90 % there.
# ImageNet-A was selected against a ResNet-50, at whose accuracy its line bends. The tables are results/*.csv of
# huggingface/pytorch-image-models. From those of 2025-10-30 (commit 4e5207c7), of 1,128 rows whose tag has in1k, no _ft_ and
# neither in12k, in21k, in22k, clip, dino nor dist, lines give 64.1, 24.6, 36.5 and 4.4 % at 76.2 % on ImageNet; these 64.1,
# 24.6, 36.8 and 4.2 %.
_TIMM = "timm's results, models of ImageNet-1k alone, fitted in November 2026"
FITS = {
    "imagenetv2": Fit(((1, 0.912, -0.481),), 795, 0.993, 0.0044, _TIMM),
    "imagenet-sketch": Fit(((1, 1.143, -2.448),), 795, 0.904, 0.0199, _TIMM),
    "imagenet-r": Fit(((1, 1.015, -1.723),), 795, 0.891, 0.0222, _TIMM),
    "imagenet-a": Fit(((0.765, 1.352, -4.712), (1, 5.166, -9.070)), 794, 0.878, 0.041, _TIMM),  # R2 of one line
}
# Table 16, and the ResNet-101 of the same accuracy in figure 13.
PAPER_SETS = ("imagenetv2", "imagenet-a", "imagenet-r", "objectnet", "imagenet-sketch")
PAPER_ROWS = {
    "zero-shot CLIP (paper)": (0.762, 0.701, 0.772, 0.889, 0.723, 0.602),
    "linear-probe CLIP (paper)": (0.854, 0.759, 0.753, 0.842, 0.662, 0.574),
    "NS EfficientNet-L2": (0.883, 0.802, 0.849, 0.747, 0.685, 0.476),
    "FixResNeXt101-32x48d V2": (0.864, 0.780, 0.684, 0.800, 0.578, 0.591),
    "ResNet-101": (0.762, 0.643, 0.027, 0.377, 0.326, 0.252),
}


def fit_of(name: str) -> Fit | None:
    """The fit of a set by its name, such as `wds_imagenet-a`; None if there is none."""
    return FITS.get(short_name(name).lower().rpartition("/")[2].removeprefix("wds_").replace("_", "-"))


def short_name(name: str) -> str:
    """The name of a data set without that of its split: "imagenet-a" of "imagenet-a/test"."""
    before, _, last = name.rpartition("/")
    return before if before and last in SPLITS else name


def fit_line(reference: Sequence[float], shifted: Sequence[float], origin: str = "") -> Fit:
    """The line through the logits of models' accuracies. Points at 0 or 1 have none, and are left out.

    Raises:
        UsageError: accuracies that are none, or fewer than three points with two different reference accuracies.
    """
    points = np.array([reference, shifted], float).T
    _check_fractions(points.ravel())
    points = points[((points > 0) & (points < 1)).all(axis=1)]
    if len(points) < 3 or len(set(points[:, 0])) < 2:
        raise UsageError(f"found {len(points)} models between 0 and 1, expected three or more to fit a line.")
    x, y = _logit(points).T
    slope, intercept = np.polyfit(x, y, 1)
    residuals, spread = y - (slope * x + intercept), y - y.mean()
    r2 = 1 - (residuals**2).sum() / (spread**2).sum() if spread.any() else 0.0
    sd = np.std(points[:, 1] - _sigmoid(slope * x + intercept))
    span = float(points[:, 0].min()), float(points[:, 0].max())
    return Fit(((1, float(slope), float(intercept)),), len(points), float(r2), float(sd), origin, span)


def effective_robustness(fit: Fit, reference: float, shifted: float) -> float:
    """Accuracy on the shifted set above what the fit expects (paper 3.3, after Taori et al. 2020)."""
    _check_fractions([shifted])
    return shifted - fit(reference)


def relative_robustness(before: float, after: float) -> float:
    """Accuracy on a shifted set that an intervention has added."""
    _check_fractions([before, after])
    return after - before


def read_baseline(path: str | os.PathLike, reference: str, names: Iterable[str]) -> dict[str, Fit]:
    """Fits of a table of models: a column per set by its name, fractions in 0..1, a row per model."""
    with as_usage_error(path), open(path, encoding="utf-8", newline="") as file:
        columns, rows = read_records(file, str(path), Keys())
        rows = [row for row in rows if isinstance(row, dict)]
    if reference not in columns:
        raise UsageError(f"{path} has the columns {columns}, expected {reference!r}, the name of the reference.")
    fits = {}
    for name in names:
        if name in columns:
            both = [(row[reference], row[name]) for row in rows if row[reference] and row[name]]
            with as_usage_error(f"{path}, {name}"):
                fits[name] = fit_line(*np.array(both, float).reshape(-1, 2).T, origin=str(path))
    return fits


def _logit(p: Any) -> Any:
    return np.log(p) - np.log1p(-np.asarray(p))


def _sigmoid(x: Any) -> Any:
    return 1 / (1 + np.exp(-np.asarray(x)))


def _check_fractions(values: Iterable[float]) -> None:
    if wrong := [float(value) for value in values if not 0 <= value <= 1]:
        raise UsageError(f"found the accuracy {wrong[0]:g}, expected a fraction from 0 to 1.")


# ---------------------------------------------------------------------------------------------------------------------
# Classes
# ---------------------------------------------------------------------------------------------------------------------

Members = list[list[int]]  # of each class of a set, its classes of the reference


def members_by_name(name: str, labels: Sequence[str], reference: Sequence[str]) -> Members:
    """The classes of the reference that have the names of a set's classes.

    Raises:
        UsageError: a class has another name.
    """
    known = {label: [number for number, other in enumerate(reference) if other == label] for label in reference}
    if missing := [label for label in labels if label not in known]:
        raise UsageError(
            f"{name} has {len(missing)} of {len(labels)} classes that the reference has not, {missing[0]!r} is one: give "
            f"a class map, {name}.json in a folder, by class_maps."
        )
    # Where a name repeats on both sides, the first is the first and the second the second.
    turns = {label: iter(known[label]) for label in labels if labels.count(label) == len(known[label])}
    return [[next(turns[label])] if label in turns else known[label] for label in labels]


def read_class_map(path: str | os.PathLike) -> dict[str, list[str | int]]:
    """Classes of a set with those of the reference, from a JSON file or a public folder of metadata (see above)."""
    path = Path(path)

    def read(name: str) -> Any:
        return json.loads((path / name if name else path).read_text(encoding="utf-8"))

    with as_usage_error(path):
        if (path / "objectnet_to_imagenet_1k.json").is_file():
            lines = (path / "imagenet_to_label_2012_v2").read_text(encoding="utf-8").splitlines()
            of_id = {number: int(label) for label, number in read("pytorch_to_imagenet_2012_id.json").items()}
            numbers = {line.strip(): of_id[place] for place, line in enumerate(lines) if line.strip()}
            folders = {label: folder for folder, label in read("folder_to_objectnet_label.json").items()}
            mapping = {}
            for label, names in read("objectnet_to_imagenet_1k.json").items():
                mapping[folders[label]] = mapping[label] = [numbers[name] for name in names.split("; ")]
            return mapping
        if (path / "rev_wnid_map.json").is_file():
            numbers = {wnid: int(number) for number, (wnid, *_) in read("imagenet_class_index.json").items()}
            own = {wnid: number for number, (wnid, *_) in read("imagenet_vid_class_index.json").items()}
            return {own[wnid]: [numbers[each] for each in many] for wnid, many in read("rev_wnid_map.json").items()}
        mapping = read("")
        return {own: [many] if isinstance(many, str | int) else list(many) for own, many in mapping.items()}


def members_by_map(
    name: str, labels: Sequence[str], reference: Sequence[str], mapping: Mapping[str, Sequence[str | int]]
) -> Members:
    """The classes of the reference that a map gives each class of a set; none for those that it does not name.

    Raises:
        UsageError: the map names a class that the reference has not, or none of the set's.
    """
    plain = {_plain(key): value for key, value in mapping.items()}
    places = {_plain(label): number for number, label in reversed(list(enumerate(reference)))}
    members = []
    for number, label in enumerate(labels):
        found = plain.get(_plain(label), mapping.get(str(number), ()))
        members.append([each if isinstance(each, int) else places.get(_plain(each), -1) for each in found])
        if wrong := [own for own, place in zip(found, members[-1], strict=True) if not 0 <= place < len(reference)]:
            raise UsageError(
                f"{name}: the class map gives {label!r} the class {wrong[0]!r}, which the reference has not."
            )
    if not any(members):
        raise UsageError(
            f"{name}: the class map has {next(iter(mapping), 'nothing')!r}, expected classes such as {labels[0]!r}."
        )
    return members


def _plain(name: str) -> str:
    """A name as folders and lists of classes write it, in one form."""
    return str(name).lower().replace("_", " ").strip()


def restrict(scores: np.ndarray, members: Members) -> np.ndarray:
    """Scores of a set's classes, (num_images, num_classes): the maximum over each one's members, -inf without any."""
    columns = [scores[:, many].max(axis=1) if many else np.full(len(scores), -np.inf) for many in members]
    return np.stack(columns, axis=1)


# ---------------------------------------------------------------------------------------------------------------------
# Tasks
# ---------------------------------------------------------------------------------------------------------------------


def robustness(
    model: nn.Module,
    processor: Any,
    data: Sequence[DataSet],
    *,
    class_maps: File | None = None,
    baseline: File | None = None,
    **embedding,
) -> Result:
    """Accuracy of one text classifier on a reference and on shifted sets, restricted to the classes of each.

    Args:
        data: the reference first, then the shifted sets.
        class_maps: folder that holds NAME.json, or a folder NAME of public metadata, for sets whose classes have other
            names than the reference's.
        baseline: table (csv, tsv, jsonl, parquet) of accuracies of other models, a column per set: effective robustness
            is measured against the line through them. None: the built-in fits, of ImageNetV2, -Sketch, -R and -A.

    Returns:
        `reference_top1`, `<set>_top1` of the restricted classifier, `<set>_own_names_top1` of one of the set's own
        class names where they differ, `<set>_effective_robustness` (which may be below 0) where there is a fit, and
        `shifted_top1`, the mean over sets.
    """
    names = [short_name(each.name) for each in data]
    if len(names) < 2 or len(set(names)) < len(names):
        raise UsageError(f"robustness: found the data sets {names}, expected a reference and shifted sets, each once.")
    reference, folders = data[0].labelled(), dict(zip(names[1:], (each.labelled() for each in data[1:]), strict=True))
    members = {name: _members(name, of.labels, reference.labels, class_maps) for name, of in folders.items()}
    fits = {name: fit_of(name) for name in folders}
    fits |= {} if baseline is None else read_baseline(baseline, names[0], folders)
    label_embeds = embed_names(model, processor, reference.labels, reference.templates, **embedding)
    on_reference = embed_readable(model, processor, reference.samples.source, **embedding).compare(label_embeds)
    rows = []
    for name, folder in folders.items():
        images = embed_readable(model, processor, folder.samples.source, **embedding)
        row = {"set": name, "reference_top1": on_reference.top1}
        row |= _restricted_row(on_reference, images.compare(label_embeds), members[name])
        if any(label not in reference.labels for label in folder.labels):
            own = embed_names(model, processor, folder.labels, folder.templates, **embedding)
            row["own_names_top1"] = images.compare(own).top1
        if fit := fits.get(name):
            row["expected_top1"] = fit(row["reference_top1"])
            row["effective_robustness"] = row["top1"] - row["expected_top1"]
            row["fit"] = str(fit)
        rows.append(row)
    metrics = {"reference_top1": rows[0]["reference_top1"], "shifted_top1": float(np.mean([r["top1"] for r in rows]))}
    for row in rows:
        kept = ("top1", "own_names_top1", "effective_robustness")
        metrics |= {f"{row['set']}_{name}": row[name] for name in kept if name in row}
        metrics |= {f"{row['set']}_left_out": row["left_out"]} if row["left_out"] else {}
    without = [name for name in folders if not fits.get(name)]
    return Result(
        metrics,
        headline="shifted_top1",
        tables={"robustness": rows, "fits": _lines(rows, fits)},
        plots=[_plot("robustness", label="set", series="set")],
        protocol={"reference": names[0], "classifier": "the reference's labels and templates, restricted to each set"},
        notes=[f"No fit of other models is known for {', '.join(without)}: give them by baseline."] if without else [],
    )


def _plot(table: str, **columns) -> Plot:
    axes = {"x_scale": "logit", "y_scale": "logit", "x_label": "accuracy on the reference", "y_label": "accuracy"}
    lines = {"line": "fits", "band": ("low", "high"), "title": "Robustness, and lines of other models, ± 1 sd"}
    return Plot(table, "reference_top1", "top1", kind="scatter", **columns, **axes, **lines)


def _lines(rows: Sequence[Mapping[str, Any]], fits: Mapping[str, Fit | None]) -> list[dict[str, Any]]:
    """Points along the fit of each set, where there are models that it is of, and near those in `rows`."""
    places = np.array([row["reference_top1"] for row in rows])
    lines = []
    for name, fit in fits.items():
        if fit is None:
            continue
        ends = max(fit.span[0], places.min() - 0.1), min(fit.span[1], places.max() + 0.1)
        for place in np.linspace(*ends, 40).tolist() if ends[0] < ends[1] else ():
            expected = fit(place)
            low, high = np.clip([expected - fit.sd, expected + fit.sd], 1e-3, 1 - 1e-3).tolist()
            lines.append({"set": name, "reference_top1": place, "top1": expected, "low": low, "high": high})
    return lines


def _members(name: str, labels: Sequence[str], reference: Sequence[str], class_maps: str | None) -> Members:
    places = [] if class_maps is None else [Path(class_maps, f"{name}.json"), Path(class_maps, name)]
    path = next((place for place in places if place.exists()), None)
    if path is None:
        return members_by_name(name, labels, reference)
    return members_by_map(name, labels, reference, read_class_map(path))


def _restricted_row(on_reference: Scores, found: Scores, members: Members) -> dict[str, float]:
    """What the restricted classifier does on the set, and on those images of the reference that are of its classes."""
    has_members = np.array([bool(many) for many in members])
    kept = has_members[found.targets]
    if not kept.any():
        raise UsageError("the class map leaves no image: expected classes that occur in the data.")
    class_of = {place: number for number, many in enumerate(members) for place in many}
    of_reference = np.array([class_of.get(target, -1) for target in on_reference.targets])
    same = of_reference >= 0
    best = restrict(on_reference.scores[same], members).argmax(axis=1)
    return {
        "top1": float((restrict(found.scores[kept], members).argmax(axis=1) == found.targets[kept]).mean()),
        "reference_top1_of_its_classes": float((best == of_reference[same]).mean()) if same.any() else None,
        "classes": int(has_members.sum()),
        "images": int(kept.sum()),
        "left_out": int((~kept).sum()),
    }


def robustness_plot(
    model: None,
    processor: None,
    data: Sequence[Mapping[str, Any]],
    *,
    points: str | None = None,
    paper: bool = False,
    before: str | None = None,
    figure: str | None = None,
) -> Result:
    """Points of any origin under shift: stored results of "robustness", the paper's rows, a table of others.

    Args:
        points: table (csv, tsv, jsonl, parquet) of further points, such as those of linear probes, with the columns set,
            origin, reference_top1 and top1, fractions in 0..1.
        paper: adds table 16 of the paper.
        before: origin that the others are compared with, as relative robustness: what they have added to its accuracy.
        figure: file that they are drawn into, on logit axes; its ending says how (.png, .svg).

    Returns:
        `points` and `origins`, how many there are; table "points".
    """
    rows = [
        {"set": row["set"], "origin": Path(result["model"]["name"]).name, **{key: row[key] for key in _AXES}}
        for result in data
        if result["task"] == "robustness"
        for row in result["tables"]["robustness"]
    ]
    rows += [] if points is None else _read_points(points)
    if paper:
        rows += [
            {"set": name, "origin": origin, "reference_top1": of_reference, "top1": top1}
            for origin, (of_reference, *others) in PAPER_ROWS.items()
            for name, top1 in zip(PAPER_SETS, others, strict=True)
        ]
    earlier = {row["set"]: row["top1"] for row in rows if row["origin"] == before}
    if not rows or before is not None and not earlier:
        origins = ", ".join(sorted({row["origin"] for row in rows})) or "no points"
        raise UsageError(
            f"found {origins}, expected results of robustness{f', {before} among them' if before else ''}."
        )
    for row in rows:
        if fit := fit_of(row["set"]):
            row["effective_robustness"] = effective_robustness(fit, row["reference_top1"], row["top1"])
        if row["set"] in earlier:
            row["relative_robustness"] = relative_robustness(earlier[row["set"]], row["top1"])
    tables = {
        "points": rows,
        "fits": _lines(rows, {name: fit_of(name) for name in dict.fromkeys(r["set"] for r in rows)}),
    }
    plot = _plot("points", marker="origin", series="set")
    if figure is not None and draw(plot, tables, figure) is None:
        raise UsageError("robustness-plot: found no point with accuracies between 0 and 1, expected at least one.")
    return Result(
        {"points": len(rows), "origins": len({row["origin"] for row in rows})},
        headline="points",
        tables=tables,
        plots=[plot],
    )


_AXES = ("reference_top1", "top1")


def _read_points(path: str) -> list[dict[str, Any]]:
    with as_usage_error(path), open(path, encoding="utf-8", newline="") as file:
        _, rows = read_records(file, path, Keys(image="origin"))
        rows = [row for row in rows if isinstance(row, dict)]
        rows = [{key: row[key] for key in ("set", "origin")} | {key: float(row[key]) for key in _AXES} for row in rows]
    _check_fractions(row[key] for row in rows for key in _AXES)
    return rows

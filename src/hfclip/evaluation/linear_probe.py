"""Linear probe: multinomial logistic regression on the features of a frozen image tower (paper 3.2, A.3).

train, validation, test -> features, shared by all processes -> lambda that is best on validation -> fit on both -> test

Features are those before the projection to the joint space. The search for lambda takes seven values from 1e-6 to 1e6, and
then halves the step around the best one until it is an eighth of a decade: 15 fits, of the 97 on that grid.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..embeddings.chunks import Pool
from ..errors import UsageError
from ..zero_shot import device_of
from . import metrics
from .data import DataSet, LabelledFolder
from .logistic import Fit, LabelRegressions, LogisticRegression
from .shared import Metric, check_metric, embed_labelled
from .task import Plot, Result


STEPS_PER_DECADE = 8
GRID = [10 ** (step / STEPS_PER_DECADE - 6) for step in range(12 * STEPS_PER_DECADE + 1)]  # of lambda
IMAGE_EMBEDS = "image_embeds"  # names the embeddings in the joint space, in place of a layer
SEARCH_TOLERANCE = 1e-6  # of a fit whose accuracy alone is asked for
HELD_OUT = 0.2  # of train, where there is no validation split
LOSS = "sum over samples of the cross-entropy + lambda / 2 * |W|^2: scikit-learn's C is 1 / lambda"

LOSS_OF_LABELS = "of each label: sum over samples of the binary cross-entropy + lambda / 2 * |w|^2; one lambda for all"


class Split(NamedTuple):
    """The labelled images of a split that can be read, as a model has embedded them."""

    folder: LabelledFolder
    features: Tensor
    """(num_images, dim) float32, on the device that computes."""
    image_embeds: Tensor
    """(num_images, projection_dim) float32, of unit length."""
    targets: Tensor
    """(num_images,), indices of the folder's labels; or (num_images, num_labels), above 0 for those of an image."""
    num_unreadable: int = 0

    def part(self, rows: Tensor) -> "Split":
        """Some of the images."""
        rows = rows.to(self.targets.device)
        return Split(self.folder, *(array[rows] for array in self[1:4]))

    def joined(self, other: "Split") -> "Split":
        """These images and others."""
        return Split(self.folder, *map(torch.cat, zip(self[1:4], other[1:4], strict=True)))

    def regression(self, prior: Tensor | None = None) -> LogisticRegression:
        """Of the targets on the features."""
        kind = LogisticRegression if self.targets.ndim == 1 else LabelRegressions
        return kind(self.features, self.targets, len(self.folder.labels), prior)


def linear_probe(
    model: nn.Module,
    processor: Any,
    data: DataSet,
    *,
    layer: str = "visual_projection",
    pool: Pool = "input",
    metric: Metric | None = None,
    lam: float | None = None,
    seed: int = 0,
    **embedding,
) -> Result:
    """Accuracy of a linear classifier on the features of a model that is not trained further.

    Args:
        data: its splits "train" and "test" are used, and "validation", on which lambda is chosen. Without one it is
            chosen on a fifth of train, stratified by class.
        layer: module of the model whose features are classified; "image_embeds" are the embeddings of unit length.
        pool: what is taken of it for each image: its "input", the "mean" of its output over tokens or places, or the
            "first" token. By default these are the image tower's pooled features before the projection.
        metric: the headline, by which lambda is chosen. None: top-1 accuracy, or 11-point mAP where images have several
            labels, each of which has a regression of its own. "roc_auc" takes the second of two labels as the positive one.
        lam: lambda, if it is given and not searched for: a factor of |W|^2 / 2 beside the sum of the samples' losses.
        seed: of the split of train.
        embedding: options of `hfclip.embeddings.embed`; `precision` is "fp32" if it is not given.

    Returns:
        `top1`, `top5`, `mean_per_class_recall` and the metric on test, or `map_11_point` and `mean_average_precision` of
        several labels per image; `unreadable_images` of it if there are any; the table of the lambdas that were tried.

    Raises:
        UsageError: a missing split, labels that differ between splits, one class, features that are not finite or not a
            row per image, a metric that the labels do not allow.
    """
    splits = load_splits(model, processor, data, layer, pool, **embedding)
    whole, test = splits["train"], splits["test"]
    metric = check_metric(metric, test.folder.labels, test.folder.samples.targets)
    if "validation" in splits:
        train, validation, chosen_on = whole, splits["validation"], "the validation split"
        whole = train.joined(validation)
    elif lam is None:
        train, validation = divide(whole, seed)
        chosen_on = f"{HELD_OUT:.0%} of train, stratified by class, seed {seed}"
    start, tried = search(train, validation, metric) if lam is None else (None, [])
    fit = whole.regression().fit(start.lam if start else lam, start)
    found = measure(fit, test, metric)
    found |= {"unreadable_images": test.num_unreadable} if test.num_unreadable else {}
    protocol = {
        "features": named(layer, pool),
        "dim": test.features.shape[1],
        "loss": LOSS if test.targets.ndim == 1 else LOSS_OF_LABELS,
        "lambda": fit.lam,
        "lambda_chosen_on": chosen_on if tried else None,
        "iterations": fit.iterations,
        "converged": fit.converged,
        "images": {name: len(split.targets) for name, split in splits.items()},
    }
    plots = [Plot("lambdas", "lambda", metric, x_scale="log", title=f"On {chosen_on}")] if tried else []
    notes = [*describe(splits), *([] if fit.converged else [f"L-BFGS stopped after {fit.iterations} iterations."])]
    return Result(found, metric, {"lambdas": tried} if tried else {}, plots, protocol=protocol, notes=notes)


def load_splits(
    model: nn.Module, processor: Any, data: DataSet, layer: str, pool: Pool, **embedding
) -> dict[str, Split]:
    """The features of train, validation if there is one, and test; all are opened before the first one is embedded.

    Raises:
        UsageError: see `linear_probe`.
    """
    names = ["train", *(["validation"] if data.has("validation") else []), "test"]
    folders = {name: data.labelled(name) for name in names}
    labels = folders["train"].labels
    for name, folder in folders.items():
        if folder.labels != labels:
            raise UsageError(
                f"{data.name}: train has {len(labels)} labels, {labels[:3]} ..., and {name} {len(folder.labels)}, "
                f"{folder.labels[:3]} ...: expected the same in the same order."
            )
    splits, device, wanted = {}, device_of(model), {} if layer == IMAGE_EMBEDS else {layer: pool}
    device = torch.device("cpu") if device.type == "mps" else device  # which has no float64
    for name, folder in folders.items():
        images = embed_labelled(model, processor, folder.samples, labels, layers=wanted, **embedding)
        features = images.found.layers.get(layer, images.found.image_embeds)[images.readable]
        arrays = features, images.embeds, images.targets
        features, image_embeds, targets = (torch.from_numpy(array).to(device) for array in arrays)
        if features.ndim != 2:
            raise UsageError(
                f"{named(layer, pool)} is {tuple(features.shape[1:])} for an image, expected one row: pool its mean."
            )
        splits[name] = Split(
            folder, features.float(), image_embeds.float(), targets, len(folder.samples) - len(targets)
        )
    return splits


def named(layer: str, pool: Pool) -> str:
    """Features in words."""
    return layer if layer == IMAGE_EMBEDS else f"{pool} of {layer}"


def describe(splits: Mapping[str, Split]) -> list[str]:
    """What a reader has to know of the splits, in sentences."""
    notes = [
        f"{split.num_unreadable} images of {name} cannot be read."
        for name, split in splits.items()
        if split.num_unreadable
    ]
    labels, targets = splits["train"].folder.labels, splits["train"].targets
    present = set((targets if targets.ndim == 1 else (targets > 0).any(0).nonzero().flatten()).tolist())
    if missing := [label for target, label in enumerate(labels) if target not in present]:
        notes.append(f"{len(missing)} of {len(labels)} classes have no image in train, such as {missing[0]!r}.")
    return notes


def places_in_class(targets: Tensor, seed: int) -> Tensor:
    """The place of each image among those of its class in a random order, `(num_images,)`."""
    targets = targets.cpu()
    order = torch.randperm(len(targets), generator=torch.Generator().manual_seed(seed))
    by_class = order[targets[order].argsort(stable=True)]
    counts = torch.bincount(targets)
    places = torch.empty_like(targets)
    places[by_class] = torch.arange(len(targets)) - (counts.cumsum(0) - counts).repeat_interleave(counts)
    return places


def divide(split: Split, seed: int) -> tuple[Split, Split]:
    """Most images of each class, and `HELD_OUT` of them; one at least, but of a class of a single image none.

    Where images have several labels, most of all.

    Raises:
        UsageError: there is no class of two images.
    """
    if split.targets.ndim == 2:
        held_out = places_in_class(split.targets.new_zeros(len(split.targets), dtype=torch.int64), seed)
        held_out = held_out < round(HELD_OUT * len(held_out))
        return split.part(~held_out), split.part(held_out)
    counts = torch.bincount(split.targets)[split.targets].cpu()
    quota = torch.where(counts > 1, (HELD_OUT * counts).round().clamp(min=1), 0)
    held_out = places_in_class(split.targets, seed) < quota
    if not held_out.any():
        raise UsageError("found one image per class in train: expected two to choose lambda by, or a given lambda.")
    return split.part(~held_out), split.part(held_out)


def search(train: Split, validation: Split, metric: Metric, prior: Tensor | None = None) -> tuple[Fit, list[dict]]:
    """The fit on train that is best on validation, of equals that of the largest lambda, and a row for each one tried."""
    regression, fits, scores = train.regression(prior), {}, {}
    step = 2 * STEPS_PER_DECADE
    places = range(len(GRID) - 1, -1, -step)  # from the strongest penalty on: each is a start for the next
    while step:
        for place in places:
            if place in range(len(GRID)) and place not in fits:
                fits[place] = regression.fit(GRID[place], expected_at(place, fits), tolerance=SEARCH_TOLERANCE)
                scores[place] = measure(fits[place], validation, metric)[metric]
        best = max(fits, key=lambda place: (scores[place], place))
        step //= 2
        places = best + step, best - step
    rows = [
        {
            "lambda": fit.lam,
            metric: scores[place],
            "loss": fit.loss,
            "iterations": fit.iterations,
            "converged": fit.converged,
        }
        for place, fit in sorted(fits.items())
    ]
    return fits[best], rows


def expected_at(place: int, fits: Mapping[int, Fit]) -> Fit | None:
    """About what the fit for `GRID[place]` will be: weights are nearly linear in the logarithm of lambda.

    Between two fits, or on from the nearest two.
    """
    below, above = [p for p in fits if p < place], [p for p in fits if p > place]
    if len(fits) < 2:
        return next(iter(fits.values()), None)
    low, high = (max(below), min(above)) if below and above else sorted(above)[:2] or sorted(below)[-2:]
    share = (place - low) / (high - low)
    weight, bias = (torch.lerp(a, b, share) for a, b in zip(fits[low][:2], fits[high][:2], strict=True))
    return fits[low]._replace(weight=weight, bias=bias)


def measure(fit: Fit, split: Split, metric: Metric) -> dict[str, float]:
    """`top1`, `top5`, `mean_per_class_recall`, and the metric; of several labels per image average precisions."""
    logits, targets, num_classes = fit.logits(split.features), split.targets, len(split.folder.labels)
    if targets.ndim == 2:
        return metrics.mean_average_precisions(zip(logits.T.cpu().numpy(), targets.T.cpu().numpy(), strict=True))
    ranks, best = metrics.rank_of_target(logits, targets).cpu(), metrics.best_label(logits).cpu()
    found = {
        "top1": metrics.top_k_accuracy(ranks, 1),
        "top5": metrics.top_k_accuracy(ranks, 5),
        "mean_per_class_recall": metrics.mean_per_class(best, targets.cpu(), num_classes),
    }
    if metric == "mean_top1_top5":
        found[metric] = metrics.mean_of_top1_and_top5(ranks)
    elif metric == "roc_auc":
        found[metric] = metrics.roc_auc((logits[:, 1] - logits[:, 0]).cpu(), targets.cpu())
    return found

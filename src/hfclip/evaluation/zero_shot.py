"""Zero-shot classification: what a classifier that is made of words gets right, and how well it knows that.

labels x templates -> embeddings of sentences -> their mean -> one row per label
images -> embeddings, shared by all processes -> blocks of logits -> for each image three numbers -> metrics

Memory is that of the embeddings and of a block of logits, whatever the number of images.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers.modeling_utils import unwrap_model

from ..zero_shot import DEFAULT_TEMPLATES, Template, check_labels, device_of, evaluating
from . import metrics
from .data import LabelledFolder, LazyImages, UndecodableImage, load_labelled_folder
from .shared import (
    ROWS,
    Embedded,
    LabelledImages,
    Metric,
    Prompts,
    check_metric,
    distinct,
    embed_labelled,
    embed_prompts,
)
from .task import Plot, Result


__all__ = [
    "LabelledFolder",
    "LabelledImages",
    "LazyImages",
    "UndecodableImage",
    "load_labelled_folder",
    "zero_shot",
    "zero_shot_accuracy",
]

COLUMNS = 16  # labels whose scores of all images are in memory, where a metric ranks images
COVERAGES = [number / 20 for number in range(1, 21)]  # of the table of accuracy by coverage

PLOTS = [
    Plot("calibration", "confidence", "accuracy", title="Accuracy of predictions by their confidence"),
    Plot("coverage", "coverage", "accuracy", title="Accuracy on the most confident images"),
]


class Predictions(NamedTuple):
    """What a classifier makes of images, a number for each of them."""

    ranks: np.ndarray
    """Labels ahead of the target, 0 if it is the best."""
    best: np.ndarray
    """The label that is chosen."""
    confidence: np.ndarray
    """The probability that the model gives to it: softmax over the labels, or, with a `logit_bias`, the sigmoid."""


def zero_shot_accuracy(
    model: nn.Module,
    processor: Any,
    dataset: LabelledImages,
    labels: Iterable[str],
    templates: Iterable[Template] = DEFAULT_TEMPLATES,
    *,
    batch_size: int = 64,
    top_k: Sequence[int] = (1, 5),
    num_workers: int = 0,
    group: dist.ProcessGroup | None = None,
    **embedding,
) -> dict[str, float | int]:
    """Share of images whose label is among the k best of a prompt-ensembled classifier (paper 3.1).

    Every rank of the process group embeds a share of the images on its own copy of the model, so every rank returns the
    same result and every image counts once. Equal scores are ranked in
    the order of the labels, as argmax does; labels may repeat, as in OpenAI's list for ImageNet, and then the later
    one of two can only be found at k = 2.

    Args:
        model: a `HFCLIPModel`; a distributed wrapper is taken off, its mode is restored afterwards.
        processor: a `HFCLIPProcessor`.
        dataset: `(image, target)` pairs, e.g. the samples of [`load_labelled_folder`].
        labels: name of each target.
        templates: see [`ZeroShotClassifier`].
        batch_size: images embedded at a time on each rank.
        top_k: values of k. A k that is not below the number of labels gives 1.
        num_workers: processes a rank that read and preprocess images.
        group: ranks that share the work. Default: all if `torch.distributed` is initialised, else this process.
        embedding: further options of `hfclip.embeddings.embed`; `precision` is "fp32" if it is not given.

    Returns:
        `top<k>` for each k and `mean_per_class_recall` (mean over the classes that occur of their top-1 accuracy),
        fractions in 0..1, over `num_samples` images; `num_skipped` more raised [`UndecodableImage`].

    Raises:
        ValueError: an empty data set or none of its images decodable, a target that is no index of `labels`, k below 1,
            logits that are not finite, and what [`ZeroShotClassifier`] raises.
    """
    model, labels = unwrap_model(model), check_labels(labels)
    _check_top_k(top_k)
    options = {"batch_size": batch_size, "num_workers": num_workers, "group": group, **embedding}
    classes = embed_prompts(model, processor, distinct(labels), templates, **options).ensemble()
    images = embed_labelled(model, processor, dataset, labels, **options)
    predictions = predict(model, images, classes, labels)
    num_samples = len(images.readable)
    return {
        **_accuracies(predictions, images.targets, len(labels), top_k),
        "num_samples": num_samples,
        "num_skipped": len(dataset) - num_samples,
    }


def zero_shot(
    model: nn.Module,
    processor: Any,
    data: LabelledFolder,
    *,
    metric: Metric | None = None,
    top_k: Sequence[int] = (1, 5),
    baseline: str | None = None,
    per_template: bool = False,
    **embedding,
) -> Result:
    """Zero-shot classification of labelled images, measured in every respect.

    Args:
        data: what has `labels`, `templates` and `samples`, such as a [`LabelledFolder`].
        metric: the headline, which is the metric of the data set. None: top-1 accuracy, or 11-point mAP where images
            have several labels. "roc_auc" takes the second of two labels as the positive one.
        top_k: values of k of the accuracy that counts a label among the k best.
        baseline: one template by which the headline is measured, too, such as "a photo of a {}."
        per_template: whether the headline is measured for each template by itself.
        embedding: options of `hfclip.embeddings.embed`; `precision` is "fp32" if it is not given. Under a `cache_dir`
            images and classifiers are stored, and found again.

    Returns:
        For one label per image `top<k>`, `mean_per_class_recall`, `ece` and `adaptive_ece` (15 bins, the model's own
        probabilities) and `selective_accuracy` (area of accuracy by coverage), for several `map_11_point` and
        `mean_average_precision`; `metric`, `baseline`, and `unreadable_images` if there are any. Tables of classes,
        templates, calibration and coverage; the confusion matrix, and the chosen label of each image, as arrays.

    Raises:
        UsageError: a metric that the labels do not allow; a model without a text tower.
        ValueError: see `zero_shot_accuracy`.
    """
    model, labels, targets = unwrap_model(model), check_labels(data.labels), getattr(data.samples, "targets", None)
    _check_top_k(top_k)
    metric = check_metric(metric, labels, targets)
    prompts = embed_prompts(model, processor, distinct(labels), data.templates, **embedding)
    alone = None if baseline is None else embed_prompts(model, processor, distinct(labels), [baseline], **embedding)
    images = embed_labelled(model, processor, data.samples, labels, **embedding)
    result = measure(model, images, prompts, labels, metric, top_k, per_template)
    if alone:
        result.metrics["baseline"] = _measure(model, images, alone.of_template(0), labels, metric, top_k)[0][metric]
    if unreadable := len(data.samples) - len(images.readable):
        result.metrics["unreadable_images"] = unreadable
    return result


def measure(
    model: nn.Module,
    images: Embedded,
    prompts: Prompts,
    labels: Sequence[str],
    metric: str = "top1",
    top_k: Sequence[int] = (1, 5),
    per_template: bool = False,
) -> Result:
    """What `zero_shot` returns, of images and sentences that are embedded; `prompts` are of the distinct labels."""
    found, predictions = _measure(model, images, prompts.ensemble(), labels, metric, top_k)
    tables, plots, arrays = {}, [], {}
    if predictions is not None:
        found |= _confidence(predictions)
        tables, arrays = _details(predictions, images, labels)
        plots = PLOTS
    if per_template:
        alone = (
            _measure(model, images, prompts.of_template(t), labels, metric, top_k) for t in range(len(prompts.rows))
        )
        tables["templates"] = [
            {"template": template, metric: of_template[metric]}
            for template, (of_template, _) in zip(prompts.templates, alone, strict=True)
        ]
    protocol = {"templates": len(prompts.templates), "classes": len(labels), "images": len(images.readable)}
    return Result(found, metric, tables, plots, arrays, protocol, _notes(labels, images.targets))


def predict(model: nn.Module, images: Embedded, classes: Tensor, labels: Sequence[str]) -> Predictions:
    """Classifies images, a block at a time.

    Args:
        classes: `(num_distinct_labels, dim)`.
        labels: in the order of targets; they may repeat those of `classes`.

    Raises:
        ValueError: logits that are not finite.
    """
    device, number = device_of(model), {label: number for number, label in enumerate(distinct(labels))}
    classes, columns = classes.to(device), torch.tensor([number[label] for label in labels], device=device)
    # Allocated before the blocks: between them, small arrays that stay would keep their memory from being used again.
    kinds = Predictions(np.int64, np.int64, np.float32)
    found = Predictions(*(np.empty(len(images.readable), kind) for kind in kinds))
    with evaluating(model) as model:
        for start, block in zip(range(0, len(images.readable), ROWS), images.blocks()):
            rows = slice(start, start + len(block))
            image_embeds, targets = torch.from_numpy(block).float(), torch.from_numpy(images.targets[rows])
            logits = model(image_embeds=image_embeds.to(device), text_embeds=classes).logits_per_image
            if not logits.isfinite().all():
                raise ValueError(
                    "the model gives logits that are not finite: check its weights, or evaluate in float32."
                )
            confidence = (logits.softmax(dim=-1) if model.logit_bias is None else logits.sigmoid()).amax(dim=1)
            logits = logits[:, columns]
            parts = metrics.rank_of_target(logits, targets.to(device)), metrics.best_label(logits), confidence
            for whole, part in zip(found, parts, strict=True):
                whole[rows] = part.cpu().numpy()
    return found


def _scores(images: Embedded, classes: Tensor) -> np.ndarray:
    """`(num_readable, len(classes))` similarities, which rank the images of each class as its logits do."""
    scores = np.empty((len(images.readable), len(classes)), np.float32)
    for start, block in zip(range(0, len(scores), ROWS), images.blocks()):
        scores[start : start + len(block)] = block.astype(np.float32) @ classes.numpy().T
    return scores


# -------------------------------------------------------------------------------------------------------------- measures


def _measure(
    model: nn.Module, images: Embedded, classes: Tensor, labels: Sequence[str], metric: str, top_k: Sequence[int]
) -> tuple[dict[str, float], Predictions | None]:
    """What one classifier gets right; without predictions where images have several labels."""
    if images.targets.ndim == 2:
        return metrics.mean_average_precisions(_columns(images, classes)), None
    predictions = predict(model, images, classes, labels)
    found = _accuracies(predictions, images.targets, len(labels), sorted({1, *top_k}))
    if metric == "mean_top1_top5":
        found[metric] = metrics.mean_of_top1_and_top5(predictions.ranks)
    if metric == "roc_auc":
        found[metric] = metrics.roc_auc(_scores(images, classes[1:] - classes[:1])[:, 0], images.targets)
    return found, predictions


def _accuracies(predictions: Predictions, targets: np.ndarray, num_labels: int, top_k: Sequence[int]) -> dict:
    return {
        **{f"top{k}": metrics.top_k_accuracy(predictions.ranks, k) for k in top_k},
        "mean_per_class_recall": metrics.mean_per_class(predictions.best, targets, num_labels),
    }


def _confidence(predictions: Predictions) -> dict[str, float]:
    confidence, correct = predictions.confidence, predictions.ranks == 0
    return {
        "ece": metrics.calibration_error(confidence, correct),
        "adaptive_ece": metrics.calibration_error(confidence, correct, adaptive=True),
        "selective_accuracy": metrics.selective_accuracy(confidence, correct),
    }


def _columns(images: Embedded, classes: Tensor) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Scores and targets of all images, class by class in the order of columns of the targets."""
    for start in range(0, len(classes), COLUMNS):
        scores = _scores(images, classes[start : start + COLUMNS])
        yield from zip(scores.T, images.targets[:, start : start + COLUMNS].T, strict=True)


def _details(predictions: Predictions, images: Embedded, labels: Sequence[str]) -> tuple[dict, dict]:
    """Tables of classes, calibration and coverage; confusion matrix and chosen labels, -1 where an image is unreadable."""
    confidence, correct, num_labels = predictions.confidence, predictions.ranks == 0, len(labels)
    confusion = metrics.confusion_matrix(predictions.best, images.targets, num_labels)
    accuracy, counts = metrics.per_class_accuracy(predictions.best, images.targets, num_labels), confusion.sum(axis=1)
    mistakes = confusion.copy()
    np.fill_diagonal(mistakes, 0)
    tables = {
        "classes": [
            {
                "class": label,
                "images": int(counts[number]),
                "accuracy": float(accuracy[number]) if counts[number] else None,
                "mistaken_for": labels[mistakes[number].argmax()] if mistakes[number].any() else None,
            }
            for number, label in enumerate(labels)
        ],
        "calibration": [
            {"confidence": mean, "accuracy": right, "images": int(count)}
            for count, mean, right in metrics.calibration_bins(confidence, correct).tolist()
        ],
        "coverage": [
            {"coverage": coverage, "accuracy": metrics.selective_accuracy(confidence, correct, coverage)}
            for coverage in COVERAGES
        ],
    }
    chosen = np.full(len(images.found), -1, np.int32)
    chosen[images.readable] = predictions.best
    return tables, {"confusion_matrix": confusion, "predictions": chosen}


def _notes(labels: Sequence[str], targets: np.ndarray) -> list[str]:
    notes, repeated = [], [label for label, times in Counter(labels).items() if times > 1]
    if repeated:
        notes.append(
            f"{len(repeated)} class names repeat ({', '.join(repeated[:3])}): images of the later class of a name are "
            "wrong at k = 1, whatever the model sees."
        )
    occurring = np.unique(targets) if targets.ndim == 1 else np.flatnonzero((targets > 0).any(axis=0))
    if len(occurring) < len(labels):
        notes.append(
            f"{len(labels) - len(occurring)} of {len(labels)} classes have no image: means over classes leave them out."
        )
    return notes


# ---------------------------------------------------------------------------------------------------------------- checks


def _check_top_k(top_k: Sequence[int]) -> None:
    if not top_k or min(top_k) < 1:
        raise ValueError(f"top_k is {tuple(top_k)}: expected values of k of at least 1.")

"""What classifiers and rankings are measured by: pure functions, one definition each.

None needs the scores of all images with all classes at once. A block of images gives `rank_of_target`, the label it
predicts and its confidence, and everything about single labels follows from these three numbers per image; multi-label
metrics take the scores of one class at a time.
"""

from collections.abc import Iterable

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor


NUM_BINS = 15  # of a calibration error, as Guo et al. have it

# ------------------------------------------------------------------------------------------- one label for each image


def rank_of_target(scores: Tensor, targets: Tensor) -> Tensor:
    """Labels ahead of the target of each image, `(num_images, num_labels)`, `(num_images,)` -> `(num_images,)`.

    0 is the best. Equal scores are ranked in the order of the labels, as argmax does.
    """
    of_target = scores.gather(1, targets[:, None])
    earlier = torch.arange(scores.shape[1], device=scores.device) < targets[:, None]
    return ((scores > of_target) | ((scores == of_target) & earlier)).sum(dim=1)


def best_label(scores: Tensor) -> Tensor:
    """The label of the highest score of each image, the first one of equals, `(num_images,)`."""
    places = torch.arange(scores.shape[1], device=scores.device)
    return torch.where(scores == scores.amax(dim=1, keepdim=True), places, scores.shape[1]).amin(dim=1)


def top_k_accuracy(ranks: ArrayLike, k: int) -> float:
    """Share of ranks (from 0) below `k`: top-k accuracy, and recall at k."""
    return float(np.mean(np.asarray(ranks) < k))


def mean_of_top1_and_top5(ranks: ArrayLike) -> float:
    """Kinetics' metric (Carreira and Zisserman 2017; the paper's for Kinetics700)."""
    return (top_k_accuracy(ranks, 1) + top_k_accuracy(ranks, 5)) / 2


def confusion_matrix(predicted: ArrayLike, targets: ArrayLike, num_classes: int) -> np.ndarray:
    """Images of class i that were taken for class j, `(num_classes, num_classes)` int32."""
    pairs = np.asarray(targets, np.int64) * num_classes + np.asarray(predicted, np.int64)
    matrix = np.zeros(num_classes * num_classes, np.int32)
    np.add.at(matrix, pairs, 1)
    return matrix.reshape(num_classes, num_classes)


def per_class_accuracy(predicted: ArrayLike, targets: ArrayLike, num_classes: int) -> np.ndarray:
    """Share of each class's images that are predicted as theirs (recall), `(num_classes,)`; NaN without images."""
    predicted, targets = np.asarray(predicted), np.asarray(targets)
    images = np.bincount(targets, minlength=num_classes)
    hits = np.bincount(targets[predicted == targets], minlength=num_classes)
    return np.divide(hits, images, out=np.full(num_classes, np.nan), where=images > 0)


def mean_per_class(predicted: ArrayLike, targets: ArrayLike, num_classes: int) -> float:
    """Mean of `per_class_accuracy` over the classes that occur: balanced accuracy."""
    return float(np.nanmean(per_class_accuracy(predicted, targets, num_classes)))


# ----------------------------------------------------------------------------------------------------------- confidence


def calibration_bins(
    confidence: ArrayLike, correct: ArrayLike, num_bins: int = NUM_BINS, adaptive: bool = False
) -> np.ndarray:
    """Count, mean confidence and accuracy of the predictions in each bin that is not empty, `(at most num_bins, 3)`.

    Bins are intervals of one width, ]0, 1/15], ]1/15, 2/15] ...; adaptive ones hold one number of predictions each, up
    to one, in the order of their confidence.
    """
    confidence, correct = np.asarray(confidence, np.float64), np.asarray(correct, np.float64)
    if adaptive:
        parts = np.array_split(confidence.argsort(kind="stable"), num_bins)
        numbers = np.empty(len(confidence), np.int64)
        numbers[np.concatenate(parts)] = np.repeat(np.arange(num_bins), [len(part) for part in parts])
    else:
        numbers = np.digitize(confidence, np.linspace(0, 1, num_bins + 1)[1:-1], right=True)
    counts = np.bincount(numbers, minlength=num_bins)
    sums = [np.bincount(numbers, values, num_bins)[counts > 0] for values in (confidence, correct)]
    counts = counts[counts > 0]
    return np.stack([counts, *(of_bin / counts for of_bin in sums)], axis=1)


def calibration_error(
    confidence: ArrayLike, correct: ArrayLike, num_bins: int = NUM_BINS, adaptive: bool = False
) -> float:
    """Expected calibration error: mean over predictions of |accuracy - confidence| of their bin.

    Guo et al. 2017, "On Calibration of Modern Neural Networks", section 2; with adaptive bins the top-label error of
    Nguyen and O'Connor 2015 and Mukhoti et al. 2020.

    Args:
        confidence: probability that the model gives to what it predicts.
        correct: whether it is right.
    """
    counts, mean_confidence, accuracy = calibration_bins(confidence, correct, num_bins, adaptive).T
    return float((counts * np.abs(accuracy - mean_confidence)).sum() / counts.sum())


def accuracy_by_coverage(confidence: ArrayLike, correct: ArrayLike) -> np.ndarray:
    """Accuracy on the 1, 2, ... all most confident images, `(num_images,)`: 1 - the risk of selective classification.

    Geifman and El-Yaniv 2017. Images of equal confidence count as the mean of them, so that their order is nothing.
    """
    _, group, counts = np.unique(-np.asarray(confidence, np.float64), return_inverse=True, return_counts=True)
    expected = np.bincount(group, np.asarray(correct, np.float64)) / counts
    return np.repeat(expected, counts).cumsum() / np.arange(1, len(group) + 1)


def selective_accuracy(confidence: ArrayLike, correct: ArrayLike, coverage: float | None = None) -> float:
    """Accuracy on the most confident share `coverage` of the images, rounded up to one.

    None: the area under the curve of accuracy by coverage, 1 - AURC of Geifman et al. 2019.
    """
    curve = accuracy_by_coverage(confidence, correct)
    return float(curve.mean() if coverage is None else curve[max(int(np.ceil(coverage * len(curve))), 1) - 1])


# ------------------------------------------------------------------------------------ two classes, or several per image


def roc_auc(scores: ArrayLike, targets: ArrayLike) -> float:
    """Area under the receiver operating characteristic: how often a positive outscores a negative, ties a half."""
    targets = np.asarray(targets).astype(bool)
    _, group, counts = np.unique(np.asarray(scores), return_inverse=True, return_counts=True)
    mean_ranks = counts.cumsum() - (counts - 1) / 2  # from 1
    positives, negatives = int(targets.sum()), int((~targets).sum())
    if not (positives and negatives):
        raise ValueError(f"found {positives} positives and {negatives} negatives, expected both for a ROC curve.")
    wins = mean_ranks[group][targets].sum() - positives * (positives + 1) / 2
    return float(wins / (positives * negatives))


def precision_and_recall(scores: ArrayLike, targets: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """Precision and recall after each image of a ranking by descending score; equal scores keep their order.

    Args:
        targets: above 0 for images of the class, 0 for others, below 0 for those that are ignored, such as the VOC
            devkit's difficult ones.
    """
    scores, targets = np.asarray(scores), np.asarray(targets)
    scores, targets = scores[targets >= 0], targets[targets >= 0] > 0
    hits = targets[np.argsort(-scores, kind="stable")].cumsum()
    return hits / np.arange(1, len(hits) + 1), hits / max(targets.sum(), 1)


def average_precision(scores: ArrayLike, targets: ArrayLike) -> float:
    """Mean of the precision at each image of the class (the whole area); arguments as in `precision_and_recall`."""
    precision, recall = precision_and_recall(scores, targets)
    return float(precision[np.diff(recall, prepend=0) > 0].mean())


def average_precision_11_points(scores: ArrayLike, targets: ArrayLike) -> float:
    """Mean over recalls 0, 0.1, ... 1 of the best precision at that recall or more: VOCevalcls.m of the VOC2007 devkit.

    Recalls are compared as its loop has them, multiples of 0.1 in double precision: 3 * 0.1 is above 3 / 10. Arguments
    as in `precision_and_recall`.
    """
    precision, recall = precision_and_recall(scores, targets)
    return float(np.mean([precision[recall >= point].max(initial=0) for point in np.arange(11) * 0.1]))


def mean_average_precisions(classes: Iterable[tuple[ArrayLike, ArrayLike]]) -> dict[str, float]:
    """`map_11_point` and `mean_average_precision`, means over the classes of which there are images.

    Args:
        classes: the scores and targets of each.
    """
    kept = [(scores, targets) for scores, targets in classes if (np.asarray(targets) > 0).any()]
    kinds = {"map_11_point": average_precision_11_points, "mean_average_precision": average_precision}
    return {name: float(np.mean([precision(*of_class) for of_class in kept])) for name, precision in kinds.items()}


# ------------------------------------------------------------------------------------------------------------ retrieval


def median_rank(ranks: ArrayLike) -> int:
    """Median place of the match, from 1, for ranks from 0; rounded down between two, as VSE++ and its followers do."""
    return int(np.median(np.asarray(ranks))) + 1

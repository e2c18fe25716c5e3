"""Metrics against scikit-learn, the VOC2007 devkit's formula written out, and numbers that are counted by hand."""

import numpy as np
import pytest
import torch

from hfclip.evaluation import metrics


sklearn = pytest.importorskip("sklearn.metrics")


def classified(num_images=997, num_classes=7, seed=0):
    """Scores of images that favour the target, and targets of unequal frequency, one class without images."""
    generator = np.random.default_rng(seed)
    targets = generator.choice(num_classes, num_images, p=[0.4, 0.2, 0.2, 0.1, 0.07, 0.03, 0.0])
    scores = generator.normal(size=(num_images, num_classes)) + 1.2 * np.eye(num_classes)[targets]
    return scores, targets


def test_accuracies_equal_scikit_learns():
    scores, targets = classified()
    predicted = metrics.best_label(torch.from_numpy(scores)).numpy()
    ranks = metrics.rank_of_target(torch.from_numpy(scores), torch.from_numpy(targets)).numpy()
    for k in (1, 2, 5):
        expected = sklearn.top_k_accuracy_score(targets, scores, k=k, labels=range(7))
        assert metrics.top_k_accuracy(ranks, k) == pytest.approx(expected, abs=1e-12)
    expected = sklearn.confusion_matrix(targets, predicted, labels=range(7))
    assert np.array_equal(metrics.confusion_matrix(predicted, targets, 7), expected)
    found = metrics.per_class_accuracy(predicted, targets, 7)
    recalls = sklearn.recall_score(targets, predicted, average=None, labels=range(6))
    assert np.isnan(found[6]) and found[:6] == pytest.approx(recalls, abs=1e-12)
    expected = sklearn.balanced_accuracy_score(targets, predicted)
    assert metrics.mean_per_class(predicted, targets, 7) == pytest.approx(expected, abs=1e-12)
    top1, top5 = (metrics.top_k_accuracy(ranks, k) for k in (1, 5))
    assert 0 < top1 < top5 < 1 and metrics.mean_of_top1_and_top5(ranks) == pytest.approx((top1 + top5) / 2)


def test_equal_scores_are_ranked_in_the_order_of_labels():
    scores = torch.tensor([[1.0, 2.0, 2.0, 0.0]] * 4)
    assert metrics.rank_of_target(scores, torch.arange(4)).tolist() == [2, 0, 1, 3]
    assert metrics.best_label(scores).tolist() == [1] * 4


@pytest.mark.parametrize("distinct", [1000, 5])
def test_roc_auc_equals_scikit_learns(distinct):
    generator = np.random.default_rng(0)
    targets = generator.random(301) < 0.3
    scores = np.round((generator.normal(size=301) + targets) * distinct / 10)  # ties, with few distinct values
    expected = sklearn.roc_auc_score(targets, scores)
    assert 0.5 < expected < 1 and metrics.roc_auc(scores, targets) == pytest.approx(expected, abs=1e-12)


def test_roc_auc_needs_both_classes():
    with pytest.raises(ValueError, match="found 0 positives and 3 negatives"):
        metrics.roc_auc([1, 2, 3], [0, 0, 0])


def devkit_average_precision(confidence, gt):
    """VOCevalcls.m of the VOC2007 devkit, line by line; `gt` is 1, -1 or, for difficult images, 0."""
    order = np.argsort(-confidence, kind="stable")
    true_positives, false_positives = np.cumsum(gt[order] > 0), np.cumsum(gt[order] < 0)
    recall = true_positives / (gt > 0).sum()
    with np.errstate(invalid="ignore"):
        precision = true_positives / (false_positives + true_positives)
    total = 0
    for threshold in np.arange(0, 1.1, 0.1):
        reached = precision[(recall >= threshold) & ~np.isnan(precision)]
        total += (reached.max() if len(reached) else 0) / 11
    return total


@pytest.mark.parametrize("positives", [1, 7, 10, 60])
def test_11_point_average_precision_is_the_devkits(positives):
    generator = np.random.default_rng(positives)
    for _ in range(20):
        gt = np.full(200, -1)
        gt[generator.permutation(200)[:positives]] = 1
        gt[generator.random(200) < 0.05] = 0
        if not (gt > 0).any():
            continue
        confidence = np.round(generator.normal(size=200) + (gt > 0), 1)  # ties keep their order
        targets = np.select([gt > 0, gt < 0], [1, 0], -1)
        found = metrics.average_precision_11_points(confidence, targets)
        assert found == pytest.approx(devkit_average_precision(confidence, gt), abs=1e-12)


def test_11_point_average_precision_by_hand():
    """Ranking + - + -: precision 1 up to recall 0.5, then 2/3; six points of 1 (0 to 0.5) and five of 2/3."""
    assert metrics.average_precision_11_points([4, 3, 2, 1], [1, 0, 1, 0]) == pytest.approx((6 + 5 * 2 / 3) / 11)
    assert metrics.average_precision([4, 3, 2, 1], [1, 0, 1, 0]) == pytest.approx((1 + 2 / 3) / 2)


def test_average_precision_equals_scikit_learns():
    generator = np.random.default_rng(0)
    targets = generator.random(500) < 0.2
    scores = generator.normal(size=500) + targets
    expected = sklearn.average_precision_score(targets, scores)
    assert metrics.average_precision(scores, targets) == pytest.approx(expected, abs=1e-12)


def test_calibration_error_equals_the_definition_bin_by_bin():
    generator = np.random.default_rng(0)
    confidence = np.concatenate([generator.random(500), np.arange(16) / 15])  # edges, too
    correct = generator.random(516) < confidence**2
    expected = 0
    for number in range(15):
        inside = (confidence > number / 15) & (confidence <= (number + 1) / 15) | (number == 0) & (confidence == 0)
        expected += inside.mean() * abs(correct[inside].mean() - confidence[inside].mean())
    assert metrics.calibration_error(confidence, correct) == pytest.approx(expected, abs=1e-12)
    order = np.argsort(confidence)
    parts = [order[35 * n : 35 * (n + 1)] for n in range(6)] + [order[210 + 34 * n : 244 + 34 * n] for n in range(9)]
    expected = sum(len(part) / 516 * abs(correct[part].mean() - confidence[part].mean()) for part in parts)
    assert metrics.calibration_error(confidence, correct, adaptive=True) == pytest.approx(expected, abs=1e-12)


def test_calibration_bins_equal_scikit_learns_curve():
    generator = np.random.default_rng(1)
    confidence = generator.random(400)
    correct = generator.random(400) < confidence
    accuracy, mean = pytest.importorskip("sklearn.calibration").calibration_curve(correct, confidence, n_bins=15)
    assert metrics.calibration_bins(confidence, correct)[:, 1:] == pytest.approx(
        np.stack([mean, accuracy], 1), abs=1e-12
    )


def test_selective_accuracy_by_hand():
    confidence, correct = [0.9, 0.8, 0.7, 0.6], [True, True, False, True]
    assert metrics.accuracy_by_coverage(confidence, correct) == pytest.approx([1, 1, 2 / 3, 3 / 4])
    assert metrics.selective_accuracy(confidence, correct, 0.5) == 1
    assert metrics.selective_accuracy(confidence, correct, 0.6) == pytest.approx(2 / 3)
    assert metrics.selective_accuracy(confidence, correct) == pytest.approx((1 + 1 + 2 / 3 + 3 / 4) / 4)


def test_images_of_equal_confidence_count_as_their_mean():
    expected = [0.5, 0.5, 2 / 3]
    for correct in ([True, False, True], [False, True, True]):
        assert metrics.accuracy_by_coverage([0.9, 0.9, 0.1], correct) == pytest.approx(expected)


def test_median_rank_counts_from_1():
    assert metrics.median_rank([0, 0, 4]) == 1 and metrics.median_rank([0, 1, 2, 9]) == 2

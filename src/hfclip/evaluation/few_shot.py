"""Few-shot: linear probes on a few labelled images per class beside the classifier made of words (paper, figures 6 and 7).

train -> as many images per class, drawn once per seed -> probe -> test -> mean and deviation over the seeds

A seed's two images of a class are among its four. Where the curve crosses zero-shot is how many labelled images per class a
probe needs to be as good.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers.modeling_utils import unwrap_model

from ..embeddings.chunks import Pool
from ..errors import UsageError
from . import linear_probe as probing
from .data import DataSet, LabelledFolder
from .linear_probe import Split
from .logistic import Fit
from .shared import Metric, check_metric, embed_prompts
from .task import Plot, Result


VALIDATION_SHOTS = 4  # images per class at most by which lambda is chosen, as in CoOp (Zhou et al. 2022)


def few_shot(
    model: nn.Module,
    processor: Any,
    data: DataSet,
    *,
    shots: Sequence[int] = (1, 2, 4, 8, 16),
    num_seeds: int = 3,
    start: Literal["zero", "zero-shot"] = "zero",
    layer: str = "visual_projection",
    pool: Pool = "input",
    metric: Metric = "top1",
    lam: float | None = None,
    **embedding,
) -> Result:
    """Accuracy of linear probes on a few images per class, and how many images make them as good as zero-shot.

    Args:
        data: its splits "train" and "test" are used, and "validation", if it is there, to choose lambda.
        shots: images per class. A class that has fewer gives all that it has.
        num_seeds: how often images are drawn, with the seeds 0, 1 ...
        start: "zero" penalises |W|^2. "zero-shot" penalises |W - W_0|^2, where W_0 is the classifier made of words times
            the model's scale; features are embeddings of unit length then, without a bias: a large lambda leaves W_0.
        layer, pool: the features, as of the linear probe.
        metric: what is measured, and by which lambda is chosen.
        lam: lambda, if it is given. None: for each draw what is best for as many more images per class, at most 4, of
            validation or the rest of train.
        embedding: options of `hfclip.embeddings.embed`; `precision` is "fp32" if it is not given.

    Returns:
        `<metric>@0` of zero-shot and `<metric>@<shots>`, means over the seeds; `shots_to_match_zero_shot` if the curve,
        straight over the logarithm of the shots, crosses it. Its last point is all of train if no other is high enough.

    Raises:
        UsageError: see `linear_probe`; no images are left to choose lambda by.
    """
    if not shots or min(shots) < 1 or num_seeds < 1:
        raise UsageError(f"found shots {list(shots)} and {num_seeds} seeds, expected at least one of each, from 1 on.")
    splits = probing.load_splits(model, processor, data, layer, pool, **embedding)
    if splits["test"].targets.ndim == 2:
        raise UsageError(f"few-shot: {data.name} has several labels per image, expected one, by which they are drawn.")
    metric = check_metric(metric, splits["test"].folder.labels, None)
    in_joint_space = {name: split._replace(features=split.image_embeds) for name, split in splits.items()}
    words = _classifier_of_words(model, processor, splits["test"].folder, **embedding)
    zero_shot = probing.measure(words, in_joint_space["test"], metric)[metric]
    prior, used = (None, splits) if start == "zero" else (words.weight, in_joint_space)
    numbers = sorted(set(shots))
    probes = [_probe(used, number, seed, metric, lam, prior) for number in numbers for seed in range(num_seeds)]
    curve = _curve(probes, metric)
    found = {f"{metric}@0": zero_shot, **{f"{metric}@{row['shots']}": row[metric] for row in curve}}
    if all(row[metric] < zero_shot for row in curve):
        probes.append(_probe(used, None, 0, metric, lam, prior))
        curve = _curve(probes, metric)
    matching = shots_to_match([row["shots"] for row in curve], [row[metric] for row in curve], zero_shot)
    found |= {} if matching is None else {"shots_to_match_zero_shot": matching}
    level = {"classifier": "zero-shot", metric: zero_shot, "low": zero_shot, "high": zero_shot}
    tables = {"curve": [*curve, *({**level, "shots": row["shots"]} for row in curve)], "probes": probes}
    protocol = _protocol(splits, probing.named(layer, pool), lam, prior)
    notes = [*probing.describe(splits), *_describe(splits["train"], numbers, matching)]
    return Result(found, f"{metric}@{numbers[-1]}", tables, [_plot(metric, num_seeds)], protocol=protocol, notes=notes)


def _plot(metric: str, num_seeds: int) -> Plot:
    words = {"title": f"Few-shot, {num_seeds} seeds", "x_label": "images per class"}
    return Plot("curve", "shots", metric, "classifier", x_scale="log", error=("low", "high"), **words)


def _protocol(splits: Mapping[str, Split], features: str, lam: float | None, prior: Tensor | None) -> dict[str, Any]:
    source = "the validation split" if "validation" in splits else "the rest of train"
    return {
        "features": features if prior is None else "embeddings of unit length",
        "loss": probing.LOSS if prior is None else probing.LOSS.replace("|W|", "|W - W_0|"),
        "lambda_chosen_on": f"as many images per class, at most {VALIDATION_SHOTS}, of {source}"
        if lam is None
        else None,
        "templates": len(splits["test"].folder.templates),
        "images": {name: len(split.targets) for name, split in splits.items()},
    }


def shots_to_match(shots: Sequence[float], accuracies: Sequence[float], target: float) -> float | None:
    """Where a curve, straight between its points over the logarithm of the shots, first reaches `target`.

    The first number of shots if that is enough, None if no number is (paper, figure 7).
    """
    if accuracies[0] >= target:
        return shots[0]
    for (few, low), (more, high) in pairwise(zip(shots, accuracies, strict=True)):
        if low < target <= high:
            return math.exp(math.log(few) + (target - low) / (high - low) * math.log(more / few))
    return None


def _classifier_of_words(model: nn.Module, processor: Any, folder: LabelledFolder, **embedding) -> Fit:
    """The zero-shot classifier as weights for embeddings of unit length."""
    embeds = embed_prompts(model, processor, folder.labels, folder.templates, **embedding).ensemble()
    weight = embeds.double() * unwrap_model(model).logit_scale.exp().item()
    return Fit(weight, weight.new_zeros(len(weight)), lam=math.inf, loss=math.nan, iterations=0, converged=True)


def _draw(splits: Mapping[str, Split], number: int | None, seed: int) -> tuple[Split, Split]:
    """`number` images per class, or all of train, and others by which lambda is chosen."""
    train, validation = splits["train"], splits.get("validation")
    if number is None:
        return (train, validation) if validation else probing.divide(train, seed)
    places, more = probing.places_in_class(train.targets, seed), min(number, VALIDATION_SHOTS)
    if validation:
        return train.part(places < number), validation.part(probing.places_in_class(validation.targets, seed) < more)
    return train.part(places < number), train.part((places >= number) & (places < number + more))


def _probe(
    splits: Mapping[str, Split], number: int | None, seed: int, metric: Metric, lam: float | None, prior: Tensor | None
) -> dict[str, Any]:
    """What a probe on one draw of images gives on test."""
    train, validation = _draw(splits, number, seed)
    if lam is not None:
        fit = train.regression(prior).fit(lam)
    elif len(validation.targets):
        fit, _ = probing.search(train, validation, metric, prior)
    else:
        raise UsageError(f"no class has more than {number} images, by which lambda could be chosen: give it as lam.")
    return {
        "shots": number or len(train.targets) / len(train.targets.unique()),
        "seed": seed,
        metric: probing.measure(fit, splits["test"], metric)[metric],
        "images": len(train.targets),
        "lambda": fit.lam,
        "iterations": fit.iterations,
        "converged": fit.converged,
    }


def _curve(probes: Sequence[Mapping[str, Any]], metric: Metric) -> list[dict[str, Any]]:
    """Mean and standard deviation over the seeds, a row for each number of shots."""
    rows = []
    for shots in dict.fromkeys(probe["shots"] for probe in probes):
        values = [probe[metric] for probe in probes if probe["shots"] == shots]
        mean, deviation = statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0
        ends = {"low": mean - deviation, "high": mean + deviation}
        rows.append({"classifier": "probe", "shots": shots, metric: mean, "deviation": deviation, **ends})
    return rows


def _describe(train: Split, shots: Sequence[int], matching: float | None) -> list[str]:
    """What a reader has to know, in sentences."""
    notes, counts = [], torch.bincount(train.targets)
    for number in shots:
        if few := int(((counts > 0) & (counts < number)).sum()):
            fewest = int(counts[counts > 0].min())
            notes.append(
                f"Classes with fewer than {number} images, which give all they have: {few}, the least {fewest}."
            )
    if matching is None:
        notes.append("No number of images per class makes the probe as good as zero-shot.")
    elif matching == shots[0]:
        notes.append(f"{shots[0]} images per class, or fewer, make the probe as good as zero-shot.")
    return notes

"""What every evaluation returns."""

from collections.abc import Mapping
from typing import NamedTuple


class Result(NamedTuple):
    """What a task measured: fractions in 0..1 and counts by name, one of which stands for the whole."""

    metrics: dict[str, float]
    headline: str


def all_metrics(results: Mapping[str, Result]) -> dict[str, float]:
    """Every metric as `task/metric`."""
    return {f"{task}/{name}": value for task, result in results.items() for name, value in result.metrics.items()}


def headlines(results: Mapping[str, Result]) -> dict[str, float]:
    """The metric of each task that stands for it, as `task/metric`."""
    return {f"{task}/{result.headline}": result.metrics[result.headline] for task, result in results.items()}

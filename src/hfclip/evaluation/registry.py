"""The registry of data sets: what the paper measures, where it is found, and the numbers that were published of it.

It is data, `datasets.json`: a row per data set, and the published numbers, in percent, by task, model and source. A number
of kind "paper" is printed in the paper; one of kind "released" was measured with the released weights, and is what a
faithful program reproduces. `unverified` are numbers that are known from memory alone.

`docs/datasets.md` is `as_markdown()`.
"""

import functools
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UsageError
from ..presets_hfclip import PRESETS


@dataclass(frozen=True)
class Registered:
    """A data set of the registry.

    Args:
        group: "paper" is of its 27, "robustness", "retrieval", "fairness" or "further".
        train, test: images that the paper has of each.
        metric: the paper's, as tasks name it.
        templates: number of the paper's. Their words are those of openai/CLIP's data/prompts.md.
        hub, hub_test, hub_templates: its repository on the Hub, and what differs there may be told by numbers.
        openclip_column: its name in OpenCLIP's table of results.
        same_protocol: whether what is on the Hub is measured as the paper did; None: not known.
        why: why not, or what else there is to know.
    """

    group: str
    name: str
    title: str
    metric: str
    train: int | None = None
    test: int | None = None
    classes: int | None = None
    templates: int | None = None
    hub: str | None = None
    hub_test: int | None = None
    hub_templates: int | None = None
    openclip_column: str | None = None
    license: str | None = None
    same_protocol: bool | None = None
    why: str = ""

    @property
    def address(self) -> str | None:
        return self.hub and f"https://huggingface.co/datasets/{self.hub}"

    def protocol(self, num_images: int | None, limit: int | None) -> tuple[bool | None, str]:
        """Whether a measurement is the paper's, and why not or what is to be known.

        Args:
            num_images: that were measured, if it is known.
        """
        if limit is not None:
            return False, f"only {limit:,} images"
        if None not in (num_images, self.test) and num_images != self.test:
            return False, f"{num_images:,} images, the paper has {self.test:,}" + (f"; {self.why}" if self.why else "")
        return self.same_protocol, self.why


@dataclass(frozen=True)
class Published:
    """A number that was published, as a fraction."""

    model: str
    kind: str
    source: str
    metric: str
    value: float
    verified: bool


@functools.cache
def _load() -> dict[str, Any]:
    return json.loads((Path(__file__).parent / "datasets.json").read_text(encoding="utf-8"))


@functools.cache
def registered() -> dict[str, Registered]:
    """All data sets by name."""
    return {row["name"]: Registered(**row) for row in _load()["sets"]}


def published(task: str, data: str, model: str | None = None) -> list[Published]:
    """The numbers that were published of a data set, of one model or of all."""
    found = []
    for row in _load()["published"]:
        if row["task"] == task and data in row["values"] and model in (None, row["model"]):
            metric = row.get("metric", registered()[data].metric)
            about = row["model"], row["kind"], row["source"], metric
            found.append(Published(*about, row["values"][data] / 100, data not in row.get("unverified", [])))
    return found


def published_models() -> list[str]:
    """Models of which numbers were published, the largest first."""
    models = {row["model"] for row in _load()["published"]}
    return [name for name in reversed(PRESETS) if name in models]


@dataclass(frozen=True)
class Comparison:
    """A measured metric beside a published number."""

    published: Published
    measured: float

    def __str__(self) -> str:
        row, points = self.published, 100 * (self.measured - self.published.value)
        known = "" if row.verified else ", known from memory alone"
        whose = "paper" if row.kind == "paper" else "released weights"
        return f"{row.metric} {self.measured:.2%}, {whose} {row.value:.2%} ({row.source}{known}): {points:+.2f} points"


def compare(result: Mapping[str, Any], model: str | None = None) -> list[Comparison]:
    """A stored result beside what was published of its task and data set.

    Args:
        model: whose published numbers are meant. None: those of the same architecture.
    """
    model = model or result["model"].get("architecture")
    if model is None or len(result["data"]) != 1 or "registered" not in result["data"][0]:
        return []
    rows = published(result["task"], result["data"][0]["registered"], model)
    return [Comparison(row, result["metrics"][row.metric]) for row in rows if row.metric in result["metrics"]]


def tell_protocol(result: Mapping[str, Any]) -> str | None:
    """Whether a stored result may be held against the paper's, in words; None where the registry does not know the data."""
    found = result.get("same_protocol")
    if found is None:
        return None
    answers = {
        True: "same protocol as the paper",
        False: "NOT the paper's protocol",
        None: "not known to be the paper's protocol",
    }
    return answers[found["answer"]] + (f": {found['why']}" if found["why"] else "")


def find_local(name: str, root: Path) -> str:
    """The folder of a data set below `root`, by its name here or on the Hub.

    Raises:
        UsageError: there is none.
    """
    row = registered().get(name)
    hub = row.hub.rpartition("/")[2] if row and row.hub else name
    names = dict.fromkeys([name, hub, hub.removeprefix("wds_"), hub.removeprefix("wds_vtab-")])
    for folder in names:
        if (root / folder).exists():
            return str(root / folder)
    raise UsageError(f"{root}: found no {name}, expected a folder named {' or '.join(names)}.")


def fetch(name: str, split: str) -> str:
    """The folder of a registered data set, whose split is fetched from the Hub if it is not there yet.

    Raises:
        UsageError: it is not on the Hub, or cannot be fetched.
    """
    from huggingface_hub import snapshot_download

    row = registered()[name]
    if row.hub is None:
        raise UsageError(f"{name} is not on the Hub: {row.why}. Fetch it, and name its folder instead.")
    try:
        return snapshot_download(row.hub, repo_type="dataset", allow_patterns=[f"{split}/*", "*.txt"])
    except Exception as error:  # of requests, of which huggingface_hub has many kinds
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UsageError(
            f"{name} cannot be fetched from {row.address} ({reason}). Name its folder instead, or the folder that holds it "
            "with --data-root."
        ) from error


def as_markdown() -> str:
    """The registry as docs/datasets.md."""
    return "\n".join([_INTRODUCTION, *_tables()])


_INTRODUCTION = """# Data sets

The data sets that `hfclip evaluate --data NAME` knows by name. A set is taken from `--data-root` if it lies there (in a
folder of its name here or on the Hub), else from the Hub. `same` says whether what is on the Hub is measured as the paper
(Radford et al. 2021) did, in split, number of images, metric and templates; where it is not, or where other images are
found, reports say so and no number is called equal to the paper's. This page is what
`hfclip.evaluation.registry.as_markdown()` returns."""

_TITLES = {
    "paper": "The paper's 27",
    "robustness": "Robustness",
    "retrieval": "Retrieval",
    "fairness": "Fairness",
    "further": "Further",
}


def _tables() -> Iterator[str]:
    for group, title in _TITLES.items():
        yield f"\n## {title}\n"
        yield "| name | data set | classes | train | test | metric | templates | on the Hub | licence | same | why |"
        yield "|---|---|---|---|---|---|---|---|---|---|---|"
        for row in registered().values():
            if row.group == group:
                yield f"| {' | '.join(_cells(row))} |"
    yield "\n## Published numbers\n"
    yield (
        "In percent, by the metric of the data set, of OpenAI's models. `paper`: as printed; in brackets what is known from "
        "memory\nalone. `released`: measured with the released weights, the target of a reproduction."
    )
    for task, kind in (("zero-shot", "paper"), ("zero-shot", "released"), ("linear-probe", "paper")):
        yield f"\n### {task}, {kind}\n"
        models = [model for model in published_models() if any(_of(task, name, model, kind) for name in registered())]
        yield f"| data set | {' | '.join(models)} |"
        yield f"|---|{'---|' * len(models)}"
        for name in registered():
            found = [_of(task, name, model, kind) for model in models]
            if any(found):
                yield f"| {name} | {' | '.join(found)} |"
    yield "\n### retrieval\n"
    yield "| data set | model | kind | metric | value |\n|---|---|---|---|---|"
    for name in registered():
        for row in published("retrieval", name):
            yield f"| {name} | {row.model} | {row.kind} | {row.metric} | {_percent(row)} |"


def _of(task: str, name: str, model: str, kind: str) -> str:
    return " / ".join(_percent(row) for row in published(task, name, model) if row.kind == kind)


def _percent(row: Published) -> str:
    value = f"{100 * row.value:.{1 if row.kind == 'paper' else 2}f}"
    return value if row.verified else f"({value})"


def _cells(row: Registered) -> list[str]:
    where = f"[{row.hub.rpartition('/')[2]}]({row.address})" if row.hub else ""
    if row.hub_test not in (None, row.test):
        where += f" ({row.hub_test:,} images)"
    templates = "" if row.templates is None else str(row.templates)
    if row.hub_templates not in (None, row.templates):
        templates += f" (Hub: {row.hub_templates})"
    same = {True: "yes", False: "no", None: ""}[row.same_protocol]
    numbers = ["" if number is None else f"{number:,}" for number in (row.classes, row.train, row.test)]
    return [row.name, row.title, *numbers, row.metric, templates, where, row.license or "", same, row.why]

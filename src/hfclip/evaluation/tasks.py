"""The table of tasks, and the flags that a task's signature asks for.

A task is one file with a function `task(model, processor, data, *, option=default, **embedding) -> Result`, and a row of
`TASKS`. `data` is what the row says that it reads:

    "labelled"     a `LabelledFolder`: labels, templates and labelled images of the split that is evaluated
    "captioned"    a `Source` whose samples have captions
    "splits"       a `DataSet`, of which the task opens the splits that it needs: `data.labelled("train")`
    "several"      a list of `DataSet`s, all that were named, for one result
    "results"      a list of results that are stored, as mappings; `model` and `processor` are None

Keyword-only parameters are the task's own options. Each becomes a flag of `hfclip evaluate` and a key of a suite, read as
its annotation says (`int`, `float`, `str`, `bool`, `Literal`, a sequence of these, `| None`) and explained by the
`Args:` of the docstring: nothing is written twice. One that names what is read is a `data.File` or `data.Data`, so that a
result is told by its content. `**embedding` are options of `hfclip.embeddings.embed` (`batch_size`,
`num_workers`, `precision`, `cache_dir`), which a task hands on; only those that the user gave are in it.
"""

import argparse
import importlib
import inspect
import re
from collections.abc import Callable, Collection, Mapping
from typing import Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

from ..errors import UsageError


EMBEDDING = ("batch_size", "num_workers", "precision", "cache_dir")  # options that every task hands on


class Task(NamedTuple):
    module: str
    function: str
    reads: Literal["labelled", "captioned", "splits", "several", "results"]
    does: str

    def load(self) -> Callable:
        return getattr(importlib.import_module(f".{self.module}", __package__), self.function)


TASKS = {
    "zero-shot": Task("zero_shot", "zero_shot", "labelled", "accuracy of a classifier made of words"),
    "retrieval": Task("retrieval", "retrieval", "captioned", "recall between images and captions"),
    "linear-probe": Task(
        "linear_probe", "linear_probe", "splits", "accuracy of a linear classifier on frozen features"
    ),
    "few-shot": Task("few_shot", "few_shot", "splits", "accuracy by the number of labelled images per class"),
    "robustness": Task("robustness", "robustness", "several", "one classifier on a reference and on shifted sets"),
    "frames": Task("frames", "frames", "several", "anchor frames of videos, alone and with the frames near them"),
    "corruptions": Task("corruptions", "corruptions", "labelled", "accuracy on images corrupted in eighteen ways"),
    "typographic": Task("corruptions", "typographic", "labelled", "images with the name of a wrong class on them"),
    "robustness-plot": Task("robustness", "robustness_plot", "results", "robustness of models on logit axes"),
    "overlap": Task("overlap", "overlap", "labelled", "accuracy on images that the training data have, and on others"),
    "overlap-summary": Task("overlap", "overlap_summary", "results", "overlap of all data sets together"),
    "fairness": Task("fairness", "fairness", "splits", "accuracy and denigrating labels by groups of people"),
    "video": Task("video", "video", "splits", "videos by their middle frame, or the mean of frames"),
    "scaling": Task("scaling", "scaling", "results", "error against compute: a power law with its interval"),
}


def find_task(name: str) -> Task:
    """The row of a task. Raises UsageError for a name that is none."""
    if name not in TASKS:
        raise UsageError(f"found no task {name!r}, expected one of {', '.join(TASKS)}.")
    return TASKS[name]


def defaults_of(function: Callable) -> dict[str, Any]:
    """A function's keyword-only parameters with their defaults."""
    parameters = inspect.signature(function).parameters.items()
    return {name: p.default for name, p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}


def contents_of(function: Callable, options: Mapping[str, Any]) -> dict[str, str]:
    """What tells the files and data that options name from others, by option."""
    found = {}
    for name, hint in get_type_hints(function, include_extras=True).items():
        for digest in (each for part in (hint, *get_args(hint)) for each in getattr(part, "__metadata__", ())):
            found |= {name: digest(options[name])} if options.get(name) is not None else {}
    return found


def add_flags(parser: Any, function: Callable, names: Collection[str] | None = None) -> None:
    """Adds a flag for each keyword-only parameter of a function, or for those of `names`. What is not given has none.

    Args:
        parser: an `ArgumentParser` or a group of its arguments.
    """
    hints, explained = get_type_hints(function), _explanations(function)
    defaults = defaults_of(function)
    for name in names or defaults:
        default = defaults[name]
        said = explained.get(name, "").replace("%", "%%")
        said += "" if default is None or "efault" in said else f" (default: {_words(default)})"
        reading = _reading(hints[name])
        parser.add_argument(f"--{name.replace('_', '-')}", default=argparse.SUPPRESS, help=said, **reading)


def _reading(hint: Any) -> dict[str, Any]:
    """How argparse reads a value of a type."""
    choices = [part for part in get_args(hint) if part is not type(None)]
    if get_origin(hint) is Literal:
        return {"choices": choices, "type": type(choices[0])}
    if type(None) in get_args(hint):
        return _reading(choices[0])
    if get_origin(hint) is not None:
        return {"nargs": "+", **_reading(choices[0])}
    if hint is bool:
        return {"action": argparse.BooleanOptionalAction}
    return {"type": hint, "metavar": "N" if hint in (int, float) else "NAME"}


def _words(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _explanations(function: Callable) -> dict[str, str]:
    """What the `Args:` of a docstring say of each parameter, on one line."""
    block = re.search(r"^Args:\n((?:[ ]{4}.*\n|\n)*)", f"{inspect.getdoc(function) or ''}\n", flags=re.MULTILINE)
    found = re.findall(r"^ {4}(\w[\w, ]*): (.*(?:\n {8}.*)*)", block[1] if block else "", flags=re.MULTILINE)
    return {name: " ".join(text.split()) for names, text in found for name in names.split(", ")}

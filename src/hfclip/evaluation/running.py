"""A task run on a model and data by their names, and kept: what is there is not computed again.

    evaluate("zero-shot", "clip-b32", "cifar10/test", out="results").metrics["top1"]

Processes that torchrun or `accelerate launch` has started share the work of each data set; all return the same record.
"""

import os
import time
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from .. import HFCLIPModel, HFCLIPProcessor, __version__
from ..embeddings.processes import Processes, preprocessing_of
from ..errors import UsageError, redact
from ..names import opening
from ..presets_hfclip import PRESETS
from ..zero_shot import device_of, model_fingerprint
from .data import DataSet
from .records import Record, identity_of, plain, read_all, record_of, slug
from .tasks import EMBEDDING, contents_of, defaults_of, find_task


class OpenModel(NamedTuple):
    """A model with its processor, and the name that its results bear."""

    model: nn.Module
    processor: Any
    name: str


def open_model(name: str, setting: str = "model") -> OpenModel:
    """Opens a CLIP folder, or its name on the Hub, on this process's device.

    Raises:
        UsageError: it is no CLIP model with two towers and a processor.
    """
    with opening(name, f"{setting} {name}"):
        model = HFCLIPModel.from_pretrained(os.path.expanduser(name)).eval()
        processor = HFCLIPProcessor.from_pretrained(os.path.expanduser(name))
    if torch.accelerator.is_available():
        index = int(os.environ.get("LOCAL_RANK", "0"))
        torch.accelerator.set_device_index(index)
        model.to(torch.device(torch.accelerator.current_accelerator().type, index))
    return OpenModel(model, processor, redact(name))


def evaluate(
    task: str,
    model: str | OpenModel | None,
    data: str | Mapping[str, str] | DataSet | Sequence[str | DataSet],
    *,
    out: str | os.PathLike | None = None,
    limit: int | None = None,
    **options,
) -> Record:
    """Runs a task, or returns what is stored of it.

    Args:
        task: a row of `hfclip.evaluation.TASKS`.
        model: a folder or name on the Hub, or an `OpenModel`, such as `adapt` makes of another library's. None for a
            task that reads results.
        data: what `DataSet` takes, or several of them for a task that compares data sets.
        out: folder of results. None: nothing is stored.
        limit: images of each split, at most.
        options: of the task, and `batch_size`, `num_workers`, `precision` and `cache_dir` of `hfclip.embeddings.embed`.

    Raises:
        UsageError: for an unknown task or option, a model or data that cannot be opened, and what is wrong with either.
    """
    several = [data] if isinstance(data, str | os.PathLike | Mapping | DataSet) else data
    sets = [part if isinstance(part, DataSet) else DataSet(part, limit=limit) for part in several]
    job = Job(task, model.name if isinstance(model, OpenModel) else model, sets, options)
    opened = open_model(model) if isinstance(model, str) else model
    return job.run(opened, None if out is None else Path(out).expanduser())


class Job:
    """A task, the name of a model, data sets and options: all that decides where its result is kept.

    Raises:
        UsageError: for an unknown task or option, and for several data sets if the task takes one.
    """

    def __init__(self, task: str, model: str | None, sets: Sequence[DataSet], options: Mapping[str, Any]):
        self.task, self.row, self.model, self.sets = task, find_task(task), model, list(sets)
        self.function = self.row.load()
        defaults = defaults_of(self.function)
        if unknown := options.keys() - defaults.keys() - set(EMBEDDING):
            known = ", ".join([*defaults, *EMBEDDING])
            raise UsageError(f"{task}: found the option {min(unknown)!r}, expected one of {known}.")
        if len(self.sets) != 1 and self.row.reads != "several":
            raise UsageError(f"{task}: found {len(self.sets)} data sets, expected one for each result.")
        card = self.sets[0].card
        by_card = {"metric": card.metric} if "metric" in defaults and card and self.row.reads != "several" else {}
        self.changed = {name: value for name, value in options.items() if plain(value) != plain(defaults.get(name))}
        self.options = defaults | by_card | {name: value for name, value in options.items() if name in defaults}
        embedding = () if self.row.reads == "results" else EMBEDDING  # what reads results embeds nothing
        self.embedding = {name: options[name] for name in embedding if name in options}

    @property
    def names(self) -> str:
        """Its data sets, in words."""
        return ", ".join(part.name for part in self.sets)

    def path(self, out: Path) -> Path:
        """Where its result is kept below `out`; options that are not the default tell results apart."""
        limit = {"limit": self.sets[0].limit} if self.sets[0].limit else {}
        limit |= {"only": self.sets[0].only} if self.sets[0].only else {}
        told = {name: value for name, value in self.changed.items() if name not in OF_THE_MACHINE} | limit
        words = [f"{name}={slug(str(value))}" for name, value in sorted(told.items())]
        together = "+".join(slug(part.name) for part in self.sets)
        return out / slug(self.model or "all") / _short(together) / f"{_short('-'.join([self.task, *words]))}.json"

    def run(self, opened: OpenModel | None, out: Path | None) -> Record:
        """Runs it, or returns what is stored below `out`. Collective."""
        began, processes = time.perf_counter(), Processes.find(None, alone=False)
        about = {"task": self.task, "model": describe_model(opened), "data": [part.describe() for part in self.sets]}
        about |= {"options": plain(self.options), "precision": self.embedding.get("precision")}
        contents = contents_of(self.function, self.options)
        about |= {"contents": contents} if contents else {}
        about["identity"] = identity_of(about, __version__)
        path = None if out is None else self.path(out)
        # As the first process finds it: another one may come when the first has already written.
        # What reads results costs little, and depends on more than their names: it is computed anew.
        kept = None if self.row.reads == "results" else path
        if stored := processes.gather(_stored(kept, about["identity"]))[0]:
            return stored
        model, processor = (None, None) if opened is None else opened[:2]
        try:
            data = self._data()
            result = self.function(model, processor, data, **self.options, **self.embedding)
            about |= self._protocol(data)
            record = record_of(result, about)
        except ValueError as error:
            raise UsageError(f"{self.task} on {self.names}: {error}") from error
        record.run = {
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "seconds": round(time.perf_counter() - began, 3),
            "processes": processes.size,
            "device": _device_name(model),
        }
        if path is not None and processes.rank == 0:
            record.write(path)
        return record

    def _data(self) -> Any:
        """What the task reads."""
        first = self.sets[0]
        read = {
            "labelled": first.labelled,
            "captioned": first.captioned,
            "splits": lambda: first,
            "several": lambda: self.sets,
            "results": lambda: [record.result for record in read_all(first.place)],
        }
        return read[self.row.reads]()

    def _protocol(self, data: Any) -> dict[str, Any]:
        """Whether the measurement is the paper's, of a registered data set."""
        first = self.sets[0]
        if first.card is None or len(self.sets) > 1:
            return {}
        number = {"labelled": lambda: len(data.samples), "captioned": lambda: len(data)}.get(
            self.row.reads, lambda: None
        )
        answer, why = first.card.protocol(number(), first.limit)
        return {"same_protocol": {"answer": answer, "why": why}}


OF_THE_MACHINE = ("batch_size", "num_workers", "cache_dir")  # options that do not change a number


def describe_model(opened: OpenModel | None) -> dict[str, Any]:
    """What a record says of a model."""
    if opened is None:
        return {}
    config = opened.model.config
    found = {
        "name": opened.name,
        "architecture": architecture_of(config),
        "parameters": sum(parameter.numel() for parameter in opened.model.parameters()),
        "revision": getattr(config, "_commit_hash", None),
        "fingerprint": model_fingerprint(opened.model),
        "preprocessing": identity_of(preprocessing_of(opened.processor)),
    }
    return {name: value for name, value in found.items() if value is not None}


def architecture_of(config: Any) -> str | None:
    """The published architecture that a config is of, whatever its weights are."""
    for name, (dim, vision, _) in PRESETS.items():
        found = {key: getattr(config.vision_config, key, None) for key in vision}
        if plain(found) == plain(vision) and config.projection_dim == dim:
            return name
    return None


def _stored(path: Path | None, identity: str) -> Record | None:
    if path is None or not path.exists():
        return None
    record = Record.read(path)
    return record if record.result["identity"] == identity else None


def _short(name: str) -> str:
    """A name that file systems take."""
    return name if len(name) < 120 else f"{name[:80]}-{identity_of(name)[:12]}"


def _device_name(model: nn.Module | None) -> str:
    if model is None or device_of(model).type == "cpu":
        return "cpu"
    return torch.get_device_module(device_of(model)).get_device_name()

"""What is kept of an evaluation: one JSON file per result, the same bytes however often it was interrupted.

    {"result": {task, model, data, options, protocol, metrics, headline, tables, plots, notes, versions, identity},
     "run": {date, seconds, processes, device}}

Arrays lie beside it in a `.safetensors` of the same name. `identity` is of all that the numbers depend on: with the same
one a result is not computed again.
"""

import dataclasses
import hashlib
import importlib.metadata
import json
import os
import platform
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from .. import __version__
from ..errors import UsageError
from .task import Plot, Result


PACKAGES = ("torch", "transformers", "numpy", "pillow")


@dataclasses.dataclass
class Record:
    """A result as it is stored: `result` is a function of model, data and options, `run` of this one run."""

    result: dict[str, Any]
    run: dict[str, Any]
    arrays: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    path: Path | None = None

    @property
    def metrics(self) -> dict[str, float]:
        return self.result["metrics"]

    @property
    def headline(self) -> float:
        """The value of the metric that stands for the whole."""
        return self.metrics[self.result["headline"]]

    @property
    def plots(self) -> list[Plot]:
        return [Plot(**plot) for plot in self.result["plots"]]

    def write(self, path: Path) -> None:
        """Writes the arrays, then the JSON, each renamed into place."""
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_name(f".{path.name}.{os.getpid()}")
        if self.arrays:
            save_file({name: np.ascontiguousarray(array) for name, array in self.arrays.items()}, beside)
            os.replace(beside, path.with_suffix(".safetensors"))
        text = json.dumps({"result": self.result, "run": self.run}, indent=1, ensure_ascii=False, allow_nan=False)
        beside.write_text(text + "\n", encoding="utf-8")
        os.replace(beside, path)
        self.path = path

    @classmethod
    def read(cls, path: Path) -> "Record":
        """Raises UsageError for what is no result."""
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))
            arrays = path.with_suffix(".safetensors")
            record = cls(stored["result"], stored["run"], load_file(arrays) if arrays.exists() else {}, path)
            if not np.isfinite(record.headline):
                raise ValueError(f"{record.result['headline']} is {record.headline}")
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise UsageError(f"{path} holds no result of `hfclip evaluate` ({error!r}). Remove it.") from error
        return record


def read_all(folder: str | os.PathLike) -> list[Record]:
    """The results below a folder, in the order of their paths.

    Raises:
        UsageError: there are none, or a file is none.
    """
    found = sorted(path for path in Path(folder).expanduser().rglob("*.json") if not path.name.startswith("."))
    if not found:
        raise UsageError(
            f"{folder}: found no results, expected .json files. `hfclip evaluate --out {folder}` makes them."
        )
    return [Record.read(path) for path in found]


def models_of(records: Sequence[Record]) -> list[str]:
    """The names of the models of results."""
    return list(dict.fromkeys(record.result["model"]["name"] for record in records if record.result["model"]))


def record_of(result: Result, about: dict[str, Any]) -> Record:
    """A record of what a task returned.

    Raises:
        ValueError: a metric is not finite.
    """
    metrics = {name: plain(value) for name, value in result.metrics.items()}
    if broken := [name for name, value in metrics.items() if value is None]:
        raise ValueError(f"the metrics {broken} are not finite: check the model's weights, or evaluate in float32.")
    measured = {
        "metrics": metrics,
        "headline": result.headline,
        "tables": plain(result.tables),
        "plots": [dataclasses.asdict(plot) for plot in result.plots],
        "arrays": {name: list(array.shape) for name, array in sorted(result.arrays.items())},
        "protocol": plain(result.protocol),
        "notes": list(result.notes),
    }
    return Record({**about, **measured, "versions": versions()}, {}, dict(result.arrays))


def plain(value: Any) -> Any:
    """A value as JSON has it: numbers of NumPy and torch as Python's, those that are not finite as None."""
    if isinstance(value, dict) or hasattr(value, "items"):
        return {str(key): plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [plain(part) for part in value]
    value = value.item() if hasattr(value, "item") else value
    return None if isinstance(value, float) and not np.isfinite(value) else value


def versions() -> dict[str, str]:
    """Versions of what computes the numbers."""
    found = {name: importlib.metadata.version(name) for name in PACKAGES}
    return {"hfclip": __version__, **found, "python": platform.python_version()}


def identity_of(*parts: Any) -> str:
    """64 hex digits of what a result depends on."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def slug(name: str) -> str:
    """A name as a name of a file."""
    return re.sub(r"[^\w.@-]+", "_", name).strip("._") or "_"

"""Checkpoints of OpenAI and OpenCLIP, told from model folders by what lies there; `hfclip.foreign` opens them.

That package is no part of the code that travels with a model, so it is imported by its name, when it is needed.
"""

import importlib
import json
import os
from pathlib import Path
from types import ModuleType
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id

from .families_hfclip import FAMILIES, HUB_OPTIONS
from .translation_hfclip import TRANSFORMERS_MODEL_TYPES


OPENCLIP_CONFIG = "open_clip_config.json"
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")


def is_path(name: str) -> bool:
    """Whether a name cannot be one on the Hub, "owner/name"."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return True
    return name.startswith((".", "/", "~"))


def pinned(name: Any, options: dict[str, Any]) -> dict[str, Any]:
    """`options` with the commit that a name on the Hub means now, so that all its files are of it and are asked for once.

    Raises:
        FileNotFoundError: at once, for a path at which nothing is.
    """
    if isinstance(name, str | os.PathLike) and not os.path.exists(name):
        if is_path(os.fspath(name)):
            raise FileNotFoundError(
                f"{name}: found nothing there, expected a folder or file here, or a name on the Hub such as owner/name."
            )
        if not options.get("subfolder") and (folder := _fetch_settings(os.fspath(name), options)):
            return {**options, "revision": folder.name}
    return options


def is_foreign(name: Any, options: dict[str, Any]) -> bool:
    """Whether `name` is a file of weights, or a folder (here or on the Hub) that is OpenCLIP's and no model of transformers.

    A folder in both formats is transformers' where its config.json is of a type that is opened here and, on this
    machine, its weights are there.
    """
    if not isinstance(name, str | os.PathLike) or options.get("subfolder"):  # OpenCLIP has none
        return False
    path = Path(name)
    if path.is_file():
        return path.suffix != ".json"
    if path.is_dir():
        is_whole = any((path / file).is_file() for file in WEIGHTS)
        return (path / OPENCLIP_CONFIG).is_file() and not (is_whole and _is_opened_here(path))
    folder = _fetch_settings(os.fspath(name), options)
    return (
        folder is not None and not _is_opened_here(folder) and bool(_fetch(os.fspath(name), OPENCLIP_CONFIG, options))
    )


def _fetch_settings(name: str, options: dict[str, Any]) -> Path | None:
    """The folder of a commit in the Hub's cache, with config.json or else OpenCLIP's; None where there is none."""
    path = _fetch(name, "config.json", options) or _fetch(name, OPENCLIP_CONFIG, options)
    return path and path.parent


def _fetch(name: str, file: str, options: dict[str, Any]) -> Path | None:
    hub = {key: options[key] for key in HUB_OPTIONS if options.get(key) is not None}
    try:
        return Path(hf_hub_download(name, file, **hub))
    except (HfHubHTTPError, EntryNotFoundError, HFValidationError, OSError):  # told by whoever opens it
        return None


def _is_opened_here(folder: Path) -> bool:
    return model_type_of(folder) in {"hfclip", *TRANSFORMERS_MODEL_TYPES, *FAMILIES}


def model_type_of(folder: Path) -> str | None:
    """What the config.json in a folder says, if there is one that says it."""
    try:
        return json.loads((folder / "config.json").read_text(encoding="utf-8"))["model_type"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def foreign(name: Any) -> ModuleType:
    """The module that opens what `is_foreign`.

    Raises:
        ImportError: this code came with a model, and no hfclip that has it is installed.
    """
    try:
        return importlib.import_module("hfclip.foreign.opening")
    except ModuleNotFoundError as error:
        if error.name not in ("hfclip", "hfclip.foreign"):
            raise
        raise ImportError(
            f"{name}: found a checkpoint of OpenAI or OpenCLIP, which this code, that came with a model, does not open. "
            "Install hfclip, and use its classes."
        ) from error

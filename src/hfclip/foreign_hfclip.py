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
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from transformers import PreTrainedConfig

from .families_hfclip import FAMILIES, HUB_OPTIONS
from .translation_hfclip import TRANSFORMERS_MODEL_TYPES


OPENCLIP_CONFIG = "open_clip_config.json"
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")


def is_foreign(name: Any, options: dict[str, Any]) -> bool:
    """Whether `name` is a file of weights, or a folder (here or on the Hub) that is OpenCLIP's and no model of transformers.

    A folder in both formats is transformers' where its config.json is of a type that is opened here and, on this
    machine, its weights are there.
    """
    if not isinstance(name, str | os.PathLike) or options.get("subfolder"):  # OpenCLIP has none
        return False
    name, path = os.fspath(name), Path(name)
    if path.is_file():
        return path.suffix != ".json"
    if path.is_dir():
        is_whole = any((path / file).is_file() for file in WEIGHTS)
        return (path / OPENCLIP_CONFIG).is_file() and not (is_whole and model_type_of(path) in _opened_here())
    hub = {key: options[key] for key in HUB_OPTIONS if options.get(key) is not None}
    try:
        if PreTrainedConfig.get_config_dict(name, **hub)[0].get("model_type") in _opened_here():
            return False
    except (OSError, ValueError):  # no config.json there, or no such place, which is told by whoever opens it
        pass
    try:
        return bool(hf_hub_download(name, OPENCLIP_CONFIG, **hub))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError):
        return False


def _opened_here() -> set[str]:
    return {"hfclip", *TRANSFORMERS_MODEL_TYPES, *FAMILIES}


def model_type_of(folder: Path) -> str | None:
    """What the config.json of a folder says; None where there is none to read."""
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

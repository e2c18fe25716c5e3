"""Checkpoints of OpenAI and OpenCLIP opened as they are, for `from_pretrained`: nothing is converted, nothing written.

name -> file or folder, from the Hub's cache where it is a name there -> whose -> `Plan`
     -> config; image processor and tokenizer; model: tensors read, renamed and cast one at a time, once
"""

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError
from transformers import PreTrainedModel

from ..errors import UsageError
from ..foreign_hfclip import HUB_OPTIONS
from .checkpoints import OPENCLIP_FILES, OPENCLIP_WEIGHTS, open_checkpoint, rounded
from .openai import plan_openai
from .openclip import plan_openclip
from .plan import Choices, Plan, check_fit, on_meta
from .whose import kinds_of_tensors


logger = logging.getLogger(__name__)
CHOICES = ("architecture", "weights", "tokenizer", "text_model")
# What the converters call them.
OPTIONS = {"model": "architecture", "text-model": "text_model", "merges": "tokenizer", **{n: n for n in CHOICES}}
SETTINGS = ("*.json", "*.txt", "*.model")
# Options of transformers' that choose among its own files.
MEANINGLESS = ("gguf_file", "subfolder", "use_safetensors", "variant")


def open_config(name: Any, **options: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """The config of a checkpoint as a dictionary, and the options that are not about files."""
    with told_as_keywords(name):
        plan = plan_of(name, options)
        return _fitted(plan).config.to_dict(), options


def open_model(model_class: type[PreTrainedModel], name: Any, config: Any = None, **options: Any) -> Any:
    """The model of a checkpoint; `options` are those of transformers' `from_pretrained`, and `CHOICES`.

    Raises:
        UsageError: no checkpoint of OpenAI or OpenCLIP, a damaged or forged one, an architecture that has no counterpart
            here, or tensors that do not fit it.
    """
    with told_as_keywords(name):
        plan = _fitted(plan_of(name, options))
        if meaningless := [key for key in MEANINGLESS if options.pop(key, None)]:
            raise UsageError(
                f"{name}: found {', '.join(meaningless)}, which only files of transformers have. Leave it out."
            )
        config = plan.config if config is None else config
        check_fit(dict(plan.items(plan.weights.on_meta())), on_meta(model_class, config))
        dtype = options.pop("dtype", None) or options.pop("torch_dtype", None) or "auto"
        dtype = torch.float32 if dtype == "auto" else getattr(torch, dtype) if isinstance(dtype, str) else dtype
        cast = dtype if isinstance(dtype, torch.dtype) else None
        tensors = {name: rounded(tensor, cast) for name, tensor in plan.items(plan.weights)}
    for note in plan.notes:
        logger.warning("%s: %s", name, _as_keywords(note))
    wants_report = options.pop("output_loading_info", False)
    model, report = model_class.from_pretrained(
        None, config=config, state_dict=tensors, dtype=dtype, output_loading_info=True, **options
    )
    model.name_or_path = model.config.name_or_path = str(name)
    return (model, report) if wants_report else model


def open_image_processor(name: Any, **options: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """The image processor of a checkpoint as a dictionary, and the options that are not about files."""
    with told_as_keywords(name):
        return plan_of(name, options).image_processor.to_dict(), options


def open_processor(processor_class: type, name: Any, **options: Any) -> Any:
    """Image processor and tokenizer of a checkpoint.

    Raises:
        UsageError: as `open_model`, or there is no tokenizer.
    """
    with told_as_keywords(name):
        plan = plan_of(name, options)
        tokenizer, notes = plan.build_tokenizer()
        if tokenizer is None:
            raise UsageError(f"{name}: {' '.join(notes)} Pass --tokenizer FOLDER.")
    if unknown := [key for key, value in options.items() if value is not None]:
        raise TypeError(f"{name}: a checkpoint of OpenAI or OpenCLIP is opened without {', '.join(unknown)}.")
    for note in notes:
        logger.warning("%s: %s", name, note)
    return processor_class(plan.image_processor, tokenizer)


def plan_of(name: Any, options: dict[str, Any]) -> Plan:
    """Plans what `name` holds; takes the options of the Hub and `CHOICES` out of `options`."""
    hub = {key: value for key in HUB_OPTIONS if (value := options.pop(key, None)) is not None}
    chosen = {key: value for key in CHOICES if (value := options.pop(key, None)) is not None}
    if Path(chosen.get("tokenizer", "")).is_file():
        chosen["merges"] = chosen.pop("tokenizer")
    source = Path(name) if Path(name).exists() else fetch(str(name), hub)
    choices = Choices(folder=source if source.is_dir() else None, **chosen)
    checkpoint = open_checkpoint(source, OPENCLIP_FILES)
    kinds = ["openclip"] if choices.folder or choices.architecture else kinds_of_tensors(checkpoint)
    if kinds == ["openai"]:
        return plan_openai(checkpoint, choices)
    if kinds == ["openclip"]:
        return plan_openclip(checkpoint, choices)
    if not kinds:
        raise UsageError(f"{source}: found no tensors of a CLIP that is known, expected OpenAI's or OpenCLIP's.")
    if "openai" not in kinds:
        raise UsageError(f"{source}: found weights of transformers alone. Open the folder that they lie in.")
    raise UsageError(
        f"{source}: found names that OpenAI and OpenCLIP both write; they differ in the activation, which tensors cannot "
        "tell. Pass --model ViT-B-32-quickgelu, with the name of this architecture, for OpenAI's, or one without "
        "-quickgelu."
    )


def _fitted(plan: Plan) -> Plan:
    """The plan, its config with the padding id of the tokenizer where the text tower reads padding."""
    if plan.config.text_reads_padding:
        plan.build_tokenizer()
    return plan


def fetch(name: str, hub: dict[str, Any]) -> Path:
    """The folder of the Hub's cache with OpenCLIP's files of a repository, of the weights the safest kind alone."""
    try:
        folder = Path(snapshot_download(name, allow_patterns=SETTINGS, **hub))
        for file in OPENCLIP_WEIGHTS:
            try:
                hf_hub_download(name, file, **{**hub, "revision": folder.name})
                return folder
            except EntryNotFoundError:
                continue
    except (HfHubHTTPError, OSError) as error:
        raise UsageError(f"{name} cannot be fetched from the Hub: {error}") from error
    raise UsageError(f"{name}: found no weights on the Hub, expected one of {', '.join(OPENCLIP_WEIGHTS)}.")


@contextmanager
def told_as_keywords(name: Any) -> Iterator[None]:
    """Has errors that name options of the converters name keywords of `from_pretrained`."""
    try:
        yield
    except UsageError as error:
        told = _as_keywords(str(error))
        if told == str(error):
            raise
        raise UsageError(
            f"{told} A program takes the folder that `hfclip convert {name} OUT` makes, with options of the same names."
        ) from error


def _as_keywords(text: str) -> str:
    """`--text-model FOLDER` -> `text_model="FOLDER"`."""
    pattern = rf"--({'|'.join(OPTIONS)})\b(?: ([\w.-]*[A-Z._][\w.-]*\w))?"
    return re.sub(pattern, lambda match: f"{OPTIONS[match[1]]}=" + (f'"{match[2]}"' if match[2] else "..."), text)

"""Whose a checkpoint is, so that a converter that is given another project's file names the program that takes it.

A folder tells by its settings, a file by the names of its tensors. OpenAI and OpenCLIP write the same names; prefixes, a
bias, and towers of other libraries are OpenCLIP's, TorchScript and stored constants OpenAI's. Where nothing tells the two
apart, both will do.
"""

import re
from pathlib import Path

from ..configuration_hfclip import TOWER_CONFIGS
from ..errors import UsageError
from ..families_hfclip import FAMILIES
from ..foreign_hfclip import model_type_of
from ..translation_hfclip import TRANSFORMERS_MODEL_TYPES
from .checkpoints import Checkpoint, open_checkpoint
from .key_maps import CONSTANTS


# What it is, and what takes it.
PROGRAMS = {
    "openai": ("a checkpoint of OpenAI's CLIP", "hfclip convert FILE OUT --from openai"),
    "openclip": ("a checkpoint of OpenCLIP", "hfclip convert FILE_OR_FOLDER OUT --from openclip"),
    "transformers": ("a model of transformers", "hfclip convert FOLDER OUT, with its folder"),
    "hfclip": (
        "a model of hfclip, which needs no conversion",
        "HFCLIPModel.from_pretrained(FOLDER), or hfclip export to bring it out",
    ),
}


def require_own(own: str, source: Path, checkpoint: Checkpoint | None = None) -> None:
    """Raises UsageError, with the right program, where a source is certainly not `own`, a key of `PROGRAMS`."""
    kinds = kinds_of_folder(source)
    if not kinds and checkpoint is not None:
        kinds = kinds_of_tensors(checkpoint)
    if kinds and own not in kinds:
        raise UsageError(f"{source}: found {PROGRAMS[kinds[0]][0]}, expected {PROGRAMS[own][0]}.{advice_for(kinds)}")


def advice(source: Path) -> str:
    """For the end of an error: the program that takes `source`, as far as that can be told."""
    kinds = kinds_of_folder(source)
    if not kinds and source.is_file():
        try:
            kinds = kinds_of_tensors(open_checkpoint(source))
        except UsageError as error:
            return f" {error}"
    return advice_for(kinds)


def advice_for(kinds: list[str]) -> str:
    return f" Use {' or '.join(PROGRAMS[kind][1] for kind in kinds)}." if kinds else ""


def kinds_of_folder(source: Path) -> list[str]:
    """By the settings in a folder; a folder of OpenCLIP's on the Hub may hold transformers' files as well."""
    if source.parent.name == "trainer_state" or source.name == "trainer_state":
        return ["hfclip"]
    if not source.is_dir():
        return []
    kinds = ["openclip"] if any(source.glob("open_clip_*")) else []
    model_type = model_type_of(source)
    if model_type in ("hfclip", *TOWER_CONFIGS) or any(source.glob("*/trainer_state")):
        kinds.append("hfclip")
    elif model_type in TRANSFORMERS_MODEL_TYPES or model_type in FAMILIES:
        kinds.append("transformers")
    return kinds


def kinds_of_tensors(checkpoint: Checkpoint) -> list[str]:
    names = [*checkpoint, *checkpoint.scalars]
    if any(re.match(r"(text_model|vision_model)\.", name) for name in names):
        return ["transformers"]
    if any(re.match(r"(encoder\.layers\.\d|embeddings\.(token|patch)_embedding)", name) for name in names):
        return ["transformers"]
    if not any(re.search(r"(^|\.)visual\.", name) for name in names):
        return []
    if checkpoint.format == "torchscript" or any(name in CONSTANTS for name in names):
        return ["openai"]
    if any(re.match(r".+\.visual\.|visual\.trunk\.|visual\.head\.|text\.|logit_bias", name) for name in names):
        return ["openclip"]
    return ["openai", "openclip"]

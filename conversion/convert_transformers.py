"""transformers' CLIP -> model folders.

    hfclip convert openai/clip-vit-base-patch32 clip-b32       # from the Hub
    hfclip convert stable-diffusion/text_encoder sd-text       # as diffusers keeps it

The source is a folder or Hub name of a CLIPModel, CLIPTextModel, CLIPTextModelWithProjection, CLIPVisionModel or
CLIPVisionModelWithProjection. hfclip opens such folders as they are; converted ones carry their code, open with
AutoModel as hfclip's, and have an old `eos_token_id: 2` repaired. For the way back see export.py.
"""

from functools import partial
from pathlib import Path
from typing import Any

from hfclip_errors import start_program


if __name__ == "__main__":
    start_program(__file__, __spec__, "convert")

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from hfclip import (
    HFCLIPImageProcessor,
    HFCLIPModel,
    HFCLIPTextModel,
    HFCLIPTextModelWithProjection,
    HFCLIPTokenizer,
    HFCLIPVisionModel,
    HFCLIPVisionModelWithProjection,
)
from hfclip.errors import UsageError, as_usage_error
from hfclip.families_hfclip import FAMILIES
from hfclip.foreign.checkpoints import Checkpoint, View, open_checkpoint
from hfclip.foreign.processors import IMAGE_FILES, TOKENIZER_FILES, has_any, join
from hfclip.foreign.whose import advice, require_own
from hfclip.hub.check import read_json
from hfclip.translation_hfclip import DUAL_ENCODER, TRANSFORMERS_MODEL_TYPES

from .convert import Conversion, build_parser, convert, parse_options, run
from .reference_settings import LEGACY_EOS, transformers_features


CLASSES = {
    "CLIPModel": HFCLIPModel,
    "CLIPTextModel": HFCLIPTextModel,
    "CLIPTextModelWithProjection": HFCLIPTextModelWithProjection,
    "CLIPVisionModel": HFCLIPVisionModel,
    "CLIPVisionModelWithProjection": HFCLIPVisionModelWithProjection,
}
FILES = ["*.json", "*.txt", "*.safetensors", "pytorch_model*.bin"]


def main() -> None:
    options = parse_options(build_parser(__doc__))
    folder = options.source if options.source.exists() else fetch(str(options.source))
    convert(plan(folder), options.out, options)


def fetch(name: str) -> Path:
    """A model's files from the Hub, or from its cache."""
    try:
        return Path(snapshot_download(name, allow_patterns=FILES))
    except HFValidationError as error:
        raise UsageError(f"{name} is neither a folder here nor a name on the Hub.") from error
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise UsageError(f"{name} is no folder here and cannot be fetched from the Hub: {error}") from error


def plan(folder: Path) -> Conversion:
    """Plans the conversion of a folder that transformers wrote."""
    require_own("transformers", folder)
    if not (folder / "config.json").is_file():
        raise UsageError(f"{folder}: found no config.json, expected a folder that transformers wrote.{advice(folder)}")
    checkpoint = open_checkpoint(folder)
    written = read_json(folder / "config.json")
    model_class = find_class(written, checkpoint, folder)
    with as_usage_error(folder / "config.json"):
        config = model_class.config_class.from_pretrained(folder)
    if model_class is HFCLIPModel:  # transformers lets `text_config_dict` of old configs replace `text_config`
        keys = ("text_config", "vision_config")
        parts = {key: next((written[name] for name in (f"{key}_dict", key) if written.get(name) is not None), {}) for key in keys}  # fmt: skip
    else:
        parts = {model_class.config_class.base_config_key: written}
    processor, notes = find_processor(folder, model_class)
    if (parts.get("text_config") or {}).get("eos_token_id") == LEGACY_EOS:
        notes.append(
            f"eos_token_id 2 of an old config was repaired: {getattr(config, 'text_config', config).eos_token_id}."
        )
    weights = View(checkpoint, {name: name for name in checkpoint if not name.endswith("position_ids")})
    features = transformers_features(parts.get("vision_config"), parts.get("text_config"))
    items = partial(rename, model_class)
    return Conversion(checkpoint, weights, items, model_class, config, features, processor, notes)


def find_class(written: dict[str, Any], checkpoint: Checkpoint, folder: Path) -> type:
    """Our class for the one that wrote the folder: as `architectures` says, else by its tensors."""
    model_type = written.get("model_type")
    if model_type == DUAL_ENCODER or model_type in FAMILIES:
        raise UsageError(
            f"{folder}: found a model of type {model_type!r}, which needs no conversion: HFCLIPModel.from_pretrained opens "
            "it as it is, and save_pretrained writes it as hfclip's."
        )
    if not isinstance(model_type, str) or model_type not in TRANSFORMERS_MODEL_TYPES:
        known = ", ".join(kind for kind in TRANSFORMERS_MODEL_TYPES if kind != DUAL_ENCODER)
        raise UsageError(f"{folder}: found a model of type {model_type!r}, expected one of {known}.")
    written_by = written.get("architectures") or [None]
    architecture = written_by[0] if isinstance(written_by, list) else str(written_by)
    if architecture is None:
        text = any("token_embedding" in name for name in checkpoint)
        vision = any("patch_embedding" in name for name in checkpoint)
        projected = any(name.endswith("_projection.weight") for name in checkpoint)
        kind = {(True, True): "", (True, False): "Text", (False, True): "Vision"}.get((text, vision))
        architecture = None if kind is None else f"CLIP{kind}Model{'WithProjection' if kind and projected else ''}"
    if architecture not in CLASSES:
        raise UsageError(f"{folder}: found a {architecture or model_type}, expected one of {', '.join(CLASSES)}.")
    return CLASSES[architecture]


def rename(model_class: type, weights):
    """Names are the same, but for the prefix that older versions gave to a lone tower."""
    prefix = f"{model_class.base_model_prefix}." if model_class in (HFCLIPTextModel, HFCLIPVisionModel) else ""
    for name in weights:
        yield name.removeprefix(prefix), weights[name]


def find_processor(folder: Path, model_class: type) -> tuple[Any, list[str]]:
    """The folder's tokenizer and image processor, as far as the model needs them and they are there."""
    has_text, has_images = model_class.input_modalities != ("image",), "image" in model_class.input_modalities
    places = (folder, folder.parent / "tokenizer")  # the second is diffusers'
    place = next((place for place in places if has_any(place, TOKENIZER_FILES)), None)
    with as_usage_error(folder):
        tokenizer = HFCLIPTokenizer.from_pretrained(place) if has_text and place else None
        has_settings = has_images and has_any(folder, IMAGE_FILES)
        image_processor = HFCLIPImageProcessor.from_pretrained(folder) if has_settings else None
    missing = ["tokenizer"] if has_text and tokenizer is None else []
    missing += ["image processor"] if has_images and image_processor is None else []
    return join(image_processor, tokenizer), [f"no {what} was written: the source has none." for what in missing]


if __name__ == "__main__":
    run(main)

"""transformers' CLIP -> model folders.

    python conversion/convert_transformers.py openai/clip-vit-base-patch32 clip-b32       # from the Hub
    python conversion/convert_transformers.py stable-diffusion/text_encoder sd-text       # as diffusers keeps it

The source is a folder or Hub name of a CLIPModel, CLIPTextModel, CLIPTextModelWithProjection, CLIPVisionModel or
CLIPVisionModelWithProjection. hfclip opens such folders as they are; converted ones carry their code, open with
AutoModel as hfclip's, and have an old `eos_token_id: 2` repaired. For the way back see export.py.
"""

import sys
from functools import partial
from pathlib import Path
from typing import Any


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from conversion.checkpoints import Checkpoint, View, open_checkpoint
from conversion.convert import Conversion, convert, options_of, parser_of, read_json, run
from conversion.errors import UsageError, refusals
from conversion.reference import Settings, image_features, text_features
from conversion.whose import advice, require_own
from hfclip import (
    HFCLIPImageProcessor,
    HFCLIPModel,
    HFCLIPProcessor,
    HFCLIPTextModel,
    HFCLIPTextModelWithProjection,
    HFCLIPTokenizer,
    HFCLIPVisionModel,
    HFCLIPVisionModelWithProjection,
)
from hfclip.configuration_hfclip import DUAL_ENCODER, TRANSFORMERS_MODEL_TYPES


CLASSES = {
    "CLIPModel": HFCLIPModel,
    "CLIPTextModel": HFCLIPTextModel,
    "CLIPTextModelWithProjection": HFCLIPTextModelWithProjection,
    "CLIPVisionModel": HFCLIPVisionModel,
    "CLIPVisionModelWithProjection": HFCLIPVisionModelWithProjection,
}
ACTIVATIONS = {"quick_gelu": "quick_gelu", "gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}
LEGACY_EOS = 2  # written before transformers' pull request 24773, while pooling at the highest id
FILES = ["*.json", "*.txt", "*.safetensors", "pytorch_model*.bin"]


def main() -> None:
    options = options_of(parser_of(__doc__))
    folder = options.source if options.source.exists() else fetch(str(options.source))
    convert(plan(folder), options.out, options)


def fetch(name: str) -> Path:
    """A model's files from the Hub, or from its cache.

    Raises:
        UsageError: neither a folder here nor a repository there, or no connection.
    """
    try:
        return Path(snapshot_download(name, allow_patterns=FILES))
    except HFValidationError as error:
        raise UsageError(f"{name} is neither a folder here nor a name on the Hub.") from error
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise UsageError(f"{name} is no folder here and cannot be fetched from the Hub: {error}") from error


def plan(folder: Path) -> Conversion:
    """Plans the conversion of a folder that transformers wrote.

    Raises:
        UsageError: no folder of one of the five classes.
    """
    require_own("transformers", folder)
    if not (folder / "config.json").is_file():
        raise UsageError(f"{folder}: found no config.json, expected a folder that transformers wrote.{advice(folder)}")
    checkpoint = open_checkpoint(folder)
    written = read_json(folder / "config.json")
    model_class = find_class(written, checkpoint, folder)
    with refusals(folder / "config.json"):
        config = model_class.config_class.from_pretrained(folder)
    theirs = {"CLIPModel": ("text_config", "vision_config")}.get(_their_name(model_class), ())
    # transformers lets `text_config_dict` of old configs replace `text_config`.
    parts = {key: next((written[name] for name in (f"{key}_dict", key) if written.get(name) is not None), {}) for key in theirs}  # fmt: skip
    parts = parts or {model_class.config_class.base_config_key: written}
    towers = {key: {**defaults_of(key), **part} for key, part in parts.items()}
    processor, notes = find_processor(folder, model_class)
    if towers.get("text_config", {}).get("eos_token_id") == LEGACY_EOS:
        notes.append(
            f"eos_token_id 2 of an old config was repaired: {getattr(config, 'text_config', config).eos_token_id}."
        )
    return Conversion(
        checkpoint=checkpoint,
        weights=View(checkpoint, {name: name for name in checkpoint if not name.endswith("position_ids")}),
        items=partial(renamed, model_class),
        model_class=model_class,
        config=config,
        features=partial(features, towers),
        processor=processor,
        notes=notes,
    )


def find_class(written: dict[str, Any], checkpoint: Checkpoint, folder: Path) -> type:
    """Our class for the one that wrote the folder: as `architectures` says, else by its tensors."""
    model_type = written.get("model_type")
    if model_type == DUAL_ENCODER:
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


def _their_name(model_class: type) -> str:
    return {ours: theirs for theirs, ours in CLASSES.items()}[model_class]


def defaults_of(key: str) -> dict[str, Any]:
    """What transformers assumes for fields that a config leaves out."""
    text = {"num_attention_heads": 8, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5, "eos_token_id": 49407}
    return text if key == "text_config" else {**text, "num_attention_heads": 12}


def renamed(model_class: type, weights):
    """Names are the same, but for the prefix that older versions gave to a lone tower."""
    prefix = f"{model_class.base_model_prefix}." if model_class in (HFCLIPTextModel, HFCLIPVisionModel) else ""
    for name in weights:
        yield name.removeprefix(prefix), weights[name]


def features(towers: dict[str, dict[str, Any]], weights, pixel_values, input_ids) -> dict[str, torch.Tensor]:
    found = {}
    if "vision_config" in towers:
        settings = reference_settings(towers["vision_config"])
        found["image_features"] = image_features(weights, pixel_values, settings, dtype=torch.float64)
    if "text_config" in towers:
        settings = reference_settings(towers["text_config"])
        found["text_features"] = text_features(weights, input_ids, settings, dtype=torch.float64)
    return found


def reference_settings(tower: dict[str, Any]) -> Settings:
    """A tower's settings as `reference` takes them."""
    if tower["hidden_act"] not in ACTIVATIONS:
        raise UsageError(f"hidden_act: found {tower['hidden_act']!r}, expected one of {', '.join(ACTIVATIONS)}.")
    end, heads = tower["eos_token_id"], tower["num_attention_heads"]
    return Settings(
        text_heads=heads,
        vision_heads=heads,
        activation=ACTIVATIONS[tower["hidden_act"]],
        text_pooling="argmax" if end == LEGACY_EOS else "eos",
        eos_token_id=end,
        layer_norm_eps=tower["layer_norm_eps"],
    )


def find_processor(folder: Path, model_class: type) -> tuple[Any, list[str]]:
    """The folder's tokenizer and image processor, as far as the model needs them and they are there."""
    has_text, has_images = model_class.input_modalities != ("image",), "image" in model_class.input_modalities
    beside = folder.parent / "tokenizer"  # diffusers
    places = [place for place in (folder, beside) if any(place.glob("tokenizer*.json")) or (place / "vocab.json").is_file()]  # fmt: skip
    has_settings = any((folder / name).is_file() for name in ("preprocessor_config.json", "processor_config.json"))
    with refusals(folder):
        tokenizer = HFCLIPTokenizer.from_pretrained(places[0]) if has_text and places else None
        image_processor = HFCLIPImageProcessor.from_pretrained(folder) if has_images and has_settings else None
    notes = [f"no {what} was written: the source has none." for what, needed, part in (("tokenizer", has_text, tokenizer), ("image processor", has_images, image_processor)) if needed and part is None]  # fmt: skip
    if tokenizer is not None and image_processor is not None:
        return HFCLIPProcessor(image_processor, tokenizer), notes
    return tokenizer or image_processor, notes


if __name__ == "__main__":
    run(main)

"""Models whose towers are those of another family of transformers -> that family's own folder (SigLIP, MetaCLIP 2 ...).

The family's own class takes the tensors, is asked for embeddings of fixed inputs, and writes its folder.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import CONFIG_MAPPING, CLIPTokenizer, PreTrainedModel

from hfclip import HFCLIPConfig, HFCLIPImageProcessor, HFCLIPModel
from hfclip.errors import UsageError, as_usage_error
from hfclip.families_hfclip import FAMILIES, LEGACY_EOS, OURS, Family
from hfclip.foreign.processors import as_clip_tokenizer, open_processor

from .convert import say
from .folder import new_folder
from .proof import compare, fixed_inputs


OURS_ALONE = {"causal", "pooling", "pooling_heads", "layer_scale_init_value", "pre_layer_norm", "patch_dropout"}
OURS_ALONE |= {"projection_type", "auto_map", "architectures"}
TOLERANCE = 1e-5  # relative, in float32


def family_of_towers(config: HFCLIPConfig) -> str | None:
    """The family with these towers; None for those of CLIP, which CLIPSeg's and OWL-ViT's are, too."""
    towers = (config.text_config.model_type, config.vision_config.model_type)
    if towers == OURS:
        return "metaclip_2" if config.text_config.eos_token_id == LEGACY_EOS else None
    return next((name for name, family in FAMILIES.items() if (family.text, family.vision) == towers), None)


def to_family(options: argparse.Namespace, config: HFCLIPConfig, name: str) -> None:
    """A folder of the class of transformers whose towers the model has."""
    if name == "flava":
        raise UsageError("Cannot export: FlavaModel needs its multimodal encoder, which hfclip does not keep.")
    model = HFCLIPModel.from_pretrained(options.source).eval()
    with as_usage_error("Cannot export"):
        theirs = family_model(model, name)
    pixel_values, input_ids = family_inputs(config, FAMILIES[name])
    with torch.no_grad():
        expected = features(model, pixel_values, input_ids)
        compare(features(theirs, pixel_values, input_ids), expected, TOLERANCE)
    with new_folder(options.out, options.source, options.overwrite) as folder:
        theirs.save_pretrained(folder)
        save_processor(options.source, folder, name)
    say(f"Written: {options.out}, a folder of {FAMILIES[name].model}")


def family_model(model: HFCLIPModel, name: str) -> PreTrainedModel:
    """The family's own model with the tensors of `model`."""
    config, family = model.config, FAMILIES[name]
    towers = {}
    for part in ("text", "vision"):
        fields = getattr(config, f"{part}_config").to_dict()
        fields = {key: value for key, value in fields.items() if key not in OURS_ALONE}
        towers[f"{part}_config"] = {**fields, "model_type": f"{name}_{part}_model"}
    tensors = model.state_dict()
    if family.sigmoid:
        tensors |= {key: tensors[key].reshape(1) for key in ("logit_scale", "logit_bias")}
    if family.temperature:
        scale = tensors.pop("logit_scale")
        tensors["temperature"] = (-scale.double()).exp().to(scale.dtype)
    config_class = CONFIG_MAPPING[name]
    known = {"projection_dim", "logit_scale_init_value"} & config_class.__dataclass_fields__.keys()
    scalars = {key: getattr(config, key) for key in known}
    theirs = getattr(transformers, family.model)(config_class(**towers, **scalars)).to(model.dtype).eval()
    missing, unexpected = theirs.load_state_dict(tensors, strict=False)
    unread = [key for key in missing if key.startswith("text_model.pooler.")]  # ALIGN's, which nothing reads
    if unexpected or len(missing) > len(unread):
        raise ValueError(
            f"{family.model} has no place for {unexpected}, and needs {sorted(set(missing) - set(unread))}."
        )
    return theirs


def family_inputs(config: HFCLIPConfig, family: Family) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Fixed images and texts, as the family's model takes them."""
    if not config.is_naflex:
        pixel_values, input_ids = fixed_inputs(config)
        images = {"pixel_values": pixel_values}
    else:  # NaFlex: patches, which of them are real, and how they lie
        _, input_ids = fixed_inputs(config.text_config)
        vision = config.vision_config
        side = int(vision.num_patches**0.5)
        patches = torch.randn(
            1, side**2, vision.num_channels * vision.patch_size**2, generator=torch.Generator().manual_seed(0)
        )
        images = {"pixel_values": patches, "pixel_attention_mask": torch.ones(1, side**2, dtype=torch.long)}
        images["spatial_shapes"] = torch.tensor([[side, side]])
    texts = {"input_ids": input_ids[:, : input_ids.shape[1] - family.reserved_positions]}
    if family.text != OURS[0] and not config.text_reads_padding:
        pad = getattr(config.text_config, "pad_token_id", None)
        texts["attention_mask"] = (
            torch.ones_like(texts["input_ids"]) if pad is None else (texts["input_ids"] != pad).long()
        )
    return images, texts


def features(model: Any, images: dict[str, Tensor], texts: dict[str, Tensor]) -> dict[str, Tensor]:
    """Embeddings, not normalised."""
    return {
        "image_features": model.get_image_features(**images).pooler_output.float(),
        "text_features": model.get_text_features(**texts).pooler_output.float(),
    }


def save_processor(source: Path, folder: Path, name: str) -> None:
    """Tokenizer and image processor, as far as they are there, as the family has them."""
    image_processor, tokenizer = open_processor(source)
    tokenizer = as_clip_tokenizer(tokenizer)
    if tokenizer is not None and not isinstance(tokenizer, CLIPTokenizer):
        for option in ("truncation", "padding", "model_input_names"):
            tokenizer.init_kwargs.pop(option, None)
        if FAMILIES[name].sigmoid:  # its padding is read
            tokenizer.model_input_names = tokenizer.init_kwargs["model_input_names"] = ["input_ids"]
    for part in (image_processor, tokenizer):
        if part is not None:
            part.save_pretrained(folder)
    changes = {}
    if isinstance(image_processor, HFCLIPImageProcessor):
        changes = {"image_processor_type": FAMILIES[name].image_processor}
        for path in folder.glob("*.py"):  # the code that hfclip's own come with
            path.unlink()
    for file in ("preprocessor_config.json", "tokenizer_config.json"):
        if (folder / file).is_file():
            settings = json.loads((folder / file).read_text(encoding="utf-8"))
            settings = {
                key: value
                for key, value in settings.items()
                if key not in ("auto_map", "processor_class", "resize_backend")
            }
            settings |= changes if file.startswith("pre") else {}
            (folder / file).write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

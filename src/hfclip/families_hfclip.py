"""transformers' dual encoders, one row per family: what its folders are in hfclip's terms.

    config.json of a family -> `translate_family` -> fields of HFCLIPConfig
    names of its tensors    -> `Family.names`     -> names of HFCLIPModel's

A tower is ours where the family computes what CLIP does, and transformers' own class elsewhere. What no row and no other
reader knows is refused by name, with the reason where there is one.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedConfig
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from .limits_hfclip import shown


OURS = ("hfclip_text", "hfclip_vit")
HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "token", "revision")
# Towers that AutoModel does not build.
OMITTED_TOWERS = {
    "aimv2_text_model": "Aimv2TextModel",
    "align_text_model": "AlignTextModel",
    "align_vision_model": "AlignVisionModel",
    "altclip_text_model": "AltCLIPTextModel",
    "chinese_clip_text_model": "ChineseCLIPTextModel",
    "flava_image_model": "FlavaImageModel",
    "flava_text_model": "FlavaTextModel",
    "siglip_text_model": "SiglipTextModel",
    "siglip2_text_model": "Siglip2TextModel",
}
NAFLEX_INPUTS = {"pixel_attention_mask", "spatial_shapes"}


@dataclass(frozen=True)
class Family:
    """One dual encoder of transformers.

    model: its class, for the way back.
    text, vision: types of the towers here.
    text_pooling, vision_pooling, text_projection, vision_projection: for `HFCLIPConfig`.
    names: patterns of names in its files, and what they become.
    left_out: patterns of tensors that no embedding needs: decoders, detection heads.
    sigmoid: whether its logits have a bias, and scale and bias are lists of one number.
    temperature: whether it divides by a temperature in place of multiplying by the exponential of a scale.
    is_whole: whether published folders hold the scale, too; where not, that of the config is meant.
    limited: whether its scale counts between 1 and the config's `max_logit_scale`.
    reserved_positions: positions of its text tower that are not those of tokens.
    image_processor: transformers' class, for the way back.
    """

    model: str
    text: str
    vision: str
    text_pooling: str = "pooler"
    vision_pooling: str = "pooler"
    text_projection: str = "linear"
    vision_projection: str = "linear"
    names: Mapping[str, str] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()
    sigmoid: bool = False
    temperature: bool = False
    is_whole: bool = True
    limited: bool = False
    reserved_positions: int = 0
    image_processor: str = "CLIPImageProcessor"


def _siglip(model: str, towers: str) -> Family:
    towers = {"text": f"{towers}_text_model", "vision": f"{towers}_vision_model"}
    identity = {"text_projection": "identity", "vision_projection": "identity"}
    return Family(model, **towers, **identity, sigmoid=True, image_processor="SiglipImageProcessor")


def _owl(name: str, model: str) -> Family:
    names = {rf"^{name}\.": "", r"^vision_model\.pre_layernorm\.": "vision_model.pre_layrnorm."}
    left_out = (r"^box_head\.", r"^class_head\.", r"^objectness_head\.", r"^layer_norm\.", r"^box_bias$")
    return Family(model, *OURS, names=names, left_out=left_out)


FAMILIES = {
    "siglip": _siglip("SiglipModel", "siglip"),
    "siglip2": _siglip("Siglip2Model", "siglip2"),  # NaFlex; SigLIP 2 of a fixed size is of type siglip
    "metaclip_2": Family("MetaClip2Model", *OURS),
    "chinese_clip": Family(
        "ChineseCLIPModel",
        "chinese_clip_text_model",
        "hfclip_vit",
        text_pooling="cls",
        image_processor="ChineseCLIPImageProcessor",
    ),
    "altclip": Family(
        "AltCLIPModel",
        "altclip_text_model",
        "hfclip_vit",
        names={r"\.encoder\.layer\.": ".encoder.layers."},
        reserved_positions=2,
    ),
    "align": Family(
        "AlignModel",
        "align_text_model",
        "align_vision_model",
        text_pooling="cls",
        text_projection="linear_bias",
        vision_projection="identity",
        left_out=(r"^text_model\.pooler\.",),
        temperature=True,
    ),
    "aimv2": Family("Aimv2Model", "aimv2_text_model", "aimv2_vision_model", limited=True),
    "tipsv2": Family(
        "Tipsv2Model",
        "tipsv2_text_model",
        "tipsv2_vision_model",
        text_projection="identity",
        vision_projection="identity",
        names={r"^text_encoder\.": "text_model.", r"^vision_encoder\.": "vision_model."},
        temperature=True,
        is_whole=False,
        image_processor="Tipsv2ImageProcessor",
    ),
    "flava": Family(
        "FlavaModel",
        "flava_text_model",
        "flava_image_model",
        text_pooling="cls",
        vision_pooling="cls",
        text_projection="linear_bias",
        vision_projection="linear_bias",
        names={r"^flava\.": "", r"^image_model\.": "vision_model.", r"^image_projection\.": "visual_projection."},
        left_out=(
            *(r"^(text|vision)_model\.pooler\.", r"^multimodal_model\.", r"_to_mm_projection\.", r"^image_codebook\."),
            r"^(mim|mlm|itm|mmm_\w+)_head\.",
        ),
    ),
    "clipseg": Family("CLIPSegModel", *OURS, names={r"^clip\.": ""}, left_out=(r"^decoder\.",)),
    "owlvit": _owl("owlvit", "OwlViTModel"),
    "owlv2": _owl("owlv2", "Owlv2Model"),
}
REFUSED = {
    "blip": "what its published folders hold has no projections into a joint space, or no scale",
    "blip-2": "its image embeddings are 32 for each image",
    "groupvit": "its projections have BatchNorm between their layers",
    "videoprism": "it embeds videos",
    "xclip": "it embeds videos, and texts together with them",
}


def _resized_to(
    size: int, resample: int = 3, mean: Sequence[float] = (0.5,) * 3, std: Sequence[float] = (0.5,) * 3, **others
):
    squashed = {"size": {"height": size, "width": size}, "do_center_crop": False, "resample": resample}
    return {**squashed, "image_mean": mean, "image_std": std, **others}


# Image processors whose pixels HFCLIPImageProcessor gives, and the defaults of theirs that are not its own.
IMAGE_PROCESSORS = {
    "HFCLIPImageProcessor": {},
    "CLIPImageProcessor": {},
    "ChineseCLIPImageProcessor": {"do_center_crop": True},
    "FlavaImageProcessor": _resized_to(224, 3, OPENAI_CLIP_MEAN, OPENAI_CLIP_STD, do_center_crop=True),
    "OwlViTImageProcessor": _resized_to(768, 3, OPENAI_CLIP_MEAN, OPENAI_CLIP_STD),
    "SiglipImageProcessor": _resized_to(224),
    "Tipsv2ImageProcessor": _resized_to(448, 2, do_normalize=False),
    "ViTImageProcessor": _resized_to(224, 2),
}
LEGACY_EOS = 2  # written before transformers' pull request 24773 by models that pool at the highest id
GEMMA_VOCABULARY = 256_000


def end_of_text(vocab_size: int) -> int:
    """OpenAI's id of the end of a text, the highest, where a config names `LEGACY_EOS`."""
    return min(49407, vocab_size - 1)


def translate_family(config: dict[str, Any], family: Family, theirs: dict[str, Any]) -> dict[str, Any]:
    """Fields of HFCLIPConfig for a config of `family`; `theirs` are all its settings, defaults included."""
    text, vision = theirs["text_config"], theirs.get("vision_config") or theirs["image_config"]
    text, vision = {**text, "model_type": family.text}, {**vision, "model_type": family.vision}
    if family.text == "hfclip_text" and config["model_type"] != "metaclip_2" and text["eos_token_id"] == LEGACY_EOS:
        text["eos_token_id"] = end_of_text(text["vocab_size"])
    if family.sigmoid and text["vocab_size"] == GEMMA_VOCABULARY:
        text["pad_token_id"] = 0  # of Gemma's tokenizer; SigLIP's pads with 1, which its configs name for both
    for tower in (text, vision):
        tower.pop("architectures", None)
    width = theirs.get("projection_dim") or text.get("projection_size") or vision["hidden_size"]
    vision.setdefault("hidden_size", width)  # ALIGN's image tower ends in the joint space, and does not say how wide
    if family.temperature:
        scale = -math.log(_positive("temperature_init_value", theirs["temperature_init_value"]))
    else:
        scale = theirs.get("logit_scale_init_value")
    ours = {key: config[key] for key in ("dtype", "torch_dtype", "quantization_config") if key in config}
    return {
        **ours,
        "model_type": "hfclip",
        "text_config": text,
        "vision_config": vision,
        "projection_dim": width,
        "text_pooling": family.text_pooling,
        "vision_pooling": family.vision_pooling,
        "text_projection_type": family.text_projection,
        "vision_projection_type": family.vision_projection,
        **({} if scale is None else {"logit_scale_init_value": scale}),
        **({"logit_bias_init_value": -10.0} if family.sigmoid else {}),
    }


def family_of(place: str | None, options: dict[str, Any]) -> tuple[Family | None, dict[str, Any]]:
    """Whose folder (or Hub name) it is, and its config as it is written; of hfclip's own and of those without, None."""
    if place is None:
        return None, {}
    hub = (*HUB_OPTIONS, "proxies", "subfolder")
    try:
        written, _ = PreTrainedConfig.get_config_dict(place, **{key: options[key] for key in hub if key in options})
        return FAMILIES.get(written["model_type"]), written
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None, {}  # opening it will say what is wrong


def require_joint_space(place: str, family: Family | None, missing: set[str]) -> None:
    """Raises ValueError if weights are missing that make two towers one model, projections, scale and bias; or any of a family."""
    may_be_missing = set() if family is None or family.is_whole else {"logit_scale"}
    needed = r"(visual|text)_projection\.|logit_(scale|bias)$" if family is None else ""
    lost = sorted(key for key in missing - may_be_missing if re.match(needed, key))
    if lost:
        raise ValueError(
            f"{place}: found no {', '.join(lost[:5])} ({len(lost)} tensors), expected the weights of a whole dual encoder: "
            "these would be random. Fetch the folder again, or another that holds them. "
            "HFCLIPModel.from_vision_text_pretrained joins two towers that have to be trained first."
        )


def _positive(name: str, value: Any) -> float:
    if not isinstance(value, int | float) or not value > 0:
        raise ValueError(f"found {name}={shown(value)}, expected a positive number. Correct config.json.")
    return value


def refuse_other_families(place: str, model_type: Any) -> None:
    """Raises ValueError for folders of a type that transformers knows and hfclip does not open as a dual encoder."""
    if model_type in REFUSED:
        raise ValueError(
            f"{place}: found a model of type {model_type!r}, which hfclip does not open: {REFUSED[model_type]}."
        )
    if model_type in CONFIG_MAPPING and model_type not in FAMILIES and not model_type.startswith("hfclip"):
        raise ValueError(
            f"{place}: found a model of type {model_type!r}, expected a dual encoder: {', '.join(['hfclip', 'clip', *FAMILIES])}. "
            "Two towers are joined by HFCLIPModel.from_vision_text_pretrained."
        )

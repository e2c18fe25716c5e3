"""OpenCLIP's towers from other libraries -> towers that transformers' AutoModel builds.

    visual.trunk. ...    timm's SigLIP ViT             -> siglip_vision_model
    visual.trunk. ...    any other timm model          -> timm_wrapper (timm has to be installed)
    transformer. ...     BERT, RoBERTa, XLM-RoBERTa    -> the same model
    transformer. ...     mT5, NLLB                     -> the same model's encoder
    text tower with a bias in its projection, or none  -> siglip_text_model
    OpenCLIP's own tower beside one of these           -> our own, as in `key_maps`

Each half of a checkpoint becomes a `Tower`: its config, its pooling rule, its kind of projection, its tensors under our
names.
"""

import importlib.util
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig

from ..configuration_hfclip import HFCLIPConfig
from ..errors import UsageError, as_usage_error
from ..families_hfclip import GEMMA_VOCABULARY
from ..limits_hfclip import refuse_absurd
from .checkpoints import View
from .key_maps import (
    CONVERTIBLE,
    UNCHANGED,
    hfclip_items,
    openclip_text_fields,
    openclip_vision_fields,
    reasons_against,
    text_config,
    vision_config,
)


Tensors = Mapping[str, Tensor]

# Their settings, all read here or of no bearing on what is computed.
TIMM = set("timm_model_name timm_model_pretrained timm_pool timm_proj timm_proj_bias timm_drop timm_drop_path".split())
HUGGING_FACE = set("hf_model_name hf_model_pretrained hf_proj_type hf_pooler_type".split())

# timm's SigLIP ViTs: name -> width, heads. Shapes tell the rest, but for the activation: timm's first SigLIP ViTs have
# GELU, those that came with SigLIP2 its approximation by tanh.
SIGLIP_VITS = {"base": (768, 12), "large": (1024, 16), "so400m": (1152, 16), "giantopt": (1536, 16)}
SIGLIP_TANH = re.compile(r"vit_((base_patch32|so400m_patch16|giantopt_patch16)_siglip_\d+|large_patch16_siglip_512)")
# timm's name -> transformers'; pieces that need more than a new name are not here.
SIGLIP_PIECES = {
    "patch_embed.proj.": "embeddings.patch_embedding.",
    "blocks.": "encoder.layers.",
    ".norm1.": ".layer_norm1.",
    ".norm2.": ".layer_norm2.",
    ".attn.proj.": ".self_attn.out_proj.",
    "attn_pool.proj.": "head.attention.out_proj.",
    "attn_pool.norm.": "head.layernorm.",
    "attn_pool.mlp.": "head.mlp.",
    "attn_pool.latent": "head.probe",
}
SIGLIP_NAMES = (
    r"pos_embed|(patch_embed\.proj|norm|blocks\.\d+\.(norm[12]|attn\.(qkv|proj)|mlp\.fc[12]))\.(weight|bias)"
    r"|attn_pool\.(latent|(q|kv|proj|norm|mlp\.fc[12])\.(weight|bias))"
)
SIGLIP_PREPROCESS = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "resize_mode": "squash"}

TEXT_MODELS = ("bert", "roberta", "xlm-roberta", "mt5", "m2m_100")
# OpenCLIP's pooler -> our rule. `cls_pooler` goes through the model's own pooling layer, which encoders of
# encoder-decoders do not have.
TEXT_POOLERS = {"mean_pooler": "mean", "cls_pooler": "pooler", "cls_last_hidden_state_pooler": "cls"}


# OpenCLIP's layers of a projection -> ours. A tower without any ends in the joint space.
PROJECTIONS = {
    "proj": "text_projection",
    "proj.0": "text_projection.fc1",
    "proj.2": "text_projection.fc2",
    "visual.head.proj": "visual_projection",
    "visual.head.mlp.fc1": "visual_projection.fc1",
    "visual.head.mlp.fc2": "visual_projection.fc2",
    "visual.trunk.head": "visual_projection",
    "visual.trunk.head.fc": "visual_projection",
}


@dataclass
class Tower:
    """Half a dual encoder.

    config, pooling, projection: for `HFCLIPConfig`.
    items: the source's tensors -> ours, under our names.
    """

    config: dict[str, Any] | PreTrainedConfig
    items: Callable[[Tensors], Iterator[tuple[str, Tensor]]]
    pooling: str = "pooler"
    projection: str = "linear"


def has_foreign_tower(model_cfg: dict[str, Any]) -> bool:
    """Whether a tower comes from another library."""
    vision, text = model_cfg["vision_cfg"], model_cfg["text_cfg"]
    return bool(vision.get("timm_model_name") or text.get("hf_model_name"))


def foreign_plan(
    weights: Tensors, model_cfg: dict[str, Any], text_model: str | None
) -> tuple[HFCLIPConfig, Callable[[Tensors], Iterator[tuple[str, Tensor]]]]:
    """Config, and tensors under our names, of a checkpoint with a tower from another library.

    Args:
        weights: on the meta device, in OpenCLIP's names without `text.`.
        text_model: folder or Hub name of the text tower's config, if not `hf_model_name`.

    Raises:
        UsageError: a tower without counterpart, with the reason.
    """
    vision, text = model_cfg["vision_cfg"], model_cfg["text_cfg"]
    is_timm, is_hf = bool(vision.get("timm_model_name")), bool(text.get("hf_model_name"))
    reasons = reasons_against(model_cfg, CONVERTIBLE | TIMM | HUGGING_FACE)
    reasons += [reason for reason in (is_timm and against_timm(vision), is_hf and against_text_model(text)) if reason]
    if not isinstance(model_cfg.get("embed_dim"), int):
        reasons.append(f"embed_dim {model_cfg.get('embed_dim')!r}: expected a number")
    if reasons:
        raise UsageError(f"Not convertible: {'; '.join(reasons)}.")
    image, words = halves(weights)
    if is_hf:
        text_tower = hugging_face_tower(words, model_cfg, text_model or text["hf_model_name"])
    elif "text_projection" in words:
        text_tower = own_text_tower(words, model_cfg)
    else:
        text_tower = siglip_text_tower(words, model_cfg)
    image_tower = timm_tower(image, model_cfg) if is_timm else own_image_tower(image, model_cfg)
    with as_usage_error("The architecture"):
        config = HFCLIPConfig(
            text_config=text_tower.config,
            vision_config=image_tower.config,
            text_pooling=text_tower.pooling,
            vision_pooling=image_tower.pooling,
            text_projection_type=text_tower.projection,
            vision_projection_type=image_tower.projection,
            projection_dim=model_cfg["embed_dim"],
            logit_bias_init_value=-10.0 if "logit_bias" in weights else None,
        )
    return config, partial(join_items, image_tower, text_tower)


def halves(weights: Tensors) -> tuple[View, View]:
    """The image tower's and the text tower's tensors."""
    image = {name: name for name in weights if name.startswith("visual.")}
    words = {name: name for name in weights if name not in image and name not in UNCHANGED}
    return View(weights, image), View(weights, words)


def join_items(image_tower: Tower, text_tower: Tower, weights: Tensors) -> Iterator[tuple[str, Tensor]]:
    image, words = halves(weights)
    yield from image_tower.items(image)
    yield from text_tower.items(words)
    for name in UNCHANGED:
        if name in weights:
            yield name, weights[name].reshape(())  # OpenCLIP may train them in a list of one


def renamed_items(prefix: str, ours: str, weights: Tensors) -> Iterator[tuple[str, Tensor]]:
    """Tensors of a tower whose names differ from ours in `prefix` alone, and those of its projection."""
    for name in weights:
        layer, _, kind = name.rpartition(".")
        if layer in PROJECTIONS:
            yield f"{PROJECTIONS[layer]}.{kind}", weights[name]
        else:
            yield name.replace(prefix, ours, 1), weights[name]


def projection_kind(weights: Tensors) -> str:
    """Our kind of the projection among a tower's tensors."""
    layers = {
        PROJECTIONS[layer] + kind for layer in PROJECTIONS for kind in (".weight", ".bias") if layer + kind in weights
    }
    names = {name.partition("_projection.")[2] for name in layers}
    kinds = {
        "linear": {"weight"},
        "linear_bias": {"weight", "bias"},
        "mlp": {"fc1.weight", "fc2.weight"},
        "mlp_bias": {"fc1.weight", "fc1.bias", "fc2.weight"},
        "identity": set(),
    }
    kind = next((kind for kind, expected in kinds.items() if names == expected), None)
    if kind is None:
        raise UsageError(
            f"Not convertible: a projection with {', '.join(sorted(names))}, of no kind that is known here."
        )
    return kind


# OpenCLIP's own towers


def own_image_tower(weights: Tensors, model_cfg: dict[str, Any]) -> Tower:
    return Tower(vision_config(weights, **openclip_vision_fields(model_cfg)), hfclip_items)


def own_text_tower(weights: Tensors, model_cfg: dict[str, Any]) -> Tower:
    return Tower(text_config(weights, **openclip_text_fields(model_cfg)), hfclip_items)


# SigLIP


def siglip_text_tower(weights: Tensors, model_cfg: dict[str, Any]) -> Tower:
    """OpenCLIP's text tower of SigLIP: no mask, pooled at the last position, a projection with a bias or none."""
    fields = openclip_text_fields(model_cfg)
    if fields["causal"] or fields["pooling"] != "last":
        raise UsageError(
            "Not convertible: text_cfg: a projection with a bias, or none, after a causal mask or another pooling than "
            f"'last' (found no_causal_mask {not fields['causal']}, pool_type {fields['pooling']!r}). Only SigLIP's text "
            "tower has it."
        )
    own = text_config(weights, **fields)
    kept = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    kept += ("max_position_embeddings", "hidden_act", "layer_norm_eps")
    # SigLIP's tokenizers pad with id 1, SigLIP2's (Gemma's vocabulary) with 0. All end texts with 1.
    padding = {
        "pad_token_id": 0 if own["vocab_size"] == GEMMA_VOCABULARY else 1,
        "bos_token_id": None,
        "eos_token_id": 1,
    }
    config = {"model_type": "siglip_text_model", **{key: own[key] for key in kept}, **padding}
    config["projection_size"] = model_cfg["embed_dim"]
    return Tower(config, partial(siglip_text_items, model_cfg["embed_dim"]), projection="identity")


def siglip_text_items(embed_dim: int, weights: Tensors) -> Iterator[tuple[str, Tensor]]:
    yield from hfclip_items(View(weights, {name: name for name in weights if not name.startswith("text_projection")}))
    like = weights["token_embedding.weight"]
    if "text_projection.weight" in weights:
        yield "text_model.head.weight", weights["text_projection.weight"]
        yield "text_model.head.bias", weights["text_projection.bias"]
    else:
        yield "text_model.head.weight", torch.eye(embed_dim, dtype=like.dtype, device=like.device)
        yield "text_model.head.bias", torch.zeros(embed_dim, dtype=like.dtype, device=like.device)


def siglip_kind(model_name: str) -> tuple[int, int, str] | None:
    """Width, heads and activation of timm's SigLIP ViTs with attention pooling; None for other models."""
    name = model_name.partition(".")[0]
    match = re.fullmatch(r"vit_([a-z0-9]+)_patch\d+_siglip_\d+", name)
    if not match or match[1] not in SIGLIP_VITS:
        return None
    return *SIGLIP_VITS[match[1]], "gelu_tanh" if SIGLIP_TANH.fullmatch(name) else "gelu"


def is_siglip(vision: dict[str, Any]) -> bool:
    how = (vision.get("timm_pool"), vision.get("timm_proj"))
    return how == ("map", "none") and siglip_kind(vision["timm_model_name"]) is not None


def siglip_image_tower(weights: Tensors, model_cfg: dict[str, Any]) -> Tower:
    """timm's SigLIP ViT with attention pooling."""
    name = model_cfg["vision_cfg"]["timm_model_name"]
    width, num_heads, activation = siglip_kind(name)
    trunk = {key.removeprefix("visual.trunk."): tensor.shape for key, tensor in weights.items()}
    unknown = [key for key in trunk if not re.fullmatch(SIGLIP_NAMES, key)]
    if unknown or not {"patch_embed.proj.weight", "pos_embed", "blocks.0.mlp.fc1.weight"} <= trunk.keys():
        raise UsageError(f"The tensors are not those of timm's {name}: unknown {unknown[:5]}, or others are missing.")
    found, num_channels, patch, _ = trunk["patch_embed.proj.weight"]
    grid = round(trunk["pos_embed"][1] ** 0.5)
    image_size = model_cfg["vision_cfg"].get("image_size") or patch * grid
    if found != width or image_size // patch != grid or model_cfg["embed_dim"] != width:
        raise UsageError(
            f"The settings are not those of the weights: {name} has a width of {width}, and {found} in the weights; "
            f"{image_size} px and a patch of {patch} make {image_size // patch} rows, and {grid} in the weights; "
            f"embed_dim is {model_cfg['embed_dim']}. Pass the model's own."
        )
    config = {
        "model_type": "siglip_vision_model",
        "hidden_size": width,
        "intermediate_size": trunk["blocks.0.mlp.fc1.weight"][0],
        "num_hidden_layers": len({match[1] for key in trunk if (match := re.match(r"blocks\.(\d+)\.", key))}),
        "num_attention_heads": num_heads,
        "num_channels": num_channels,
        "image_size": image_size,
        "patch_size": patch,
        "hidden_act": "gelu_pytorch_tanh" if activation == "gelu_tanh" else "gelu",
        "layer_norm_eps": 1e-6,
    }
    return Tower(config, siglip_image_items, projection="identity")


def siglip_image_items(weights: Tensors) -> Iterator[tuple[str, Tensor]]:
    for name in weights:
        rest, tensor = name.removeprefix("visual.trunk."), weights[name]
        if rest == "pos_embed":
            # (1, patches, width) -> (patches, width)
            yield "vision_model.embeddings.position_embedding.weight", tensor.squeeze(0)
        elif rest.startswith("norm."):
            yield f"vision_model.post_layernorm.{rest.removeprefix('norm.')}", tensor
        elif match := re.fullmatch(r"blocks\.(\d+)\.attn\.qkv\.(weight|bias)", rest):
            # (3 * width, ...) -> three times (width, ...)
            for part, piece in zip("qkv", tensor.chunk(3)):
                yield f"vision_model.encoder.layers.{match[1]}.self_attn.{part}_proj.{match[2]}", piece.clone()
        elif match := re.fullmatch(r"attn_pool\.q\.(weight|bias)", rest):
            # (width, ...) and (2 * width, ...) -> (3 * width, ...)
            fused = torch.cat([tensor, weights[f"visual.trunk.attn_pool.kv.{match[1]}"]])
            yield f"vision_model.head.attention.in_proj_{match[1]}", fused
        elif not rest.startswith("attn_pool.kv."):
            for piece, ours in SIGLIP_PIECES.items():
                rest = rest.replace(piece, ours)
            yield f"vision_model.{rest}", tensor


# Other models of timm


def has_timm() -> bool:
    return importlib.util.find_spec("timm") is not None


def against_timm(vision: dict[str, Any]) -> str | None:
    """Why an image tower of timm cannot be converted."""
    name, pool = vision["timm_model_name"], vision.get("timm_pool", "avg")
    if pool in ("abs_attn", "rot_attn"):
        return f"timm_pool {pool!r}: OpenCLIP's own attention pooling after a timm model"
    if is_siglip(vision):
        return None
    if not has_timm():
        return f"timm_model_name {name!r}: it needs timm (pip install timm), and so will whoever loads the result"
    return None


def timm_tower(weights: Tensors, model_cfg: dict[str, Any]) -> Tower:
    """A tower of timm: `siglip_vision_model` where it is one, the timm model itself where not."""
    vision = model_cfg["vision_cfg"]
    name, pool = vision["timm_model_name"], vision.get("timm_pool", "avg")
    if is_siglip(vision):
        return siglip_image_tower(weights, model_cfg)
    import timm

    if not timm.is_model(name):
        raise UsageError(f"timm {timm.__version__} has no model {name!r}. Another version of timm may have it.")
    projection = timm_projection(weights)
    is_fused = any(".reparam_conv." in name for name in weights)  # MobileOne's branches, added up for inference
    arguments = ({"global_pool": pool} if pool else {}) | ({"inference_mode": True} if is_fused else {})
    config = {
        "model_type": "timm_wrapper",
        "architecture": name,
        "model_args": arguments or None,
        # The wrapper's config has no place of its own for these.
        "hidden_size": weights[f"{projection}.weight"].shape[1] if projection else model_cfg["embed_dim"],
        "image_size": vision.get("image_size", 224),
        "num_channels": 3,
    }
    items = partial(renamed_items, "visual.trunk.", "vision_model.timm_model.")
    return Tower(config, items, projection=projection_kind(weights))


def timm_projection(weights: Tensors) -> str | None:
    """The first layer after the pooling: OpenCLIP's, or the classifier of the timm model; None if there is none."""
    layers = ("visual.head.proj", "visual.head.mlp.fc1", "visual.trunk.head", "visual.trunk.head.fc")
    return next((layer for layer in layers if f"{layer}.weight" in weights), None)


# Text towers of transformers


def against_text_model(text: dict[str, Any]) -> str | None:
    """Why a text tower of transformers cannot be converted, as far as the settings tell."""
    pooler = text.get("hf_pooler_type", "mean_pooler")
    if pooler is not None and pooler not in TEXT_POOLERS:
        return f"hf_pooler_type {pooler!r}: none of {', '.join(TEXT_POOLERS)}"
    return None


def hugging_face_tower(weights: Tensors, model_cfg: dict[str, Any], name: str) -> Tower:
    """One of `TEXT_MODELS`; `name` is the folder or the Hub name of its config."""
    try:
        refuse_absurd(name, PreTrainedConfig.get_config_dict(name)[0])
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # a config of the user's, which each class refuses in its own way
        raise UsageError(
            f"The text tower's config is not available: {name} ({error}). Pass --text-model FOLDER, a folder with its config.json."
        ) from error
    if config.model_type not in TEXT_MODELS:
        raise UsageError(f"Not convertible: a text tower {config.model_type}; expected {', '.join(TEXT_MODELS)}.")
    if not hasattr(config, "max_position_embeddings"):  # mT5's config has no place of its own for it
        config.max_position_embeddings = model_cfg["text_cfg"].get("context_length", 77)
    pooling = TEXT_POOLERS[pooler_of(model_cfg, config)]
    if config.is_encoder_decoder and pooling == "pooler":
        pooling = "cls"
    items = partial(renamed_items, "transformer.", "text_model.")
    return Tower(config, items, pooling, projection_kind(weights))


def pooler_of(model_cfg: dict[str, Any], config: PreTrainedConfig) -> str:
    """OpenCLIP's pooler of a text tower; a null in its settings stands for the default of its family."""
    default = "cls_pooler" if config.model_type in ("bert", "m2m_100") else "mean_pooler"
    return model_cfg["text_cfg"].get("hf_pooler_type", "mean_pooler") or default

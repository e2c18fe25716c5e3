"""What the settings of OpenCLIP and of transformers mean to `reference`, read apart from what `key_maps` makes of them."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hfclip.errors import UsageError

from .reference import Settings, image_features, text_features


ACTIVATIONS = {"quick_gelu": "quick_gelu", "gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}
LEGACY_EOS = 2  # of transformers' configs before its pull request 24773, for which it pools at the highest id


def compute_source_features(
    vision: Settings | None,
    text: Settings | None,
    weights: Mapping[str, Tensor],
    pixel_values: Tensor,
    input_ids: Tensor,
) -> dict[str, Tensor]:
    """Embeddings in float64, not normalised, of the towers whose settings are given, from the source's own tensors."""
    features = {}
    if vision is not None:
        features["image_features"] = image_features(weights, pixel_values, vision, dtype=torch.float64)
    if text is not None:
        features["text_features"] = text_features(weights, input_ids, text, dtype=torch.float64)
    return features


openai_features = partial(compute_source_features, Settings(), Settings())


def openclip_settings(model_cfg: dict[str, Any]) -> tuple[Settings, Settings]:
    """Of OpenCLIP's own image tower and own text tower."""
    vision, text = model_cfg["vision_cfg"], model_cfg["text_cfg"]
    is_resnet = isinstance(vision.get("layers"), list)
    width = vision.get("width", 64 if is_resnet else 768)
    pool_type = text.get("pool_type", "argmax")
    return (
        Settings(
            vision_heads=width * (32 if is_resnet else 1) // vision.get("head_width", 64),
            activation=_activation(model_cfg, vision),
            vision_pooling="query" if vision.get("attentional_pool") else vision.get("pool_type", "tok"),
            pooling_heads=vision.get("attn_pooler_heads", 8),
            norm_before_pooling=not vision.get("final_ln_after_pool", False),
            layer_norm_eps=(vision.get("norm_kwargs") or {}).get("eps", 1e-5),
        ),
        Settings(
            text_heads=text.get("heads", 8),
            activation=_activation(model_cfg, text),
            causal=not text.get("no_causal_mask", False),
            text_pooling="class" if text.get("embed_cls") else pool_type,
            pad_token_id=text.get("pad_id", 0),
            eos_token_id=text.get("eos_id", 2) if pool_type == "eos" else None,
            layer_norm_eps=(text.get("norm_kwargs") or {}).get("eps", 1e-5),
        ),
    )


def _activation(model_cfg: dict[str, Any], tower_cfg: dict[str, Any]) -> str:
    if model_cfg.get("quick_gelu"):
        return "quick_gelu"
    return "gelu_tanh" if (tower_cfg.get("act_kwargs") or {}).get("approximate") == "tanh" else "gelu"


def transformers_features(vision: dict[str, Any] | None, text: dict[str, Any] | None) -> Callable:
    """`compute_source_features` by the configs of transformers' CLIP, None for a tower that is not there."""
    vision_settings = None if vision is None else _transformers_settings(vision, num_heads=12)
    text_settings = None if text is None else _transformers_settings(text, num_heads=8)
    return partial(compute_source_features, vision_settings, text_settings)


def _transformers_settings(tower: dict[str, Any], num_heads: int) -> Settings:
    """A tower's; what its config leaves out is as transformers assumes."""
    defaults = {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-5, "eos_token_id": 49407}
    tower = {"num_attention_heads": num_heads, **defaults, **tower}
    if tower["hidden_act"] not in ACTIVATIONS:
        raise UsageError(f"hidden_act: found {tower['hidden_act']!r}, expected one of {', '.join(ACTIVATIONS)}.")
    return Settings(
        text_heads=tower["num_attention_heads"],
        vision_heads=tower["num_attention_heads"],
        activation=ACTIVATIONS[tower["hidden_act"]],
        text_pooling="argmax" if tower["eos_token_id"] == LEGACY_EOS else "eos",
        eos_token_id=tower["eos_token_id"],
        layer_norm_eps=tower["layer_norm_eps"],
    )

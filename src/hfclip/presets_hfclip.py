"""The nine published architectures."""

import difflib
from typing import Any


def _vit(width: int, layers: int, patch: int, image_size: int = 224) -> dict[str, Any]:
    return {
        "model_type": "hfclip_vit",
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": width // 64,
        "patch_size": patch,
        "image_size": image_size,
    }


def _resnet(depths: tuple[int, ...], stem_width: int, image_size: int) -> dict[str, Any]:
    return {"model_type": "hfclip_resnet", "depths": depths, "stem_width": stem_width, "image_size": image_size}


# name: (joint dimensions, image tower, text width); paper tables 19 and 20.
PRESETS = {
    "RN50": (1024, _resnet((3, 4, 6, 3), 64, 224), 512),
    "RN101": (512, _resnet((3, 4, 23, 3), 64, 224), 512),
    "RN50x4": (640, _resnet((4, 6, 10, 6), 80, 288), 640),
    "RN50x16": (768, _resnet((6, 8, 18, 8), 96, 384), 768),
    "RN50x64": (1024, _resnet((3, 15, 36, 10), 128, 448), 1024),
    "ViT-B/32": (512, _vit(768, 12, 32), 512),
    "ViT-B/16": (512, _vit(768, 12, 16), 512),
    "ViT-L/14": (768, _vit(1024, 24, 14), 768),
    "ViT-L/14@336px": (768, _vit(1024, 24, 14, 336), 768),
}


def fields_of_preset(name: str, overrides: dict[str, Any]) -> dict[str, Any]:
    """Fields of `HFCLIPConfig` for a preset; see `HFCLIPConfig.from_preset`."""
    by_lower = {preset.lower(): preset for preset in PRESETS}
    if name not in PRESETS:
        near = difflib.get_close_matches(str(name).lower(), by_lower, n=1, cutoff=0.4)
        hint = f" Did you mean {by_lower[near[0]]!r}?" if near else ""
        raise ValueError(f"Unknown preset {name!r}: expected one of {', '.join(PRESETS)}.{hint}")
    projection_dim, vision, text_width = PRESETS[name]
    text = {
        "model_type": "hfclip_text",
        "hidden_size": text_width,
        "intermediate_size": 4 * text_width,
        "num_attention_heads": text_width // 64,
        "num_hidden_layers": 12,
    }
    fields = {"text_config": text, "vision_config": vision, "projection_dim": projection_dim}
    for key, value in overrides.items():
        part = fields.get(key)
        # A dict without a type, or with the same, changes fields of the preset's tower; another type replaces it.
        if (
            isinstance(part, dict)
            and isinstance(value, dict)
            and value.get("model_type", part["model_type"]) == part["model_type"]
        ):
            value = {**part, **value}
        fields[key] = value
    return fields

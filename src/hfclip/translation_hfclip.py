"""Configs that transformers wrote for its dual encoders, as ours."""

from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedConfig

from .families_hfclip import FAMILIES, LEGACY_EOS, end_of_text, translate_family
from .limits_hfclip import shown


DUAL_ENCODER = "vision-text-dual-encoder"
TRANSFORMERS_MODEL_TYPES = {
    "clip": "hfclip",
    DUAL_ENCODER: "hfclip",
    "clip_text_model": "hfclip_text",
    "clip_vision_model": "hfclip_vit",
}


def build_foreign_config(config_class: type[PreTrainedConfig], fields: dict[str, Any]) -> PreTrainedConfig:
    """A config of transformers, from fields that have passed `refuse_absurd`."""
    try:
        return config_class(**fields)
    except Exception as error:  # each class fails in its own way
        raise ValueError(
            f"{config_class.__name__}: found settings that it refuses ({type(error).__name__}: {error}), expected a "
            f"config of `{config_class.model_type}`. Correct them, or leave them out."
        ) from error


def translate_transformers_config(config: dict[str, Any]) -> dict[str, Any]:
    """Rewrites a config that a dual encoder of transformers wrote into ours, sub-configs included.

    Others pass unchanged.

    Repairs `eos_token_id: 2`, which transformers wrote before its pull request 24773 while pooling at the highest id,
    the end-of-text token. Merges `text_config_dict` / `vision_config_dict` as transformers does.
    """
    config = dict(config)
    model_type = config.get("model_type")
    for key, kind in {"model_type": str, **dict.fromkeys(("text_config", "vision_config"), dict)}.items():
        value = config.get(key)
        if not isinstance(value, kind | PreTrainedConfig | None):
            raise ValueError(
                f"found {key}={shown(value)}, expected {'a name' if kind is str else 'an object of settings'}. Correct "
                "config.json, or fetch it again."
            )
    if model_type in FAMILIES and model_type in CONFIG_MAPPING:
        fields = {key: value for key, value in config.items() if key not in ("model_type", "auto_map")}
        theirs = build_foreign_config(CONFIG_MAPPING[model_type], fields).to_dict()
        return translate_family(config, FAMILIES[model_type], theirs)
    if model_type == DUAL_ENCODER:
        for key, default in (("text_config", "bert"), ("vision_config", "vit")):
            config[key] = {"model_type": default, **(config.get(key) or {})}
        config["text_pooling"] = config["vision_pooling"] = "pooler"
    if model_type in TRANSFORMERS_MODEL_TYPES:
        config["model_type"] = TRANSFORMERS_MODEL_TYPES[model_type]
        # The class that wrote the folder, and code it does not need.
        config.pop("architectures", None)
    if model_type == "clip_text_model" and config.get("eos_token_id") == LEGACY_EOS:
        vocab_size = config.get("vocab_size", 49408)
        if not isinstance(vocab_size, int):
            raise ValueError(f"found vocab_size={shown(vocab_size)}, expected a whole number. Correct config.json.")
        config["eos_token_id"] = end_of_text(vocab_size)
        config["bos_token_id"] = config["eos_token_id"] - 1
    if model_type == "clip":
        for key, tower_type in (("text_config", "clip_text_model"), ("vision_config", "clip_vision_model")):
            fields = {"model_type": tower_type, **(config.get(key) or {})}
            legacy = config.pop(f"{key}_dict", None)
            if legacy is not None:
                fields.update(build_foreign_config(CONFIG_MAPPING[tower_type], legacy).to_dict())
            config[key] = translate_transformers_config(fields)
    return config

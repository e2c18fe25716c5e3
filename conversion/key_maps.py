"""OpenAI's and OpenCLIP's checkpoints <-> hfclip's: tables of names, and pure functions of state dicts.

Both projects write the same names (OpenCLIP adds `logit_bias` for sigmoid-trained models). Three edits go beyond
renaming: the fused query/key/value matrices are split, the two projections are transposed (they are multiplied from the
right there), and scalars that a checkpoint does not train (`input_resolution` ...) are dropped.

    state dict -> openai_config / openclip_config (from shapes and what shapes cannot tell) -> HFCLIPConfig
    state dict -> to_hfclip -> load_state_dict(strict=True)        to_openai is its exact inverse
"""

import re
from typing import Any

import torch

from hfclip import HFCLIPConfig


StateDict = dict[str, torch.Tensor]

# OpenAI's name -> ours. `{n}` is the number of a block.
BLOCK = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
TEXT = {
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
}
VIT = {
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
}
TRANSPOSED = {"text_projection": "text_projection.weight", "visual.proj": "visual_projection.weight"}
UNCHANGED = ("logit_scale", "logit_bias")
# The two transformers: OpenAI's prefix -> ours.
TRANSFORMERS = {
    "transformer.resblocks": "text_model.encoder.layers",
    "visual.transformer.resblocks": "vision_model.encoder.layers",
}
# Constants that OpenAI's archives store beside the weights.
CONSTANTS = ("input_resolution", "context_length", "vocab_size", "attn_mask")


def to_hfclip(state_dict: StateDict) -> StateDict:
    """Renames, splits and transposes a state dict in OpenAI's or OpenCLIP's names.

    Raises:
        ValueError: names that are in no table, listed; nothing is left over silently.
    """
    is_vit = "visual.proj" in state_dict
    tables = {**TEXT, **(VIT if is_vit else {}), **{name: name for name in UNCHANGED}}
    converted: StateDict = {}
    unknown = []
    for name, tensor in state_dict.items():
        if name in CONSTANTS:
            continue
        if name in tables:
            converted[tables[name]] = tensor
        elif name in TRANSPOSED:
            converted[TRANSPOSED[name]] = tensor.t().contiguous()
        elif (block := _block_name(name, TRANSFORMERS)) is not None:
            converted.update(_block_to_hfclip(*block, tensor))
        elif name.startswith("visual.") and not is_vit:
            converted["vision_model." + name.removeprefix("visual.")] = tensor
        else:
            unknown.append(name)
    if unknown:
        raise ValueError(
            f"{len(unknown)} tensors have names that neither OpenAI's nor OpenCLIP's CLIP has, such as {unknown[:5]}. "
            "Strip prefixes such as `module.`, and pass the model's weights only."
        )
    return converted


def to_openai(state_dict: StateDict) -> StateDict:
    """The exact inverse of `to_hfclip`: an hfclip state dict in the names of OpenAI and OpenCLIP.

    Raises:
        ValueError: towers that OpenAI's CLIP does not have.
    """
    is_vit = "visual_projection.weight" in state_dict
    tables = {ours: theirs for theirs, ours in {**TEXT, **VIT, **{name: name for name in UNCHANGED}}.items()}
    transposed = {ours: theirs for theirs, ours in TRANSPOSED.items()}
    prefixes = {ours: theirs for theirs, ours in TRANSFORMERS.items()}
    converted: StateDict = {}
    unknown = []
    for name, tensor in state_dict.items():
        if name in tables:
            converted[tables[name]] = tensor
        elif name in transposed:
            converted[transposed[name]] = tensor.t().contiguous()
        elif (block := _block_name(name, prefixes)) is not None:
            converted.update(_block_to_openai(*block, tensor, state_dict, name))
        elif name.startswith("vision_model.") and not is_vit:
            converted["visual." + name.removeprefix("vision_model.")] = tensor
        else:
            unknown.append(name)
    if unknown:
        raise ValueError(f"OpenAI's CLIP has no counterpart for {len(unknown)} tensors, such as {unknown[:5]}.")
    return converted


def _block_name(name: str, prefixes: dict[str, str]) -> tuple[str, str] | None:
    """("<target prefix>.<number>", "<rest>") of a transformer block's tensor, None for others."""
    for source, target in prefixes.items():
        if match := re.fullmatch(rf"{re.escape(source)}\.(\d+)\.(.+)", name):
            return f"{target}.{match[1]}", match[2]
    return None


def _block_to_hfclip(prefix: str, rest: str, tensor: torch.Tensor) -> StateDict:
    if rest in ("attn.in_proj_weight", "attn.in_proj_bias"):
        kind = rest.rpartition("_")[2]
        # (3 * hidden, ...) -> three times (hidden, ...)
        parts = zip(("q_proj", "k_proj", "v_proj"), tensor.chunk(3))
        return {f"{prefix}.self_attn.{name}.{kind}": part.contiguous() for name, part in parts}
    module, _, kind = rest.rpartition(".")
    if module not in BLOCK:
        raise ValueError(f"Unknown tensor {rest!r} in transformer block {prefix}.")
    return {f"{prefix}.{BLOCK[module]}.{kind}": tensor}


def _block_to_openai(prefix: str, rest: str, tensor: torch.Tensor, state_dict: StateDict, name: str) -> StateDict:
    module, _, kind = rest.rpartition(".")
    if module in ("self_attn.k_proj", "self_attn.v_proj"):
        return {}  # written with the query
    if module == "self_attn.q_proj":
        parts = [state_dict[name.replace("q_proj", part)] for part in ("q_proj", "k_proj", "v_proj")]
        return {f"{prefix}.attn.in_proj_{kind}": torch.cat(parts)}
    theirs = {ours: theirs for theirs, ours in BLOCK.items()}
    return {f"{prefix}.{theirs[module]}.{kind}": tensor}


def openai_config(state_dict: StateDict) -> HFCLIPConfig:
    """The architecture of a checkpoint in OpenAI's names: all from shapes, QuickGELU, 64 units a head."""
    return _config(state_dict, text_heads=None, vision_head_width=64, hidden_act="quick_gelu")


def openclip_config(state_dict: StateDict, model_cfg: dict[str, Any]) -> HFCLIPConfig:
    """The architecture of an OpenCLIP checkpoint: shapes, and from its `model_cfg` what shapes cannot tell.

    Raises:
        ValueError: `model_cfg` asks for something that these weights' names do not express (timm or Hugging Face
            towers, other poolings).
    """
    vision, text = model_cfg["vision_cfg"], model_cfg["text_cfg"]
    foreign = [key for key in ("timm_model_name", "attentional_pool") if vision.get(key)]
    foreign += [key for key in ("hf_model_name", "embed_cls") if text.get(key)]
    if foreign:
        raise ValueError(f"OpenCLIP settings without a counterpart here: {foreign}.")
    return _config(
        state_dict,
        text_heads=text.get("heads"),
        vision_head_width=vision.get("head_width", 64),
        hidden_act="quick_gelu" if model_cfg.get("quick_gelu", False) else "gelu",
    )


def _config(state_dict: StateDict, text_heads: int | None, vision_head_width: int, hidden_act: str) -> HFCLIPConfig:
    missing = {"token_embedding.weight", "positional_embedding", "text_projection", "visual.conv1.weight"} - {
        *state_dict
    }
    if missing:
        raise ValueError(f"No CLIP checkpoint in OpenAI's names: {sorted(missing)} are missing.")
    vocab_size, text_width = state_dict["token_embedding.weight"].shape
    text = {
        "model_type": "hfclip_text",
        "vocab_size": vocab_size,
        "hidden_size": text_width,
        "intermediate_size": state_dict["transformer.resblocks.0.mlp.c_fc.weight"].shape[0],
        "num_hidden_layers": _count_blocks(state_dict, r"transformer\.resblocks\.(\d+)\."),
        "num_attention_heads": text_heads or text_width // 64,
        "max_position_embeddings": state_dict["positional_embedding"].shape[0],
        "hidden_act": hidden_act,
        # OpenAI's CLIP pools at the highest id of a text, the last of the vocabulary.
        "bos_token_id": vocab_size - 2,
        "eos_token_id": vocab_size - 1,
    }
    is_vit = "visual.proj" in state_dict
    vision = (
        _vit_config(state_dict, vision_head_width, hidden_act)
        if is_vit
        else _resnet_config(state_dict, vision_head_width)
    )
    return HFCLIPConfig(
        text_config=text,
        vision_config=vision,
        projection_dim=state_dict["text_projection"].shape[1],
        logit_bias_init_value=state_dict["logit_bias"].item() if "logit_bias" in state_dict else None,
    )


def _vit_config(state_dict: StateDict, head_width: int, hidden_act: str) -> dict[str, Any]:
    width, num_channels, patch_size, _ = state_dict["visual.conv1.weight"].shape
    grid = round((state_dict["visual.positional_embedding"].shape[0] - 1) ** 0.5)
    return {
        "model_type": "hfclip_vit",
        "hidden_size": width,
        "intermediate_size": state_dict["visual.transformer.resblocks.0.mlp.c_fc.weight"].shape[0],
        "num_hidden_layers": _count_blocks(state_dict, r"visual\.transformer\.resblocks\.(\d+)\."),
        "num_attention_heads": width // head_width,
        "num_channels": num_channels,
        "patch_size": patch_size,
        "image_size": patch_size * grid,
        "hidden_act": hidden_act,
    }


def _resnet_config(state_dict: StateDict, head_width: int) -> dict[str, Any]:
    stem_width = state_dict["visual.layer1.0.conv1.weight"].shape[0]
    grid = round((state_dict["visual.attnpool.positional_embedding"].shape[0] - 1) ** 0.5)
    return {
        "model_type": "hfclip_resnet",
        "depths": [_count_blocks(state_dict, rf"visual\.layer{stage}\.(\d+)\.") for stage in (1, 2, 3, 4)],
        "stem_width": stem_width,
        "num_attention_heads": stem_width * 32 // head_width,
        "num_channels": state_dict["visual.conv1.weight"].shape[1],
        "image_size": 32 * grid,
    }


def _count_blocks(state_dict: StateDict, pattern: str) -> int:
    return len({match[1] for name in state_dict if (match := re.match(pattern, name))})

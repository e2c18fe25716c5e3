"""OpenAI's and OpenCLIP's checkpoints <-> hfclip's: tables of names, and pure functions of state dicts.

Both projects write the same names (OpenCLIP adds `logit_bias` for sigmoid-trained models). Three edits go beyond
renaming: the fused query/key/value matrices are split, the two projections are transposed (they are multiplied from the
right there), and scalars that a checkpoint does not train (`input_resolution` ...) are dropped.

    state dict -> openai_config / openclip_config (from shapes and what shapes cannot tell) -> HFCLIPConfig
    state dict -> hfclip_items -> load_state_dict(strict=True)     openai_items is its exact inverse
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch

from ..configuration_hfclip import HFCLIPConfig
from ..errors import UsageError, as_usage_error


# OpenAI's name -> ours. `{n}` is the number of a block.
BLOCK = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
    "ls_1": "layer_scale1",
    "ls_2": "layer_scale2",
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
# CoCa's poolings. Of its learned queries the first makes the embedding; the others, and `text_decoder`, write captions.
COCA = {"cls_emb": "text_model.embeddings.class_embedding"}
COCA |= {
    f"visual.attn_pool.{theirs}.{kind}": f"vision_model.attention_pool.{ours}.{kind}"
    for theirs, ours in {"ln_q": "query_norm", "ln_k": "key_norm", "attn.out_proj": "out_proj"}.items()
    for kind in ("weight", "bias")
}
COCA |= {f"visual.attn_pool.attn.{x}_proj_weight": f"vision_model.attention_pool.{x}_proj.weight" for x in "qkv"}
QUERY, IN_PROJ = "visual.attn_pool.query", ("visual.attn_pool.attn.in_proj_weight", "visual.attn_pool.attn.in_proj_bias")  # fmt: skip
# The two transformers: OpenAI's prefix -> ours.
TRANSFORMERS = {
    "transformer.resblocks": "text_model.encoder.layers",
    "visual.transformer.resblocks": "vision_model.encoder.layers",
}
# Constants that OpenAI's archives store beside the weights.
CONSTANTS = ("input_resolution", "context_length", "vocab_size", "attn_mask")


def hfclip_items(state_dict: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    """Our names and tensors, one after the other; each of `state_dict` is asked for once, when its turn comes."""
    is_vit = _is_vit(state_dict)
    tables = {**TEXT, **COCA, **(VIT if is_vit else {}), **{name: name for name in UNCHANGED}}
    names = [name for name in state_dict if name not in CONSTANTS]
    known = {*tables, *TRANSPOSED, QUERY, *IN_PROJ}
    if unknown := _unknown(names, known, TRANSFORMERS, () if is_vit else ("visual.",)):
        raise UsageError(
            f"{len(unknown)} tensors have names that neither OpenAI's nor OpenCLIP's CLIP has, such as {unknown[:5]}. "
            "Strip prefixes such as `module.`, and pass the model's weights only."
        )
    for name in names:
        if name in tables:
            yield tables[name], state_dict[name]
        elif name in TRANSPOSED:
            yield TRANSPOSED[name], state_dict[name].t().contiguous()
        elif (block := _block_name(name, TRANSFORMERS)) is not None:
            yield from _block_to_hfclip(*block, state_dict[name])
        elif name == QUERY:
            yield "vision_model.attention_pool.query", state_dict[name][:1].clone()
        elif name in IN_PROJ:
            for x, part in zip("qkv", state_dict[name].chunk(3)):
                yield f"vision_model.attention_pool.{x}_proj.{name.rpartition('_')[2]}", part.clone()
        else:
            yield "vision_model." + name.removeprefix("visual."), state_dict[name]


def openai_items(state_dict: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    """OpenAI's names and tensors, one after the other; the inverse of `hfclip_items`."""
    is_vit = "visual_projection.weight" in state_dict
    tables = {ours: theirs for theirs, ours in {**TEXT, **VIT, **COCA, **{name: name for name in UNCHANGED}}.items()}
    tables["vision_model.attention_pool.query"] = QUERY
    tables |= _fused_in_pooling(state_dict)
    transposed = {ours: theirs for theirs, ours in TRANSPOSED.items()}
    prefixes = {ours: theirs for theirs, ours in TRANSFORMERS.items()}
    if unknown := _unknown(state_dict, {*tables, *transposed}, prefixes, () if is_vit else ("vision_model.",)):
        raise UsageError(f"OpenAI's CLIP has no counterpart for {len(unknown)} tensors, such as {unknown[:5]}.")
    for name in state_dict:
        if tables.get(name) in IN_PROJ:
            if "q_proj" in name:  # those of keys and values are written with it
                yield tables[name], torch.cat([state_dict[name.replace("q_proj", f"{x}_proj")] for x in "qkv"])
        elif name in tables:
            yield tables[name], state_dict[name]
        elif name in transposed:
            yield transposed[name], state_dict[name].t().contiguous()
        elif (block := _block_name(name, prefixes)) is not None:
            yield from _block_to_openai(*block, state_dict, name)
        else:
            yield "visual." + name.removeprefix("vision_model."), state_dict[name]


def _fused_in_pooling(state_dict: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """Our names in CoCa's pooling that torch's attention has in one tensor: biases, and weights where all are square."""
    query, key = (state_dict.get(f"vision_model.attention_pool.{x}_proj.weight") for x in "qk")
    if query is None:
        return {}
    kinds = IN_PROJ if query.shape == key.shape else IN_PROJ[1:]
    return {f"vision_model.attention_pool.{x}_proj.{kind.rpartition('_')[2]}": kind for kind in kinds for x in "qkv"}


def _unknown(names: Iterable[str], known: set[str], blocks: dict[str, str], resnet: tuple[str, ...]) -> list[str]:
    """The names in no table, of no transformer block, and of no ResNet, whose prefix is all that changes."""
    return [
        name
        for name in names
        if name not in known and _block_name(name, blocks) is None and not name.startswith(resnet)
    ]


def _block_name(name: str, prefixes: dict[str, str]) -> tuple[str, str] | None:
    """("<target prefix>.<number>", "<rest>") of a transformer block's tensor, None for others."""
    for source, target in prefixes.items():
        if match := re.fullmatch(rf"{re.escape(source)}\.(\d+)\.(.+)", name):
            return f"{target}.{match[1]}", match[2]
    return None


def _block_to_hfclip(prefix: str, rest: str, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    if rest in ("attn.in_proj_weight", "attn.in_proj_bias"):
        kind = rest.rpartition("_")[2]
        # (3 * hidden, ...) -> three times (hidden, ...)
        for name, part in zip(("q_proj", "k_proj", "v_proj"), tensor.chunk(3)):
            yield f"{prefix}.self_attn.{name}.{kind}", part.clone()
        return
    module, _, kind = rest.rpartition(".")
    if module not in BLOCK:
        raise UsageError(f"Unknown tensor {rest!r} in transformer block {prefix}.")
    yield f"{prefix}.{BLOCK[module]}.{kind}", tensor


def _block_to_openai(
    prefix: str, rest: str, state_dict: Mapping[str, torch.Tensor], name: str
) -> Iterator[tuple[str, torch.Tensor]]:
    module, _, kind = rest.rpartition(".")
    if module in ("self_attn.k_proj", "self_attn.v_proj"):
        return  # written with the query
    if module == "self_attn.q_proj":
        parts = [state_dict[name.replace("q_proj", part)] for part in ("q_proj", "k_proj", "v_proj")]
        yield f"{prefix}.attn.in_proj_{kind}", torch.cat(parts)
        return
    theirs = {ours: theirs for theirs, ours in BLOCK.items()}
    if module not in theirs:
        raise UsageError(f"OpenAI's CLIP has no counterpart for {name!r}.")
    yield f"{prefix}.{theirs[module]}.{kind}", state_dict[name]


def openai_config(state_dict: Mapping[str, torch.Tensor]) -> HFCLIPConfig:
    """The architecture of a checkpoint in OpenAI's names: all from shapes, QuickGELU, 64 units a head."""
    return _config(state_dict, {"hidden_act": "quick_gelu"}, {"head_width": 64, "hidden_act": "quick_gelu"})


# OpenCLIP's settings that change what is computed and have no counterpart here -> why.
VISION_POOLINGS, TEXT_POOLINGS = ("tok", "avg"), ("argmax", "eos", "first", "last")
ATTENTION_VARIANTS = ("qk_norm", "scaled_cosine_attn", "scale_heads", "scale_attn_inner", "scale_attn", "scale_fc")
INCONVERTIBLE = {
    "patch_embed_type": "a patch embedding of its own kind",
    "timm_model_name": "a tower of another library",
    "hf_model_name": "a tower of another library",
    **dict.fromkeys(ATTENTION_VARIANTS, "an attention block of its own kind"),
}
# The settings that are read here, told by shapes, or of no bearing on what is computed.
CONVERTIBLE = set(
    "embed_dim vision_cfg text_cfg quick_gelu custom_text output_dict cast_dtype output_tokens init_logit_scale "
    "init_logit_bias nonscalar_logit_scale layers width heads head_width mlp_ratio patch_size image_size patch_dropout "
    "pos_embed_type block_type pool_type no_ln_pre final_ln_after_pool act_kwargs norm_kwargs context_length vocab_size "
    "pad_id eos_id no_causal_mask proj_bias proj_type hf_tokenizer_name tokenizer_mode hf_tokenizer_mode "
    "tokenizer_kwargs attentional_pool attn_pooler_queries attn_pooler_heads embed_cls ls_init_value multimodal_cfg".split()
)


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 < value < 10**9


# The kinds of OpenCLIP's settings, where another kind would fail later. Names, objects and `OPTIONAL` may be None.
OPTIONAL = ("patch_size", "ls_init_value", "init_logit_scale", "init_logit_bias")
KINDS = {
    "a positive number": (
        _is_count,
        "embed_dim width heads head_width patch_size context_length vocab_size attn_pooler_heads",
    ),
    "a whole number": (
        lambda value: value is not False and (value == 0 or _is_count(value)),
        "image_size pad_id eos_id",
    ),
    "a number": (
        lambda value: type(value) in (int, float) and abs(value) < 1e9,
        "mlp_ratio patch_dropout ls_init_value init_logit_bias eps",
    ),
    "an object": (
        lambda value: value is None or isinstance(value, dict),
        "act_kwargs norm_kwargs tokenizer_kwargs multimodal_cfg",
    ),
    "a name": (
        lambda value: value is None or isinstance(value, str),
        "pool_type hf_model_name hf_tokenizer_name hf_pooler_type hf_proj_type timm_model_name timm_pool timm_proj "
        "approximate",
    ),
    "a positive number, or four of a ResNet": (
        lambda value: all(map(_is_count, value)) and len(value) == 4 if isinstance(value, list) else _is_count(value),
        "layers",
    ),
}
KIND_OF = {setting: kind for kind, (_, settings) in KINDS.items() for setting in settings.split()}


def require_kinds(place: Any, settings: dict[str, Any], part: str = "") -> None:
    """Raises UsageError for a setting of OpenCLIP's that is of another kind than it gives it; nested ones included."""
    for key, value in settings.items():
        expected = KIND_OF.get(key)
        if expected and not (KINDS[expected][0](value) or value is None and key in OPTIONAL):
            raise UsageError(
                f"{place} has a setting that makes no sense: {part}{key}: found {value!r:.80}, expected {expected}."
            )
        if isinstance(value, dict) and not part.count(".") > 2:
            require_kinds(place, value, f"{part}{key}.")


def openclip_config(state_dict: Mapping[str, torch.Tensor], model_cfg: dict[str, Any]) -> HFCLIPConfig:
    """The architecture of OpenCLIP's own towers: from shapes, and from `model_cfg` what shapes cannot tell."""
    reasons = reasons_against(model_cfg, CONVERTIBLE)
    if "text_projection" not in state_dict and "token_embedding.weight" in state_dict:
        reasons.append("text_cfg: a text tower without projection, or with a bias in it")
    if reasons:
        raise UsageError(f"Not convertible: {'; '.join(reasons)}.")
    config = _config(state_dict, openclip_text_fields(model_cfg), openclip_vision_fields(model_cfg))
    _require_agreement(config, model_cfg, model_cfg.get("vision_cfg") or {}, model_cfg.get("text_cfg") or {})
    return config


def reasons_against(model_cfg: dict[str, Any], convertible: set[str]) -> list[str]:
    """The settings that have no counterpart here, each with its reason; those named in `convertible` have one."""
    vision, text = model_cfg.get("vision_cfg") or {}, model_cfg.get("text_cfg") or {}
    given = {key for part in (model_cfg, vision, text) for key, value in part.items() if value} - convertible
    reasons = [f"{key}: {INCONVERTIBLE[key]}" for key in INCONVERTIBLE if key in given]
    if not reasons:  # settings of other towers come in groups
        reasons += [f"{key}: an unknown setting" for key in sorted(given)]
    for part, tower, known in (("vision_cfg", vision, VISION_POOLINGS), ("text_cfg", text, TEXT_POOLINGS)):
        if tower.get("pool_type") not in (None, *known):
            reasons.append(f"{part}.pool_type {tower['pool_type']!r}: none of {', '.join(known)}")
    if vision.get("attentional_pool") and (
        vision["attentional_pool"] is not True or vision.get("pool_type", "tok") != "tok"
    ):
        reasons.append("attentional_pool: a pooling by learned queries other than CoCa's, whose first query is read")
    if text.get("embed_cls") and text.get("no_causal_mask"):
        reasons.append("embed_cls: a class token after a text that is not causal")
    return reasons


def openclip_text_fields(model_cfg: dict[str, Any]) -> dict[str, Any]:
    """What the settings tell of OpenCLIP's own text tower, for `text_config`."""
    text = model_cfg.get("text_cfg") or {}
    fields = {
        "hidden_act": _activation(text, model_cfg),
        "layer_norm_eps": _epsilon(text),
        "causal": not text.get("no_causal_mask", False),
        "pooling": {"argmax": "eos"}.get(text.get("pool_type", "argmax"), text.get("pool_type")),
        "layer_scale_init_value": text.get("ls_init_value"),
        "num_attention_heads": text.get("heads", 8),
        "pad_token_id": text.get("pad_id", 0),
    }
    if text.get("pool_type") == "eos":  # "argmax" pools at the highest id instead, the last of the vocabulary
        fields |= {"eos_token_id": text.get("eos_id", 2), "bos_token_id": None}
    if text.get("embed_cls"):
        fields["pooling"] = "class"
    return fields


def openclip_vision_fields(model_cfg: dict[str, Any]) -> dict[str, Any]:
    """What the settings tell of OpenCLIP's own image tower, for `vision_config`."""
    vision = model_cfg.get("vision_cfg") or {}
    average = "norm_of_mean" if vision.get("final_ln_after_pool") else "mean"
    pooling = {"tok": "cls", "avg": average}.get(vision.get("pool_type", "tok"), vision.get("pool_type"))
    return {
        "head_width": vision.get("head_width", 64),
        "hidden_act": _activation(vision, model_cfg),
        "layer_norm_eps": _epsilon(vision),
        "layer_scale_init_value": vision.get("ls_init_value"),
        "pooling": "attention" if vision.get("attentional_pool") else pooling,
        "pooling_heads": vision.get("attn_pooler_heads", 8),
    }


def _require_agreement(config: HFCLIPConfig, model_cfg: dict[str, Any], vision: dict, text: dict) -> None:
    """Raises UsageError where settings and shapes disagree: the weights are another model's. Shapes cannot tell the rest,
    such as heads and activation, so the settings must be right. (Resolution and context may be changed in training.)"""
    ours, told = config.vision_config, {"embed_dim": (model_cfg.get("embed_dim"), config.projection_dim)}
    is_vit = ours.model_type == "hfclip_vit"
    told |= {
        "vision_cfg.layers": (vision.get("layers"), ours.num_hidden_layers if is_vit else ours.depths),
        "vision_cfg.width": (vision.get("width"), ours.hidden_size if is_vit else ours.stem_width),
        "vision_cfg.patch_size": (vision.get("patch_size"), ours.patch_size if is_vit else None),
        "text_cfg.layers": (text.get("layers"), config.text_config.num_hidden_layers),
        "text_cfg.width": (text.get("width"), config.text_config.hidden_size),
        "text_cfg.vocab_size": (text.get("vocab_size"), config.text_config.vocab_size),
    }
    wrong = [f"{key} is {said}, and {found} in the weights" for key, (said, found) in told.items() if said not in (None, found)]  # fmt: skip
    if wrong:
        raise UsageError(f"The settings are not those of the weights: {'; '.join(wrong)}. Pass the model's own.")


def _activation(tower_cfg: dict[str, Any], model_cfg: dict[str, Any]) -> str:
    is_approximate = (tower_cfg.get("act_kwargs") or {}).get("approximate") == "tanh"
    exact = "quick_gelu" if model_cfg.get("quick_gelu", False) else "gelu"
    return "gelu_pytorch_tanh" if is_approximate else exact


def _epsilon(tower_cfg: dict[str, Any]) -> float:
    return (tower_cfg.get("norm_kwargs") or {}).get("eps", 1e-5)


def _config(
    state_dict: Mapping[str, torch.Tensor], text_fields: dict[str, Any], vision_fields: dict[str, Any]
) -> HFCLIPConfig:
    """Fields that shapes tell, with those given laid over them (`head_width` stands for the number of heads)."""
    needed = {"token_embedding.weight", "positional_embedding", "text_projection", "visual.conv1.weight"}
    if missing := needed - state_dict.keys():
        raise UsageError(f"No CLIP checkpoint in OpenAI's names: {sorted(missing)} are missing.")
    towers = {"text_config": text_config(state_dict, **text_fields)}
    towers["vision_config"] = vision_config(state_dict, **vision_fields)
    projection_dim = _shape(state_dict, "text_projection", 2)[1]
    # The initial value; loading puts the trained one in its place.
    bias = -10.0 if "logit_bias" in state_dict else None
    with as_usage_error("The architecture"):
        return HFCLIPConfig(**towers, projection_dim=projection_dim, logit_bias_init_value=bias)


def text_config(state_dict: Mapping[str, torch.Tensor], **fields) -> dict[str, Any]:
    """The text tower's fields that shapes tell, with those given laid over them."""
    vocab_size, width = _shape(state_dict, "token_embedding.weight", 2)
    return {
        "model_type": "hfclip_text",
        "vocab_size": vocab_size,
        "hidden_size": width,
        "intermediate_size": _shape(state_dict, "transformer.resblocks.0.mlp.c_fc.weight", 2)[0],
        "num_hidden_layers": _count_blocks(state_dict, r"transformer\.resblocks\.(\d+)\."),
        "num_attention_heads": max(1, width // 64),
        "max_position_embeddings": _shape(state_dict, "positional_embedding", 2)[0] - ("cls_emb" in state_dict),
        # OpenAI's CLIP pools at the highest id of a text, the last of the vocabulary.
        "bos_token_id": vocab_size - 2,
        "eos_token_id": vocab_size - 1,
        **fields,
    }


def vision_config(state_dict: Mapping[str, torch.Tensor], head_width: int, **fields) -> dict[str, Any]:
    """The image tower's, likewise; `head_width` stands for the number of heads."""
    make = _vit_config if _is_vit(state_dict) else _resnet_config
    return make(state_dict, head_width, **fields)


def _vit_config(state_dict: Mapping[str, torch.Tensor], head_width: int, **fields) -> dict[str, Any]:
    width, num_channels, patch_size, _ = _shape(state_dict, "visual.conv1.weight", 4)
    grid = round((_shape(state_dict, "visual.positional_embedding", 2)[0] - 1) ** 0.5)
    return {
        "model_type": "hfclip_vit",
        "hidden_size": width,
        "intermediate_size": _shape(state_dict, "visual.transformer.resblocks.0.mlp.c_fc.weight", 2)[0],
        "num_hidden_layers": _count_blocks(state_dict, r"visual\.transformer\.resblocks\.(\d+)\."),
        "num_attention_heads": max(1, width // head_width),
        "num_channels": num_channels,
        "patch_size": patch_size,
        "image_size": patch_size * grid,
        "pre_layer_norm": "visual.ln_pre.weight" in state_dict,
        **fields,
    }


def _resnet_config(state_dict: Mapping[str, torch.Tensor], head_width: int, **_of_transformers) -> dict[str, Any]:
    stem_width = _shape(state_dict, "visual.layer1.0.conv1.weight", 4)[0]
    grid = round((_shape(state_dict, "visual.attnpool.positional_embedding", 2)[0] - 1) ** 0.5)
    return {
        "model_type": "hfclip_resnet",
        "depths": [_count_blocks(state_dict, rf"visual\.layer{stage}\.(\d+)\.") for stage in (1, 2, 3, 4)],
        "stem_width": stem_width,
        "num_attention_heads": stem_width * 32 // head_width,
        "num_channels": _shape(state_dict, "visual.conv1.weight", 4)[1],
        "image_size": 32 * grid,
    }


def _is_vit(state_dict: Mapping[str, torch.Tensor]) -> bool:
    return any(name.startswith("visual.transformer.") for name in state_dict)


def _shape(state_dict: Mapping[str, torch.Tensor], name: str, dimensions: int) -> torch.Size:
    if name not in state_dict:
        raise UsageError(f"No CLIP checkpoint in OpenAI's names: {name!r} is missing.")
    if state_dict[name].ndim != dimensions:
        raise UsageError(f"{name!r}: found shape {tuple(state_dict[name].shape)}, expected {dimensions} dimensions.")
    return state_dict[name].shape


def _count_blocks(state_dict: Mapping[str, torch.Tensor], pattern: str) -> int:
    return len({match[1] for name in state_dict if (match := re.match(pattern, name))})

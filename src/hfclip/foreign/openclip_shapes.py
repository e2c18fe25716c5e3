"""OpenCLIP's settings of a checkpoint that comes without them, from shapes and by the rules of OpenCLIP's own models.

    names and shapes -> towers, widths, layers, context, vocabulary
    OpenCLIP's model_configs, as rules -> units a head, and CLIPA's and the worldwide models' poolings
    a name (--model ViT-B-32-quickgelu, or the run's own) -> the activation, which no shape tells

All of OpenCLIP's own ViT and ResNet architectures follow these rules. Towers of timm or transformers tell too little by
their shapes, so their settings are asked for.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch

from ..errors import UsageError


# ViT by OpenCLIP's letter: layers and width. Wider ones than L have heads of another size than 64.
VITS = {
    **{"S": (12, 384), "M": (12, 512), "B": (12, 768), "L": (24, 1024)},
    **{"H": (32, 1280), "g": (40, 1408), "bigG": (48, 1664), "e": (56, 1792)},
}
HEAD_WIDTHS = {1280: 80, 1408: 88, 1664: 104, 1792: 112}
PLUS = 896  # the width of ViT-B-*-plus
RESNETS = {
    "RN50": ([3, 4, 6, 3], 64),
    "RN101": ([3, 4, 23, 3], 64),
    "RN50x4": ([4, 6, 10, 6], 80),
    "RN50x16": ([6, 8, 18, 8], 96),
    "RN50x64": ([3, 15, 36, 10], 128),
}
NAME = re.compile(r"(?P<vit>ViT-(?P<letter>S|M|B|L|H|g|bigG|e)-(?P<patch>\d+)(?P<rest>-[\w-]+)?)|(?P<resnet>RN50x\d+|RN\d+)(-quickgelu)?")  # fmt: skip
CLIPA = {"no_ln_pre": True, "pool_type": "avg", "final_ln_after_pool": True}
# Vocabularies of OpenCLIP's own text towers beside OpenAI's: settings that belong to each.
VOCABULARIES = {
    32_000: {"hf_tokenizer_name": "bert-base-uncased", "pool_type": "last", "no_causal_mask": True},
    901_629: {"hf_tokenizer_name": "facebook/xlm-v-base", "pool_type": "eos", "eos_id": 2},
    250_100: {"hf_tokenizer_name": "google/mt5-base", "pool_type": "eos", "eos_id": 1},
}
ASK = "Pass --model FILE.json, the architecture as OpenCLIP keeps it in src/open_clip/model_configs (a name is enough where open_clip is installed)."  # fmt: skip


def model_name(text: str) -> str:
    """OpenCLIP's spelling of a model's name: "ViT-B/32" and "ViT-B-32" are one, and so are "@336px" and "-336"."""
    return text.replace("/", "-").replace("@", "-").removesuffix("px")


def name_of_run(scalars: Mapping[str, Any]) -> str | None:
    """The model's name in a training checkpoint, where its run kept OpenCLIP's default name."""
    match = re.search(r"model_(.+?)-lr_", str(scalars.get("name", "")))
    return match[1] if match and NAME.fullmatch(match[1]) else None


def settings_from_shapes(weights: Mapping[str, torch.Tensor], name: str | None) -> tuple[dict[str, Any], str]:
    """`model_cfg` of a checkpoint in OpenCLIP's names (on the meta device), and what was assumed, for the user.

    Args:
        name: of the architecture, if one was given; the weights must be its.
    """
    require_own_towers(weights)
    vision = vision_settings(weights)
    vocabulary, width = weights["token_embedding.weight"].shape
    text = {
        "width": width,
        "heads": max(1, width // 64),
        **VOCABULARIES.get(vocabulary, {}),
        **layer_scale(weights, ""),
    }
    if "cls_emb" in weights:
        text["embed_cls"] = True
    found = name_of_architecture(vision)
    if name is not None:
        require_named(name, found)
    is_quick = name is not None and name.endswith("-quickgelu")
    settings = {"embed_dim": weights["text_projection"].shape[1], "vision_cfg": vision, "text_cfg": text, "quick_gelu": is_quick}  # fmt: skip
    note = f"taken for {name or found} by its shapes, with {'QuickGELU' if is_quick else 'GELU'}, "
    note += f"{vision['head_width']} units a head in the image tower and 64 in the text tower, pooled "
    note += {"last": "at the last position", "eos": f"at id {text.get('eos_id')}"}.get(text.get("pool_type"), "at the highest id")  # fmt: skip
    note += ", which no shape tells."
    if name is None:
        note += (
            " A model with QuickGELU (trained as ...-quickgelu, or from OpenAI's weights) is converted with --model "
            "and a name in -quickgelu."
        )
    return settings, note


def require_own_towers(weights: Mapping[str, torch.Tensor]) -> None:
    """Raises UsageError unless both towers are OpenCLIP's own, whose shapes tell enough."""
    if any(name.startswith("visual.trunk.") for name in weights):
        raise UsageError(f"The image tower is one of timm, which its shapes do not tell. {ASK}")
    if any(name.startswith(("transformer.embeddings.", "transformer.encoder.")) for name in weights):
        raise UsageError(f"The text tower is one of transformers, which its shapes do not tell. {ASK}")
    needed = {"token_embedding.weight": 2, "text_projection": 2, "visual.conv1.weight": 4}
    wrong = [name for name, ndim in needed.items() if name not in weights or weights[name].ndim != ndim]
    if wrong:
        raise UsageError(f"The architecture cannot be told: {', '.join(wrong)} missing, or of unknown form. {ASK}")


def vision_settings(weights: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """`vision_cfg` of OpenCLIP's own image tower."""
    blocks = {}
    for name in weights:
        if match := re.match(r"visual\.(?:transformer\.resblocks|layer([1-4]))\.(\d+)\.", name):
            blocks.setdefault(match[1], set()).add(match[2])
    channels, _, patch, _ = weights["visual.conv1.weight"].shape
    if None not in blocks:
        layers = [len(blocks.get(stage, ())) for stage in "1234"]
        return {"layers": layers, "width": 2 * channels, "head_width": 64}
    vision = {"layers": len(blocks[None]), "width": channels, "patch_size": patch}
    vision["head_width"] = HEAD_WIDTHS.get(channels, 64)
    vision |= layer_scale(weights, "visual.")
    if "visual.attn_pool.query" in weights:
        vision["attentional_pool"] = True
    return vision if "visual.ln_pre.weight" in weights else vision | CLIPA


def layer_scale(weights: Mapping[str, torch.Tensor], tower: str) -> dict[str, float]:
    """The setting that gives the blocks of a tower LayerScale, if they have it."""
    return {"ls_init_value": 1e-4} if f"{tower}transformer.resblocks.0.ls_1.gamma" in weights else {}


def name_of_architecture(vision: dict[str, Any]) -> str:
    """OpenCLIP's name of an image tower, without resolution; its numbers where none is known."""
    layers, width = vision["layers"], vision["width"]
    if isinstance(layers, list):
        return next((name for name, numbers in RESNETS.items() if numbers == (layers, width)), f"a ResNet of {layers} blocks")  # fmt: skip
    patch, clipa = vision["patch_size"], "-CLIPA" if "no_ln_pre" in vision else ""
    if (layers, width) == (12, PLUS):
        return f"ViT-B-{patch}-plus{clipa}"
    letter = next((letter for letter, numbers in VITS.items() if numbers == (layers, width)), None)
    return f"ViT-{letter}-{patch}{clipa}" if letter else f"a ViT of {layers} layers of {width}"


def require_named(name: str, found: str) -> None:
    """Raises UsageError unless the weights, of the architecture `found`, are those that a name stands for."""
    match = NAME.fullmatch(name)
    if not match or match["resnet"] and match["resnet"] not in RESNETS:
        raise UsageError(
            f"--model {name}: no file, and no name of OpenCLIP's own ViT or ResNet, such as ViT-B-32 or RN50-quickgelu. {ASK}"
        )
    words = [word for word in ("plus", "CLIPA") if word in (match["rest"] or "").split("-")]
    expected = match["resnet"] or "-".join([f"ViT-{match['letter']}-{match['patch']}", *words])
    if found != expected:
        raise UsageError(f"--model {name}: its weights are {found}. Pass the model's own name, or leave --model out.")

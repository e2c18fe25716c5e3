"""What OpenCLIP's checkpoints compute, each tower by its source's own code: the source side of the proof.

    OpenCLIP's own towers     plain PyTorch, `reference`
    visual.trunk. ...         timm
    transformer. ...          transformers, as OpenCLIP calls it

Nothing that tells the result how to compute (`SIGLIP_VITS`, `TEXT_POOLERS`) takes part in it, so that a wrong entry shows
in the proof. Without timm a SigLIP's image tower is compared with plain PyTorch, and a note says what that leaves unproven.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import cpu_offload
from torch import Tensor
from transformers import AutoModel, PreTrainedConfig

from hfclip.foreign.checkpoints import View
from hfclip.foreign.towers import halves, has_timm, is_siglip, pooler_of, siglip_kind, timm_projection

from .reference import image_features, text_features
from .reference_settings import openclip_settings
from .reference_siglip import siglip_image_features


Tensors = Mapping[str, Tensor]
# (the source's tensors, pixel_values or input_ids) -> embeddings in float64, not normalised
Features = Callable[[Tensors, Tensor], Tensor]


def openclip_features(model_cfg: dict[str, Any], text_config: PreTrainedConfig) -> tuple[Callable, list[str]]:
    """`features` of a `Conversion`, and notes on what it leaves unproven; `text_config` is of a text tower of transformers."""
    vision, text = model_cfg["vision_cfg"], model_cfg["text_cfg"]
    of_image, of_text = openclip_settings(model_cfg)
    notes = []
    if not vision.get("timm_model_name"):
        image = partial(image_features, settings=of_image, dtype=torch.float64)
    elif not is_siglip(vision):
        image = partial(timm_features, vision["timm_model_name"], vision.get("timm_pool", "avg"))
    elif has_timm():
        image = partial(siglip_features_by_timm, vision["timm_model_name"])
    else:
        image, notes = siglip_features_by_table(vision["timm_model_name"])
    if text.get("hf_model_name"):
        words = partial(hugging_face_features, text_config, pooler_of(model_cfg, text_config))
    else:
        words = partial(text_features, settings=of_text, dtype=torch.float64)
    return partial(compute_features, image, words), notes


def compute_features(
    image: Features, words: Features, weights: Tensors, pixel_values: Tensor, input_ids: Tensor
) -> dict[str, Tensor]:
    of_image, of_text = halves(weights)
    return {"image_features": image(of_image, pixel_values), "text_features": words(of_text, input_ids)}


@torch.no_grad()
def siglip_features_by_timm(name: str, weights: Tensors, pixel_values: Tensor) -> Tensor:
    """What timm computes, one layer's weights in memory at a time."""
    import timm

    with torch.device("meta"):
        model = timm.create_model(name, num_classes=0, global_pool="map").double().eval()
    trunk = View(weights, {key.removeprefix("visual.trunk."): key for key in weights})
    return cpu_offload(model, torch.device("cpu"), state_dict=trunk)(pixel_values.double())


def siglip_features_by_table(name: str) -> tuple[Features, list[str]]:
    _, num_heads, activation = siglip_kind(name)
    note = (
        f"{num_heads} heads and the activation {activation} of {name} are taken from a table and were not proven, since "
        "timm is not installed. To prove them: pip install timm, and convert again."
    )
    features = partial(siglip_image_features, num_heads=num_heads, activation=activation, dtype=torch.float64)
    return features, [note]


@torch.no_grad()
def timm_features(name: str, pool: str, weights: Tensors, pixel_values: Tensor) -> Tensor:
    import timm

    trunk = {key.removeprefix("visual.trunk."): key for key in weights if key.startswith("visual.trunk.")}
    projection = timm_projection(weights)
    options = {"inference_mode": True} if any(".reparam_conv." in key for key in trunk) else {}
    has_head = projection is not None and projection.startswith("visual.head.")
    if has_head:
        model = timm.create_model(name, **options)
        model.reset_classifier(0, **({"global_pool": pool} if pool else {}))
    else:
        classes = len(weights[f"{projection}.weight"]) if projection else 0
        model = timm.create_model(name, num_classes=classes, global_pool=pool, **options)
    model.load_state_dict({key: weights[theirs] for key, theirs in trunk.items()})
    embeds = model.double().eval()(pixel_values.double())
    if projection == "visual.head.mlp.fc1":
        embeds = F.gelu(linear(weights, projection, embeds))
        projection = "visual.head.mlp.fc2"
    return linear(weights, projection, embeds) if has_head else embeds


def linear(weights: Tensors, layer: str, x: Tensor) -> Tensor:
    bias = weights[f"{layer}.bias"].double() if f"{layer}.bias" in weights else None
    return F.linear(x, weights[f"{layer}.weight"].double(), bias)


@torch.no_grad()
def hugging_face_features(config: PreTrainedConfig, pooler: str, weights: Tensors, input_ids: Tensor) -> Tensor:
    if config.is_encoder_decoder:
        model = AutoModel.from_config(config).encoder
    else:
        model = AutoModel.from_config(config, add_pooling_layer=pooler == "cls_pooler")
    model = model.double().eval()
    inner = {name.removeprefix("transformer."): name for name in weights if name.startswith("transformer.")}
    model.load_state_dict({name: weights[theirs] for name, theirs in inner.items()})
    mask = (input_ids != config.pad_token_id).long()
    outputs = model(input_ids=input_ids, attention_mask=mask)
    if pooler == "mean_pooler":
        # (batch, seq, width) -> (batch, width)
        pooled = (outputs.last_hidden_state * mask[..., None]).sum(dim=1) / mask.sum(dim=1, keepdim=True)
    else:
        own = outputs.get("pooler_output") if pooler == "cls_pooler" else None
        pooled = outputs.last_hidden_state[:, 0] if own is None else own
    if "proj.0.weight" in weights:
        return linear(weights, "proj.2", F.gelu(linear(weights, "proj.0", pooled)))
    return linear(weights, "proj", pooled) if "proj.weight" in weights else pooled

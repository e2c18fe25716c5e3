"""From a tower's pooled output into the joint space: how wide that output is, and the kinds of projections.

    linear       a matrix, as in the paper
    linear_bias  a matrix and a bias
    mlp          Linear -> GELU -> Linear without biases, (width + projection_dim) // 2 between them
    mlp_bias     the same with a bias in the first layer, 2 * projection_dim between them
    identity     nothing: the tower ends in the joint space

The two perceptrons are OpenCLIP's, `hf_proj_type: mlp` and `timm_proj: mlp`.
"""

from collections import OrderedDict
from typing import Literal

from torch import nn

from .layers_hfclip import with_init_std


ProjectionType = Literal["linear", "linear_bias", "mlp", "mlp_bias", "identity"]


def tower_width(config, rule: str = "pooler") -> int:
    """Size of a tower's pooled output."""
    if getattr(config, "pooler_is_projected", False):
        return config.projection_dim
    if rule == "pooler" and getattr(config, "projection_size", None):
        return config.projection_size  # SigLIP's text towers end in a linear layer
    if rule == "pooler" and getattr(config, "project_dim", None):
        return config.project_dim  # so does AltCLIP's
    width = getattr(config, "hidden_size", None) or (getattr(config, "hidden_sizes", None) or [None])[-1]
    if width is None:
        raise ValueError(
            f"Cannot tell the output size of a `{config.model_type}` tower: its config has neither `hidden_size` nor "
            "`hidden_sizes`. Choose another tower."
        )
    return width


def projection(width: int, projection_dim: int, kind: ProjectionType = "linear") -> nn.Module:
    """The map from a tower's pooled output into the joint space."""
    if kind == "identity":
        return nn.Identity()
    if kind in ("linear", "linear_bias"):
        return _linear(width, projection_dim, bias=kind == "linear_bias")
    hidden = 2 * projection_dim if kind == "mlp_bias" else (width + projection_dim) // 2
    layers = {"fc1": _linear(width, hidden, bias=kind == "mlp_bias"), "act": nn.GELU()}
    return nn.Sequential(OrderedDict(layers, fc2=_linear(hidden, projection_dim, bias=False)))


def _linear(width: int, size: int, bias: bool) -> nn.Linear:
    return with_init_std(nn.Linear(width, size, bias=bias), width**-0.5)


def projection_of(config, modality: str) -> nn.Module:
    """The projection of a dual encoder's `text` or `vision` tower, by its config."""
    tower, rule = getattr(config, f"{modality}_config"), getattr(config, f"{modality}_pooling")
    if getattr(tower, "pooler_is_projected", False):
        return nn.Identity()
    kind = getattr(config, f"{modality}_projection_type")
    return projection(tower_width(tower, rule), config.projection_dim, kind)


def require_projection(config, modality: str) -> None:
    """Raises ValueError unless the `text` or `vision` tower can have the projection that the config asks for."""
    tower, rule = getattr(config, f"{modality}_config"), getattr(config, f"{modality}_pooling")
    field, kind = f"{modality}_projection_type", getattr(config, f"{modality}_projection_type")
    if getattr(tower, "pooler_is_projected", False):
        if kind not in ("linear", "identity"):
            raise ValueError(
                f"found {field}={kind!r}, expected none: this tower ends in the joint space. Leave it out."
            )
    elif kind == "identity" and (width := tower_width(tower, rule)) != config.projection_dim:
        raise ValueError(
            f"found {field}='identity' with a tower of width {width} and projection_dim={config.projection_dim}, expected "
            "the same, since nothing comes between. Set projection_dim to the width, or choose 'linear'."
        )

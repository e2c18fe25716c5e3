"""timm's SigLIP image tower in plain PyTorch, straight from a checkpoint's own tensors; see `reference`.

    patches + positions -> blocks -> LayerNorm -> one learned query attends to all patches -> MLP -> features

There is no class token and no projection: the features are as wide as the tower.
"""

import itertools
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from .reference import ACTIVATIONS, attend


EPSILON = 1e-6  # timm's LayerNorm in vision transformers


@torch.no_grad()
def siglip_image_features(
    tensors: Mapping[str, Tensor],
    pixel_values: Tensor,
    num_heads: int,
    activation: str,
    *,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Embeddings of images (batch, width), not normalised, from the tensors `visual.trunk. ...`.

    Args:
        pixel_values: (batch, channels, height, width) of the size that the position embeddings were made for.
        num_heads: in the blocks and in the attention pool.
        activation: `gelu` or `gelu_tanh`.
    """

    def read(name: str) -> Tensor:
        return tensors[f"visual.trunk.{name}"].to(dtype)

    def linear(name: str, x: Tensor) -> Tensor:
        return F.linear(x, read(f"{name}.weight"), read(f"{name}.bias"))

    def norm(name: str, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], read(f"{name}.weight"), read(f"{name}.bias"), EPSILON)

    def mlp(name: str, x: Tensor) -> Tensor:
        return linear(f"{name}.fc2", ACTIVATIONS[activation](linear(f"{name}.fc1", x)))

    kernel = read("patch_embed.proj.weight")
    x = F.conv2d(pixel_values.to(dtype), kernel, read("patch_embed.proj.bias"), stride=kernel.shape[2:])
    # (batch, width, rows, columns) -> (batch, patches, width)
    x = x.flatten(2).transpose(1, 2) + read("pos_embed")
    for number in itertools.count():
        block = f"blocks.{number}"
        if f"visual.trunk.{block}.norm1.weight" not in tensors:
            break
        # (batch, patches, 3 * width) -> three times (batch, patches, width)
        qkv = linear(f"{block}.attn.qkv", norm(f"{block}.norm1", x)).chunk(3, dim=-1)
        x = x + linear(f"{block}.attn.proj", attend(*qkv, num_heads))
        x = x + mlp(f"{block}.mlp", norm(f"{block}.norm2", x))
    x = norm("norm", x)
    query = linear("attn_pool.q", read("attn_pool.latent")).expand(len(x), -1, -1)
    x = linear("attn_pool.proj", attend(query, *linear("attn_pool.kv", x).chunk(2, dim=-1), num_heads))
    x = x + mlp("attn_pool.mlp", norm("attn_pool.norm", x))
    return x[:, 0]

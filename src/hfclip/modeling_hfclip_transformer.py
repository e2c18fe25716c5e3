"""Transformer blocks, the base of all models, and the ViT, with the parameter names of transformers' `CLIPModel`.

    pixel_values -> patches, class token, positions -> LayerNorm -> blocks -> class token -> LayerNorm -> pooled

Departures from transformers' `CLIPModel`, both exact to float tolerance:

- Where only the embedding is asked for, the last ViT block computes the class token alone.
- Images of any size that the patch divides are served by interpolating the positions.
"""

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_hfclip import HFCLIPConfig, HFCLIPTextConfig, HFCLIPVisionConfig
from .layers_hfclip import check_pixel_values, initialize_leaf, with_init_std
from .packing_hfclip import PackedTexts


# ---------------------------------------------------------------------------------------------------------------------
# Transformer blocks, shared by both towers
# ---------------------------------------------------------------------------------------------------------------------


def eager_attention_forward(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    """Attention written out; the only implementation that returns its weights."""
    weights = torch.matmul(query, key.transpose(-1, -2)) * scaling
    if attention_mask is not None:
        weights = weights + attention_mask
    weights = F.softmax(weights, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = F.dropout(weights, p=dropout, training=module.training)
    # (batch, heads, queries, head_dim) -> (batch, queries, heads, head_dim)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), weights


class HFCLIPAttention(nn.Module):
    def __init__(self, config: HFCLIPVisionConfig | HFCLIPTextConfig):
        super().__init__()
        self.config = config
        self.num_heads = config.num_attention_heads
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.num_key_value_groups = 1  # attention implementations ask for it
        self.is_causal = False  # the text tower says so per call
        width, depth = config.hidden_size, config.num_hidden_layers
        self.k_proj = with_init_std(nn.Linear(width, width), width**-0.5)
        self.v_proj = with_init_std(nn.Linear(width, width), width**-0.5)
        self.q_proj = with_init_std(nn.Linear(width, width), width**-0.5)
        self.out_proj = with_init_std(nn.Linear(width, width), (2 * depth * width) ** -0.5)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        *,
        attention: Callable,
        packed: PackedTexts | None = None,
        queries: slice | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(batch, seq, hidden), or (num_tokens, hidden) with `packed`. `queries`: only these positions attend."""
        query = self.q_proj(hidden_states if queries is None else hidden_states[:, queries])
        key = self.k_proj(hidden_states)
        value = self.v_proj(hidden_states)
        if packed is not None:
            query, key, value = packed.pad(query), packed.pad(key), packed.pad(value)
        # (batch, seq, hidden) -> (batch, heads, seq, head_dim)
        heads = (query.shape[0], -1, self.num_heads, self.head_dim)
        query = query.view(heads).transpose(1, 2)
        key = key.view(heads).transpose(1, 2)
        value = value.view(heads).transpose(1, 2)
        attended, weights = attention(
            self,
            query,
            key,
            value,
            attention_mask,
            scaling=self.scaling,
            dropout=self.config.attention_dropout if self.training else 0.0,
            **kwargs,
        )
        # (batch, seq, heads, head_dim) -> (batch, seq, hidden)
        attended = attended.flatten(-2)
        if packed is not None:
            attended = packed.pack(attended)
        return self.out_proj(attended), weights


class HFCLIPMLP(nn.Module):
    def __init__(self, config: HFCLIPVisionConfig | HFCLIPTextConfig):
        super().__init__()
        self.config = config
        self.activation_fn = ACT2FN[config.hidden_act]
        width, depth = config.hidden_size, config.num_hidden_layers
        self.fc1 = with_init_std(nn.Linear(width, config.intermediate_size), (2 * width) ** -0.5)
        self.fc2 = with_init_std(nn.Linear(config.intermediate_size, width), (2 * depth * width) ** -0.5)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.activation_fn(self.fc1(hidden_states)))


class HFCLIPLayerScale(nn.Module):
    """A gain for each channel of what a block adds (CaiT, arXiv 2103.17239)."""

    def __init__(self, config: HFCLIPVisionConfig | HFCLIPTextConfig):
        super().__init__()
        self.initial_gain = config.layer_scale_init_value
        self.gamma = nn.Parameter(torch.empty(config.hidden_size))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states * self.gamma


class HFCLIPEncoderLayer(GradientCheckpointingLayer):
    def __init__(self, config: HFCLIPVisionConfig | HFCLIPTextConfig):
        super().__init__()
        self.self_attn = HFCLIPAttention(config)
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = HFCLIPMLP(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        has_scale = config.layer_scale_init_value is not None
        self.layer_scale1 = HFCLIPLayerScale(config) if has_scale else nn.Identity()
        self.layer_scale2 = HFCLIPLayerScale(config) if has_scale else nn.Identity()

    def forward(
        self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None, **kwargs
    ) -> torch.Tensor:
        queries = kwargs.get("queries")
        residual = hidden_states if queries is None else hidden_states[:, queries]
        attended, _ = self.self_attn(self.layer_norm1(hidden_states), attention_mask, **kwargs)
        hidden_states = residual + self.layer_scale1(attended)
        return hidden_states + self.layer_scale2(self.mlp(self.layer_norm2(hidden_states)))


class HFCLIPEncoder(nn.Module):
    def __init__(self, config: HFCLIPVisionConfig | HFCLIPTextConfig):
        super().__init__()
        self.config = config
        self.layers = nn.ModuleList([HFCLIPEncoderLayer(config) for _ in range(config.num_hidden_layers)])
        self.gradient_checkpointing = False

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        queries: slice | None = None,
        **kwargs,
    ) -> torch.Tensor:
        """`queries`: the last block computes only these positions, all that the caller will read."""
        implementation = self.config._attn_implementation
        kwargs["attention"] = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)
        *layers, last = self.layers
        for layer in layers:
            hidden_states = layer(hidden_states, attention_mask, **kwargs)
        return last(hidden_states, attention_mask, queries=queries, **kwargs)


class HFCLIPPreTrainedModel(PreTrainedModel):
    config_class = HFCLIPConfig
    config: HFCLIPConfig
    base_model_prefix = "hfclip"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _auto_class = "AutoModel"  # saved folders carry this code, so that they load where hfclip is not installed
    _no_split_modules = ["HFCLIPTextEmbeddings", "HFCLIPVisionEmbeddings", "HFCLIPEncoderLayer"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_record_outputs = {"hidden_states": HFCLIPEncoderLayer, "attentions": HFCLIPAttention}
    # Buffers that transformers before version 5 wrote into CLIP checkpoints.
    _keys_to_ignore_on_load_unexpected = [r"position_ids"]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """OpenAI's initialisation (`CLIP.initialize_parameters`), for both towers.

        transformers' CLIP swaps the standard deviations of the query/key/value and the output projections.
        """
        if isinstance(module, HFCLIPLayerScale):
            init.constant_(module.gamma, module.initial_gain)
        else:
            initialize_leaf(module, self.config.initializer_factor)


# ---------------------------------------------------------------------------------------------------------------------
# Image tower
# ---------------------------------------------------------------------------------------------------------------------


class HFCLIPVisionEmbeddings(nn.Module):
    """Patches, class token and positions."""

    def __init__(self, config: HFCLIPVisionConfig):
        super().__init__()
        self.config = config
        self.grid_size = config.image_size // config.patch_size
        self.class_embedding = nn.Parameter(torch.empty(config.hidden_size))
        self.init_std = config.hidden_size**-0.5
        patches = nn.Conv2d(config.num_channels, config.hidden_size, config.patch_size, config.patch_size, bias=False)
        positions = nn.Embedding(1 + self.grid_size**2, config.hidden_size)
        self.patch_embedding = with_init_std(patches, (config.num_channels * config.patch_size**2) ** -0.5)
        self.position_embedding = with_init_std(positions, config.hidden_size**-0.5)

    def positions(self, height: int, width: int) -> torch.Tensor:
        """(1 + height * width, hidden) for a grid of patches: the trained grid, or it bicubically interpolated."""
        # The module is called, its weight not read: offloaded weights arrive when their module is called.
        trained = self.position_embedding(torch.arange(1 + self.grid_size**2, device=self.class_embedding.device))
        if height == width == self.grid_size:
            return trained
        # (grid * grid, hidden) -> (1, hidden, grid, grid) -> (1, hidden, height, width) -> (height * width, hidden)
        grid = trained[1:].T.reshape(1, -1, self.grid_size, self.grid_size)
        grid = F.interpolate(grid, size=(height, width), mode="bicubic", align_corners=False)
        return torch.cat([trained[:1], grid.flatten(2)[0].T])

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        # (batch, channels, height, width) -> (batch, hidden, rows, columns)
        patches = self.patch_embedding(pixel_values.to(self.patch_embedding.weight.dtype))
        positions = self.positions(*patches.shape[-2:])
        # (batch, hidden, rows, columns) -> (batch, rows * columns, hidden) -> (batch, 1 + rows * columns, hidden)
        patches = patches.flatten(2).transpose(1, 2)
        class_token = self.class_embedding.expand(patches.shape[0], 1, -1)  # len() would fix the batch of an export
        embeddings = torch.cat([class_token, patches], dim=1) + positions
        if self.training and self.config.patch_dropout:
            embeddings = self.drop_patches(embeddings)
        return embeddings

    def drop_patches(self, embeddings: torch.Tensor) -> torch.Tensor:
        """Keeps the class token and a random share of the patches of each image (FLIP, arXiv 2212.00794)."""
        batch_size, length, hidden = embeddings.shape
        num_kept = max(1, round((length - 1) * (1 - self.config.patch_dropout)))
        noise = torch.rand(batch_size, length - 1, device=embeddings.device)
        kept = 1 + noise.argsort(dim=1)[:, :num_kept]
        kept = torch.cat([kept.new_zeros(batch_size, 1), kept], dim=1)
        # (batch, length, hidden) -> (batch, 1 + num_kept, hidden)
        return embeddings.gather(1, kept[..., None].expand(-1, -1, hidden))


class HFCLIPAttentionPool(nn.Module):
    """Attention of one learned query to all positions, CoCa's of the contrastive loss (arXiv 2205.01917)."""

    def __init__(self, config: HFCLIPVisionConfig):
        super().__init__()
        width, size, self.num_heads = config.hidden_size, config.projection_dim, config.pooling_heads
        self.query = nn.Parameter(torch.empty(1, size))
        self.init_std = size**-0.5
        self.query_norm = nn.LayerNorm(size, eps=config.layer_norm_eps)
        self.key_norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.q_proj = with_init_std(nn.Linear(size, size), size**-0.5)
        self.k_proj = with_init_std(nn.Linear(width, size), width**-0.5)
        self.v_proj = with_init_std(nn.Linear(width, size), width**-0.5)
        self.out_proj = with_init_std(nn.Linear(size, size), size**-0.5)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(batch, seq, hidden) -> (batch, projection_dim)"""
        keys = self.key_norm(hidden_states)
        query = self.q_proj(self.query_norm(self.query)).expand(hidden_states.shape[0], 1, -1)
        # (batch, seq, size) -> (batch, heads, seq, size / heads)
        parts = (x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for x in (query, self.k_proj(keys), self.v_proj(keys)))  # fmt: skip
        return self.out_proj(F.scaled_dot_product_attention(*parts).flatten(1))


class HFCLIPVisionModel(HFCLIPPreTrainedModel):
    """ViT image tower. Its pooled output is the class token after the last LayerNorm, not yet projected."""

    config_class = HFCLIPVisionConfig
    config: HFCLIPVisionConfig
    base_model_prefix = "vision_model"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    _input_embed_layer = "patch_embedding"
    _keys_to_ignore_on_load_unexpected = [r"position_ids", r"^text_model\.", r"_projection\.", r"^logit_"]

    def __init__(self, config: HFCLIPVisionConfig):
        super().__init__(config)
        self.embeddings = HFCLIPVisionEmbeddings(config)
        # The misspelling is part of every CLIP checkpoint on the Hub.
        self.pre_layrnorm = nn.Identity()
        if config.pre_layer_norm:
            self.pre_layrnorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.encoder = HFCLIPEncoder(config)
        self.attention_pool = HFCLIPAttentionPool(config) if config.pooling == "attention" else None
        self.post_layernorm = nn.LayerNorm(config.projection_size or config.hidden_size, eps=config.layer_norm_eps)
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        interpolate_pos_encoding: bool | None = None,
        pooled_only: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPooling:
        """Hidden states and the pooled output of images.

        Args:
            pixel_values: (batch, channels, height, width), normalised; height and width multiples of the patch. Other
                sizes than the trained one are served by interpolating the positions, unless
                `interpolate_pos_encoding` is False.
            pooled_only: compute nothing but the pooled output; `last_hidden_state` is then None.

        Returns:
            `last_hidden_state` (batch, 1 + patches, hidden), before the last LayerNorm;
            `pooler_output` (batch, hidden), not normalised.

        Raises:
            ValueError: wrong shape, or a size that the patch does not divide.
        """
        check_pixel_values(pixel_values, self.config, interpolate_pos_encoding)
        hidden_states = self.pre_layrnorm(self.embeddings(pixel_values))
        queries = slice(1) if pooled_only and self.config.pooling == "cls" else None
        hidden_states = self.encoder(hidden_states, queries=queries, **kwargs)
        return BaseModelOutputWithPooling(
            last_hidden_state=None if pooled_only else hidden_states, pooler_output=self.pool(hidden_states)
        )

    def pool(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(batch, 1 + patches, hidden) -> (batch, pooled), after the last LayerNorm, by the config's `pooling`."""
        if self.config.pooling == "cls":
            return self.post_layernorm(hidden_states[:, 0])
        if self.config.pooling == "attention":
            return self.post_layernorm(self.attention_pool(hidden_states))
        if self.config.pooling == "norm_of_mean":
            return self.post_layernorm(hidden_states[:, 1:].mean(dim=1))
        return self.post_layernorm(hidden_states[:, 1:]).mean(dim=1)

    def features_for_classification(self, outputs: BaseModelOutputWithPooling) -> torch.Tensor:
        """(batch, hidden_size): the mean over the patches, what transformers' CLIP classifier reads."""
        return outputs.last_hidden_state[:, 1:].mean(dim=1)

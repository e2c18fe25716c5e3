"""The ViT and text towers, the dual encoder and its heads, with the parameter names of transformers' `CLIPModel`.

    pixel_values -> image tower -> pooled -> visual_projection -> unit length -> image_embeds
    input_ids    -> text tower  -> pooled -> text_projection   -> unit length -> text_embeds
    logits_per_image = exp(logit_scale) * image_embeds @ text_embeds.T (+ logit_bias)

Departures from transformers' `CLIPModel`, all exact to float tolerance:

- Text is packed. In a causal tower nothing behind the end-of-text token can change the embedding, so a batch of
  captions is computed as one flat list of its real tokens; only attention sees a padded form.
- Where only the embedding is asked for, the last ViT block computes the class token alone.
- In inference, label texts that repeat from call to call (the zero-shot pipeline) are embedded once.
- Images of any size that the patch divides are served by interpolating the positions.
"""

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoModel, PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPooling, ImageClassifierOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import ModelOutput
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_hfclip import (
    HFCLIPBagOfWordsConfig,
    HFCLIPConfig,
    HFCLIPTextConfig,
    HFCLIPVisionConfig,
)
from .modeling_hfclip_resnet import HFCLIPResNetModel, check_pixel_values, drawn_with, initialize_leaf


@dataclass
class HFCLIPOutput(ModelOutput):
    """What `HFCLIPModel` returns; names as in transformers' `CLIPOutput`.

    loss: scalar, symmetric contrastive (or sigmoid) loss of this batch, if `return_loss`.
    logits_per_image: (num_images, num_texts), scaled cosine similarities (plus the logit bias, if there is one).
    logits_per_text: (num_texts, num_images), its transpose.
    text_embeds: (num_texts, projection_dim), unit length.
    image_embeds: (num_images, projection_dim), unit length.
    text_model_output, vision_model_output: the towers' outputs, before the projections.
    """

    loss: torch.FloatTensor | None = None
    logits_per_image: torch.FloatTensor | None = None
    logits_per_text: torch.FloatTensor | None = None
    text_embeds: torch.FloatTensor | None = None
    image_embeds: torch.FloatTensor | None = None
    text_model_output: BaseModelOutputWithPooling | None = None
    vision_model_output: BaseModelOutputWithPooling | None = None

    def to_tuple(self) -> tuple:
        return tuple(v.to_tuple() if isinstance(v, ModelOutput) else v for v in self.values())


@dataclass
class HFCLIPTextModelOutput(ModelOutput):
    """`text_embeds`: (batch, projection_dim), projected, NOT normalised (as in transformers' CLIP)."""

    text_embeds: torch.FloatTensor | None = None
    last_hidden_state: torch.FloatTensor | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None


@dataclass
class HFCLIPVisionModelOutput(ModelOutput):
    """`image_embeds`: (batch, projection_dim), projected, NOT normalised (as in transformers' CLIP)."""

    image_embeds: torch.FloatTensor | None = None
    last_hidden_state: torch.FloatTensor | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None


# ---------------------------------------------------------------------------------------------------------------------
# Which tokens of a text count
# ---------------------------------------------------------------------------------------------------------------------


def pooled_positions(input_ids: torch.Tensor, attention_mask: torch.Tensor | None, eos_token_id: int) -> torch.Tensor:
    """(batch,) position that each text is pooled at: its first end-of-text token.

    A text without one (cut by hand) is pooled at its last real token, if an attention mask says which that is.

    Raises:
        ValueError: no end-of-text token and no attention mask; pooling position 0 would be silently wrong
            (open_clip issue 1151).
    """
    is_eos = input_ids == eos_token_id
    if attention_mask is not None:
        is_eos = is_eos & attention_mask.bool()
    first_eos = is_eos.int().argmax(dim=-1)
    if attention_mask is not None:
        order = torch.arange(input_ids.shape[1], device=input_ids.device)
        last_real = (attention_mask.bool() * order).argmax(dim=-1)
        return torch.where(is_eos.any(dim=-1), first_eos, last_real)
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return first_eos
    missing = (~is_eos.any(dim=-1)).nonzero().flatten().tolist()
    if missing:
        raise ValueError(
            f"input_ids: found no end-of-text token {eos_token_id} in row(s) {missing[:5]}, expected one in each. "
            "Let the tokenizer truncate (it keeps that token), or pass the attention_mask."
        )
    return first_eos


@dataclass
class PackedTexts:
    """Where the real tokens of a padded batch lie: flat (num_tokens, ...) tensors <-> (batch, length, ...) tensors."""

    index: torch.Tensor  # (num_tokens,) position of each real token in the flattened (batch * length) layout
    positions: torch.Tensor  # (num_tokens,) position of each real token in its text
    last: torch.Tensor  # (batch,) index of each text's pooled token in the flat layout
    batch_size: int
    length: int

    @classmethod
    @torch.compiler.disable
    def of(cls, attention_mask: torch.Tensor | None, pooled: torch.Tensor) -> "PackedTexts | None":
        """The tokens up to the pooled one; None if padding lies among them, which only a full mask can express."""
        order = torch.arange(int(pooled.max()) + 1, device=pooled.device)
        keep = order <= pooled[:, None]
        if attention_mask is not None and not bool(attention_mask[:, : len(order)].bool()[keep].all()):
            return None
        index = keep.flatten().nonzero().flatten()
        last = (pooled + 1).cumsum(dim=0) - 1
        return cls(index, index % len(order), last, len(keep), len(order))

    def pack(self, padded: torch.Tensor) -> torch.Tensor:
        """(batch, at least length, ...) -> (num_tokens, ...)"""
        return padded[:, : self.length].flatten(0, 1).index_select(0, self.index)

    def pad(self, packed: torch.Tensor) -> torch.Tensor:
        """(num_tokens, hidden) -> (batch, length, hidden), zeros in the places without a token"""
        padded = packed.new_zeros(self.batch_size * self.length, packed.shape[-1])
        return padded.index_copy(0, self.index, packed).view(self.batch_size, self.length, -1)


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
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.is_causal = False  # the text tower says so per call
        width, depth = config.hidden_size, config.num_hidden_layers
        self.k_proj = drawn_with(width**-0.5, nn.Linear(width, width))
        self.v_proj = drawn_with(width**-0.5, nn.Linear(width, width))
        self.q_proj = drawn_with(width**-0.5, nn.Linear(width, width))
        self.out_proj = drawn_with((2 * depth * width) ** -0.5, nn.Linear(width, width))

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        packed: PackedTexts | None = None,
        num_queries: int | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(batch, seq, hidden), or (num_tokens, hidden) with `packed`. `num_queries`: only the first ones attend."""
        query = self.q_proj(hidden_states[:, :num_queries])
        key = self.k_proj(hidden_states)
        value = self.v_proj(hidden_states)
        if packed is not None:
            query, key, value = packed.pad(query), packed.pad(key), packed.pad(value)
        # (batch, seq, hidden) -> (batch, heads, seq, head_dim)
        query, key, value = (x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for x in (query, key, value))
        attention = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
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
        self.fc1 = drawn_with((2 * width) ** -0.5, nn.Linear(width, config.intermediate_size))
        self.fc2 = drawn_with((2 * depth * width) ** -0.5, nn.Linear(config.intermediate_size, width))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.activation_fn(self.fc1(hidden_states)))


class HFCLIPEncoderLayer(GradientCheckpointingLayer):
    def __init__(self, config: HFCLIPVisionConfig | HFCLIPTextConfig):
        super().__init__()
        self.self_attn = HFCLIPAttention(config)
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = HFCLIPMLP(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(
        self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None, **kwargs
    ) -> torch.Tensor:
        residual = hidden_states[:, : kwargs.get("num_queries")]
        attended, _ = self.self_attn(self.layer_norm1(hidden_states), attention_mask, **kwargs)
        hidden_states = residual + attended
        return hidden_states + self.mlp(self.layer_norm2(hidden_states))


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
        num_queries: int | None = None,
        **kwargs,
    ) -> torch.Tensor:
        """`num_queries`: the last block computes only that many positions, all that the caller will read."""
        for layer in self.layers[:-1]:
            hidden_states = layer(hidden_states, attention_mask, **kwargs)
        return self.layers[-1](hidden_states, attention_mask, num_queries=num_queries, **kwargs)


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
        factor = self.config.initializer_factor
        if isinstance(module, HFCLIPVisionEmbeddings):
            init.normal_(module.class_embedding, std=module.config.hidden_size**-0.5 * factor)
        elif isinstance(module, HFCLIPModel):
            init.constant_(module.logit_scale, self.config.logit_scale_init_value)
            if module.logit_bias is not None:
                init.constant_(module.logit_bias, self.config.logit_bias_init_value)
        else:
            initialize_leaf(module, factor)


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
        patches = nn.Conv2d(config.num_channels, config.hidden_size, config.patch_size, config.patch_size, bias=False)
        positions = nn.Embedding(1 + self.grid_size**2, config.hidden_size)
        self.patch_embedding = drawn_with((config.num_channels * config.patch_size**2) ** -0.5, patches)
        self.position_embedding = drawn_with(config.hidden_size**-0.5, positions)

    def positions(self, height: int, width: int) -> torch.Tensor:
        """(1 + height * width, hidden) for a grid of patches: the trained grid, or it bicubically interpolated."""
        trained = self.position_embedding.weight
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
        class_token = self.class_embedding.expand(len(patches), 1, -1)
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


class HFCLIPVisionModel(HFCLIPPreTrainedModel):
    """ViT image tower. Its pooled output is the class token behind the last LayerNorm, not yet projected."""

    config_class = HFCLIPVisionConfig
    config: HFCLIPVisionConfig
    base_model_prefix = "vision_model"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    _input_embed_layer = "patch_embedding"

    def __init__(self, config: HFCLIPVisionConfig):
        super().__init__(config)
        self.embeddings = HFCLIPVisionEmbeddings(config)
        # The misspelling is part of every CLIP checkpoint on the Hub.
        self.pre_layrnorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.encoder = HFCLIPEncoder(config)
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        interpolate_pos_encoding: bool | None = None,
        pooled_only: bool = False,
        **kwargs,
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
        check_pixel_values(pixel_values, self.config, self.config.patch_size, interpolate_pos_encoding)
        hidden_states = self.pre_layrnorm(self.embeddings(pixel_values))
        hidden_states = self.encoder(hidden_states, num_queries=1 if pooled_only else None, **kwargs)
        return BaseModelOutputWithPooling(
            last_hidden_state=None if pooled_only else hidden_states,
            pooler_output=self.post_layernorm(hidden_states[:, 0]),
        )

    def features_for_classification(self, outputs: BaseModelOutputWithPooling) -> torch.Tensor:
        """(batch, hidden_size): the mean over the patches, what transformers' CLIP classifier reads."""
        return outputs.last_hidden_state[:, 1:].mean(dim=1)


# ---------------------------------------------------------------------------------------------------------------------
# Text towers
# ---------------------------------------------------------------------------------------------------------------------


class HFCLIPTextEmbeddings(nn.Module):
    """Tokens and learned positions."""

    def __init__(self, config: HFCLIPTextConfig):
        super().__init__()
        self.token_embedding = drawn_with(0.02, nn.Embedding(config.vocab_size, config.hidden_size))
        positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.position_embedding = drawn_with(0.01, positions)

    def forward(self, input_ids: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        return self.token_embedding(input_ids) + self.position_embedding(position_ids)


def check_input_ids(input_ids: torch.Tensor | None, max_length: int) -> None:
    """Raises ValueError for ids that are missing, not two-dimensional or longer than the context."""
    if input_ids is None:
        raise ValueError("You have to specify input_ids, a (batch, length) tensor of token ids.")
    if input_ids.dim() != 2:
        raise ValueError(f"input_ids: found shape {tuple(input_ids.shape)}, expected (batch, length).")
    if input_ids.shape[1] > max_length:
        raise ValueError(
            f"Sequence length must be at most max_position_embeddings: found {input_ids.shape[1]} tokens, expected at "
            f"most {max_length}. Truncate with the tokenizer, which keeps the end-of-text token."
        )


class HFCLIPTextModel(HFCLIPPreTrainedModel):
    """Causal text transformer. Its pooled output is the first end-of-text token behind the last LayerNorm."""

    config_class = HFCLIPTextConfig
    config: HFCLIPTextConfig
    base_model_prefix = "text_model"
    input_modalities = ("text",)
    _input_embed_layer = "token_embedding"

    def __init__(self, config: HFCLIPTextConfig):
        super().__init__(config)
        self.embeddings = HFCLIPTextEmbeddings(config)
        self.encoder = HFCLIPEncoder(config)
        self.final_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        skip_padding: bool = False,
        **kwargs,
    ) -> BaseModelOutputWithPooling:
        """Hidden states and the pooled output of texts.

        Args:
            input_ids: (batch, length), each row with an end-of-text token.
            attention_mask: (batch, length), 1 for real tokens. Not needed for texts padded on the right.
            position_ids: (batch, length) or (1, length), default 0, 1, 2, ...
            skip_padding: compute nothing for the tokens behind each first end-of-text token. The pooled output is
                the same; `last_hidden_state` is zero there. Ignored where all positions are asked for
                (`output_hidden_states`, `output_attentions`), for `position_ids`, and for padding in front.

        Returns:
            `last_hidden_state` (batch, length, hidden), behind the last LayerNorm;
            `pooler_output` (batch, hidden), not projected, not normalised.

        Raises:
            ValueError: ids missing, longer than the context, or without end-of-text token and attention mask.
        """
        check_input_ids(input_ids, self.config.max_position_embeddings)
        pooled = pooled_positions(input_ids, attention_mask, self.config.eos_token_id)
        packed = None
        if skip_padding and position_ids is None and not torch.jit.is_tracing():
            if not (kwargs.get("output_hidden_states") or kwargs.get("output_attentions")):
                packed = PackedTexts.of(attention_mask, pooled)
        if packed is not None:
            return self._forward_packed(input_ids, packed, **kwargs)

        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
        hidden_states = self.embeddings(input_ids, position_ids)
        causal_mask = create_causal_mask(self.config, hidden_states, attention_mask, past_key_values=None)
        hidden_states = self.encoder(hidden_states, causal_mask, **{**kwargs, "is_causal": True})
        hidden_states = self.final_layer_norm(hidden_states)
        rows = torch.arange(len(pooled), device=pooled.device)
        return BaseModelOutputWithPooling(last_hidden_state=hidden_states, pooler_output=hidden_states[rows, pooled])

    def _forward_packed(self, input_ids: torch.Tensor, packed: PackedTexts, **kwargs) -> BaseModelOutputWithPooling:
        hidden_states = self.embeddings(packed.pack(input_ids), packed.positions)
        layout = hidden_states.new_empty(packed.batch_size, packed.length, 1)
        causal_mask = create_causal_mask(self.config, layout, None, past_key_values=None)
        hidden_states = self.encoder(hidden_states, causal_mask, **{**kwargs, "is_causal": True, "packed": packed})
        hidden_states = self.final_layer_norm(hidden_states)
        last_hidden_state = F.pad(packed.pad(hidden_states), (0, 0, 0, input_ids.shape[1] - packed.length))
        return BaseModelOutputWithPooling(
            last_hidden_state=last_hidden_state, pooler_output=hidden_states.index_select(0, packed.last)
        )


class HFCLIPBagOfWordsModel(HFCLIPPreTrainedModel):
    """Bag-of-words text tower: LayerNorm of the mean embedding of a caption's tokens, order ignored."""

    config_class = HFCLIPBagOfWordsConfig
    config: HFCLIPBagOfWordsConfig
    base_model_prefix = "text_model"
    input_modalities = ("text",)
    _input_embed_layer = "token_embedding"
    _can_record_outputs = {}

    def __init__(self, config: HFCLIPBagOfWordsConfig):
        super().__init__(config)
        self.token_embedding = drawn_with(0.02, nn.Embedding(config.vocab_size, config.hidden_size))
        self.final_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPooling:
        """`last_hidden_state` (batch, length, hidden): token embeddings; `pooler_output` (batch, hidden).

        The words of a caption are the tokens in front of its first end-of-text token, without the start token.
        """
        check_input_ids(input_ids, self.config.max_position_embeddings)
        pooled = pooled_positions(input_ids, attention_mask, self.config.eos_token_id)
        is_word = torch.arange(input_ids.shape[1], device=input_ids.device) < pooled[:, None]
        is_word = is_word & (input_ids != self.config.bos_token_id)
        if attention_mask is not None:
            is_word = is_word & attention_mask.bool()
        hidden_states = self.token_embedding(input_ids)
        weights = is_word.to(hidden_states.dtype) / is_word.sum(dim=1, keepdim=True).clamp(min=1)
        # (batch, 1, length) @ (batch, length, hidden) -> (batch, hidden)
        mean = (weights[:, None].to(hidden_states.dtype) @ hidden_states)[:, 0]
        return BaseModelOutputWithPooling(
            last_hidden_state=hidden_states, pooler_output=self.final_layer_norm(mean)
        )


# ---------------------------------------------------------------------------------------------------------------------
# Dual encoder
# ---------------------------------------------------------------------------------------------------------------------


def build_tower(config) -> PreTrainedModel:
    """Our tower for our config types, AutoModel's for all others."""
    if config.model_type in TOWERS:
        return TOWERS[config.model_type]._from_config(config)
    tower = AutoModel.from_config(config)
    # Parameters that an encoder never uses would have no gradient, an error under data parallelism.
    for name, parameter in tower.named_parameters():
        if name.endswith("mask_token"):
            parameter.requires_grad_(False)
    return tower


def tower_width(config) -> int:
    """Size of a tower's pooled output."""
    if getattr(config, "pooler_is_projected", False):
        return config.projection_dim
    width = getattr(config, "hidden_size", None) or (getattr(config, "hidden_sizes", None) or [None])[-1]
    if width is None:
        raise ValueError(
            f"Cannot tell the output size of a `{config.model_type}` tower: its config has neither `hidden_size` nor "
            "`hidden_sizes`. Choose another tower."
        )
    return width


def pool(outputs: ModelOutput, rule: str, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
    """(batch, hidden) from a tower's outputs by a named rule; see `HFCLIPConfig`.

    Raises:
        ValueError: the rule is `pooler` and the tower has none.
    """
    if rule == "pooler":
        pooled = getattr(outputs, "pooler_output", None)
        if pooled is None:
            raise ValueError("Pooling rule 'pooler': this tower has no pooler_output. Use 'cls', 'mean' or 'last'.")
        return pooled.flatten(1)
    states = outputs.last_hidden_state
    if states.dim() == 4:
        # (batch, hidden, height, width) -> (batch, height * width, hidden)
        states = states.flatten(2).transpose(1, 2)
    if attention_mask is None or attention_mask.shape != states.shape[:2]:
        attention_mask = torch.ones(states.shape[:2], dtype=torch.long, device=states.device)
    order = torch.arange(states.shape[1], device=states.device)
    if rule == "cls":
        first = attention_mask.bool().int().argmax(dim=1)
        return states[torch.arange(len(states), device=states.device), first]
    if rule == "last":
        last = (attention_mask.bool() * order).argmax(dim=1)
        return states[torch.arange(len(states), device=states.device), last]
    weights = attention_mask.to(states.dtype)[..., None]
    return (states * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1)


def projection(width: int, projection_dim: int) -> nn.Linear:
    """The linear map from a tower's pooled output into the joint space."""
    return drawn_with(width**-0.5, nn.Linear(width, projection_dim, bias=False))


def unit_length(embeds: torch.Tensor) -> torch.Tensor:
    """Normalises in float32 (or better): in half precision the norm itself would carry the error."""
    precise = embeds if embeds.dtype == torch.float64 else embeds.float()
    return (precise / precise.norm(dim=-1, keepdim=True)).to(embeds.dtype)


class HFCLIPModel(HFCLIPPreTrainedModel):
    """CLIP: an image tower and a text tower that map into one space.

    `from_pretrained` opens folders saved by this class and by transformers' `CLIPModel`.
    """

    def __init__(self, config: HFCLIPConfig):
        super().__init__(config)
        self.text_model = build_tower(config.text_config)
        self.vision_model = build_tower(config.vision_config)
        if config.text_config.model_type not in TOWERS and config.text_pooling != "pooler":
            # Its pooling layer would never be used, and have no gradient.
            self.text_model.pooler = None
        self.visual_projection = self._projection(config.vision_config)
        self.text_projection = self._projection(config.text_config)
        self.logit_scale = nn.Parameter(torch.empty(()))
        self.logit_bias = None if config.logit_bias_init_value is None else nn.Parameter(torch.empty(()))
        self._frozen_towers: list[nn.Module] = []
        self._text_cache: TextCache | None = None
        self.post_init()

    def _projection(self, tower_config) -> nn.Module:
        if getattr(tower_config, "pooler_is_projected", False):
            return nn.Identity()
        return projection(tower_width(tower_config), self.config.projection_dim)

    @classmethod
    def from_vision_text_pretrained(cls, vision: str, text: str, projection_dim: int = 512, **config) -> "HFCLIPModel":
        """A dual encoder from two pretrained towers (folders or Hub names of any AutoModel type), projections new.

        `config` are further fields of `HFCLIPConfig`, such as `text_pooling`.
        """
        vision_model, text_model = AutoModel.from_pretrained(vision), AutoModel.from_pretrained(text)
        joint = HFCLIPConfig(
            vision_config=vision_model.config, text_config=text_model.config, projection_dim=projection_dim, **config
        )
        model = cls(joint)
        for tower, source in ((model.vision_model, vision_model), (model.text_model, text_model)):
            missing, unexpected = tower.load_state_dict(source.state_dict(), strict=False)
            unexpected = [key for key in unexpected if not key.startswith("pooler.")]
            if missing or unexpected:
                raise ValueError(f"{source.config.model_type}: missing {missing}, unexpected {unexpected} weights.")
        return model

    def save_pretrained(self, save_directory, *args, **kwargs) -> None:
        self.config.auto_map = {"AutoModelForZeroShotImageClassification": "modeling_hfclip.HFCLIPModel"}
        super().save_pretrained(save_directory, *args, **kwargs)

    def freeze(self, tower: str) -> None:
        """Locks the `vision` or `text` tower (LiT): no gradients, and evaluation mode for good (BatchNorm, dropout).

        The projection stays trainable. Raises ValueError for another name.
        """
        towers = {"vision": self.vision_model, "text": self.text_model}
        if tower not in towers:
            raise ValueError(f"freeze: found {tower!r}, expected 'vision' or 'text'.")
        towers[tower].requires_grad_(False)
        self._frozen_towers.append(towers[tower].eval())

    def train(self, mode: bool = True) -> "HFCLIPModel":
        super().train(mode)
        for tower in self._frozen_towers:
            tower.eval()
        return self

    def _text_outputs(self, input_ids, attention_mask=None, position_ids=None, **kwargs) -> BaseModelOutputWithPooling:
        """The text tower's outputs, with `pooler_output` pooled by the config's rule but not projected."""
        if self.config.text_config.model_type in TOWERS:
            kwargs = {"skip_padding": True, "position_ids": position_ids, **kwargs}
        elif attention_mask is None:
            attention_mask = (input_ids != self.config.text_config.pad_token_id).long()
        outputs = self.text_model(input_ids=input_ids, attention_mask=attention_mask, return_dict=True, **kwargs)
        pooled = pool(outputs, self.config.text_pooling, attention_mask)
        return BaseModelOutputWithPooling(**{**only_base_fields(outputs), "pooler_output": pooled})

    def _vision_outputs(self, pixel_values, interpolate_pos_encoding=None, pooled_only=False, **kwargs):
        """The image tower's outputs, with `pooler_output` pooled by the config's rule but not projected."""
        if self.config.vision_config.model_type in TOWERS:
            kwargs.update(interpolate_pos_encoding=interpolate_pos_encoding, pooled_only=pooled_only)
        outputs = self.vision_model(pixel_values=pixel_values, return_dict=True, **kwargs)
        pooled = pool(outputs, self.config.vision_pooling)
        return BaseModelOutputWithPooling(**{**only_base_fields(outputs), "pooler_output": pooled})

    @can_return_tuple
    def get_text_features(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPooling:
        """As in transformers 5: `pooler_output` (batch, projection_dim) is projected and NOT normalised.

        `last_hidden_state` is zero behind each end-of-text token unless `output_hidden_states` is set.
        """
        outputs = self._text_outputs(input_ids, attention_mask, position_ids, **kwargs)
        outputs.pooler_output = self.text_projection(outputs.pooler_output)
        return outputs

    @can_return_tuple
    def get_image_features(
        self, pixel_values: torch.Tensor, interpolate_pos_encoding: bool | None = None, **kwargs
    ) -> BaseModelOutputWithPooling:
        """As in transformers 5: `pooler_output` (batch, projection_dim) is projected and NOT normalised."""
        outputs = self._vision_outputs(pixel_values, interpolate_pos_encoding, **kwargs)
        outputs.pooler_output = self.visual_projection(outputs.pooler_output)
        return outputs

    def encode_text(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, normalize: bool = True
    ) -> torch.Tensor:
        """(batch, length) token ids -> (batch, projection_dim) embeddings, unit length if `normalize`."""
        embeds = self.text_projection(self._text_outputs(input_ids, attention_mask).pooler_output)
        return unit_length(embeds) if normalize else embeds

    def encode_image(self, pixel_values: torch.Tensor, normalize: bool = True) -> torch.Tensor:
        """(batch, 3, height, width) pixels -> (batch, projection_dim) embeddings, unit length if `normalize`."""
        embeds = self.visual_projection(self._vision_outputs(pixel_values, pooled_only=True).pooler_output)
        return unit_length(embeds) if normalize else embeds

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        return_loss: bool | None = None,
        interpolate_pos_encoding: bool | None = None,
        embeds_only: bool = False,
        **kwargs,
    ) -> HFCLIPOutput:
        """Embeddings and similarities of images and texts.

        Args:
            input_ids: (num_texts, length); attention_mask and position_ids likewise.
            pixel_values: (num_images, channels, height, width), normalised.
            return_loss: also compute the contrastive loss of this batch (sigmoid loss if there is a logit bias).
            embeds_only: compute `image_embeds` and `text_embeds` (those whose input is given) and nothing else;
                what a trainer needs, whose loss sees the batches of all processes.

        Returns:
            `HFCLIPOutput`. `text_model_output.last_hidden_state` is zero behind each end-of-text token unless
            `output_hidden_states` is set.

        Raises:
            ValueError: an input is missing.
            RuntimeError: `return_loss` in a run of several processes, where it would miss their negatives.
        """
        if embeds_only:
            return HFCLIPOutput(
                image_embeds=None if pixel_values is None else self.encode_image(pixel_values),
                text_embeds=None if input_ids is None else self.encode_text(input_ids, attention_mask),
            )
        if input_ids is None or pixel_values is None:
            raise ValueError(
                "You have to specify input_ids and pixel_values. For one of the two use encode_text, encode_image, or "
                "embeds_only=True."
            )
        vision_outputs = self._vision_outputs(pixel_values, interpolate_pos_encoding, **kwargs)
        image_embeds = unit_length(self.visual_projection(vision_outputs.pooler_output))
        text_outputs, text_embeds = self._text_embeds(input_ids, attention_mask, position_ids, kwargs)
        logits_per_image = self.similarities(image_embeds, text_embeds)
        return HFCLIPOutput(
            loss=self._local_loss(logits_per_image) if return_loss else None,
            logits_per_image=logits_per_image,
            logits_per_text=logits_per_image.t(),
            text_embeds=text_embeds,
            image_embeds=image_embeds,
            text_model_output=text_outputs,
            vision_model_output=vision_outputs,
        )

    def similarities(self, image_embeds: torch.Tensor, text_embeds: torch.Tensor) -> torch.Tensor:
        """(num_images, num_texts) logits of unit embeddings: scaled cosines, plus the bias if there is one."""
        logits = image_embeds @ text_embeds.t().to(image_embeds.device) * self.logit_scale.exp()
        return logits if self.logit_bias is None else logits + self.logit_bias

    def _local_loss(self, logits_per_image: torch.Tensor) -> torch.Tensor:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            if torch.distributed.get_world_size() > 1:
                raise RuntimeError(
                    "return_loss=True sees the pairs of one process only, and there are "
                    f"{torch.distributed.get_world_size()}. Use hfclip.contrastive_loss or hfclip.sigmoid_loss on "
                    "image_embeds and text_embeds: they are exact over all processes."
                )
        logits = logits_per_image.float()
        if self.logit_bias is not None:
            signs = 2 * torch.eye(len(logits), device=logits.device) - 1
            return -F.logsigmoid(signs * logits).sum() / len(logits)
        targets = torch.arange(len(logits), device=logits.device)
        return (F.cross_entropy(logits, targets) + F.cross_entropy(logits.t(), targets)) / 2

    def _text_embeds(self, input_ids, attention_mask, position_ids, kwargs):
        """Text outputs and unit embeddings; in inference, those of the call before if nothing has changed."""
        cacheable = not (self.training or torch.is_grad_enabled() or kwargs or position_ids is not None)
        state = None
        if cacheable and not torch.compiler.is_compiling():
            state = TextCache.state_of((self.text_model, self.text_projection), input_ids, attention_mask)
        if state is not None and self._text_cache is not None and self._text_cache.holds(state):
            return self._text_cache.copies()
        outputs = self._text_outputs(input_ids, attention_mask, position_ids, **kwargs)
        embeds = unit_length(self.text_projection(outputs.pooler_output))
        self._text_cache = None if state is None else TextCache(state, outputs, embeds)
        return outputs, embeds

    def __getstate__(self):
        return {**self.__dict__, "_text_cache": None}


class TextCache:
    """The texts of the last call in inference, with their outputs.

    The zero-shot pipeline passes the same labels with every image. They count as the same while the ids, the mask and
    the tower are: the weights (their identity, version counter and one value of each, since `.data` writes escape the
    counter), and no layers or hooks in it that come from outside (adapters can be switched without a trace).
    """

    PLAIN = {"torch", "transformers", __name__.partition(".")[0]}

    def __init__(self, state: tuple, outputs: BaseModelOutputWithPooling, embeds: torch.Tensor):
        self.weights, *texts, self.values = state
        self.texts = [None if text is None else text.clone() for text in texts]
        self.results = (BaseModelOutputWithPooling(**outputs), embeds)
        self.results = self.copies()

    @classmethod
    def state_of(cls, towers: tuple[nn.Module, ...], input_ids, attention_mask) -> tuple | None:
        """What the outputs depend on, or None if that cannot be told."""
        modules = [module for tower in towers for module in tower.modules()]
        for module in modules:
            if type(module).__module__.partition(".")[0] not in cls.PLAIN:
                return None
            if module._forward_hooks or module._forward_pre_hooks:
                return None
        weights = [weight for module in modules for weight in module._parameters.values() if weight is not None]
        if any(type(weight.data) is not torch.Tensor or weight.is_inference() or weight.is_meta for weight in weights):
            return None
        identity = [(weight.data_ptr(), weight.dtype, weight._version) for weight in weights]
        values = [weight.detach().view(-1)[weight.numel() // 2].float() for weight in weights if weight.is_contiguous()]
        return identity, input_ids, attention_mask, torch.stack(values)

    def holds(self, state: tuple) -> bool:
        weights, *texts, values = state
        same = weights == self.weights and torch.equal(values, self.values)
        for old, new in zip(self.texts, texts):
            same = same and (old is None) == (new is None)
            same = same and (new is None or (old.device == new.device and torch.equal(old, new)))
        return same

    def copies(self) -> tuple[BaseModelOutputWithPooling, torch.Tensor]:
        """Fresh tensors: what a caller writes into its outputs must not reach the next call."""
        outputs, embeds = self.results
        return BaseModelOutputWithPooling(**{name: value.clone() for name, value in outputs.items()}), embeds.clone()


def only_base_fields(outputs: ModelOutput) -> dict[str, torch.Tensor]:
    """The fields of a tower's outputs that all towers share."""
    fields = ("last_hidden_state", "hidden_states", "attentions")
    return {name: getattr(outputs, name) for name in fields if getattr(outputs, name, None) is not None}


class HFCLIPTextModelWithProjection(HFCLIPPreTrainedModel):
    """The text transformer with its projection, as in transformers' `CLIPTextModelWithProjection`."""

    config_class = HFCLIPTextConfig
    config: HFCLIPTextConfig
    base_model_prefix = "text_model"
    input_modalities = ("text",)
    _keys_to_ignore_on_load_unexpected = [r"position_ids", r"^vision_model\.", r"^visual_projection\.", r"^logit_"]

    def __init__(self, config: HFCLIPTextConfig):
        super().__init__(config)
        self.text_model = HFCLIPTextModel._from_config(config)
        self.text_projection = projection(config.hidden_size, config.projection_dim)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.text_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.text_model.set_input_embeddings(value)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        **kwargs,
    ) -> HFCLIPTextModelOutput:
        """`text_embeds` (batch, projection_dim), not normalised; see `HFCLIPTextModel.forward`."""
        kwargs["return_dict"] = True
        outputs = self.text_model(input_ids, attention_mask, position_ids, skip_padding=True, **kwargs)
        return HFCLIPTextModelOutput(
            text_embeds=self.text_projection(outputs.pooler_output), **only_base_fields(outputs)
        )


class HFCLIPVisionModelWithProjection(HFCLIPPreTrainedModel):
    """The ViT with its projection, as in transformers' `CLIPVisionModelWithProjection`."""

    config_class = HFCLIPVisionConfig
    config: HFCLIPVisionConfig
    base_model_prefix = "vision_model"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    _keys_to_ignore_on_load_unexpected = [r"position_ids", r"^text_model\.", r"^text_projection\.", r"^logit_"]

    def __init__(self, config: HFCLIPVisionConfig):
        super().__init__(config)
        self.vision_model = HFCLIPVisionModel._from_config(config)
        self.visual_projection = projection(config.hidden_size, config.projection_dim)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.vision_model.get_input_embeddings()

    @can_return_tuple
    def forward(
        self, pixel_values: torch.Tensor | None = None, interpolate_pos_encoding: bool | None = None, **kwargs
    ) -> HFCLIPVisionModelOutput:
        """`image_embeds` (batch, projection_dim), not normalised; see `HFCLIPVisionModel.forward`."""
        kwargs["return_dict"] = True
        outputs = self.vision_model(pixel_values, interpolate_pos_encoding, **kwargs)
        return HFCLIPVisionModelOutput(
            image_embeds=self.visual_projection(outputs.pooler_output), **only_base_fields(outputs)
        )


class HFCLIPForImageClassification(HFCLIPPreTrainedModel):
    """An image tower of any type with a linear classifier of `config.num_labels` classes."""

    _auto_class = "AutoModelForImageClassification"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    _keys_to_ignore_on_load_unexpected = [
        *(r"position_ids", r"^text_model\.", r"^text_projection\.", r"^visual_projection\.", r"^logit_")
    ]

    def __init__(self, config: HFCLIPConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.vision_model = build_tower(config.vision_config)
        vision = config.vision_config
        width = vision.hidden_size if vision.model_type in TOWERS else tower_width(vision)
        self.classifier = nn.Identity()
        if config.num_labels > 0:
            self.classifier = drawn_with(width**-0.5, nn.Linear(width, config.num_labels))
        self.post_init()

    @can_return_tuple
    def forward(
        self, pixel_values: torch.Tensor | None = None, labels: torch.Tensor | None = None, **kwargs
    ) -> ImageClassifierOutput:
        """`logits` (batch, num_labels); `loss` if `labels` (batch,) are given. Pooled as in transformers' CLIP."""
        kwargs["return_dict"] = True
        outputs = self.vision_model(pixel_values=pixel_values, **kwargs)
        if hasattr(self.vision_model, "features_for_classification"):
            features = self.vision_model.features_for_classification(outputs)
        else:
            features = pool(outputs, self.config.vision_pooling)
        logits = self.classifier(features)
        return ImageClassifierOutput(
            loss=None if labels is None else self.loss_function(labels, logits, self.config),
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=getattr(outputs, "attentions", None),
        )


TOWERS = {
    tower.config_class.model_type: tower
    for tower in (HFCLIPTextModel, HFCLIPBagOfWordsModel, HFCLIPVisionModel, HFCLIPResNetModel)
}

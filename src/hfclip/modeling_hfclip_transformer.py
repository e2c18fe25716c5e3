"""The ViT and the text towers, with the parameter names of transformers' `CLIPModel`.

    pixel_values -> patches, class token, positions -> LayerNorm -> blocks -> class token -> LayerNorm -> pooled
    input_ids    -> tokens, positions -> causal blocks -> LayerNorm -> first end-of-text token -> pooled

Departures from transformers' `CLIPModel`, all exact to float tolerance:

- Text is packed. In a causal tower nothing behind the end-of-text token can change the embedding, so a batch of
  captions is computed as one flat list of its real tokens; only attention sees a padded form.
- Where only the embedding is asked for, the last ViT block computes the class token alone; the last block of the
  text tower the end-of-text tokens alone, if the texts of a batch are of one length.
- Images of any size that the patch divides are served by interpolating the positions.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_hfclip import HFCLIPBagOfWordsConfig, HFCLIPConfig, HFCLIPTextConfig, HFCLIPVisionConfig
from .layers_hfclip import check_pixel_values, initialize_leaf, is_exporting, is_on_host, with_init_std


# ---------------------------------------------------------------------------------------------------------------------
# Which tokens of a text count
# ---------------------------------------------------------------------------------------------------------------------


TOKENS_WORTH_A_WAIT = 4096  # padded tokens of a batch on a GPU, from which on its host waits to learn their lengths


def pooled_positions(input_ids: torch.Tensor, attention_mask: torch.Tensor | None, eos_token_id: int) -> torch.Tensor:
    """(batch,) position that each text is pooled at: its first end-of-text token.

    A text without one (cut by hand) is pooled at its last real token, if an attention mask says which that is.

    Raises:
        ValueError: no end-of-text token and no attention mask; pooling position 0 would be silently wrong
            (open_clip issue 1151). On a GPU the host would have to wait to find out, and does not.
    """
    is_eos = input_ids == eos_token_id
    if attention_mask is not None:
        is_eos = is_eos & attention_mask.bool()
    first_eos = is_eos.int().argmax(dim=-1)
    if attention_mask is not None:
        order = torch.arange(input_ids.shape[1], device=input_ids.device)
        last_real = (attention_mask.bool() * order).argmax(dim=-1)
        return torch.where(is_eos.any(dim=-1), first_eos, last_real)
    if is_on_host(input_ids):
        complete = is_eos.any(dim=-1)
        if not complete.all():
            rows = (~complete).nonzero().flatten()[:5].tolist()
            raise ValueError(
                f"input_ids: found no end-of-text token {eos_token_id} in row(s) {rows}, expected one in each. "
                "Let the tokenizer truncate (it keeps that token), or pass the attention_mask."
            )
    return first_eos


def count_from_first_real(attention_mask: torch.Tensor) -> torch.Tensor:
    """(batch, length) position of each token in its text: 0 at the first real one, and in any padding before it."""
    order = torch.arange(attention_mask.shape[1], device=attention_mask.device)
    return (order - attention_mask.bool().int().argmax(dim=1, keepdim=True)).clamp(min=0)


def asks_for_all_positions(config: PreTrainedConfig, kwargs: dict) -> bool:
    """Whether hidden states or attention weights are to be returned, which packed texts do not have."""
    names = ("output_hidden_states", "output_attentions")
    return any(kwargs.get(name, getattr(config, name, False)) for name in names)


def without_left_padding(input_ids: torch.Tensor, attention_mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask, (batch, length) each, with any padding before a text moved to after it."""
    length = input_ids.shape[1]
    shift = attention_mask.bool().int().argmax(dim=1, keepdim=True)
    index = (torch.arange(length, device=input_ids.device) + shift) % length
    return input_ids.gather(1, index), attention_mask.gather(1, index)


def real_tokens_first(attention_mask: torch.Tensor) -> torch.Tensor | None:
    """(batch, length) order that brings the real tokens of each text to the front; None if they are there already.

    On a device the answer would make the host wait: there the order is computed in any case.
    """
    real = attention_mask.bool()
    if is_on_host(real) and not (real[:, 1:] & ~real[:, :-1]).any():
        return None
    return (~real).int().argsort(dim=1, stable=True)


@dataclass
class PackedTexts:
    """Where the real tokens of a padded batch lie: flat (num_tokens, ...) tensors <-> (batch, length, ...) tensors.

    The flat list is filled up to a round number with tokens from after the pooled ones, as far as there are any:
    kernels are chosen and cached by shape, and numbers of tokens would hardly ever repeat. Round are multiples of 64,
    and of larger powers of two for longer lists: at most 16 numbers between one power of two and the next.
    """

    index: torch.Tensor  # (num_tokens,) place of each packed token in the flattened (batch * length) layout
    last: torch.Tensor  # (batch,) place of each text's pooled token in the flat list
    real: torch.Tensor  # (batch, length) whether a token is at or before the pooled one

    @classmethod
    def of(cls, text_lengths: list[int], device: torch.device) -> "PackedTexts":
        """The first so many tokens of each text. All is decided on the host, and then sent to the device."""
        lengths = torch.tensor(text_lengths)
        width, num_real = max(text_lengths), sum(text_lengths)
        real = torch.arange(width) < lengths[:, None]
        taken = real.flatten()
        spare = -num_real % max(64, 2 ** num_real.bit_length() // 32)
        if spare:
            taken = taken.clone()
            taken[(~taken).nonzero().flatten()[:spare]] = True
        last = taken.cumsum(dim=0)[torch.arange(len(lengths)) * width + lengths - 1] - 1
        index = taken.nonzero().flatten()
        return cls(*(part.to(device, non_blocking=True) for part in (index, last, real)))

    def pack(self, padded: torch.Tensor) -> torch.Tensor:
        """(batch, at least length, ...) -> (num_tokens, ...)"""
        return padded[:, : self.real.shape[1]].flatten(0, 1).index_select(0, self.index)

    def pad(self, packed: torch.Tensor) -> torch.Tensor:
        """(num_tokens, hidden) -> (batch, length, hidden), zeros in the places without a token"""
        padded = packed.new_zeros(self.real.numel(), packed.shape[-1])
        return padded.index_copy(0, self.index, packed).view(*self.real.shape, -1)


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
        queries = kwargs.get("queries")
        residual = hidden_states if queries is None else hidden_states[:, queries]
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
        factor = self.config.initializer_factor
        if isinstance(module, HFCLIPVisionEmbeddings):
            init.normal_(module.class_embedding, std=module.config.hidden_size**-0.5 * factor)
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


class HFCLIPVisionModel(HFCLIPPreTrainedModel):
    """ViT image tower. Its pooled output is the class token behind the last LayerNorm, not yet projected."""

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
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
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
        """(batch, 1 + patches, hidden) -> (batch, hidden), behind the last LayerNorm, by the config's `pooling`."""
        if self.config.pooling == "cls":
            return self.post_layernorm(hidden_states[:, 0])
        if self.config.pooling == "norm_of_mean":
            return self.post_layernorm(hidden_states[:, 1:].mean(dim=1))
        return self.post_layernorm(hidden_states[:, 1:]).mean(dim=1)

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
        self.token_embedding = with_init_std(nn.Embedding(config.vocab_size, config.hidden_size), 0.02)
        positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.position_embedding = with_init_std(positions, 0.01)

    def forward(self, input_ids: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        return embed_tokens(self.token_embedding, input_ids) + self.position_embedding(position_ids)


def check_texts(
    input_ids: torch.Tensor | None,
    attention_mask: torch.Tensor | None,
    config: HFCLIPTextConfig | HFCLIPBagOfWordsConfig,
) -> None:
    """Raises ValueError, saying what was found and expected, for texts that the tower cannot take."""
    if not isinstance(input_ids, torch.Tensor):
        found = "nothing" if input_ids is None else f"a {type(input_ids).__name__}"
        raise ValueError(f"You have to specify input_ids, a (batch, length) tensor of token ids; found {found}.")
    if input_ids.dim() != 2 or not input_ids.numel():
        raise ValueError(f"input_ids: found shape {tuple(input_ids.shape)}, expected (batch, length), not empty.")
    if input_ids.shape[1] > config.max_position_embeddings:
        raise ValueError(
            f"Sequence length must be at most max_position_embeddings: found {input_ids.shape[1]} tokens, expected at "
            f"most {config.max_position_embeddings}. Truncate with the tokenizer, which keeps the end-of-text token."
        )
    if attention_mask is not None and attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"attention_mask: found shape {tuple(attention_mask.shape)}, expected that of input_ids, "
            f"{tuple(input_ids.shape)}: 1 for each real token."
        )


def embed_tokens(embedding: nn.Embedding, input_ids: torch.Tensor) -> torch.Tensor:
    """Ids of any shape -> (..., hidden). Raises ValueError for ids on the host that the vocabulary does not have."""
    try:
        return embedding(input_ids)
    except IndexError as error:
        lowest, highest = (int(extreme) for extreme in input_ids.aminmax())
        raise ValueError(
            f"input_ids: found id {lowest if lowest < 0 else highest}, expected 0 to {embedding.num_embeddings - 1}, the "
            "vocabulary of this model. Use the tokenizer that was saved with it."
        ) from error


def check_lengths(text_lengths: list[int], input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> None:
    """Raises ValueError, saying what was found and expected, for lengths that the texts cannot have."""
    batch_size, length = input_ids.shape
    if not isinstance(text_lengths, list) or not all(isinstance(number, int) for number in text_lengths):
        raise ValueError(f"text_lengths: found {text_lengths!r}, expected a list of integers.")
    if attention_mask is not None and is_on_host(attention_mask) and not attention_mask[:, 0].all():
        raise ValueError("text_lengths: found texts padded on the left, expected padding on the right. Leave it out.")
    if len(text_lengths) != batch_size or not 0 < min(text_lengths) <= max(text_lengths) <= length:
        raise ValueError(
            f"text_lengths: found {len(text_lengths)} numbers from {min(text_lengths, default=None)} to "
            f"{max(text_lengths, default=None)}, expected one from 1 to {length} for each of {batch_size} texts."
        )


class HFCLIPTextModel(HFCLIPPreTrainedModel):
    """Causal text transformer. Its pooled output is the first end-of-text token behind the last LayerNorm."""

    config_class = HFCLIPTextConfig
    config: HFCLIPTextConfig
    base_model_prefix = "text_model"
    input_modalities = ("text",)
    _input_embed_layer = "token_embedding"
    _keys_to_ignore_on_load_unexpected = [r"position_ids", r"^vision_model\.", r"_projection\.", r"^logit_"]

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
        text_lengths: list[int] | None = None,
        pooled_only: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPooling:
        """Hidden states and the pooled output of texts.

        Args:
            input_ids: (batch, length), each row with an end-of-text token.
            attention_mask: (batch, length), 1 for real tokens. Not needed for texts padded on the right.
            position_ids: (batch, length) or (1, length), by default counted from the first real token.
            skip_padding: compute nothing for padding and for tokens after each first end-of-text token. The pooled
                output is the same; `last_hidden_state` is zero there. Ignored where all positions are asked for
                (`output_hidden_states`, `output_attentions`), for `position_ids`, and in graphs that are compiled or
                exported.
            text_lengths: with `skip_padding`, tokens of each text up to its first end-of-text token, if the caller
                knows them, for texts padded on the right. With ids on a GPU this spares a wait for the device.
            pooled_only: with `skip_padding`, compute nothing but the pooled output; `last_hidden_state` is then None.

        Returns:
            `last_hidden_state` (batch, length, hidden), after the last LayerNorm;
            `pooler_output` (batch, hidden), not projected, not normalised.

        Raises:
            ValueError: ids missing, longer than the context, or without end-of-text token and attention mask.
        """
        check_texts(input_ids, attention_mask, self.config)
        if self.config.reads_padding:
            return self._forward_with_padding(input_ids, attention_mask, position_ids, **kwargs)
        in_graph = torch.compiler.is_compiling() or is_exporting()
        if skip_padding and position_ids is None and not in_graph and not asks_for_all_positions(self.config, kwargs):
            return self._forward_real_tokens(input_ids, attention_mask, text_lengths, pooled_only, **kwargs)
        if position_ids is None and attention_mask is not None:
            position_ids = count_from_first_real(attention_mask)
        pooled = pooled_positions(input_ids, attention_mask, self.config.eos_token_id)
        hidden_states = self._encode(input_ids, attention_mask, position_ids, **kwargs)
        rows = torch.arange(pooled.shape[0], device=pooled.device)
        return BaseModelOutputWithPooling(last_hidden_state=hidden_states, pooler_output=hidden_states[rows, pooled])

    def _encode(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        causal: bool = True,
        last_only: bool = False,
        **kwargs,
    ) -> torch.Tensor:
        """(batch, length) ids -> (batch, length, hidden), after the last LayerNorm.

        `last_only`: of the last position, (batch, 1, hidden), where no mask is needed (not so in eager attention).
        """
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
        hidden_states = self.embeddings(input_ids, position_ids)
        mask = create_causal_mask(self.config, hidden_states, attention_mask, None) if causal else None
        kwargs.update(is_causal=causal, queries=slice(-1, None) if last_only and mask is None else None)
        return self.final_layer_norm(self.encoder(hidden_states, mask, **kwargs))

    def _forward_real_tokens(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        text_lengths: list[int] | None,
        pooled_only: bool,
        **kwargs,
    ) -> BaseModelOutputWithPooling:
        """Texts without their padding: brought to the front, cut at the longest, packed where that saves work.

        After that no mask is needed: attention is causal, and whatever follows the pooled token cannot change it.
        """
        batch_size, length = input_ids.shape
        order = positions = None
        if text_lengths is not None:
            check_lengths(text_lengths, input_ids, attention_mask)
            pooled = torch.tensor(text_lengths).to(input_ids.device, non_blocking=True) - 1
        else:
            if attention_mask is not None:
                order = real_tokens_first(attention_mask)
            if order is not None:
                positions = count_from_first_real(attention_mask).gather(1, order)
                input_ids, attention_mask = input_ids.gather(1, order), attention_mask.gather(1, order)
            pooled = pooled_positions(input_ids, attention_mask, self.config.eos_token_id)
            # One wait for a device pays where it spares much more work than it takes.
            if is_on_host(pooled) or batch_size * length >= TOKENS_WORTH_A_WAIT:
                text_lengths = [1 + position for position in pooled.tolist()]
        width = max(text_lengths) if text_lengths else length
        num_real = sum(text_lengths) if text_lengths else batch_size * length
        input_ids = input_ids[:, :width]
        if num_real > 0.8 * batch_size * width:
            if positions is not None:
                positions = positions[:, :width]
            end_alike = pooled_only and num_real == batch_size * width and text_lengths is not None
            end_alike = end_alike and not self.training  # there, rounding does not depend on a batch's lengths
            hidden_states = self._encode(input_ids, None, positions, last_only=end_alike, **kwargs)
            rows = torch.arange(batch_size, device=pooled.device)
            pooler_output = hidden_states[:, -1] if end_alike else hidden_states[rows, pooled]
        else:
            packed = PackedTexts.of(text_lengths, input_ids.device)
            if positions is None:
                positions = torch.arange(width, device=input_ids.device).expand(batch_size, -1)
            hidden_states = self.embeddings(packed.pack(input_ids), packed.pack(positions))
            layout = hidden_states.new_empty(batch_size, width, 1)
            mask = create_causal_mask(self.config, layout, None, None)
            hidden_states = self.encoder(hidden_states, mask, **{**kwargs, "is_causal": True, "packed": packed})
            hidden_states = self.final_layer_norm(hidden_states)
            pooler_output = hidden_states.index_select(0, packed.last)
            hidden_states = None if pooled_only else packed.pad(hidden_states)
        if pooled_only:
            return BaseModelOutputWithPooling(pooler_output=pooler_output)
        last_hidden_state = hidden_states
        if text_lengths is None or num_real < batch_size * length:
            real = torch.arange(width, device=pooled.device) <= pooled[:, None]
            last_hidden_state = hidden_states.masked_fill(~real[..., None], 0)
            last_hidden_state = F.pad(last_hidden_state, (0, 0, 0, length - width))
        if order is not None:  # back to where they were
            places = order[..., None].expand_as(last_hidden_state)
            last_hidden_state = torch.zeros_like(last_hidden_state).scatter(1, places, last_hidden_state)
        return BaseModelOutputWithPooling(last_hidden_state=last_hidden_state, pooler_output=pooler_output)

    def _forward_with_padding(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        **kwargs,
    ) -> BaseModelOutputWithPooling:
        """Texts padded to the whole context, as towers were trained that are not causal or do not pool at EOS."""
        context = self.config.max_position_embeddings
        if input_ids.shape[1] < context and self.config.pad_token_id is None:
            raise ValueError(
                f"input_ids: found texts of {input_ids.shape[1]} tokens, expected {context}: this tower was trained with "
                "its padding in sight, and its config names no pad_token_id. Tokenize with padding='max_length'."
            )
        if attention_mask is not None:
            input_ids, _ = without_left_padding(input_ids, attention_mask)
        # (batch, length) -> (batch, context)
        input_ids = F.pad(input_ids, (0, context - input_ids.shape[1]), value=self.config.pad_token_id or 0)
        hidden_states = self._encode(input_ids, None, position_ids, causal=self.config.causal, **kwargs)
        if self.config.pooling == "eos":
            rows = torch.arange(input_ids.shape[0], device=input_ids.device)
            pooled = hidden_states[rows, pooled_positions(input_ids, None, self.config.eos_token_id)]
        else:
            pooled = hidden_states[:, 0 if self.config.pooling == "first" else -1]
        return BaseModelOutputWithPooling(last_hidden_state=hidden_states, pooler_output=pooled)


class HFCLIPBagOfWordsModel(HFCLIPPreTrainedModel):
    """Bag-of-words text tower: LayerNorm of the mean embedding of a caption's tokens, order ignored."""

    config_class = HFCLIPBagOfWordsConfig
    config: HFCLIPBagOfWordsConfig
    base_model_prefix = "text_model"
    input_modalities = ("text",)
    _input_embed_layer = "token_embedding"
    _keys_to_ignore_on_load_unexpected = [r"position_ids", r"^vision_model\.", r"_projection\.", r"^logit_"]
    _can_record_outputs = {}

    def __init__(self, config: HFCLIPBagOfWordsConfig):
        super().__init__(config)
        self.token_embedding = with_init_std(nn.Embedding(config.vocab_size, config.hidden_size), 0.02)
        self.final_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.post_init()

    def blocks(self) -> list[nn.Module]:
        """None: all parameters are on one level."""
        return []

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
        check_texts(input_ids, attention_mask, self.config)
        pooled = pooled_positions(input_ids, attention_mask, self.config.eos_token_id)
        is_word = torch.arange(input_ids.shape[1], device=input_ids.device) < pooled[:, None]
        is_word = is_word & (input_ids != self.config.bos_token_id)
        if attention_mask is not None:
            is_word = is_word & attention_mask.bool()
        hidden_states = embed_tokens(self.token_embedding, input_ids)
        weights = is_word.to(hidden_states.dtype) / is_word.sum(dim=1, keepdim=True).clamp(min=1)
        # (batch, 1, length) @ (batch, length, hidden) -> (batch, hidden)
        mean = (weights[:, None].to(hidden_states.dtype) @ hidden_states)[:, 0]
        return BaseModelOutputWithPooling(last_hidden_state=hidden_states, pooler_output=self.final_layer_norm(mean))

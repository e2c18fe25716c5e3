"""The text towers, with the parameter names of transformers' `CLIPModel`.

    input_ids    -> tokens, positions -> causal blocks -> LayerNorm -> first end-of-text token -> pooled

Departures from transformers' `CLIPModel`, all exact to float tolerance:

- Text is packed. In a causal tower nothing after the end-of-text token can change the embedding, so a batch of
  captions is computed as one flat list of its real tokens; only attention sees a padded form.
- Where only the embedding is asked for and the texts of a batch are of one length, the last block computes the
  end-of-text tokens alone.
"""

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedConfig
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_hfclip import HFCLIPBagOfWordsConfig, HFCLIPTextConfig
from .layers_hfclip import is_exporting, is_on_host, with_init_std
from .modeling_hfclip_transformer import HFCLIPEncoder, HFCLIPPreTrainedModel
from .packing_hfclip import (
    PackedTexts,
    count_from_first_real,
    pooled_positions,
    real_tokens_first,
    without_left_padding,
)


TOKENS_WORTH_A_WAIT = 4096  # padded tokens of a batch on a GPU, from which on its host waits to learn their lengths


class HFCLIPTextEmbeddings(nn.Module):
    """Tokens and learned positions, and after them a class token where the tower pools one."""

    def __init__(self, config: HFCLIPTextConfig):
        super().__init__()
        has_class = config.pooling == "class"
        self.token_embedding = with_init_std(nn.Embedding(config.vocab_size, config.hidden_size), 0.02)
        positions = nn.Embedding(config.max_position_embeddings + has_class, config.hidden_size)
        self.position_embedding = with_init_std(positions, 0.01)
        self.class_embedding = nn.Parameter(torch.empty(config.hidden_size)) if has_class else None
        self.init_std = 0.01

    def forward(self, input_ids: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        embeddings = embed_tokens(self.token_embedding, input_ids) + self.position_embedding(position_ids)
        if self.class_embedding is None:
            return embeddings
        last = position_ids.new_tensor([self.position_embedding.num_embeddings - 1])
        class_token = (self.class_embedding + self.position_embedding(last)).expand(input_ids.shape[0], 1, -1)
        return torch.cat([embeddings, class_token], dim=1)


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


def asks_for_all_positions(config: PreTrainedConfig, kwargs: dict) -> bool:
    """Whether hidden states or attention weights are to be returned, which packed texts do not have."""
    names = ("output_hidden_states", "output_attentions")
    return any(kwargs.get(name, getattr(config, name, False)) for name in names)


class HFCLIPTextModel(HFCLIPPreTrainedModel):
    """Causal text transformer. Its pooled output is the first end-of-text token after the last LayerNorm."""

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
        seen = self._seen_by_class_token(input_ids) if self.config.pooling == "class" else None
        hidden_states = self._encode(input_ids, seen, position_ids, causal=self.config.causal, **kwargs)
        if self.config.pooling == "eos":
            rows = torch.arange(input_ids.shape[0], device=input_ids.device)
            pooled = hidden_states[rows, pooled_positions(input_ids, None, self.config.eos_token_id)]
        else:
            pooled = hidden_states[:, 0 if self.config.pooling == "first" else -1]
        return BaseModelOutputWithPooling(last_hidden_state=hidden_states, pooler_output=pooled)

    def _seen_by_class_token(self, input_ids: torch.Tensor) -> torch.Tensor:
        """(batch, context) ids -> (batch, context + 1) mask of the positions that may be seen.

        Padding may not, but for its first token: OpenCLIP's mask lies one position late, and its weights are trained so.
        """
        if "flash" in (self.config._attn_implementation or ""):
            raise ValueError(
                "found attn_implementation='flash_attention', expected 'sdpa' or 'eager' for pooling='class'."
            )
        return F.pad((input_ids != self.config.pad_token_id).long(), (1, 0), value=1)


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

        The words of a caption are the tokens before its first end-of-text token, without the start token.
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

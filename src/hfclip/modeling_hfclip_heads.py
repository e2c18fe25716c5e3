"""Towers alone: with their projection, or as a classifier of images."""

from dataclasses import dataclass

import torch
from torch import nn
from transformers.modeling_outputs import ImageClassifierOutput
from transformers.processing_utils import Unpack
from transformers.utils import ModelOutput, TransformersKwargs
from transformers.utils.generic import can_return_tuple

from .configuration_hfclip import HFCLIPConfig, HFCLIPTextConfig, HFCLIPVisionConfig
from .layers_hfclip import with_init_std
from .modeling_hfclip_text import HFCLIPTextModel
from .modeling_hfclip_transformer import HFCLIPPreTrainedModel, HFCLIPVisionModel
from .projection_hfclip import projection, tower_width
from .towers_hfclip import TOWERS, build_tower, only_base_fields, pool


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
        self.text_projection = projection(config.hidden_size, config.projection_dim, config.projection_type)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> HFCLIPTextModelOutput:
        """`text_embeds` (batch, projection_dim), not normalised; see `HFCLIPTextModel.forward`."""
        kwargs["return_dict"] = True
        outputs = self.text_model(input_ids, attention_mask, position_ids, **kwargs)
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
        self.visual_projection = projection(tower_width(config), config.projection_dim, config.projection_type)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        interpolate_pos_encoding: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
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
            self.classifier = with_init_std(nn.Linear(width, config.num_labels), width**-0.5)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.vision_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.vision_model.set_input_embeddings(value)

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
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

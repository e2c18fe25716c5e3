"""The dual encoder and its heads: two towers, two projections, one space.

    pixel_values -> image tower -> pooled -> visual_projection -> unit length -> image_embeds
    input_ids    -> text tower  -> pooled -> text_projection   -> unit length -> text_embeds
    logits_per_image = exp(logit_scale) * image_embeds @ text_embeds.T (+ logit_bias)

A tower is ours or any of transformers (`towers_hfclip`), then pooled by a named rule.
"""

import math
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.processing_utils import Unpack
from transformers.utils import ModelOutput, TransformersKwargs
from transformers.utils.generic import can_return_tuple

from .configuration_hfclip import HFCLIPConfig
from .families_hfclip import NAFLEX_INPUTS, Family, family_of, require_joint_space
from .foreign_hfclip import foreign, is_foreign, pinned
from .modeling_hfclip_transformer import HFCLIPPreTrainedModel
from .packing_hfclip import without_left_padding
from .projection_hfclip import projection_of
from .towers_hfclip import TOWERS, build_tower, pooled_by


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


def at_least_float32(values: torch.Tensor) -> torch.Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))


def unit_length(embeds: torch.Tensor) -> torch.Tensor:
    """Normalises in float32 (or better): in half precision the norm itself would carry the error."""
    precise = at_least_float32(embeds)
    return (precise / precise.norm(dim=-1, keepdim=True)).to(embeds.dtype)


class HFCLIPModel(HFCLIPPreTrainedModel):
    """CLIP: an image tower and a text tower that map into one space.

    `from_pretrained` opens folders saved by this class and by transformers' dual encoders (`families_hfclip`). `family` is
    the one whose files are read into the new model: tensors that it leaves out, and the shape of its scale and bias.
    """

    def __init__(self, config: HFCLIPConfig, family: Family | None = None):
        super().__init__(config)
        scalar_shape = (1,) if family is not None and family.sigmoid else ()
        if family is not None:
            self._keys_to_ignore_on_load_unexpected = [*self._keys_to_ignore_on_load_unexpected, *family.left_out]
        self.text_model = build_tower(config.text_config)
        self.vision_model = build_tower(config.vision_config)
        if config.text_config.model_type not in TOWERS and config.text_pooling != "pooler":
            # Its pooling layer would never be used, and have no gradient.
            self.text_model.pooler = None
        self.visual_projection = projection_of(config, "vision")
        self.text_projection = projection_of(config, "text")
        self.logit_scale = nn.Parameter(torch.empty(scalar_shape))
        self.logit_bias = None if config.logit_bias_init_value is None else nn.Parameter(torch.empty(scalar_shape))
        self._frozen_towers: list[nn.Module] = []
        self._freeze_unused()
        self.post_init()

    def _freeze_unused(self) -> None:
        """Parameters that are never used would have no gradient, an error under data parallelism. Loading forgets it."""
        parts = (name for name, _ in self.named_parameters() if name.endswith(".mask_token"))
        unused = [*parts, *(["vision_model.pooler"] if self.config.vision_pooling != "pooler" else [])]
        for name, part in (*self.named_parameters(), *self.named_modules()):
            if name in unused:
                part.requires_grad_(False)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if module is self:
            init.constant_(self.logit_scale, self.config.logit_scale_init_value)
            if self.logit_bias is not None:
                init.constant_(self.logit_bias, self.config.logit_bias_init_value)

    def get_input_embeddings(self) -> nn.Module:
        """The token embedding, as tools for language models (resizing, quantisation) expect it."""
        return self.text_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.text_model.set_input_embeddings(value)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path=None,
        *args,
        key_mapping: dict[str, str] | None = None,
        output_loading_info: bool = False,
        **kwargs,
    ) -> "HFCLIPModel":
        """Opens a folder or a Hub name, see `PreTrainedModel.from_pretrained`, or a checkpoint of OpenAI or OpenCLIP.

        Args:
            pretrained_model_name_or_path: hfclip's own, one of transformers' dual encoders (`families_hfclip`), or of a
                checkpoint the file (`ViT-B-32.pt`, `epoch_32.pt`), or the folder or Hub name with
                `open_clip_config.json`. That is read as data; nothing is converted on disk.
            architecture: Of a training checkpoint: OpenCLIP's name, such as "ViT-B-32-quickgelu", or its JSON file.
            weights: Of a training checkpoint with several sets of weights, which, such as "state_dict".
            tokenizer: Of a checkpoint without: folder, Hub name, or OpenAI's `bpe_simple_vocab_16e6.txt.gz`.
            text_model: Folder or Hub name of the config of a text tower of transformers.

        Raises:
            ValueError: projections, scale or bias are missing, and would be random. With `output_loading_info=True` the
                caller is told, as of all weights that are missing.
        """
        name = pretrained_model_name_or_path
        kwargs = pinned(name, kwargs)
        if is_foreign(name, kwargs):
            return foreign(name).open_model(cls, name, output_loading_info=output_loading_info, **kwargs)
        family, written = family_of(name, kwargs)
        # Dual encoders that transformers 4 wrote hold CLIP's towers one level deeper.
        names = {rf"^{tower}\.{tower}\.": f"{tower}." for tower in ("vision_model", "text_model")}
        if family is not None:
            names |= family.names | ({r"^temperature$": "logit_scale"} if family.temperature else {})
            kwargs |= {"family": family}
        names |= key_mapping or {}
        model, report = super().from_pretrained(name, *args, key_mapping=names, output_loading_info=True, **kwargs)
        if name is not None and not output_loading_info:
            require_joint_space(name, family, report["missing_keys"])
        if family is not None:
            model._read_scalars(family, written, report["missing_keys"])
        model._freeze_unused()
        return (model, report) if output_loading_info else model

    @torch.no_grad()
    def _read_scalars(self, family: Family, written: dict, missing: set[str]) -> None:
        """Brings scale and bias, as they were read from a family's file, into the form that they have here."""
        for scalar in ("logit_scale", "logit_bias") if family.sigmoid else ():
            setattr(self, scalar, nn.Parameter(getattr(self, scalar).reshape(())))
        if family.temperature and "logit_scale" not in missing:
            self.logit_scale.copy_(-self.logit_scale.double().log())
        if family.limited:
            self.logit_scale.clamp_(0, math.log(written.get("max_logit_scale", 100.0)))

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
        # Under the names that they have here, not under those of another family's file that they were read from.
        super().save_pretrained(save_directory, *args, **{"save_original_format": False, **kwargs})

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
        config = self.config.text_config
        if position_ids is not None:
            kwargs["position_ids"] = position_ids
        context = getattr(config, "max_position_embeddings", None)
        if attention_mask is not None and context is not None and input_ids.shape[1] > context:
            # Padded to the context of another model, as SigLIP's are by pipelines.
            if not attention_mask[:, context:].any():
                input_ids, attention_mask = input_ids[:, :context], attention_mask[:, :context]
        if config.model_type not in TOWERS:
            if attention_mask is None:
                pad = getattr(config, "pad_token_id", None)
                attention_mask = torch.ones_like(input_ids) if pad is None else (input_ids != pad).long()
            # Foreign towers count positions from the first column: texts have to start there.
            input_ids, attention_mask = without_left_padding(input_ids, attention_mask)
            if self.config.text_reads_padding:
                missing = config.max_position_embeddings - input_ids.shape[1]
                input_ids, attention_mask = F.pad(input_ids, (0, max(0, missing)), value=config.pad_token_id), None
        outputs = self.text_model(input_ids=input_ids, attention_mask=attention_mask, return_dict=True, **kwargs)
        return pooled_by(self.config.text_pooling, outputs, attention_mask)

    def _vision_outputs(self, pixel_values, interpolate_pos_encoding=None, pooled_only=False, **kwargs):
        """The image tower's outputs, with `pooler_output` pooled by the config's rule but not projected."""
        if self.config.vision_config.model_type in TOWERS:
            kwargs.update(interpolate_pos_encoding=interpolate_pos_encoding, pooled_only=pooled_only)
        elif interpolate_pos_encoding is not None:
            kwargs.update(interpolate_pos_encoding=interpolate_pos_encoding)
        if self.config.is_naflex and not kwargs.keys() >= NAFLEX_INPUTS:
            raise ValueError(
                f"pixel_values: found them without {' and '.join(sorted(NAFLEX_INPUTS - kwargs.keys()))}, expected all "
                "that the model's own processor makes of images: NaFlex takes each in its own shape."
            )
        outputs = self.vision_model(pixel_values=pixel_values, return_dict=True, **kwargs)
        return pooled_by(self.config.vision_pooling, outputs)

    @can_return_tuple
    def get_text_features(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPooling:
        """As in transformers 5: `pooler_output` (batch, projection_dim) is projected and NOT normalised.

        `last_hidden_state` (batch, length, hidden) costs what the padding costs; `encode_text` does without both.
        """
        outputs = self._text_outputs(input_ids, attention_mask, position_ids, **kwargs)
        outputs.pooler_output = self.text_projection(outputs.pooler_output)
        return outputs

    @can_return_tuple
    def get_image_features(
        self,
        pixel_values: torch.Tensor,
        interpolate_pos_encoding: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPooling:
        """As in transformers 5: `pooler_output` (batch, projection_dim) is projected and NOT normalised."""
        outputs = self._vision_outputs(pixel_values, interpolate_pos_encoding, **kwargs)
        outputs.pooler_output = self.visual_projection(outputs.pooler_output)
        return outputs

    def encode_text(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        normalize: bool = True,
        text_lengths: list[int] | None = None,
    ) -> torch.Tensor:
        """(batch, length) token ids -> (batch, projection_dim) embeddings, unit length if `normalize`.

        Padding costs nothing in our text transformer. `text_lengths`: see `HFCLIPTextModel.forward`.
        """
        skipping = {}
        if self.config.packs_texts:
            skipping = {"skip_padding": True, "text_lengths": text_lengths, "pooled_only": True}
        embeds = self.text_projection(self._text_outputs(input_ids, attention_mask, **skipping).pooler_output)
        return unit_length(embeds) if normalize else embeds

    def encode_image(self, pixel_values: torch.Tensor, normalize: bool = True, **kwargs: torch.Tensor) -> torch.Tensor:
        """(batch, 3, height, width) pixels -> (batch, projection_dim) embeddings, unit length if `normalize`.

        `kwargs`: what the tower takes beside pixels, such as NaFlex's `pixel_attention_mask` and `spatial_shapes`.
        """
        embeds = self.visual_projection(self._vision_outputs(pixel_values, pooled_only=True, **kwargs).pooler_output)
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
        text_lengths: list[int] | None = None,
        image_embeds: torch.Tensor | None = None,
        text_embeds: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> HFCLIPOutput:
        """Embeddings and similarities of images and texts.

        Args:
            input_ids: (num_texts, length); attention_mask and position_ids likewise.
            pixel_values: (num_images, channels, height, width), normalised; for NaFlex all that its processor makes.
            return_loss: also compute the contrastive loss of this batch (sigmoid loss if there is a logit bias).
            embeds_only: compute `image_embeds` and `text_embeds` (those whose input is given) and nothing else;
                what a trainer needs, whose loss sees the batches of all processes.
            text_lengths: with `embeds_only`; see `HFCLIPTextModel.forward`.
            image_embeds: (num_images, projection_dim), unit length, known already; in place of `pixel_values`.
            text_embeds: (num_texts, projection_dim), unit length, known already; in place of `input_ids`.

        Returns:
            `HFCLIPOutput`. Logits are float32, also where embeddings are half precision.

        Raises:
            ValueError: an input is missing, given twice, or does not fit the model; `return_loss` without pairs.
            RuntimeError: `return_loss` in a run of several processes, where it would miss their negatives.
        """
        if embeds_only and (
            image_embeds is not None or text_embeds is not None or (input_ids is None and pixel_values is None)
        ):
            raise ValueError("embeds_only: expected input_ids, pixel_values or both, and no embeddings.")
        of_images = {key: kwargs.pop(key) for key in NAFLEX_INPUTS & kwargs.keys()}
        if embeds_only:
            return self._embeds_only(input_ids, pixel_values, attention_mask, text_lengths, **of_images)
        self._check_inputs(input_ids, pixel_values, image_embeds, text_embeds)
        vision_outputs = text_outputs = None
        if image_embeds is None:
            vision_outputs = self._vision_outputs(pixel_values, interpolate_pos_encoding, **of_images, **kwargs)
            image_embeds = unit_length(self.visual_projection(vision_outputs.pooler_output))
        if text_embeds is None:
            text_outputs = self._text_outputs(input_ids, attention_mask, position_ids, **kwargs)
            text_embeds = unit_length(self.text_projection(text_outputs.pooler_output))
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

    def _embeds_only(self, input_ids, pixel_values, attention_mask, text_lengths, **of_images) -> HFCLIPOutput:
        """Embeddings of those of images and texts that are given."""
        image_embeds = text_embeds = None
        if pixel_values is not None:
            image_embeds = self.encode_image(pixel_values, **of_images)
        if input_ids is not None:
            text_embeds = self.encode_text(input_ids, attention_mask, text_lengths=text_lengths)
        return HFCLIPOutput(image_embeds=image_embeds, text_embeds=text_embeds)

    def _check_inputs(self, input_ids, pixel_values, image_embeds, text_embeds) -> None:
        """Raises ValueError unless images and texts are each given once, and embeddings can be this model's."""
        if (input_ids is None) == (text_embeds is None) or (pixel_values is None) == (image_embeds is None):
            raise ValueError(
                "You have to specify input_ids and pixel_values, or text_embeds and image_embeds in their place. For "
                "the embeddings of one of the two use encode_text, encode_image, or embeds_only=True."
            )
        dim = self.config.projection_dim
        for name, embeds in (("image_embeds", image_embeds), ("text_embeds", text_embeds)):
            found = tuple(embeds.shape) if isinstance(embeds, torch.Tensor) else type(embeds).__name__
            if embeds is not None and list(found[1:]) != [dim]:
                raise ValueError(f"{name}: found {found}, expected a tensor (number, {dim}) of unit embeddings.")

    def similarities(self, image_embeds: torch.Tensor, text_embeds: torch.Tensor) -> torch.Tensor:
        """(num_images, num_texts) logits of unit embeddings: scaled cosines, plus the bias if there is one.

        In float32 (or better), under autocast too: the ranking of many labels does not survive half precision.
        """
        device = image_embeds.device
        has_autocast = torch.amp.is_autocast_available(device.type)
        with torch.autocast(device.type, enabled=False) if has_autocast else nullcontext():
            images, texts = at_least_float32(image_embeds), at_least_float32(text_embeds.to(device))
            texts = texts.to(images.dtype)
            logits = images @ texts.t() * self.logit_scale.to(images.dtype).exp()
            return logits if self.logit_bias is None else logits + self.logit_bias.to(images.dtype)

    def _local_loss(self, logits_per_image: torch.Tensor) -> torch.Tensor:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            if torch.distributed.get_world_size() > 1:
                raise RuntimeError(
                    "return_loss=True sees the pairs of one process only, and there are "
                    f"{torch.distributed.get_world_size()}. Use hfclip.contrastive_loss or hfclip.sigmoid_loss on "
                    "image_embeds and text_embeds: they are exact over all processes."
                )
        num_images, num_texts = logits_per_image.shape
        if num_images != num_texts:
            raise ValueError(
                f"return_loss: found {num_images} images and {num_texts} texts, expected pairs: text i of image i."
            )
        logits = logits_per_image
        if self.logit_bias is not None:
            signs = 2 * torch.eye(len(logits), device=logits.device) - 1
            return -F.logsigmoid(signs * logits).sum() / len(logits)
        targets = torch.arange(len(logits), device=logits.device)
        return (F.cross_entropy(logits, targets) + F.cross_entropy(logits.t(), targets)) / 2

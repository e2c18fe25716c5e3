"""Dual encoders of other libraries, evaluated beside ours: what is in memory becomes what `evaluate` takes.

    model, _, preprocess = open_clip.create_model_and_transforms("ViT-B-32", "laion2b_s34b_b79k")
    adapted = adapt(model, preprocess, open_clip.get_tokenizer("ViT-B-32"), name="ViT-B-32 laion2b")

    model, processor = SiglipModel.from_pretrained(name), AutoProcessor.from_pretrained(name)
    adapted = adapt_transformers(model, processor, name=name)

    evaluate("zero-shot", adapted, "cifar10/test")

Any other model needs four functions: an image to pixels, texts to tokens, and a batch of either to embeddings.
"""

import math
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import BatchEncoding, PreTrainedConfig, PreTrainedModel

from .running import OpenModel


def adapt(
    model: nn.Module,
    preprocess: Callable[[Any], Tensor],
    tokenize: Callable[[list[str]], Tensor],
    *,
    name: str,
    encode_image: Callable[[Tensor], Tensor] | None = None,
    encode_text: Callable[[Tensor], Tensor] | None = None,
) -> OpenModel:
    """A model of another library for `evaluate`.

    Args:
        model: its weights, its `logit_scale` (a logarithm; ln 100 if it has none) and `logit_bias` are used.
        preprocess: a PIL image to pixels (3, height, width).
        tokenize: texts to ids (num_texts, context), filled up to the whole context.
        name: under which its results are kept.
        encode_image, encode_text: pixels (batch, 3, height, width), or ids, to embeddings (batch, dim) of any length.
            None: the model's methods of these names, as OpenCLIP's models have them.
    """
    encoders = encode_image or model.encode_image, encode_text or model.encode_text
    adapted = _AdaptedModel(model, *encoders, tokenize([""]))
    return OpenModel(adapted.eval(), _AdaptedProcessor(preprocess, tokenize, adapted.config), name)


def adapt_transformers(model: PreTrainedModel, processor: Any, *, name: str) -> OpenModel:
    """A dual encoder of transformers with `get_image_features` and `get_text_features`, for `evaluate`.

    For those that `HFCLIPModel.from_pretrained` does not open; texts are filled up to the whole context, without a mask.
    """
    options = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
    return adapt(
        model,
        lambda image: processor(images=image, return_tensors="pt")["pixel_values"][0],
        lambda texts: processor(text=texts, **options)["input_ids"],
        name=name,
        encode_image=lambda pixels: model.get_image_features(pixel_values=pixels).pooler_output,
        encode_text=lambda ids: model.get_text_features(input_ids=ids).pooler_output,
    )


class _AdaptedModel(nn.Module):
    """What `hfclip.embeddings.embed` and zero-shot classification call of a model."""

    def __init__(self, model: nn.Module, encode_image: Callable, encode_text: Callable, ids: Tensor):
        super().__init__()
        self.model, self.image_encoder, self.text_encoder = model, encode_image, encode_text
        scale, bias = getattr(model, "logit_scale", None), getattr(model, "logit_bias", None)
        self.logit_scale = torch.tensor(math.log(100)) if scale is None else scale.detach().squeeze()
        self.logit_bias = None if bias is None else bias.detach().squeeze()
        first = next(model.parameters())
        self.device, self.dtype = first.device, first.dtype
        with torch.no_grad():
            dim = encode_text(ids.to(self.device)).shape[-1]
        text = PreTrainedConfig(max_position_embeddings=ids.shape[1])
        self.config = PreTrainedConfig(
            projection_dim=dim, packs_texts=False, text_config=text, vision_config=PreTrainedConfig()
        )

    def get_image_features(self, pixel_values: Tensor) -> SimpleNamespace:
        return SimpleNamespace(pooler_output=self.image_encoder(pixel_values))

    def get_text_features(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> SimpleNamespace:
        return SimpleNamespace(pooler_output=self.text_encoder(input_ids))

    def encode_image(self, pixel_values: Tensor, normalize: bool = True) -> Tensor:
        embeds = self.image_encoder(pixel_values)
        return F.normalize(embeds, dim=-1) if normalize else embeds

    def encode_text(self, input_ids: Tensor, attention_mask: Tensor | None = None, normalize: bool = True) -> Tensor:
        embeds = self.text_encoder(input_ids)
        return F.normalize(embeds, dim=-1) if normalize else embeds

    def forward(self, image_embeds: Tensor, text_embeds: Tensor) -> SimpleNamespace:
        logits = self.logit_scale.exp() * image_embeds @ text_embeds.T
        logits = logits if self.logit_bias is None else logits + self.logit_bias
        return SimpleNamespace(logits_per_image=logits, logits_per_text=logits.T)


class _AdaptedProcessor:
    """What evaluations call of a processor; padding and truncation are the library's own."""

    def __init__(self, preprocess: Callable, tokenize: Callable, config: PreTrainedConfig):
        self.preprocess, self.tokenize = preprocess, tokenize
        context = config.text_config.max_position_embeddings
        # Told by what it does to some words: a library's tokenizer has no common way of saying which one it is.
        self.tokenizer = SimpleNamespace(
            model_max_length=context,
            eos_token_id=None,
            get_vocab=lambda: self.tokenize(["a photo of a cat."]).tolist(),
        )

    def __call__(self, text: Sequence[str] | None = None, images: Any = None, **padding) -> BatchEncoding:
        if text is not None:
            return BatchEncoding({"input_ids": self.tokenize(list(text))})
        images = images if isinstance(images, list) else [images]
        return BatchEncoding({"pixel_values": torch.stack([self.preprocess(image) for image in images])})

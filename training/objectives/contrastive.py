"""Images and texts that find each other among those of the global batch."""

import torch
from torch import Tensor, nn

from hfclip.losses import LOSSES

from ..config import Config
from .base import Objective


class Contrastive(Objective):
    """The loss that `optim.loss` names, on unit embeddings."""

    def __init__(self, config: Config):
        self.function, scalars = LOSSES[config.optim.loss]
        self.scalars, self.exchange = tuple(scalars), config.optim.exchange

    def embed(self, model: nn.Module, part: dict) -> tuple[Tensor, Tensor]:
        """Images and texts (size, dim). Under autocast in half precision; the loss and the cached gradients are not."""
        names = ("input_ids", "attention_mask", "pixel_values")
        output = model(**{name: part[name] for name in names}, embeds_only=True, text_lengths=part.get("text_lengths"))
        images, texts = output.image_embeds, output.text_embeds
        dtype = torch.promote_types(images.dtype, torch.float32)
        return images.to(dtype), texts.to(dtype)

    def loss_inputs(self, parts: list[dict]) -> dict:
        return {"group_id": torch.cat([part["group_id"] for part in parts])} if "group_id" in parts[0] else {}

    def loss(self, embeds: tuple[Tensor, ...], scalars: dict[str, Tensor], inputs: dict) -> Tensor:
        return self.loss_of_factors(embeds, self.factors(scalars), inputs)

    def factors(self, scalars: dict[str, Tensor]) -> list[Tensor]:
        """The scalars as losses take them."""
        return [value.exp() if name == "logit_scale" else value for name, value in scalars.items()]

    def loss_of_factors(self, embeds: tuple[Tensor, ...], factors: list[Tensor], inputs: dict) -> Tensor:
        return self.function(*embeds, *factors, group_id=inputs.get("group_id"), exchange=self.exchange)

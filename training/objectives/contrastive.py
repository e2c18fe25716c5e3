"""Images and texts that find each other among those of the global batch."""

import torch
from torch import Tensor, nn

from hfclip import HFCLIPConfig
from hfclip.errors import UsageError
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


def fit_scalars(architecture: HFCLIPConfig, config: Config) -> None:
    """Gives a new model the learnable scalars that its loss reads.

    Raises:
        UsageError: for an unknown loss, a checkpoint without its scalars, or scalars that it would leave untrained.
    """
    name = config.optim.loss
    if name not in LOSSES:
        raise UsageError(f"optim.loss: found {name!r}, expected one of {', '.join(map(repr, LOSSES))}.")
    known = {scalar for loss in LOSSES.values() for scalar in loss.scalars}
    present = {scalar for scalar in known if getattr(architecture, f"{scalar}_init_value") is not None}
    needed = LOSSES[name].scalars
    fitting = " or ".join(other for other, loss in LOSSES.items() if present == set(loss.scalars))
    for scalar in sorted(present - set(needed)):
        raise UsageError(f"optim.loss: {name} leaves the model's {scalar} untrained. Use {fitting}.")
    for scalar in sorted(set(needed) - present):
        if config.model.checkpoint is not None:
            raise UsageError(f"optim.loss: {name} needs a {scalar}, which this checkpoint has not. Use {fitting}.")
        architecture.update({f"{other}_init_value": value for other, value in needed.items()})

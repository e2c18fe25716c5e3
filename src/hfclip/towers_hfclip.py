"""Towers of any type: built from a config, pooled by a named rule.

Ours are in `TOWERS`; all others are transformers'.
"""

import torch
import transformers
from torch import nn
from transformers import AutoModel, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import ModelOutput

from .families_hfclip import OMITTED_TOWERS
from .modeling_hfclip_resnet import HFCLIPResNetModel
from .modeling_hfclip_text import HFCLIPBagOfWordsModel, HFCLIPTextModel
from .modeling_hfclip_transformer import HFCLIPVisionModel


TOWERS = {
    tower.config_class.model_type: tower
    for tower in (HFCLIPTextModel, HFCLIPBagOfWordsModel, HFCLIPVisionModel, HFCLIPResNetModel)
}


def build_tower(config) -> PreTrainedModel:
    """Our tower for our config types, AutoModel's for all others, and transformers' own where AutoModel omits it.

    Of an encoder-decoder (mT5, NLLB) the encoder.
    """
    if config.model_type in TOWERS:
        return TOWERS[config.model_type]._from_config(config)
    if config.model_type in OMITTED_TOWERS:
        tower = getattr(transformers, OMITTED_TOWERS[config.model_type])._from_config(config)
    else:
        tower = AutoModel.from_config(config)
    if config.model_type == "aimv2_text_model":  # transformers masks what follows only where a text is padded
        for module in tower.modules():
            module.is_causal = True
    return tower.get_encoder() if config.is_encoder_decoder else tower


def blocks_of(tower: PreTrainedModel) -> list[nn.Module] | None:
    """A tower's blocks from the input up, as its `blocks()` says, or the items of its largest list of modules; or None."""
    if hasattr(type(tower), "blocks"):
        return tower.blocks()
    lists = [list(module) for module in tower.modules() if isinstance(module, nn.ModuleList)]
    # Lists inside of a block hold fewer parameters.
    return max(lists, key=lambda found: sum(p.numel() for block in found for p in block.parameters()), default=None)


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


def pooled_by(
    rule: str, outputs: ModelOutput, attention_mask: torch.Tensor | None = None
) -> BaseModelOutputWithPooling:
    """A tower's outputs with the `pooler_output` (batch, hidden) of a named rule."""
    is_there = type(outputs) is BaseModelOutputWithPooling and outputs.pooler_output is not None
    if rule == "pooler" and is_there:
        return outputs
    return BaseModelOutputWithPooling(
        **{**only_base_fields(outputs), "pooler_output": pool(outputs, rule, attention_mask)}
    )


def only_base_fields(outputs: ModelOutput) -> dict[str, torch.Tensor]:
    """The fields of a tower's outputs that all towers share."""
    fields = ("last_hidden_state", "hidden_states", "attentions")
    return {name: getattr(outputs, name) for name in fields if getattr(outputs, name, None) is not None}

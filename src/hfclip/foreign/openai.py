"""OpenAI's checkpoints: the nine archives, and state dicts in their names."""

from functools import partial

from ..image_processing_hfclip import HFCLIPImageProcessor
from .checkpoints import Checkpoint, View
from .key_maps import CONSTANTS, hfclip_items, openai_config
from .plan import Choices, Plan
from .processors import openai_tokenizer


def plan_openai(checkpoint: Checkpoint, choices: Choices) -> Plan:
    """Finds the architecture of a checkpoint in OpenAI's names: from shapes, with QuickGELU and 64 units a head."""
    weights = View(checkpoint, {name: name for name in checkpoint if name.rpartition(".")[2] not in CONSTANTS})
    config = openai_config(weights.on_meta())
    image_processor = HFCLIPImageProcessor(size=config.image_size)
    build_tokenizer = partial(openai_tokenizer, config, choices.merges)
    return Plan(checkpoint, weights, hfclip_items, config, image_processor, build_tokenizer)

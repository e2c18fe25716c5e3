"""A checkpoint of another project as a model of ours: planned from its header, before a tensor is read.

checkpoint, and what the user says of it -> `Plan`: config, our names for its tensors, image processor, tokenizer
"""

from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..configuration_hfclip import TOWER_CONFIGS, HFCLIPConfig
from ..errors import UsageError, as_usage_error
from ..hub.check import mismatches
from ..image_processing_hfclip import HFCLIPImageProcessor
from .checkpoints import Checkpoint, View


Items = Callable[[Mapping[str, Tensor]], Iterable[tuple[str, Tensor]]]


@dataclass(frozen=True)
class Choices:
    """What the user says of a checkpoint that it does not say itself.

    folder: where settings and tokenizer lie beside the weights.
    architecture: OpenCLIP's name of it, or its JSON file.
    weights: which of several sets of weights.
    tokenizer, text_model: folder or Hub name of the tokenizer, and of the text tower's config.
    merges: OpenAI's file of byte pairs, in place of a tokenizer.
    """

    folder: Path | None = None
    architecture: str | None = None
    weights: str | None = None
    tokenizer: str | None = None
    merges: str | None = None
    text_model: str | None = None


@dataclass
class Plan:
    """What a checkpoint becomes.

    weights: the source's tensors in its own names.
    items: renames them; a generator, so that one tensor at a time is in memory.
    build_tokenizer: opens it, notes for the user beside it; a tower that reads its padding is told the tokenizer's.
    notes: what was assumed, for the user.
    model_cfg: OpenCLIP's settings.
    """

    checkpoint: Checkpoint
    weights: View
    items: Items
    config: HFCLIPConfig
    image_processor: HFCLIPImageProcessor
    build_tokenizer: Callable[[], tuple[Any, list[str]]]
    notes: list[str] = field(default_factory=list)
    model_cfg: dict[str, Any] = field(default_factory=dict)


def on_meta(model_class: type[PreTrainedModel], config: Any, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """The model without weights."""
    towers = [getattr(config, f"{name}_config", config) for name in ("text", "vision")]
    is_ours = all(tower.model_type in TOWER_CONFIGS for tower in towers)
    with nullcontext() if is_ours else as_usage_error("A tower cannot be built"), torch.device("meta"):
        model = model_class(config)
    return model if dtype is None else model.to(dtype)


def check_fit(layout: Mapping[str, Tensor], model: PreTrainedModel) -> None:
    """Raises UsageError unless `layout` is exactly the model's state dict, names and shapes."""
    expected = model.state_dict()
    found_shapes, shapes = ({n: list(t.shape) for n, t in tensors.items()} for tensors in (layout, expected))
    problems = mismatches(found_shapes, shapes)
    integers = [
        n for n, t in layout.items() if n in expected and expected[n].is_floating_point() > t.is_floating_point()
    ]
    problems += [f"{len(integers)} of whole numbers, such as {integers[0]}"] if integers else []
    if problems:
        raise UsageError(f"The tensors do not fit the architecture that they tell: {'; '.join(problems)}.")

"""What a model takes: its parameters, its FLOPs, and the bytes that autograd keeps between forward and backward pass.

All of it is measured on the model itself, without memory for it and without arithmetic, so that any tower is served.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode  # torch's documentation names it by this module
from transformers.modeling_layers import GradientCheckpointingLayer

from hfclip import HFCLIPConfig, HFCLIPModel
from hfclip.flops import ModelFlops

from .low_precision import halve_text_weights
from .model import checkpoint_activations
from .parallel import fsdp_units, loss_scalars


@dataclass(frozen=True)
class Parameters:
    """Parameters of a model: `total` and `trained` are their numbers, the others bytes."""

    total: int
    trained: int
    weights: int
    gradients: int
    copies: int  # in half precision, which autocast makes of linear layers and convolutions
    unit: int  # the largest part that FSDP2 puts together at a time


@dataclass(frozen=True)
class Kept:
    """Bytes of one pair between forward and backward pass."""

    total: float
    block: float
    """Of them in the largest block of a tower."""


class Towers:
    """What the towers of a model cost, measured without memory and without arithmetic."""

    def __init__(self, architecture: HFCLIPConfig, freeze: str = "none", bfloat16: Sequence[str] = ()):
        self.architecture, self.freeze, self.bfloat16, self._kept = architecture, freeze, bfloat16, {}

    def _on_meta(self) -> HFCLIPModel:
        with torch.device("meta"):
            model = HFCLIPModel(self.architecture)
        if "text_weights" in self.bfloat16:
            halve_text_weights(model)
        if self.freeze != "none":
            model.freeze(self.freeze)
        return model.train()

    @cached_property
    def flops(self) -> ModelFlops:
        return ModelFlops(self.architecture, self.freeze)

    @cached_property
    def parameters(self) -> Parameters:
        model = self._on_meta()
        parameters, units = list(model.parameters()), [list(unit.parameters()) for unit in fsdp_units(model)]
        inside = {id(p) for unit in [*units, loss_scalars(model)] for p in unit}
        units.append([p for p in parameters if id(p) not in inside])
        trained = [p for p in parameters if p.requires_grad]
        matrices = [m.weight for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
        return Parameters(
            total=sum(p.numel() for p in parameters),
            trained=sum(p.numel() for p in trained),
            weights=sum(p.nbytes for p in parameters),
            gradients=sum(p.nbytes for p in trained),
            copies=sum(p.nbytes // 2 for p in matrices if p.dtype == torch.float32),
            unit=max(sum(p.nbytes for p in unit) for unit in units),
        )

    def kept(self, half: bool, checkpointing: bool, text_tokens: int) -> Kept:
        """What a pair keeps whose text has `text_tokens` tokens on average; the longest of a batch fills the context."""
        key = half, checkpointing, text_tokens
        if key not in self._kept:
            model = self._on_meta()
            with FakeTensorMode(allow_non_fake_inputs=True):  # weights of shapes alone, on a device that has autocast
                model.to_empty(device="cpu")
            image, text = lambda n: _encode_images(model, n), lambda n: _encode_texts(model, n, text_tokens)
            parts = [kept_for_backward(model, image, 2, half), kept_for_backward(model, text, 64, half)]
            block = max(part.block for part in parts)
            if checkpointing:
                checkpoint_activations(model)
                parts = [kept_for_backward(model, image, 2, half), kept_for_backward(model, text, 64, half)]
            # With checkpointing, one block at a time is computed again.
            self._kept[key] = Kept(sum(part.total for part in parts) + block * checkpointing, block)
        return self._kept[key]


def _encode_images(model: HFCLIPModel, number: int) -> Tensor:
    vision = model.config.vision_config
    return model.encode_image(torch.zeros(number, getattr(vision, "num_channels", 3), *[vision.image_size] * 2))


def _encode_texts(model: HFCLIPModel, number: int, mean: int) -> Tensor:
    """Embeddings of texts that have `mean` tokens on average, one of which fills the context."""
    config = model.config.text_config
    longest = config.max_position_embeddings
    each, more = divmod(number * min(mean, longest) - longest, number - 1)
    lengths = torch.tensor([longest, *[each + 1] * more, *[each] * (number - 1 - more)])[:, None]
    places, end = torch.arange(longest), config.vocab_size - 1 if config.eos_token_id is None else config.eos_token_id
    return model.encode_text(torch.where(places == lengths - 1, end, 1), (places < lengths).long())


def kept_for_backward(model: nn.Module, encode: Callable[[int], Tensor], number: int, half: bool) -> Kept:
    """What autograd keeps of one input, on average: the difference that `number` more make, as weights count once."""
    once, twice = _kept_by(model, partial(encode, number), half), _kept_by(model, partial(encode, 2 * number), half)
    return Kept((twice.total - once.total) / number, (twice.block - once.block) / number)


def _kept_by(model: nn.Module, encode: Callable[[], Tensor], half: bool) -> Kept:
    storages, started, blocks = {}, [], [0]

    def keep(tensor: Tensor) -> Tensor:
        storages[id(tensor.untyped_storage())] = tensor.untyped_storage()  # held, lest its place is used again
        return tensor

    def end_of_block(*_) -> None:
        inside = list(storages.values())[started.pop() :]
        blocks.append(sum(storage.nbytes() for storage in inside))

    hooks = []
    for block in model.modules():
        if isinstance(block, GradientCheckpointingLayer):
            hooks.append(block.register_forward_pre_hook(lambda *_: started.append(len(storages))))
            hooks.append(block.register_forward_hook(end_of_block))
    saved = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with saved, torch.autocast("cpu", torch.bfloat16, enabled=half):
        embeds = encode()  # held, and what it keeps with it
    for hook in hooks:
        hook.remove()
    del embeds
    return Kept(sum(storage.nbytes() for storage in storages.values()), max(blocks))

"""A moving average of the weights, which is steadier than the weights themselves and often the better model.

The average is float32 whatever the weights are, and follows them in place: parameters may be plain, sharded (DTensor)
or wrapped for several processes, as they are when the average is made.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from hfclip.errors import UsageError

from .parallel import local_shard, shard_like


class EMA:
    """Averages of a model's trainable parameters and of its buffers of floating point (BatchNorm's statistics).

    Frozen parameters and integer buffers are the model's own. The memory is 4 bytes for each averaged number.

    Args:
        model: as it trains; the average starts from its weights.
        decay: of the average per step, between 0 and 1.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        self._live = _averaged(model)
        self._shadow = {name: tensor.detach().clone().float() for name, tensor in self._live.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Follows the weights after step `step` (from 0), with decay min(`decay`, (1 + step) / (10 + step)).

        The second is the usual warm-up: an average that began with random weights soon forgets them.
        """
        weight = 1 - min(self.decay, (1 + step) / (10 + step))
        shadow = [local_shard(tensor) for tensor in self._shadow.values()]
        live = [local_shard(tensor.detach()).to(torch.float32) for tensor in self._live.values()]
        torch._foreach_lerp_(shadow, live, weight)

    def state_dict(self) -> dict[str, Tensor]:
        """The averages by name: the tensors themselves, no copies."""
        return dict(self._shadow)

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Puts back what `state_dict` gave, or those tensors whole where the average is sharded.

        Raises:
            UsageError: if names or shapes are not those of this model.
        """
        shapes = {name: tuple(tensor.shape) for name, tensor in self._shadow.items()}
        found = {name: tuple(tensor.shape) for name, tensor in state.items()}
        wrong = sorted(name for name in shapes | found if shapes.get(name) != found.get(name))
        if wrong:
            name = wrong[0]
            raise UsageError(
                f"The saved average of the weights is of another model: {len(wrong)} tensors differ, first {name!r}, "
                f"found {found.get(name, 'none')}, expected {shapes.get(name, 'none')}."
            )
        for name, tensor in self._shadow.items():
            tensor.copy_(shard_like(state[name], tensor))

    @contextmanager
    @torch.no_grad()
    def swapped_in(self) -> Iterator[None]:
        """The model has the averages for weights inside of a `with` block.

        They are copied in place, in the weights' own type, since wrappers hold on to the tensors. The live weights wait
        beside them: a copy more.
        """
        live = {name: tensor.detach().clone() for name, tensor in self._live.items()}
        try:
            _fill(self._live, self._shadow)
            yield
        finally:
            _fill(self._live, live)


def _averaged(model: nn.Module) -> dict[str, Tensor]:
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return parameters | {name: b for name, b in model.named_buffers() if b.is_floating_point()}


def _fill(weights: dict[str, Tensor], values: dict[str, Tensor]) -> None:
    for name, tensor in weights.items():
        tensor.copy_(values[name])

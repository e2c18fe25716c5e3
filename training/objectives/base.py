"""What TrainingStep asks of an objective."""

from abc import ABC, abstractmethod
from collections.abc import Callable

from torch import Tensor, nn


class Objective(ABC):
    """How micro-batches become a loss. A part is a micro-batch on the device: what `Collate` gives, and `text_lengths`.

    An objective holds no weights: those that are trained are the model's, and are reached through its `forward`.
    """

    scalars: tuple[str, ...] = ()
    """The model's learnable scalars that `loss` is given, by name."""
    couples_pairs: bool = True
    """Whether the loss of a pair depends on other pairs. It is then computed once for all micro-batches of all
    processes, with the gradient cache. If not, it is the mean over the pairs of a part, and gradients of parts add up."""
    targets: Callable[[list[int], list[str]], dict[str, Tensor]] | None = None
    """Places of samples in the source and their captions -> further columns of the batch; pickled to the workers."""

    @abstractmethod
    def embed(self, model: nn.Module, part: dict) -> tuple[Tensor, ...]:
        """Tensors `(size, ...)` of a part with normalised `pixel_values`. The gradient cache calls it twice for each."""

    def loss_inputs(self, parts: list[dict]) -> dict:
        """What `loss` reads beside the embeddings of these parts, computed once; `pixel_values` are still uint8."""
        return {}

    @abstractmethod
    def loss(self, embeds: tuple[Tensor, ...], scalars: dict[str, Tensor], inputs: dict) -> Tensor:
        """The loss of the embeddings of all parts; if `couples_pairs`, the same value on every process, with gradients
        whose average over the processes is exact."""

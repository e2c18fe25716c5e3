"""Exact gradients of a contrastive batch that is larger than memory (gradient cache, arXiv:2101.06983).

The loss of a pair depends on every other pair, so the gradients of small batches do not add up to that of the large
one. But the loss needs the embeddings alone, and they are small:

    1. embed micro-batch by micro-batch, keeping no graph       -> embeddings of the whole batch
    2. the loss of the whole batch, and its backward pass       -> gradient of every embedding
    3. embed each micro-batch again, now with a graph, and send its embeddings' gradients backwards

Memory is that of one micro-batch and of the embeddings; the towers' forward pass is computed twice. Gradients are
those of the whole batch at once, to the order of summation: dropout draws the same numbers in both passes, processes
exchange embeddings once (in step 2) and gradients once (in the backward pass of the last micro-batch).

BatchNorm sees one micro-batch at a time, as it sees one process's share in data parallelism: statistics, and with them
the result, are those of micro-batches. The running statistics move once for each, in step 3.
"""

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TypeVar

import torch
from torch import Tensor


MicroBatch = TypeVar("MicroBatch")


def cached_backward(
    embed: Callable[[MicroBatch], tuple[Tensor, ...]],
    micro_batches: Sequence[MicroBatch],
    loss: Callable[..., Tensor],
    parameters: Sequence[Tensor] = (),
    *,
    buffers: Iterable[Tensor] = (),
    weights: Iterable[Tensor] = (),
    no_sync: Callable[[], AbstractContextManager] = nullcontext,
    first_pass: Callable[[], AbstractContextManager] = nullcontext,
    backward: Callable[[Tensor], None] = Tensor.backward,
) -> Tensor:
    """Adds the gradient of `loss` over all micro-batches together to the `grad` of every weight it depends on.

        def loss(images, texts, logit_scale):
            return contrastive_loss(images, texts, logit_scale.exp())

        cached_backward(embed, micro_batches, loss, [core.logit_scale], no_sync=model.no_sync)

    Args:
        embed: a micro-batch -> its embeddings, tensors `(size, ...)`, through the (possibly wrapped) model's `forward`.
            Called twice for each. What is random in it comes from torch's generators of the CPU and the accelerator.
        micro_batches: this process's part of the batch. Under FSDP as many on each process.
        loss: the embeddings of all micro-batches, joined along dimension 0, and stand-ins for `parameters` -> scalar.
        parameters: weights that the loss reads itself, such as `logit_scale`, by the stand-ins that it is given: a
            gradient that reached the weights before the last backward pass would miss its averaging.
        buffers: `model.buffers()`, put back after the first pass: running statistics move once for each micro-batch.
        weights: `model.parameters()`; gradients of those in half precision are summed in float32, at 4 bytes each.
        no_sync: context in which backward passes leave gradients unaveraged, for all micro-batches but the last.
        first_pass: context around the first pass, such as the autocast that `embed` enters: weights are cast once.
        backward: the loss's backward pass, e.g. with the scale of a gradient scaler. The factor reaches all gradients.

    Returns:
        The loss, detached. Raises ValueError without micro-batches.
    """
    if not micro_batches:
        raise ValueError("cached_backward: found no micro-batches, expected at least one.")
    with no_sync(), first_pass():
        joined, sizes, states = _embeddings_of_all(embed, micro_batches, buffers)
    stand_ins = [parameter.detach().requires_grad_(parameter.requires_grad) for parameter in parameters]
    value = loss(*joined, *stand_ins)
    backward(value)
    # (local_batch, ...) -> (size, ...) of each micro-batch; an embedding that the loss ignores has no gradient
    gradients = list(zip(*(_gradient(embeds).split(sizes) for embeds in joined), strict=True))

    sums = _Sums(weights)
    for i, (micro_batch, state, grads) in enumerate(zip(micro_batches, states, gradients, strict=True), start=1):
        is_last = i == len(micro_batches)
        with nullcontext() if is_last else no_sync():
            with _replayed(state):
                embeds = embed(micro_batch)
            if is_last:
                sums.put_back()
                embeds, grads = (*embeds, *parameters), (*grads, *map(_gradient, stand_ins))
            _send_back(embeds, grads)
            if not is_last:
                sums.take()
    return value.detach()


def _send_back(tensors: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
    """The backward pass from these tensors, but for those that need none: the embeddings of a locked tower."""
    pairs = [(tensor, gradient) for tensor, gradient in zip(tensors, gradients, strict=True) if tensor.requires_grad]
    torch.autograd.backward([tensor for tensor, _ in pairs], [gradient.to(t.dtype) for t, gradient in pairs])


@torch.no_grad()
def _embeddings_of_all(
    embed: Callable[[MicroBatch], tuple[Tensor, ...]], micro_batches: Sequence[MicroBatch], buffers: Iterable[Tensor]
) -> tuple[list[Tensor], list[int], list[dict]]:
    """Embeddings (local_batch, ...) as leaves, the sizes of the micro-batches, and the random state before each."""
    before = [(buffer, buffer.clone()) for buffer in buffers]
    parts, states = [], []
    for micro_batch in micro_batches:
        states.append(_random_state())
        parts.append(embed(micro_batch))
    for buffer, value in before:
        buffer.copy_(value)
    sizes = [len(part[0]) for part in parts]
    pieces = list(zip(*parts, strict=True))
    del parts
    # (size, ...) of each micro-batch -> (local_batch, ...), one kind after the other: never all of them twice
    joined = [torch.cat(pieces.pop(0)).requires_grad_() for _ in range(len(pieces))]
    return joined, sizes, states


class _Sums:
    """Float32 sums of the gradients of half-precision weights, which would lose what small ones add to them."""

    def __init__(self, weights: Iterable[Tensor]):
        self.weights = [weight for weight in weights if weight.requires_grad and weight.dtype.itemsize < 4]
        self.sums: dict[int, Tensor] = {}

    def take(self) -> None:
        """Moves what the weights' `grad` hold into the sums."""
        for i, weight in enumerate(self.weights):
            if weight.grad is not None:
                self.sums[i] = self.sums[i] + weight.grad if i in self.sums else weight.grad.float()
                weight.grad = None

    def put_back(self) -> None:
        """Moves the sums into the weights' `grad`, rounded once."""
        for i, value in self.sums.items():
            self.weights[i].grad = value.to(self.weights[i].dtype)


def _gradient(leaf: Tensor) -> Tensor:
    return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad


def _random_state() -> dict[torch.device | None, Tensor]:
    """States of the generators: the CPU's, and that of the accelerator in use, if there is one."""
    state = {None: torch.get_rng_state()}
    device = torch.accelerator.current_accelerator(check_available=True)
    if device is not None and device.type != "cpu":
        state[device] = torch.get_device_module(device).get_rng_state()
    return state


@contextmanager
def _replayed(state: dict[torch.device | None, Tensor]):
    """Draws from `state` inside, and goes on afterwards as if nothing had been drawn."""
    now = _random_state()
    _set_random_state(state)
    try:
        yield
    finally:
        _set_random_state(now)


def _set_random_state(state: dict[torch.device | None, Tensor]) -> None:
    for device, value in state.items():
        if device is None:
            torch.set_rng_state(value)
        else:
            torch.get_device_module(device).set_rng_state(value)

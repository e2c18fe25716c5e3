"""Global contrastive losses: pure functions of unit embeddings, scale and process group.

Every rank of the group holds `local_batch` pairs; together they are the global batch of N pairs, in rank order. Each
rank compares its own rows with the columns of all ranks, so no rank ever holds an N x N matrix: embeddings are
gathered once with gradient, the local `(local_batch, N)` logits are reduced to a sum over rows, and the sums of all
ranks make the loss. Batches of different size on different ranks are exact.

How the gathered gradient meets the averaging of data parallelism. Let W be the number of ranks, s_r the sum over the
rows of rank r, and L = (s_1 + ... + s_W) / N the loss of the global batch. Rank r returns the value L and sends the
gradient (W / N) ds_r backwards. An embedding e of rank r is a column of every rank; the backward pass of the gather
sums what all ranks have to say about it, so e receives (W / N) sum_q ds_q/de = W dL/de. A parameter used by every
rank, be it a weight of a tower or `logit_scale`, therefore holds on rank r its rank's share of W dL/dp, and the mean
over ranks, which DistributedDataParallel and FSDP take, is dL/dp: the gradient one process would find on the whole
batch. Where gradients are summed over ranks instead, divide the loss by W.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from numbers import Real

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def contrastive_loss(
    image_embeds: Tensor,
    text_embeds: Tensor,
    scale: Tensor | float,
    *,
    group: dist.ProcessGroup | None = None,
    group_id: Tensor | None = None,
) -> Tensor:
    """Symmetric InfoNCE of the global batch (CLIP, arXiv:2103.00020, figure 3).

    The mean over all N pairs of the group of (image->text + text->image cross-entropy) / 2, computed in float32
    (float64 for float64 embeddings) whatever autocast says. The value is the same on every rank; gradients averaged
    over the ranks are those of this value (see the module's docstring).

    Args:
        image_embeds: `(local_batch, dim)`, this rank's images, unit norm. The norm is trusted, not checked: a check
            would make the host wait for the device on every step.
        text_embeds: `(local_batch, dim)`, unit norm; row i belongs to image i.
        scale: factor on the cosines, exp(logit_scale): the inverse temperature, not its logarithm.
        group: ranks that share the batch and average their gradients. Default: all ranks if `torch.distributed` is
            initialised, else this process alone.
        group_id: `(local_batch,)` int64. Pairs with the same id, on any rank, are positives of each other, e.g. equal
            captions: the target of a row is uniform over its positives. If all ids differ, this is the plain loss.

    Returns:
        Scalar loss.

    Raises:
        TypeError: embeddings or `group_id` that are no tensors, a `scale` that is neither tensor nor number.
        ValueError: embeddings of different shape, not 2-D or not floating point, a `scale` of several elements,
            `group_id` of the wrong shape or dtype, ranks that disagree on dim, precision or use of `group_id` (on
            every rank), an empty global batch, or a rank outside `group`.
    """
    images, texts = _check_inputs(image_embeds, text_embeds, group_id)
    scale = _as_factor("scale", scale, images)
    batch = _GlobalBatch.agree(images, group_id is not None, group)
    # (local_batch, 2 * dim) -> (global_batch, 2 * dim): both towers in one collective
    columns = batch.gather(torch.cat([images, texts], dim=1))
    all_images, all_texts = columns.chunk(2, dim=1)
    positives = None if group_id is None else batch.positives(group_id, images.device)
    with torch.autocast(images.device.type, enabled=False):
        # (local_batch, dim) @ (dim, global_batch) -> (local_batch, global_batch). Scaling rows instead of logits keeps
        # one such matrix less for the backward pass; one process has all rows, so its texts' logits are at hand.
        image_logits = (scale * images) @ all_texts.T
        text_logits = image_logits.T if batch.group is None else (scale * texts) @ all_images.T
        image_sum = _cross_entropy_sum(image_logits, batch.start, positives)
        text_sum = _cross_entropy_sum(text_logits, batch.start, positives)
    return batch.mean((image_sum + text_sum) / 2)


def sigmoid_loss(
    image_embeds: Tensor,
    text_embeds: Tensor,
    scale: Tensor | float,
    bias: Tensor | float,
    *,
    group: dist.ProcessGroup | None = None,
    group_id: Tensor | None = None,
) -> Tensor:
    """Pairwise sigmoid loss of the global batch (SigLIP, arXiv:2303.15343, equation 1).

    The sum over all N x N image-text pairs of -log sigmoid(z (scale <x, y> + bias)), z = 1 for positives and -1
    otherwise, divided by N. Precision, value, gradients, `scale`, `group` and errors are those of
    [`contrastive_loss`].

    Args:
        image_embeds: `(local_batch, dim)`, this rank's images, unit norm (trusted, not checked).
        text_embeds: `(local_batch, dim)`, unit norm; row i belongs to image i.
        scale: factor on the cosines, exp(logit_scale).
        bias: added to every logit, `logit_bias`.
        group: ranks that share the batch and average their gradients.
        group_id: `(local_batch,)` int64. Pairs with the same id, on any rank, are positives of each other.

    Returns:
        Scalar loss.
    """
    images, texts = _check_inputs(image_embeds, text_embeds, group_id)
    scale, bias = _as_factor("scale", scale, images), _as_factor("bias", bias, images)
    batch = _GlobalBatch.agree(images, group_id is not None, group)
    all_texts = batch.gather(texts)
    positives = batch.positives(group_id, images.device)
    with torch.autocast(images.device.type, enabled=False):
        # (local_batch, dim) @ (dim, global_batch) -> (local_batch, global_batch)
        logits = (scale * images) @ all_texts.T + bias
        return batch.mean(-F.logsigmoid(torch.where(positives, logits, -logits)).sum())


def _cross_entropy_sum(logits: Tensor, start: int, positives: Tensor | None) -> Tensor:
    """Cross-entropy of each row of the logits, summed over rows; row i's own column is `start + i`.

    `logits` is `(local_batch, global_batch)`, and so is `positives`, bool, or None for the own column alone.
    """
    log_probs = F.log_softmax(logits, dim=1)
    if positives is None:
        own = torch.arange(start, start + len(logits), device=logits.device)
        return F.nll_loss(log_probs, own, reduction="sum")
    return -(log_probs.where(positives, 0).sum(dim=1) / positives.sum(dim=1)).sum()


@dataclass(frozen=True)
class _GlobalBatch:
    """What all ranks of `group` agree on: how many pairs each of them holds. One process alone has `group` None."""

    group: dist.ProcessGroup | None
    rank: int
    sizes: tuple[int, ...]

    @classmethod
    def agree(cls, embeds: Tensor, has_group_id: bool, group: dist.ProcessGroup | None) -> _GlobalBatch:
        """Exchange sizes; raise the same ValueError on every rank if the batches do not fit together."""
        records = [(*embeds.shape, embeds.element_size(), int(has_group_id))]
        rank = 0
        if dist.is_available() and dist.is_initialized():
            group = dist.group.WORLD if group is None else group
            rank = dist.get_rank(group)
            if rank < 0:
                raise ValueError(f"rank {dist.get_rank()} is not a member of `group`: pass a group it belongs to.")
            if dist.get_world_size(group) > 1:
                records = _exchange(records[0], embeds.device, group)
        elif group is not None:
            raise ValueError("`group` was given but torch.distributed is not initialised: call init_process_group.")
        if len({record[1:] for record in records}) > 1:
            found = "; ".join(
                f"rank {r}: embeddings ({size}, {dim}) of {8 * itemsize} bits, {'with' if ids else 'without'} group_id"
                for r, (size, dim, itemsize, ids) in enumerate(records)
            )
            raise ValueError(
                f"the ranks of a group must agree on dim, precision and use of group_id, but found {found}."
            )
        sizes = tuple(record[0] for record in records)
        if sum(sizes) == 0:
            raise ValueError(
                f"the global batch is empty (0 pairs on each of {len(sizes)} ranks): expected at least 1."
            )
        return cls(group if len(sizes) > 1 else None, rank, sizes)

    @property
    def start(self) -> int:
        """Global index of this rank's first pair."""
        return sum(self.sizes[: self.rank])

    def gather(self, rows: Tensor) -> Tensor:
        """`(local_batch, ...)` -> `(global_batch, ...)` in rank order, with gradient to the rank that owns a row."""
        if self.group is None:
            return rows
        longest = max(self.sizes)
        if min(self.sizes) == longest:
            return _AllGather.apply(rows, self.group)
        padded = torch.cat([rows, rows.new_zeros(longest - len(rows), *rows.shape[1:])])
        gathered = _AllGather.apply(padded, self.group)
        return torch.cat([gathered[r * longest : r * longest + size] for r, size in enumerate(self.sizes)])

    def positives(self, group_id: Tensor | None, device: torch.device) -> Tensor:
        """`(local_batch, global_batch)` bool: which columns belong to which row."""
        own = torch.arange(self.start, self.start + self.sizes[self.rank], device=device)
        if group_id is None:
            return own[:, None] == torch.arange(sum(self.sizes), device=device)
        group_id = group_id.to(device)
        return group_id[:, None] == self.gather(group_id)

    def mean(self, local_sum: Tensor) -> Tensor:
        """Sum over the rows of this rank -> mean over the rows of all ranks, gradient as the module says."""
        if self.group is None:
            return local_sum / sum(self.sizes)
        return _GlobalMean.apply(local_sum, sum(self.sizes), self.group)


class _AllGather(torch.autograd.Function):
    """`(rows, ...)` on each of W ranks -> `(W * rows, ...)` on all; backward sums over ranks and returns own rows."""

    @staticmethod
    def forward(ctx, local: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _all_gather(local, group)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        local = grad.new_empty(len(grad) // dist.get_world_size(ctx.group), *grad.shape[1:])
        # torch 2.13 renamed reduce_scatter_tensor and warns at the old name.
        reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
        reduce_scatter(local, grad.contiguous(), group=ctx.group)
        return local, None


class _GlobalMean(torch.autograd.Function):
    """Value sum over ranks / N, the same bits on every rank; gradient W / N to this rank's own sum."""

    @staticmethod
    def forward(ctx, local_sum: Tensor, total: int, group: dist.ProcessGroup) -> Tensor:
        ctx.factor = dist.get_world_size(group) / total
        value = local_sum.clone()
        dist.all_reduce(value, group=group)
        return value / total

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad * ctx.factor, None, None


def _all_gather(local: Tensor, group: dist.ProcessGroup) -> Tensor:
    gathered = local.new_empty(dist.get_world_size(group) * len(local), *local.shape[1:])
    # torch 2.13 renamed all_gather_into_tensor and warns at the old name.
    all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    all_gather(gathered, local.contiguous(), group=group)
    return gathered


def _exchange(record: tuple[int, ...], device: torch.device, group: dist.ProcessGroup) -> list[tuple[int, ...]]:
    """Each rank's `record`, in rank order. The host has to wait for the answer, since sizes decide shapes.

    On its own CUDA stream it waits for the other hosts only, not for the towers queued on the current stream.
    """
    stream = torch.cuda.stream(torch.cuda.Stream(device)) if device.type == "cuda" else nullcontext()
    with stream:
        records = _all_gather(torch.tensor([record], dtype=torch.int64, device=device), group)
        return [tuple(values) for values in records.tolist()]


def _check_inputs(image_embeds: Tensor, text_embeds: Tensor, group_id: Tensor | None) -> tuple[Tensor, Tensor]:
    """Both embeddings in float32, or in float64 if one of them is."""
    for name, value in (("image_embeds", image_embeds), ("text_embeds", text_embeds), ("group_id", group_id)):
        if not isinstance(value, Tensor) and not (name == "group_id" and value is None):
            raise TypeError(f"{name} must be a torch.Tensor, found {type(value).__name__}.")
    if image_embeds.ndim != 2 or image_embeds.shape != text_embeds.shape:
        raise ValueError(
            f"image_embeds is {tuple(image_embeds.shape)} and text_embeds {tuple(text_embeds.shape)}: expected the "
            "same (local_batch, dim) twice, row i of one belonging to row i of the other."
        )
    if not (image_embeds.is_floating_point() and text_embeds.is_floating_point()):
        raise ValueError(
            f"image_embeds is of {image_embeds.dtype} and text_embeds of {text_embeds.dtype}: expected floating point "
            "vectors of unit norm."
        )
    if group_id is not None and (group_id.shape != image_embeds.shape[:1] or group_id.dtype != torch.int64):
        raise ValueError(
            f"group_id is {tuple(group_id.shape)} of {group_id.dtype}: expected ({len(image_embeds)},) of "
            "torch.int64, one id for each pair of this rank."
        )
    dtype = torch.promote_types(torch.promote_types(image_embeds.dtype, text_embeds.dtype), torch.float32)
    return image_embeds.to(dtype), text_embeds.to(dtype)


def _as_factor(name: str, value: Tensor | float, like: Tensor) -> Tensor | float:
    """A float stays a float: turning it into a tensor would copy from host to device on every step."""
    if isinstance(value, Real):  # Python's numbers and numpy's
        return float(value)
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a number or a tensor of one element, found {type(value).__name__}.")
    if value.numel() != 1:
        raise ValueError(f"{name} must have one element, found shape {tuple(value.shape)}.")
    return value.to(like.dtype).reshape(())

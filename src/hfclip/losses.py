"""Global contrastive losses: pure functions of unit embeddings, scale and process group.

Every rank of the group holds `local_batch` pairs; together they are the global batch of N pairs, in rank order. The
logits are an N x N matrix, rows for images and columns for texts, that nobody ever holds. Rank r works through the
rows of its own images tile by tile, and one pass serves both directions: a tile adds to the sums of its rows, which
rank r completes alone, and to the sums of its columns, which all ranks complete together. The backward pass computes
each tile again and turns it into gradients of its rows and columns on the spot. Memory beyond the embeddings and
their gradients is a few tiles and a few numbers for each row and column.

Images stay where they are; texts come to them, in one of two ways. "gather" brings the texts of all ranks to every
rank with one collective, and sends their gradients home with another. "ring" passes the texts from rank to rank, the
sums or gradients of their columns with them, so that a rank holds those of two others at most: one at work, one
arriving. That saves memory where the embeddings of the global batch are large, and costs as many messages as there
are ranks. Batches of different size on different ranks are exact either way.

How the gradient meets the averaging of data parallelism. Let W be the number of ranks and L the loss of the global
batch. Every rank returns the value L. It sends backwards W dL/dS for the logits S of its own rows: each entry of the
matrix belongs to one rank. An embedding of rank r is a row on rank r and a column everywhere; the columns' gradients
are summed over the ranks, so every embedding e receives W dL/de. A parameter used by every rank, be it a weight of a
tower or `logit_scale`, therefore holds on rank r its rank's share of W dL/dp, and the mean over ranks, which
DistributedDataParallel and FSDP take, is dL/dp: the gradient one process would find on the whole batch. Where
gradients are summed over ranks instead, divide the loss by W.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from numbers import Real
from typing import Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor


# Rows and columns of a tile: on a CPU it stays in the cache, elsewhere it is large enough to be worth a launch.
CPU_TILE, DEVICE_TILE = 1024, 4096

# Powers of two cost a fraction of those of e; exp(x) = exp2(x / LN_2).
LN_2 = math.log(2)

Tensors = list[Tensor | None]


# Opaque to torch.compile, which would unroll the loops over tiles into one endless graph.
@torch.compiler.disable
def contrastive_loss(
    image_embeds: Tensor,
    text_embeds: Tensor,
    scale: Tensor | float,
    *,
    group: dist.ProcessGroup | None = None,
    group_id: Tensor | None = None,
    exchange: Literal["gather", "ring"] = "gather",
) -> Tensor:
    """Symmetric InfoNCE of the global batch (CLIP, arXiv:2103.00020, figure 3).

    The mean over all N pairs of the group of (image->text + text->image cross-entropy) / 2, computed in float32
    (float64 for float64 embeddings) whatever autocast says. The value is the same on every rank; gradients averaged
    over the ranks are those of this value (see the module's docstring). An input that requires no gradient, such as
    the embeddings of a locked tower, costs none. Second derivatives are refused.

    Args:
        image_embeds: `(local_batch, dim)`, this rank's images, unit norm. The norm is trusted, not checked: a check
            would make the host wait for the device on every step.
        text_embeds: `(local_batch, dim)`, unit norm; row i belongs to image i.
        scale: factor on the cosines, exp(logit_scale): the inverse temperature, not its logarithm.
        group: ranks that share the batch and average their gradients. Default: all ranks if `torch.distributed` is
            initialised, else this process alone.
        group_id: `(local_batch,)` int64. Pairs with the same id, on any rank, are positives of each other, e.g. equal
            captions: the target of a row is uniform over its positives. If all ids differ, this is the plain loss.
        exchange: how ranks come by each other's texts. "gather": every rank holds those of all. "ring": a rank holds
            those of two others at a time. Values agree to rounding.

    Returns:
        Scalar loss.

    Raises:
        TypeError: embeddings or `group_id` that are no tensors, a `scale` that is neither tensor nor number.
        ValueError: embeddings of different shape, not 2-D or not floating point, a `scale` of several elements,
            `group_id` of the wrong shape or dtype, an unknown `exchange`, ranks that disagree on dim, precision, use
            of `group_id`, need of the texts' gradients or `exchange` (on every rank), an empty global batch, or a
            rank outside `group`.
    """
    images, texts = _check_inputs(image_embeds, text_embeds, group_id)
    scale = as_factor("scale", scale, images)
    batch = agree(images, texts, group_id, exchange, group)
    ids = None if group_id is None else group_id.to(images.device)
    return _Contrastive.apply(images, texts, scale, ids, batch)


@torch.compiler.disable
def sigmoid_loss(
    image_embeds: Tensor,
    text_embeds: Tensor,
    scale: Tensor | float,
    bias: Tensor | float,
    *,
    group: dist.ProcessGroup | None = None,
    group_id: Tensor | None = None,
    exchange: Literal["gather", "ring"] = "gather",
) -> Tensor:
    """Pairwise sigmoid loss of the global batch (SigLIP, arXiv:2303.15343, equation 1).

    The sum over all N x N image-text pairs of -log sigmoid(z (scale <x, y> + bias)), z = 1 for positives and -1
    otherwise, divided by N. Precision, value, gradients, `scale`, `group`, `exchange` and errors are those of
    [`contrastive_loss`].

    Args:
        image_embeds: `(local_batch, dim)`, this rank's images, unit norm (trusted, not checked).
        text_embeds: `(local_batch, dim)`, unit norm; row i belongs to image i.
        scale: factor on the cosines, exp(logit_scale).
        bias: added to every logit, `logit_bias`.
        group: ranks that share the batch and average their gradients.
        group_id: `(local_batch,)` int64. Pairs with the same id, on any rank, are positives of each other.
        exchange: how ranks come by each other's texts.

    Returns:
        Scalar loss.
    """
    images, texts = _check_inputs(image_embeds, text_embeds, group_id)
    scale, bias = as_factor("scale", scale, images), as_factor("bias", bias, images)
    batch = agree(images, texts, group_id, exchange, group)
    ids = None if group_id is None else group_id.to(images.device)
    return _Sigmoid.apply(images, texts, scale, bias, ids, batch)


class _Contrastive(torch.autograd.Function):
    """Each row is reduced to its maximum and its sum of exponentials over all columns, and each column likewise.

    The two are kept apart instead of as one logarithm: the loss of a row, log(sum) + (maximum - target), then keeps
    its digits where the target is the maximum and the loss is small. Logits are in units of ln 2.
    """

    @staticmethod
    def forward(ctx, images: Tensor, texts: Tensor, scale: Tensor, ids: Tensor | None, batch: GlobalBatch) -> Tensor:
        columns, column_ids = batch.spread(texts), batch.spread(ids)
        row_max, column_max = _vector(images, -torch.inf), _vector(columns, -torch.inf)
        row_sum, column_sum = _vector(images, 0), _vector(columns, 0)
        target, num_positives = _vector(images, 0), _vector(images, 0 if ids is not None else 1)
        factor = scale / LN_2

        def visit(offset: int, read: Tensors, carry: Tensors) -> None:
            (columns, column_ids), (column_max, column_sum) = read, carry
            if ids is not None:
                num_positives.add_(_count(ids, column_ids))
            for rows, cols in tiles(images, columns):
                logits = (images[rows] @ columns[cols].T).mul_(factor)
                add_exponentials(row_max[rows], row_sum[rows], logits, dim=1)
                add_exponentials(column_max[cols], column_sum[cols], logits, dim=0)
                positive = _positive(logits, rows, cols, offset, ids, column_ids)
                if positive is not None:
                    target[rows].add_(logits.where(positive, 0).sum(dim=1))

        with torch.autocast(images.device.type, enabled=False):
            column_max, column_sum = batch.visit(visit, [columns, column_ids], [column_max, column_sum])
            batch.complete(column_max, column_sum)
            own_max, own_sum = column_max[batch.own], column_sum[batch.own]
            target /= num_positives
            loss = (row_max - target + row_sum.log2()) + (own_max - target + own_sum.log2())
        ctx.batch = batch
        ctx.save_for_backward(
            images, texts, scale, ids, columns, column_ids, row_max, row_sum, column_max, column_sum, num_positives
        )
        return batch.mean(loss.sum() * (LN_2 / 2))

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        images, texts, scale, ids, columns, column_ids, *statistics = ctx.saved_tensors
        row_max, row_sum, column_max, column_sum, num_positives = statistics
        refuse_second_derivatives()
        grad, factor = grad * ctx.batch.share, scale / LN_2
        # The two softmaxes of a tile, halved and times the incoming gradient, less that gradient's share of each target
        row_factor, column_factor, target = grad / (2 * row_sum), grad / (2 * column_sum), grad / num_positives

        def d_logits(rows: slice, cols: slice, offset: int, read: Tensors) -> Tensor:
            columns, column_ids, column_max, column_factor = read
            logits = (images[rows] @ columns[cols].T).mul_(factor)
            result = (logits - column_max[cols]).exp2_().mul_(column_factor[cols])
            result += logits.sub_(row_max[rows, None]).exp2_().mul_(row_factor[rows, None])
            positive = _positive(logits, rows, cols, offset, ids, column_ids)
            return result if positive is None else result.sub_(positive * target[rows, None])

        with torch.autocast(images.device.type, enabled=False):
            read = [columns, column_ids, column_max, column_factor]
            return *gradients(ctx, images, texts, scale, read, d_logits), None, None


class _Sigmoid(torch.autograd.Function):
    """The sum of softplus over all logits, those of positives with their sign turned."""

    @staticmethod
    def forward(
        ctx, images: Tensor, texts: Tensor, scale: Tensor, bias: Tensor, ids: Tensor | None, batch: GlobalBatch
    ) -> Tensor:
        columns, column_ids = batch.spread(texts), batch.spread(ids)
        row_loss = _vector(images, 0)

        def visit(offset: int, read: Tensors, carry: Tensors) -> None:
            columns, column_ids = read
            for rows, cols in tiles(images, columns):
                logits = (images[rows] @ columns[cols].T).mul_(scale).add_(bias)
                positive = _positive(logits, rows, cols, offset, ids, column_ids)
                # Above 40 softplus(x) is x to the last digit of float64.
                row_loss[rows].add_(F.softplus(_turned(logits, positive), threshold=40).sum(dim=1))

        with torch.autocast(images.device.type, enabled=False):
            batch.visit(visit, [columns, column_ids], [])
        ctx.batch = batch
        ctx.save_for_backward(images, texts, scale, bias, ids, columns, column_ids)
        return batch.mean(row_loss.sum())

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        images, texts, scale, bias, ids, columns, column_ids = ctx.saved_tensors
        refuse_second_derivatives()
        grad = grad * ctx.batch.share
        d_bias = _vector(images, 0) if ctx.needs_input_grad[3] else None

        def d_logits(rows: slice, cols: slice, offset: int, read: Tensors) -> Tensor:
            columns, column_ids = read
            logits = (images[rows] @ columns[cols].T).mul_(scale).add_(bias)
            positive = _positive(logits, rows, cols, offset, ids, column_ids)
            result = _turned(_turned(logits, positive).sigmoid_().mul_(grad), positive)
            if d_bias is not None:
                d_bias[rows].add_(result.sum(dim=1))
            return result

        with torch.autocast(images.device.type, enabled=False):
            d_images, d_texts, d_scale = gradients(ctx, images, texts, scale, [columns, column_ids], d_logits)
        return d_images, d_texts, d_scale, None if d_bias is None else d_bias.sum(), None, None


def refuse_second_derivatives() -> None:
    """Said aloud: torch's own `once_differentiable` lets a gradient penalty on the loss pass as zero."""
    if torch.is_grad_enabled():  # in a backward pass: with create_graph=True
        raise RuntimeError("the losses have no second derivatives: call backward or grad without create_graph=True.")


def gradients(
    ctx, images: Tensor, texts: Tensor, scale: Tensor, read: Tensors, d_logits: Callable[..., Tensor]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of images, texts and scale, those of them that are needed.

    `read` is what `d_logits` needs to know of columns, the texts first; `d_logits(rows, cols, offset, read)` is the
    gradient of a tile of logits. With C = images @ texts.T and D = d_logits, the logits' scale * C give images
    scale * D @ texts, texts scale * D.T @ images, and scale the sum of D * C, which is that of images * (D @ texts).
    """
    need_images, need_texts, need_scale = ctx.needs_input_grad[:3]
    d_images = torch.zeros_like(images) if need_images or (need_scale and not need_texts) else None
    d_columns = [torch.zeros_like(read[0])] if need_texts else []

    def visit(offset: int, read: Tensors, d_columns: Tensors) -> None:
        for rows, cols in tiles(images, read[0]):
            tile = d_logits(rows, cols, offset, read)
            if d_images is not None:
                d_images[rows].add_(tile @ read[0][cols])
            for d_column in d_columns:
                d_column[cols].add_(tile.T @ images[rows])

    d_columns = ctx.batch.visit(visit, read, d_columns)
    d_texts = ctx.batch.collect(*d_columns) if need_texts else None
    d_scale = None
    if need_scale:
        embeds, d_embeds = (texts, d_texts) if d_images is None else (images, d_images)
        # (rows, 1, dim) @ (rows, dim, 1): unlike vecdot, without a product of the embeddings' size in between
        d_scale = torch.bmm(embeds[:, None], d_embeds[:, :, None]).sum()
    return (
        d_images.mul_(scale) if need_images else None,
        d_texts.mul_(scale) if need_texts else None,
        d_scale,
    )


def _positive(
    logits: Tensor, rows: slice, cols: slice, offset: int, ids: Tensor | None, column_ids: Tensor | None
) -> Tensor | None:
    """Bool like a tile of logits: which columns belong to which row. Without ids row i has column i + offset alone.

    None if there are none in this tile.
    """
    if ids is not None:
        return ids[rows, None] == column_ids[cols]
    first, last = rows.start + offset, rows.stop + offset
    if last <= cols.start or cols.stop <= first:
        return None
    own = torch.arange(first, last, device=logits.device)
    return own[:, None] == torch.arange(cols.start, cols.stop, device=logits.device)


def tiles(images: Tensor, columns: Tensor) -> Iterator[tuple[slice, slice]]:
    tile = CPU_TILE if images.device.type == "cpu" else DEVICE_TILE
    for row in range(0, len(images), tile):
        for column in range(0, len(columns), tile):
            yield slice(row, min(row + tile, len(images))), slice(column, min(column + tile, len(columns)))


def _vector(embeds: Tensor, value: float) -> Tensor:
    """`(rows, dim)` -> `(rows,)`, one number for each embedding."""
    return embeds.new_full((len(embeds),), value)


def add_exponentials(maximum: Tensor, total: Tensor, logits: Tensor, dim: int) -> None:
    """Takes a tile into the running maximum and the running sum of exp2(logit - maximum) along `dim`."""
    new = torch.maximum(maximum, logits.amax(dim))
    total.mul_((maximum - new).exp2_()).add_((logits - new.unsqueeze(dim)).exp2_().sum(dim))
    maximum.copy_(new)


def _turned(logits: Tensor, positive: Tensor | None) -> Tensor:
    return logits if positive is None else torch.where(positive, -logits, logits)


def _count(ids: Tensor, column_ids: Tensor) -> Tensor:
    """How often each of `ids` is among `column_ids`."""
    ordered = column_ids.sort().values
    return torch.searchsorted(ordered, ids, right=True) - torch.searchsorted(ordered, ids)


@dataclass(frozen=True)
class GlobalBatch:
    """How many pairs each rank of `group` holds, and how a rank comes by the columns of the others: here, of none.

    Subclasses say how with several ranks. A loss spreads its columns, visits them with what it wants to know of a
    column (`read`) and what it adds to for each column (`carry`), and completes or collects what it carried.
    """

    group: dist.ProcessGroup | None
    rank: int
    sizes: tuple[int, ...]

    @property
    def start(self) -> int:
        """Global index of this rank's first pair."""
        return sum(self.sizes[: self.rank])

    @property
    def share(self) -> float:
        """Gradient of the value to this rank's sum, as the module says."""
        return len(self.sizes) / sum(self.sizes)

    def mean(self, local_sum: Tensor) -> Tensor:
        """Sum over the rows of this rank -> mean over the rows of all ranks, the same bits on every rank."""
        if self.group is not None:
            dist.all_reduce(local_sum, group=self.group)
        return local_sum / sum(self.sizes)

    @property
    def own(self) -> slice:
        """Where this rank's own columns are among those it began with."""
        return slice(None)

    def spread(self, own: Tensor | None) -> Tensor | None:
        """`(local_batch, ...)` -> the columns this rank begins with."""
        return own

    def visit(self, function: Callable[[int, Tensors, Tensors], None], read: Tensors, carry: Tensors) -> Tensors:
        """Calls `function(offset, read, carry)` for every block of columns; row i belongs to its column i + offset.

        It adds to `carry` in place. Returns `carry` of the columns this rank began with.
        """
        function(0, read, carry)
        return carry

    def complete(self, maximum: Tensor, total: Tensor) -> None:
        """Turns maximum and sum of exponentials over the rows visited into those over the rows of all ranks."""

    def collect(self, gradient: Tensor) -> Tensor:
        """The gradient of this rank's own columns from the rows of all ranks."""
        return gradient


class _Gather(GlobalBatch):
    """Every rank begins with the columns of all."""

    @property
    def own(self) -> slice:
        return slice(self.start, self.start + self.sizes[self.rank])

    def spread(self, own: Tensor | None) -> Tensor | None:
        """`(local_batch, ...)` -> `(global_batch, ...)`, in rank order."""
        if own is None:
            return None
        longest = max(self.sizes)
        if min(self.sizes) == longest:
            return _all_gather(own, self.group)
        padded = torch.cat([own, own.new_zeros(longest - len(own), *own.shape[1:])])
        gathered = _all_gather(padded, self.group)
        return torch.cat([gathered[r * longest : r * longest + size] for r, size in enumerate(self.sizes)])

    def visit(self, function: Callable[[int, Tensors, Tensors], None], read: Tensors, carry: Tensors) -> Tensors:
        function(self.start, read, carry)
        return carry

    def complete(self, maximum: Tensor, total: Tensor) -> None:
        local = maximum.clone()
        dist.all_reduce(maximum, dist.ReduceOp.MAX, group=self.group)
        total.mul_((local - maximum).exp2_())
        dist.all_reduce(total, group=self.group)

    def collect(self, gradient: Tensor) -> Tensor:
        longest = max(self.sizes)
        if min(self.sizes) < longest:
            blocks = gradient.split(self.sizes)
            gradient = torch.cat([F.pad(block, (0, 0, 0, longest - len(block))) for block in blocks])
        own = gradient.new_empty(longest, gradient.shape[1])
        # torch 2.13 renamed reduce_scatter_tensor and warns at the old name.
        reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
        reduce_scatter(own, gradient, group=self.group)
        return own[: self.sizes[self.rank]]


class _Ring(GlobalBatch):
    """Columns go round: every rank begins with its own, passes them to the next and gets those of the one before.

    What is carried follows when the rank has added to it, and has every rank's part when it is home again.
    """

    def spread(self, own: Tensor | None) -> Tensor | None:
        return None if own is None else own.contiguous()

    def visit(self, function: Callable[[int, Tensors, Tensors], None], read: Tensors, carry: Tensors) -> Tensors:
        world = len(self.sizes)
        for hop in range(world):
            holder, coming = (self.rank - hop) % world, self.sizes[(self.rank - hop - 1) % world]
            # The last block has been everywhere; only what it carries has still to go home.
            next_read, transfers = self._pass_on(read, coming) if hop < world - 1 else ([], [])
            function(self.start - sum(self.sizes[:holder]), read, carry)
            next_carry, more = self._pass_on(carry, coming)
            for transfer in transfers + more:
                transfer.wait()
            read, carry = next_read, next_carry
        return carry

    def _pass_on(self, tensors: Tensors, coming: int) -> tuple[Tensors, list[dist.Work]]:
        """Begins to send `tensors` to the next rank and to receive `coming` rows of each from the one before."""
        after, before = (dist.get_global_rank(self.group, (self.rank + step) % len(self.sizes)) for step in (1, -1))
        received = [None if tensor is None else tensor.new_empty(coming, *tensor.shape[1:]) for tensor in tensors]
        transfers = [
            dist.P2POp(operation, tensor, peer, self.group)
            for operation, peer, block in ((dist.isend, after, tensors), (dist.irecv, before, received))
            for tensor in block
            if tensor is not None and tensor.numel() > 0
        ]
        return received, dist.batch_isend_irecv(transfers) if transfers else []


_EXCHANGES = {"gather": _Gather, "ring": _Ring}


def agree(
    images: Tensor,
    texts: Tensor,
    group_id: Tensor | None,
    exchange: str,
    group: dist.ProcessGroup | None,
    teacher_dim: int = 0,
) -> GlobalBatch:
    """Exchange sizes; raise the same ValueError on every rank if the batches do not fit together.

    `teacher_dim` is the size of embeddings that travel beside the texts, as a teacher's do.
    """
    if exchange not in _EXCHANGES:
        raise ValueError(f"exchange is {exchange!r}: expected one of {', '.join(map(repr, _EXCHANGES))}.")
    trained = [int(torch.is_grad_enabled() and embeds.requires_grad) for embeds in (images, texts)]
    ring, has_ids = int(exchange == "ring"), int(group_id is not None)
    records = [(*images.shape, images.element_size(), has_ids, teacher_dim, *trained, ring)]
    rank = 0
    if dist.is_available() and dist.is_initialized():
        group = dist.group.WORLD if group is None else group
        rank = dist.get_rank(group)
        if rank < 0:
            raise ValueError(f"rank {dist.get_rank()} is not a member of `group`: pass a group it belongs to.")
        if dist.get_world_size(group) > 1:
            records = _exchange(records[0], images.device, group)
    elif group is not None:
        raise ValueError("`group` was given but torch.distributed is not initialised: call init_process_group.")
    _check_agreement(records)
    sizes = tuple(record[0] for record in records)
    if len(sizes) == 1:
        return GlobalBatch(None, 0, sizes)
    return _EXCHANGES[exchange](group, rank, sizes)


def _check_agreement(records: list[tuple[int, ...]]) -> None:
    if len({record[1:5] for record in records}) > 1:
        found = "; ".join(
            f"rank {r}: embeddings ({size}, {dim}) of {8 * itemsize} bits, {'with' if ids else 'without'} group_id"
            + (f", a teacher's of size {teacher_dim}" if teacher_dim else "")
            for r, (size, dim, itemsize, ids, teacher_dim, *_) in enumerate(records)
        )
        raise ValueError(f"the ranks of a group must agree on dim, precision and use of group_id, but found {found}.")
    if len({record[5:] for record in records}) > 1:
        found = "; ".join(
            f"rank {r}: {'ring' if ring else 'gather'}, gradient of images {bool(image)}, of texts {bool(text)}"
            for r, (*_, image, text, ring) in enumerate(records)
        )
        # A rank that waits for what another does not send would wait for ever.
        raise ValueError(
            f"the ranks of a group must agree on `exchange` and on which embeddings require a gradient, but found "
            f"{found}."
        )
    if sum(record[0] for record in records) == 0:
        raise ValueError(f"the global batch is empty (0 pairs on each of {len(records)} ranks): expected at least 1.")


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


def as_factor(name: str, value: Tensor | float, like: Tensor) -> Tensor:
    """`value` as a tensor without dimensions, filled in on the device: a copy from the host would wait for it."""
    if isinstance(value, Real):  # Python's numbers and numpy's
        return like.new_full((), float(value))
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a number or a tensor of one element, found {type(value).__name__}.")
    if value.numel() != 1:
        raise ValueError(f"{name} must have one element, found shape {tuple(value.shape)}.")
    return value.to(like.dtype).reshape(())

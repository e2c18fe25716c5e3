"""CLIP's loss: the cross-entropy of both softmaxes over the global batch."""

from __future__ import annotations

from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from .exchange import GlobalBatch, Tensors, as_factor, check_embeds, check_group_id, negotiate_batch
from .tiles import LN_2, add_exponentials, compute_gradients, find_positives, per_row, refuse_second_derivatives, tiles


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
    over the ranks are those of this value (see `hfclip.losses`). An input that requires no gradient, such as the
    embeddings of a locked tower, costs none. Second derivatives are refused.

    Args:
        image_embeds: `(local_batch, dim)`, this rank's images, unit norm. The norm is trusted, not checked: a check
            would make the host wait for the device on every step.
        text_embeds: `(local_batch, dim)`, unit norm; row i belongs to image i.
        scale: factor on the cosines, exp(logit_scale): the inverse temperature, not its logarithm.
        group: ranks that share the batch and average their gradients. Default: all ranks if `torch.distributed` is
            initialised, else this process alone.
        group_id: `(local_batch,)` int64. Pairs with the same id, on any rank, are positives of each other, e.g. equal
            captions: the target of a row is uniform over its positives. If all ids differ, this is the plain loss.
        exchange: how ranks see each other's texts. "gather": every rank holds those of all. "ring": a rank holds
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
    images, texts = check_embeds(image_embeds=image_embeds, text_embeds=text_embeds)
    scale, ids = as_factor("scale", scale, images), check_group_id(group_id, images)
    batch = negotiate_batch(images, texts, ids, exchange, group)
    return _Contrastive.apply(images, texts, scale, ids, batch)


class _Contrastive(torch.autograd.Function):
    """Each row is reduced to its maximum and its sum of exponentials over all columns, and each column likewise.

    The two are kept apart instead of as one logarithm: the loss of a row, log(sum) + (maximum - target), then keeps
    its digits where the target is the maximum and the loss is small. Logits are in units of ln 2.
    """

    @staticmethod
    def forward(ctx, images, texts, scale, ids: Tensor | None, batch: GlobalBatch) -> Tensor:
        columns, column_ids = batch.gather_columns(texts), batch.gather_columns(ids)
        row_max, column_max = per_row(images, -torch.inf), per_row(columns, -torch.inf)
        row_sum, column_sum = per_row(images, 0), per_row(columns, 0)
        target, num_positives = per_row(images, 0), per_row(images, 0 if ids is not None else 1)
        factor = scale / LN_2

        def add_block(offset: int, read: Tensors, carry: Tensors) -> None:
            (columns, column_ids), (column_max, column_sum) = read, carry
            if ids is not None:
                num_positives.add_(_count_in(ids, column_ids))
            for rows, cols in tiles(images, columns):
                logits = (images[rows] @ columns[cols].T).mul_(factor)
                add_exponentials(row_max[rows], row_sum[rows], logits, dim=1)
                add_exponentials(column_max[cols], column_sum[cols], logits, dim=0)
                positive = find_positives(logits, rows, cols, offset, ids, column_ids)
                if positive is not None:
                    target[rows].add_(logits.where(positive, 0).sum(dim=1))

        with torch.autocast(images.device.type, enabled=False):
            column_max, column_sum = batch.for_each_block(add_block, [columns, column_ids], [column_max, column_sum])
            batch.reduce_statistics(column_max, column_sum)
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
        grad, factor = grad * ctx.batch.grad_scale, scale / LN_2
        # The two softmaxes of a tile, halved and times the incoming gradient, less that gradient's share of each target
        row_factor, column_factor, target = grad / (2 * row_sum), grad / (2 * column_sum), grad / num_positives

        def d_logits(rows: slice, cols: slice, offset: int, read: Tensors) -> Tensor:
            columns, column_ids, column_max, column_factor = read
            logits = (images[rows] @ columns[cols].T).mul_(factor)
            result = (logits - column_max[cols]).exp2_().mul_(column_factor[cols])
            result += logits.sub_(row_max[rows, None]).exp2_().mul_(row_factor[rows, None])
            positive = find_positives(logits, rows, cols, offset, ids, column_ids)
            return result if positive is None else result.sub_(positive * target[rows, None])

        with torch.autocast(images.device.type, enabled=False):
            read = [columns, column_ids, column_max, column_factor]
            return *compute_gradients(ctx, images, texts, scale, read, d_logits), None, None


def _count_in(ids: Tensor, column_ids: Tensor) -> Tensor:
    """How often each of `ids` is among `column_ids`."""
    ordered = column_ids.sort().values
    return torch.searchsorted(ordered, ids, right=True) - torch.searchsorted(ordered, ids)

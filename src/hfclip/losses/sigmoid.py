"""SigLIP's loss: every pair of an image and a text on its own, over the global batch."""

from __future__ import annotations

from typing import Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from .exchange import GlobalBatch, Tensors, as_factor, check_embeds, check_group_id, negotiate_batch
from .tiles import compute_gradients, find_positives, per_row, refuse_second_derivatives, tiles


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
    otherwise, divided by N. `bias` is the model's `logit_bias`; all other arguments, precision, value, gradients and
    errors are those of [`contrastive_loss`].
    """
    images, texts = check_embeds(image_embeds=image_embeds, text_embeds=text_embeds)
    scale, bias = as_factor("scale", scale, images), as_factor("bias", bias, images)
    ids = check_group_id(group_id, images)
    batch = negotiate_batch(images, texts, ids, exchange, group)
    return _Sigmoid.apply(images, texts, scale, bias, ids, batch)


class _Sigmoid(torch.autograd.Function):
    """Sum of softplus over all logits, those of positives with their sign flipped."""

    @staticmethod
    def forward(ctx, images, texts, scale, bias, ids: Tensor | None, batch: GlobalBatch) -> Tensor:
        columns, column_ids = batch.gather_columns(texts), batch.gather_columns(ids)
        row_loss = per_row(images, 0)

        def add_block(offset: int, read: Tensors, carry: Tensors) -> None:
            columns, column_ids = read
            for rows, cols in tiles(images, columns):
                logits = (images[rows] @ columns[cols].T).mul_(scale).add_(bias)
                positive = find_positives(logits, rows, cols, offset, ids, column_ids)
                # Above 40 softplus(x) is x to the last digit of float64.
                row_loss[rows].add_(F.softplus(_flip_positives(logits, positive), threshold=40).sum(dim=1))

        with torch.autocast(images.device.type, enabled=False):
            batch.for_each_block(add_block, [columns, column_ids], [])
        ctx.batch = batch
        ctx.save_for_backward(images, texts, scale, bias, ids, columns, column_ids)
        return batch.mean(row_loss.sum())

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        images, texts, scale, bias, ids, columns, column_ids = ctx.saved_tensors
        refuse_second_derivatives()
        grad = grad * ctx.batch.grad_scale
        d_bias = per_row(images, 0) if ctx.needs_input_grad[3] else None

        def d_logits(rows: slice, cols: slice, offset: int, read: Tensors) -> Tensor:
            columns, column_ids = read
            logits = (images[rows] @ columns[cols].T).mul_(scale).add_(bias)
            positive = find_positives(logits, rows, cols, offset, ids, column_ids)
            result = _flip_positives(_flip_positives(logits, positive).sigmoid_().mul_(grad), positive)
            if d_bias is not None:
                d_bias[rows].add_(result.sum(dim=1))
            return result

        with torch.autocast(images.device.type, enabled=False):
            d_images, d_texts, d_scale = compute_gradients(ctx, images, texts, scale, [columns, column_ids], d_logits)
        return d_images, d_texts, d_scale, None if d_bias is None else d_bias.sum(), None, None


def _flip_positives(logits: Tensor, positive: Tensor | None) -> Tensor:
    return logits if positive is None else torch.where(positive, -logits, logits)

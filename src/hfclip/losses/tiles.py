"""What the losses share: the matrix of logits by tiles, sums of exponentials, and the gradients of its factors."""

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from .exchange import Tensors


# Rows and columns of a tile: on a CPU it stays in the cache, elsewhere it is large enough to be worth a launch.
CPU_TILE, DEVICE_TILE = 1024, 4096

# Powers of two cost a fraction of those of e; exp(x) = exp2(x / LN_2).
LN_2 = math.log(2)


def tiles(images: Tensor, columns: Tensor) -> Iterator[tuple[slice, slice]]:
    """Rows and columns of each tile."""
    tile = CPU_TILE if images.device.type == "cpu" else DEVICE_TILE
    for row in range(0, len(images), tile):
        for column in range(0, len(columns), tile):
            yield slice(row, min(row + tile, len(images))), slice(column, min(column + tile, len(columns)))


def per_row(embeds: Tensor, value: float) -> Tensor:
    """`(rows, dim)` -> `(rows,)`, filled with `value`."""
    return embeds.new_full((len(embeds),), value)


def find_positives(
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


def add_exponentials(maximum: Tensor, total: Tensor, logits: Tensor, dim: int) -> None:
    """Takes a tile into the running maximum and the running sum of exp2(logit - maximum) along `dim`."""
    new = torch.maximum(maximum, logits.amax(dim))
    total.mul_((maximum - new).exp2_()).add_((logits - new.unsqueeze(dim)).exp2_().sum(dim))
    maximum.copy_(new)


def compute_gradients(
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

    def add_block(offset: int, read: Tensors, d_columns: Tensors) -> None:
        for rows, cols in tiles(images, read[0]):
            tile = d_logits(rows, cols, offset, read)
            if d_images is not None:
                d_images[rows].add_(tile @ read[0][cols])
            for d_column in d_columns:
                d_column[cols].add_(tile.T @ images[rows])

    d_columns = ctx.batch.for_each_block(add_block, read, d_columns)
    d_texts = ctx.batch.reduce_gradients(*d_columns) if need_texts else None
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


def refuse_second_derivatives() -> None:
    """Raises RuntimeError where torch's own `once_differentiable` lets a gradient penalty on the loss pass as zero."""
    if torch.is_grad_enabled():  # in a backward pass: with create_graph=True
        raise RuntimeError("the losses have no second derivatives: call backward or grad without create_graph=True.")

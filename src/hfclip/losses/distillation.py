"""Distillation: a student's similarities follow a teacher's over the global batch."""

from __future__ import annotations

from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from .exchange import GlobalBatch, Tensors, as_factor, check_embeds, negotiate_batch
from .tiles import LN_2, add_exponentials, compute_gradients, per_row, refuse_second_derivatives, tiles


@torch.compiler.disable
def distillation_loss(
    student_image: Tensor,
    student_text: Tensor,
    student_scale: Tensor | float,
    teacher_image: Tensor,
    teacher_text: Tensor,
    teacher_scale: float,
    *,
    group: dist.ProcessGroup | None = None,
    exchange: Literal["gather", "ring"] = "gather",
) -> Tensor:
    """Divergence of the student's similarities from the teacher's over the global batch (arXiv:2311.17049, eq. 2, 3).

    For each image the distribution over the texts of all ranks, softmax(scale * cosines), is compared by KL(teacher ||
    student), and for each text that over the images; the loss is the mean of both over all N pairs. Precision, value,
    gradients, `group`, `exchange` and errors are those of [`contrastive_loss`]. The teacher gets no gradient.

    Args:
        student_image, student_text: `(local_batch, dim)`, unit norm (trusted, not checked).
        student_scale: exp(logit_scale) of the student.
        teacher_image, teacher_text: `(local_batch, teacher_dim)`, unit norm, of the same pairs.
        teacher_scale: exp(logit_scale) of the teacher.
    """
    images, texts = check_embeds(student_image=student_image, student_text=student_text)
    teacher = [e.to(images.dtype) for e in check_embeds(teacher_image=teacher_image, teacher_text=teacher_text)]
    if len(images) != len(teacher[0]):
        raise ValueError(f"the student has {len(images)} pairs and the teacher {len(teacher[0])}: expected the same.")
    scale, teacher_scale = (as_factor("scale", value, images) for value in (student_scale, teacher_scale))
    batch = negotiate_batch(images, texts, None, exchange, group, teacher_dim=teacher[0].shape[1])
    return _Distillation.apply(images, texts, scale, *teacher, teacher_scale, batch)


class _Distillation(torch.autograd.Function):
    """Two rounds over the tiles: the sums of exponentials of rows and columns, then the loss and its gradients.

    The gradients do not wait for the backward pass: there the tiles would have to be computed a third time. Logits are
    in units of ln 2. `sums` are of the student and of the teacher a maximum and a sum relative to it, for each row or
    column; the logarithm of the sum takes its place when it is complete.
    """

    @staticmethod
    def forward(ctx, images, texts, scale, teacher_images, teacher_texts, teacher_scale, batch: GlobalBatch) -> Tensor:
        columns = [batch.gather_columns(texts), batch.gather_columns(teacher_texts)]
        row_sums, column_sums = (
            [per_row(embeds, value) for value in (-torch.inf, 0, -torch.inf, 0)] for embeds in (images, columns[0])
        )
        row_loss = per_row(images, 0)

        def logits(rows: slice, cols: slice, columns: Tensors) -> tuple[Tensor, Tensor]:
            """A tile of the student's logits, and of the teacher's."""
            student = (images[rows] @ columns[0][cols].T).mul_(scale / LN_2)
            return student, (teacher_images[rows] @ columns[1][cols].T).mul_(teacher_scale / LN_2)

        def add_block(offset: int, columns: Tensors, column_sums: Tensors) -> None:
            for rows, cols in tiles(images, columns[0]):
                for i, tile in enumerate(logits(rows, cols, columns)):
                    add_exponentials(row_sums[2 * i][rows], row_sums[2 * i + 1][rows], tile, dim=1)
                    add_exponentials(column_sums[2 * i][cols], column_sums[2 * i + 1][cols], tile, dim=0)

        def d_logits(rows: slice, cols: slice, offset: int, read: Tensors) -> Tensor:
            student, teacher = logits(rows, cols, read[:2])
            result = torch.zeros_like(student)
            of_rows, of_columns = [values[rows, None] for values in row_sums], [values[cols] for values in read[2:]]
            for maximum, log, teacher_maximum, teacher_log in (of_rows, of_columns):
                log_share = (student - maximum).sub_(log)
                log_target = (teacher - teacher_maximum).sub_(teacher_log)
                target = log_target.exp2()
                row_loss[rows].add_(log_target.sub_(log_share).mul_(target).sum(dim=1))
                result.add_(log_share.exp2_().sub_(target))
            return result.mul_(batch.grad_scale / 2)

        ctx.batch = batch
        with torch.autocast(images.device.type, enabled=False):
            column_sums = batch.for_each_block(add_block, columns, column_sums)
            for maximum, total in (column_sums[:2], column_sums[2:]):
                batch.reduce_statistics(maximum, total)
            for total in (*row_sums[1::2], *column_sums[1::2]):
                total.log2_()
            ctx.save_for_backward(*compute_gradients(ctx, images, texts, scale, [*columns, *column_sums], d_logits))
        return batch.mean(row_loss.sum() * (LN_2 / 2))

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivatives()
        return *(None if value is None else grad * value for value in ctx.saved_tensors), None, None, None, None

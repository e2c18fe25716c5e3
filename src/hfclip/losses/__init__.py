"""Losses of the global batch: pure functions of unit embeddings, scale and process group.

    exchange.py        how processes see each other's embeddings
    tiles.py           what the losses share of their algebra
    contrastive.py  sigmoid.py  distillation.py

Every rank of the group holds `local_batch` pairs; together they are the global batch of N pairs, in rank order. The
logits are an N x N matrix, rows for images and columns for texts, that nobody ever holds. Rank r works through the
rows of its own images tile by tile, and one pass serves both directions: a tile adds to the sums of its rows, which
rank r completes alone, and to the sums of its columns, which all ranks complete together. The backward pass computes
each tile again and turns it into gradients of its rows and columns on the spot. Memory beyond the embeddings and
their gradients is a few tiles and a few numbers per row and column.

How the gradient meets the averaging of data parallelism. Let W be the number of ranks and L the loss of the global
batch. Every rank returns the value L. It sends backwards W dL/dS for the logits S of its own rows: each entry of the
matrix belongs to one rank. An embedding of rank r is a row on rank r and a column everywhere; the columns' gradients
are summed over the ranks, so every embedding e receives W dL/de. A parameter used by every rank, be it a weight of a
tower or `logit_scale`, therefore holds on rank r its rank's share of W dL/dp, and the mean over ranks, which
DistributedDataParallel and FSDP take, is dL/dp: the gradient one process would find on the whole batch. Where
gradients are summed over ranks instead, divide the loss by W.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from .contrastive import contrastive_loss
from .distillation import distillation_loss
from .sigmoid import sigmoid_loss


class Loss(NamedTuple):
    """A loss that a model can be trained with."""

    function: Callable[..., Tensor]
    """`(image_embeds, text_embeds, *scalars, group_id=..., exchange=...)`, with exp(logit_scale) for `logit_scale`."""
    scalars: dict[str, float]
    """Learnable scalars of the model that the function takes, with the values that a new model begins with."""


LOSSES = {
    "contrastive": Loss(contrastive_loss, {"logit_scale": 2.6592}),
    "sigmoid": Loss(sigmoid_loss, {"logit_scale": math.log(10), "logit_bias": -10.0}),  # arXiv:2303.15343, section 3
}

__all__ = ["LOSSES", "Loss", "contrastive_loss", "distillation_loss", "sigmoid_loss"]

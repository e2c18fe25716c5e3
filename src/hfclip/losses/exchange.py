"""How the processes of a batch see each other's embeddings.

Images stay where they are; texts come to them, in one of two ways. "gather" brings the texts of all ranks to every
rank with one collective, and sends their gradients home with another. "ring" passes the texts from rank to rank, the
sums or gradients of their columns with them, so that a rank holds those of two others at most: one at work, one
arriving. That saves memory where the embeddings of the global batch are large, and costs as many messages as there
are ranks. Batches of different size on different ranks are exact either way.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from numbers import Real

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor


Tensors = list[Tensor | None]
BlockFunction = Callable[[int, Tensors, Tensors], None]
Record = tuple[int, ...]


@dataclass(frozen=True)
class GlobalBatch:
    """How many pairs each rank of `group` holds; every rank gathers the columns of all. One process has no group.

    A loss gathers its columns, goes through them block by block with what it wants to know of a column (`read`) and
    what it adds to for each column (`carry`), and reduces what it carried over the ranks.
    """

    group: dist.ProcessGroup | None
    rank: int
    sizes: tuple[int, ...]

    @property
    def start(self) -> int:
        """Global index of this rank's first pair."""
        return sum(self.sizes[: self.rank])

    @property
    def own(self) -> slice:
        """Where this rank's own columns are among those it begins with."""
        return slice(self.start, self.start + self.sizes[self.rank])

    @property
    def grad_scale(self) -> float:
        """Gradient of the value to this rank's sum, as the package says."""
        return len(self.sizes) / sum(self.sizes)

    def mean(self, local_sum: Tensor) -> Tensor:
        """Sum over the rows of this rank -> mean over the rows of all ranks, the same bits on every rank."""
        if self.group is not None:
            dist.all_reduce(local_sum, group=self.group)
        return local_sum / sum(self.sizes)

    def gather_columns(self, own: Tensor | None) -> Tensor | None:
        """`(local_batch, ...)` -> the columns this rank begins with, `(global_batch, ...)` in rank order."""
        if own is None or self.group is None:
            return own
        longest = max(self.sizes)
        if min(self.sizes) == longest:
            return _all_gather(own, self.group)
        padded = torch.cat([own, own.new_zeros(longest - len(own), *own.shape[1:])])
        gathered = _all_gather(padded, self.group)
        return torch.cat([gathered[r * longest : r * longest + size] for r, size in enumerate(self.sizes)])

    def for_each_block(self, function: BlockFunction, read: Tensors, carry: Tensors) -> Tensors:
        """Calls `function(offset, read, carry)` for every block of columns; row i belongs to its column i + offset.

        It adds to `carry` in place. Returns `carry` of the columns this rank began with.
        """
        function(self.start, read, carry)
        return carry

    def reduce_statistics(self, maximum: Tensor, total: Tensor) -> None:
        """Turns maximum and sum of exponentials over the rows of this rank into those over the rows of all ranks."""
        if self.group is None:
            return
        local = maximum.clone()
        dist.all_reduce(maximum, dist.ReduceOp.MAX, group=self.group)
        total.mul_((local - maximum).exp2_())
        dist.all_reduce(total, group=self.group)

    def reduce_gradients(self, gradient: Tensor) -> Tensor:
        """Gradients of the columns this rank began with -> those of its own columns, from the rows of all ranks."""
        if self.group is None:
            return gradient
        longest = max(self.sizes)
        if min(self.sizes) < longest:
            blocks = gradient.split(self.sizes)
            gradient = torch.cat([F.pad(block, (0, 0, 0, longest - len(block))) for block in blocks])
        own = gradient.new_empty(longest, gradient.shape[1])
        # torch 2.13 renamed reduce_scatter_tensor and warns at the old name.
        reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
        reduce_scatter(own, gradient, group=self.group)
        return own[: self.sizes[self.rank]]


class Ring(GlobalBatch):
    """Columns go round: every rank begins with its own, passes them to the next and gets those of the one before.

    What is carried follows when the rank has added to it, and has every rank's part when it is home again.
    """

    @property
    def own(self) -> slice:
        return slice(None)

    def gather_columns(self, own: Tensor | None) -> Tensor | None:
        return None if own is None else own.contiguous()

    def for_each_block(self, function: BlockFunction, read: Tensors, carry: Tensors) -> Tensors:
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

    def reduce_statistics(self, maximum: Tensor, total: Tensor) -> None:
        """Leaves them as they are: they came home with the rows of all ranks."""

    def reduce_gradients(self, gradient: Tensor) -> Tensor:
        return gradient


EXCHANGES = {"gather": GlobalBatch, "ring": Ring}


def negotiate_batch(
    images: Tensor,
    texts: Tensor,
    group_id: Tensor | None,
    exchange: str,
    group: dist.ProcessGroup | None,
    teacher_dim: int = 0,
) -> GlobalBatch:
    """Exchanges sizes; raises the same ValueError on every rank if the batches do not fit together.

    `teacher_dim` is the size of embeddings that travel beside the texts, as a teacher's do.
    """
    if exchange not in EXCHANGES:
        raise ValueError(f"exchange is {exchange!r}: expected one of {', '.join(map(repr, EXCHANGES))}.")
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
            records = _exchange_records(records[0], images.device, group)
    elif group is not None:
        raise ValueError("`group` was given but torch.distributed is not initialised: call init_process_group.")
    _check_agreement(records)
    sizes = tuple(record[0] for record in records)
    return GlobalBatch(None, 0, sizes) if len(sizes) == 1 else EXCHANGES[exchange](group, rank, sizes)


def _check_agreement(records: list[Record]) -> None:
    if len({record[1:] for record in records}) > 1:
        found = "; ".join(
            f"rank {r}: embeddings ({size}, {dim}) of {8 * itemsize} bits, {'with' if ids else 'without'} group_id"
            + (f", a teacher's of size {teacher_dim}" if teacher_dim else "")
            + f", {'ring' if ring else 'gather'}, gradient of images {bool(image)}, of texts {bool(text)}"
            for r, (size, dim, itemsize, ids, teacher_dim, image, text, ring) in enumerate(records)
        )
        # A rank that waits for what another does not send would wait for ever.
        raise ValueError(
            "the ranks of a group must agree on dim, precision, use of group_id, `exchange` and which embeddings require "
            f"a gradient, but found {found}."
        )
    if sum(record[0] for record in records) == 0:
        raise ValueError(f"the global batch is empty (0 pairs on each of {len(records)} ranks): expected at least 1.")


def _all_gather(local: Tensor, group: dist.ProcessGroup) -> Tensor:
    gathered = local.new_empty(dist.get_world_size(group) * len(local), *local.shape[1:])
    # torch 2.13 renamed all_gather_into_tensor and warns at the old name.
    all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    all_gather(gathered, local.contiguous(), group=group)
    return gathered


def _exchange_records(record: Record, device: torch.device, group: dist.ProcessGroup) -> list[Record]:
    """Each rank's `record`, in rank order. The host has to wait for the answer, since sizes decide shapes.

    On its own CUDA stream it waits for the other hosts only, not for the towers queued on the current stream.
    """
    stream = torch.cuda.stream(torch.cuda.Stream(device)) if device.type == "cuda" else nullcontext()
    with stream:
        records = _all_gather(torch.tensor([record], dtype=torch.int64, device=device), group)
        return [tuple(values) for values in records.tolist()]


def check_embeds(**embeds: Tensor) -> tuple[Tensor, Tensor]:
    """The embeddings of images and texts, given by name, both in float32, or in float64 if one of them is."""
    for name, value in embeds.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, found {type(value).__name__}.")
    images, texts = embeds.values()
    found = " and ".join(f"{name} {tuple(value.shape)} of {value.dtype}" for name, value in embeds.items())
    if images.ndim != 2 or images.shape != texts.shape:
        raise ValueError(
            f"found {found}: expected the same (local_batch, dim) twice, row i of one of row i of the other."
        )
    if not (images.is_floating_point() and texts.is_floating_point()):
        raise ValueError(f"found {found}: expected floating point vectors of unit norm.")
    dtype = torch.promote_types(torch.promote_types(images.dtype, texts.dtype), torch.float32)
    return images.to(dtype), texts.to(dtype)


def check_group_id(group_id: Tensor | None, images: Tensor) -> Tensor | None:
    """`group_id` on the images' device."""
    if group_id is None:
        return None
    if not isinstance(group_id, Tensor):
        raise TypeError(f"group_id must be a torch.Tensor, found {type(group_id).__name__}.")
    if group_id.shape != images.shape[:1] or group_id.dtype != torch.int64:
        raise ValueError(
            f"group_id is {tuple(group_id.shape)} of {group_id.dtype}: expected ({len(images)},) of torch.int64, one id "
            "per pair of this rank."
        )
    return group_id.to(images.device)


def as_factor(name: str, value: Tensor | float, like: Tensor) -> Tensor:
    """`value` as a tensor without dimensions, filled in on the device: a copy from the host would wait for it."""
    if isinstance(value, Real):  # Python's numbers and numpy's
        return like.new_full((), float(value))
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a number or a tensor of one element, found {type(value).__name__}.")
    if value.numel() != 1:
        raise ValueError(f"{name} must have one element, found shape {tuple(value.shape)}.")
    return value.to(like.dtype).reshape(())

"""The losses over real processes: W ranks under DistributedDataParallel are one process on the whole batch.

For each world size one set of gloo processes computes every case and saves what each rank found; the tests then
compare with the definitions, as dense float64 matrices of the whole batch in this process. Loss value and the gradient
of every parameter have to agree, `logit_scale` and `logit_bias` included, for even, uneven and empty local batches,
with the texts of all ranks gathered and passed round, and with one tower locked.
"""

from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from training_utils import fork

from hfclip.losses import contrastive_loss, sigmoid_loss, tiles


NUM_FEATURES = 7
TILE = 2  # local batches are whole tiles, broken ones, or less than one
# Largest local batch first, in the middle, last, and ranks without any pair.
SIZES = {
    1: [(5,)],
    2: [(4, 4), (5, 2), (1, 6), (0, 3)],
    3: [(3, 3, 3), (2, 5, 1), (4, 0, 2)],
    4: [(2, 2, 2, 2), (1, 4, 0, 3)],
}
DTYPES = [torch.float64, torch.float32]
EXCHANGES = ["gather", "ring"]
CASES = [
    (world, sizes, head, grouped, exchange, dtype)
    for world, all_sizes in SIZES.items()
    for sizes in all_sizes
    for head in ("contrastive", "sigmoid")
    for grouped in (False, True)
    for exchange in EXCHANGES
    for dtype in DTYPES
]


class TwoTowers(nn.Module):
    def __init__(self, head: str):
        super().__init__()
        torch.manual_seed(0)
        self.image_tower = nn.Sequential(nn.Linear(NUM_FEATURES, 8), nn.GELU(), nn.Linear(8, 6))
        self.text_tower = nn.Sequential(nn.Linear(NUM_FEATURES, 8), nn.GELU(), nn.Linear(8, 6, bias=False))
        self.logit_scale = nn.Parameter(torch.tensor(1.5))
        self.logit_bias = nn.Parameter(torch.tensor(-4.0)) if head == "sigmoid" else None

    def forward(self, images, texts):
        images, texts = self.image_tower(images), self.text_tower(texts)
        return F.normalize(images, dim=-1), F.normalize(texts, dim=-1), self.logit_scale.exp(), self.logit_bias


def global_batch(num_pairs, dtype):
    generator = torch.Generator().manual_seed(1)
    images, texts = torch.randn(2, num_pairs, NUM_FEATURES, generator=generator, dtype=torch.float64).to(dtype)
    return images, texts, torch.arange(num_pairs) % 3  # ids repeat within a rank and across ranks


def dense_loss(images, texts, scale, bias, group_id):
    """The definitions on the whole batch."""
    ids = torch.arange(len(images)) if group_id is None else group_id
    positive = (ids[:, None] == ids).to(images.dtype)
    logits = scale * images @ texts.T
    if bias is not None:
        return F.binary_cross_entropy_with_logits(logits + bias, positive, reduction="sum") / len(images)
    targets = positive / positive.sum(dim=1, keepdim=True)
    return (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets)) / 2


def tiled_loss(images, texts, scale, bias, group_id, **kwargs):
    if bias is None:
        return contrastive_loss(images, texts, scale, group_id=group_id, **kwargs)
    return sigmoid_loss(images, texts, scale, bias, group_id=group_id, **kwargs)


def loss_and_gradients(model, images, texts, group_id, loss_function=tiled_loss, **kwargs):
    loss = loss_function(*model(images, texts), group_id, **kwargs)
    loss.backward()
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    return {"loss": loss.detach(), **{name.removeprefix("module."): p.grad.clone() for name, p in trained}}


def local_part(rank, sizes, dtype):
    start = sum(sizes[:rank])
    return (part[start : start + sizes[rank]] for part in global_batch(sum(sizes), dtype))


def run_case(rank, sizes, head, grouped, exchange, dtype):
    images, texts, ids = local_part(rank, sizes, dtype)
    model = DistributedDataParallel(TwoTowers(head).to(dtype))
    return loss_and_gradients(model, images, texts, ids if grouped else None, exchange=exchange)


def locked_model(head, tower):
    model = TwoTowers(head).double()
    getattr(model, tower).requires_grad_(False)
    return model


def run_locked(rank, sizes):
    """One tower locked, the other trained."""
    images, texts, ids = local_part(rank, sizes, torch.float64)
    return {
        (head, tower, exchange): loss_and_gradients(
            DistributedDataParallel(locked_model(head, tower)), images, texts, ids, exchange=exchange
        )
        for head in ("contrastive", "sigmoid")
        for tower in ("image_tower", "text_tower")
        for exchange in EXCHANGES
    }


class LargestTensor(TorchDispatchMode):
    """Notes how many elements the largest tensor has that any operation makes."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        self.elements = max(self.elements, *sizes, 0)
        return result


def run_largest(rank, world):
    """Elements of the largest tensor of a loss on 8 x 6 embeddings, forward and backward."""
    found = {}
    for exchange in EXCHANGES:
        images, texts = (torch.randn(8, 6, requires_grad=True) for _ in range(2))
        ids = torch.arange(8)
        for bias in (None, 0.0):
            with LargestTensor() as largest:
                tiled_loss(images, texts, 1.0, bias, ids, exchange=exchange).backward()
            found[exchange, bias] = largest.elements
    return found


def error_of(loss, *args, **kwargs):
    try:
        loss(*args, **kwargs)
    except ValueError as error:
        return str(error)


def run_errors(rank, world):
    """What each rank is told when the ranks do not fit together."""
    embeds = torch.randn(2, 4)
    ids = torch.zeros(2, dtype=torch.int64) if rank == 0 else None
    wide, double, empty = torch.randn(2, 4 + rank), embeds.to(DTYPES[rank % 2]), embeds[:0]
    return {
        "dim": error_of(contrastive_loss, wide, wide, 1.0),
        "precision": error_of(contrastive_loss, double, double, 1.0),
        "group_id": error_of(sigmoid_loss, embeds, embeds, 1.0, 0.0, group_id=ids),
        "empty": error_of(sigmoid_loss, empty, empty, 1.0, 0.0),
        "exchange": error_of(contrastive_loss, embeds, embeds, 1.0, exchange=EXCHANGES[rank % 2]),
        "gradient": error_of(contrastive_loss, embeds, embeds.clone().requires_grad_(rank > 0), 1.0),
    }


def run_subgroup(rank, world):
    """The last two ranks of three as a group of their own, averaging their gradients; rank 0 is refused."""
    group = dist.new_group([1, 2])
    if rank == 0:
        embeds = torch.randn(2, 4)
        return {"error": error_of(contrastive_loss, embeds, embeds, 1.0, group=group)}
    images, texts, _ = local_part(rank - 1, (3, 2), torch.float64)
    model = DistributedDataParallel(TwoTowers("contrastive").double(), process_group=group)
    found = {}
    for exchange in EXCHANGES:
        model.zero_grad()
        found[exchange] = loss_and_gradients(model, images, texts, None, group=group, exchange=exchange)
    return found


def worker(rank, world, folder):
    torch.set_num_threads(1)
    tiles.CPU_TILE = TILE
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
    results = {case: run_case(rank, *case[1:]) for case in CASES if case[0] == world}
    if world > 1:
        results["errors"] = run_errors(rank, world)
    if world == 3:
        results["locked"] = run_locked(rank, (2, 5, 1))
        results["largest"] = run_largest(rank, world)
        results["subgroup"] = run_subgroup(rank, world)
    torch.save(results, Path(folder) / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@lru_cache
def results_of(world):
    """What every rank found, in rank order."""
    with TemporaryDirectory() as folder:
        fork(worker, world, folder, processes=world)
        return [torch.load(Path(folder) / f"{rank}.pt") for rank in range(world)]


def assert_same(found, expected, tolerance):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        scale = value.abs().max()
        assert scale > 0, f"{name} is zero and would prove nothing"
        error = (found[name] - value).abs().max() / scale
        assert error <= tolerance, f"{name}: relative error {error:.1e}"


def name_of(case):
    world, sizes, head, grouped, exchange, dtype = case
    return "-".join([*map(str, sizes), head, *["grouped"] * grouped, exchange, str(dtype).removeprefix("torch.")])


@lru_cache
def expected_of(sizes, head, grouped):
    images, texts, ids = global_batch(sum(sizes), torch.float64)
    return loss_and_gradients(TwoTowers(head).double(), images, texts, ids if grouped else None, dense_loss)


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_ranks_together_equal_the_definition(case):
    world, sizes, head, grouped, _, dtype = case
    # float64 differs by the order of additions only: some hundred terms of 1e-16. float32 is measured against the
    # float64 reference: a few dozen roundings of 6e-8 each.
    tolerance = 1e-10 if dtype == torch.float64 else 1e-5
    for found in results_of(world):
        assert_same(found[case], expected_of(sizes, head, grouped), tolerance)


@pytest.mark.parametrize("head", ["contrastive", "sigmoid"])
@pytest.mark.parametrize("tower", ["image_tower", "text_tower"])
@pytest.mark.parametrize("exchange", EXCHANGES)
def test_a_locked_tower_leaves_the_other_gradients_as_they_are(head, tower, exchange):
    images, texts, ids = global_batch(8, torch.float64)
    expected = loss_and_gradients(locked_model(head, tower), images, texts, ids, dense_loss)
    for found in results_of(3):
        assert_same(found["locked"][head, tower, exchange], expected, 1e-10)


def test_a_ring_makes_nothing_larger_than_local_embeddings():
    for found in results_of(3):
        for (exchange, _), elements in found["largest"].items():
            assert elements == (3 * 8 * 6 if exchange == "gather" else 8 * 6)


@pytest.mark.parametrize("world", [2, 3, 4])
def test_every_rank_returns_the_same_bits(world):
    ranks = results_of(world)
    cases = [case for case in CASES if case[0] == world]
    assert cases
    for case in cases:
        assert all(torch.equal(found[case]["loss"], ranks[0][case]["loss"]) for found in ranks)


@pytest.mark.parametrize("world", [2, 3])
def test_rejects_ranks_that_do_not_fit_on_every_rank(world):
    for found in results_of(world):
        errors = found["errors"]
        assert "rank 0: embeddings (2, 4) of 32 bits" in errors["dim"]
        assert "rank 1: embeddings (2, 5)" in errors["dim"]
        assert "64 bits" in errors["precision"] and "32 bits" in errors["precision"]
        assert "rank 0: embeddings (2, 4) of 32 bits, with group_id, gather" in errors["group_id"]
        assert f"0 pairs on each of {world} ranks" in errors["empty"]
        exchanges = [rank.split(", ")[3] for rank in errors["exchange"].split("rank ")[1:]]
        assert exchanges == [EXCHANGES[rank % 2] for rank in range(world)]
        assert "of texts False; rank 1: embeddings (2, 4)" in errors["gradient"] and "texts True" in errors["gradient"]


def test_subgroup_of_ranks_is_a_batch_of_its_own():
    outsider, *members = results_of(3)
    for found in members:
        for exchange in EXCHANGES:
            assert_same(found["subgroup"][exchange], expected_of((5,), "contrastive", False), 1e-10)
    assert "rank 0 is not a member" in outsider["subgroup"]["error"]


def test_rejects_group_without_distributed():
    with pytest.raises(ValueError, match="torch.distributed is not initialised"):
        contrastive_loss(torch.zeros(2, 4), torch.zeros(2, 4), 1.0, group=object())

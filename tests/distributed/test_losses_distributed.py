"""The losses over real processes: W ranks under DistributedDataParallel are one process on the whole batch.

For each world size one set of gloo processes computes every case and saves what each rank found; the tests then
compare with this process, which sees all pairs at once. Loss value and the gradient of every parameter have to agree,
`logit_scale` and `logit_bias` included, for even, uneven and empty local batches.
"""

from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from hfclip.losses import contrastive_loss, sigmoid_loss


NUM_FEATURES = 7
# Largest local batch first, in the middle, last, and ranks without any pair.
SIZES = {1: [(5,)], 2: [(4, 4), (5, 2), (1, 6), (0, 3)], 3: [(3, 3, 3), (2, 5, 1), (4, 0, 2)]}
DTYPES = [torch.float64, torch.float32]
CASES = [
    (world, sizes, head, grouped, dtype)
    for world, all_sizes in SIZES.items()
    for sizes in all_sizes
    for head in ("contrastive", "sigmoid")
    for grouped in (False, True)
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


def loss_and_gradients(model, images, texts, group_id, group=None):
    image_embeds, text_embeds, scale, bias = model(images, texts)
    if bias is None:
        loss = contrastive_loss(image_embeds, text_embeds, scale, group=group, group_id=group_id)
    else:
        loss = sigmoid_loss(image_embeds, text_embeds, scale, bias, group=group, group_id=group_id)
    loss.backward()
    gradients = {name.removeprefix("module."): p.grad.clone() for name, p in model.named_parameters()}
    return {"loss": loss.detach(), **gradients}


def run_case(rank, sizes, head, grouped, dtype):
    start = sum(sizes[:rank])
    images, texts, ids = (part[start : start + sizes[rank]] for part in global_batch(sum(sizes), dtype))
    model = DistributedDataParallel(TwoTowers(head).to(dtype))
    return loss_and_gradients(model, images, texts, ids if grouped else None)


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
    }


def run_subgroup(rank, world):
    """Ranks 0 and 1 of three as a group of their own, averaging their gradients; rank 2 is refused."""
    group = dist.new_group([0, 1])
    if rank == 2:
        embeds = torch.randn(2, 4)
        return {"error": error_of(contrastive_loss, embeds, embeds, 1.0, group=group)}
    start, end = (0, 3) if rank == 0 else (3, 5)
    images, texts, _ = (part[start:end] for part in global_batch(5, torch.float64))
    model = DistributedDataParallel(TwoTowers("contrastive").double(), process_group=group)
    return loss_and_gradients(model, images, texts, None, group=group)


def worker(rank, world, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
    results = {case: run_case(rank, *case[1:]) for case in CASES if case[0] == world}
    if world > 1:
        results["errors"] = run_errors(rank, world)
    if world == 3:
        results["subgroup"] = run_subgroup(rank, world)
    torch.save(results, Path(folder) / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@lru_cache
def results_of(world):
    """What every rank found, in rank order."""
    with TemporaryDirectory() as folder:
        mp.spawn(worker, args=(world, folder), nprocs=world)
        return [torch.load(Path(folder) / f"{rank}.pt") for rank in range(world)]


def assert_same(found, expected, tolerance):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        scale = value.abs().max()
        assert scale > 0, f"{name} is zero and would prove nothing"
        error = (found[name] - value).abs().max() / scale
        assert error <= tolerance, f"{name}: relative error {error:.1e}"


def name_of(case):
    world, sizes, head, grouped, dtype = case
    return "-".join([*map(str, sizes), head, *["grouped"] * grouped, str(dtype).removeprefix("torch.")])


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_ranks_together_equal_one_process(case):
    world, sizes, head, grouped, dtype = case
    images, texts, ids = global_batch(sum(sizes), torch.float64)
    expected = loss_and_gradients(TwoTowers(head).double(), images, texts, ids if grouped else None)
    # float64 differs by the order of additions only: some hundred terms of 1e-16. float32 is measured against the
    # float64 reference: a few dozen roundings of 6e-8 each.
    tolerance = 1e-10 if dtype == torch.float64 else 1e-5
    for found in results_of(world):
        assert_same(found[case], expected, tolerance)


@pytest.mark.parametrize("world", [2, 3])
def test_every_rank_returns_the_same_bits(world):
    ranks = results_of(world)
    for case in ranks[0].keys() - {"errors", "subgroup"}:
        assert all(torch.equal(found[case]["loss"], ranks[0][case]["loss"]) for found in ranks)


@pytest.mark.parametrize("world", [2, 3])
def test_rejects_ranks_that_do_not_fit_on_every_rank(world):
    for found in results_of(world):
        errors = found["errors"]
        assert "rank 0: embeddings (2, 4) of 32 bits" in errors["dim"]
        assert "rank 1: embeddings (2, 5)" in errors["dim"]
        assert "64 bits" in errors["precision"] and "32 bits" in errors["precision"]
        assert "rank 0: embeddings (2, 4) of 32 bits, with group_id; rank 1" in errors["group_id"]
        assert f"0 pairs on each of {world} ranks" in errors["empty"]


def test_subgroup_of_ranks_is_a_batch_of_its_own():
    images, texts, _ = global_batch(5, torch.float64)
    expected = loss_and_gradients(TwoTowers("contrastive").double(), images, texts, None)
    *members, outsider = results_of(3)
    for found in members:
        assert_same(found["subgroup"], expected, 1e-10)
    assert "rank 2 is not a member" in outsider["subgroup"]["error"]


def test_rejects_group_without_distributed():
    with pytest.raises(ValueError, match="torch.distributed is not initialised"):
        contrastive_loss(torch.zeros(2, 4), torch.zeros(2, 4), 1.0, group=object())

"""The distillation loss over real processes: W ranks under DistributedDataParallel are one process on the whole batch.

For each world size one set of gloo processes computes every case and saves what each rank found; the tests then
compare with the definition on the whole batch. Loss value and the gradient of every parameter have to agree,
`logit_scale` included, for even, uneven and empty local batches, with the texts of all ranks gathered and passed round.
"""

from functools import lru_cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
import torch.distributed as dist
from test_losses_distributed import LargestTensor
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from training_utils import fork

from hfclip.losses import distillation_loss, tiles


NUM_FEATURES, TEACHER_DIM, TEACHER_SCALE = 7, 4, 20.0
SIZES = {1: [(5,)], 2: [(4, 4), (5, 2), (1, 6), (0, 3)], 3: [(3, 3, 3), (2, 5, 1), (4, 0, 2)]}
TILE = 2  # local batches are whole tiles, broken ones, or less than one
DTYPES = [torch.float64, torch.float32]
EXCHANGES = ["gather", "ring"]
CASES = [
    (sizes, exchange, dtype)
    for all_sizes in SIZES.values()
    for sizes in all_sizes
    for exchange in EXCHANGES
    for dtype in DTYPES
]


class TwoTowers(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.image_tower = nn.Sequential(nn.Linear(NUM_FEATURES, 8), nn.GELU(), nn.Linear(8, 6))
        self.text_tower = nn.Sequential(nn.Linear(NUM_FEATURES, 8), nn.GELU(), nn.Linear(8, 6, bias=False))
        self.logit_scale = nn.Parameter(torch.tensor(1.5))

    def forward(self, images, texts):
        images, texts = self.image_tower(images), self.text_tower(texts)
        return F.normalize(images, dim=-1), F.normalize(texts, dim=-1), self.logit_scale.exp()


def global_batch(num_pairs, dtype):
    """Inputs of the student, and embeddings of the teacher."""
    generator = torch.Generator().manual_seed(1)
    images, texts = torch.randn(2, num_pairs, NUM_FEATURES, generator=generator, dtype=torch.float64)
    teacher = F.normalize(torch.randn(2, num_pairs, TEACHER_DIM, generator=generator, dtype=torch.float64), dim=2)
    return [part.to(dtype) for part in (images, texts, *teacher)]


def definition(images, texts, scale, teacher_images, teacher_texts, teacher_scale):
    student, teacher = scale * images @ texts.T, teacher_scale * teacher_images @ teacher_texts.T
    total = 0
    for ours, theirs in ((student, teacher), (student.T, teacher.T)):
        p, q = theirs.softmax(dim=1), ours.softmax(dim=1)
        total = total + (p * (p / q).log()).sum() / len(p) / 2
    return total


def loss_and_gradients(model, loss, batch):
    images, texts, *teacher = batch
    value = loss(*model(images, texts), *teacher, TEACHER_SCALE)
    value.backward()
    gradients = {name.removeprefix("module."): p.grad.clone() for name, p in model.named_parameters()}
    return {"loss": value.detach(), **gradients}


def run_case(rank, sizes, exchange, dtype):
    start = sum(sizes[:rank])
    batch = [part[start : start + sizes[rank]] for part in global_batch(sum(sizes), dtype)]
    loss = partial(distillation_loss, exchange=exchange)
    return loss_and_gradients(DistributedDataParallel(TwoTowers().to(dtype)), loss, batch)


def run_largest():
    """Elements of the largest tensor of a loss on 8 x 6 embeddings, forward and backward."""
    found = {}
    for exchange in EXCHANGES:
        images, texts = (torch.randn(8, 6, requires_grad=True) for _ in range(2))
        teacher = [torch.randn(8, 5) for _ in range(2)]
        with LargestTensor() as largest:
            distillation_loss(images, texts, 1.0, *teacher, 1.0, exchange=exchange).backward()
        found[exchange] = largest.elements
    return found


def error_of(*args, **kwargs):
    try:
        distillation_loss(*args, **kwargs)
    except ValueError as error:
        return str(error)


def run_errors(rank):
    embeds, teacher = torch.randn(2, 4), torch.randn(2, 3 + rank)
    only_first = dist.new_group([0])
    return {
        "dim": error_of(embeds, embeds, 1.0, teacher, teacher, 1.0),
        "exchange": error_of(*[embeds] * 2, 1.0, *[embeds] * 2, 1.0, exchange=EXCHANGES[rank % 2]),
        "empty": error_of(*[embeds[:0]] * 2, 1.0, *[embeds[:0]] * 2, 1.0),
        "group": error_of(embeds, embeds, 1.0, embeds, embeds, 1.0, group=only_first) if rank else None,
    }


def worker(rank, world, folder):
    torch.set_num_threads(1)
    tiles.CPU_TILE = TILE
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
    results = {case: run_case(rank, *case) for case in CASES if len(case[0]) == world}
    if world > 1:
        results |= {"errors": run_errors(rank), "largest": run_largest()}
    torch.save(results, Path(folder) / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@lru_cache
def results_of(world):
    """What every rank found, in rank order."""
    with TemporaryDirectory() as folder:
        fork(worker, world, folder, processes=world)
        return [torch.load(Path(folder) / f"{rank}.pt") for rank in range(world)]


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join([*map(str, case[0]), case[1], str(case[2])[6:]]))
def test_ranks_together_equal_the_definition_on_the_whole_batch(case):
    sizes, _, dtype = case
    expected = loss_and_gradients(TwoTowers().double(), definition, global_batch(sum(sizes), torch.float64))
    # float64 differs by the order of additions only: some hundred terms of 1e-16. float32 is measured against the
    # float64 reference: a few dozen roundings of 6e-8 each.
    tolerance = 1e-10 if dtype == torch.float64 else 1e-5
    for found in results_of(len(sizes)):
        assert found[case].keys() == expected.keys()
        for name, value in expected.items():
            scale = value.abs().max()
            assert scale > 0, f"{name} is zero and would prove nothing"
            error = (found[case][name] - value).abs().max() / scale
            assert error <= tolerance, f"{name}: relative error {error:.1e}"


@pytest.mark.parametrize("world", [2, 3])
def test_a_ring_makes_nothing_larger_than_local_embeddings(world):
    for found in results_of(world):
        assert found["largest"] == {"gather": world * 8 * 6, "ring": 8 * 6}


@pytest.mark.parametrize("world", [2, 3])
def test_every_rank_returns_the_same_bits(world):
    ranks = results_of(world)
    for case in [case for case in CASES if len(case[0]) == world]:
        assert all(torch.equal(found[case]["loss"], ranks[0][case]["loss"]) for found in ranks)


@pytest.mark.parametrize("world", [2, 3])
def test_rejects_ranks_that_do_not_fit_on_every_rank(world):
    for rank, found in enumerate(results_of(world)):
        errors = found["errors"]
        assert "must agree" in errors["dim"]
        assert all(f"rank {r}: embeddings (2, 4)" in errors["dim"] for r in range(world))
        assert all(f"a teacher's of size {3 + r}" in errors["dim"] for r in range(world))
        assert (
            "rank 0: embeddings (2, 4) of 32 bits, without group_id, a teacher's of size 4, gather"
            in errors["exchange"]
        )
        assert "global batch is empty" in errors["empty"]
        assert rank == 0 or f"rank {rank} is not a member" in errors["group"]

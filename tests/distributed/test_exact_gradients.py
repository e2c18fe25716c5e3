"""The trainer's gradients over real processes: tiled, ring, cached, and all of them together, are the definition's.

In each world a set of gloo processes takes the trainer's own step, once for every way of computing it, with patch
dropout on, and saves loss and gradients. The reference is this process: it embeds the same pieces with the same random
numbers in one float64 graph, and writes the loss out as the paper does, with the whole similarity matrix.
"""

import os
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from accelerate import Accelerator
from torch.nn.parallel import DistributedDataParallel
from training_utils import fork, free_port

from hfclip import HFCLIPConfig, HFCLIPImageProcessor, HFCLIPModel
from hfclip.flops import ModelFlops
from hfclip.losses import LOSSES
from training import parallel
from training import step as training_step
from training.config import Config
from training.data.order import rank_slice
from training.objectives.contrastive import Contrastive
from training.phases import Phase, Phases
from training.report.timing import Stopwatch


BATCH = 13
TOWER = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2}
WAYS = [  # sharded, micro_batch_size, exchange, loss
    (False, None, "gather", "contrastive"),
    (False, None, "ring", "contrastive"),
    (False, 2, "gather", "contrastive"),
    (False, 2, "ring", "contrastive"),
    (True, None, "gather", "contrastive"),
    (True, 2, "ring", "contrastive"),
    (False, 2, "ring", "sigmoid"),
    (True, None, "gather", "sigmoid"),
    (False, 2, "gather", "mean"),
    (True, 2, "gather", "mean"),
]
CASES = [
    (world, dtype, *way)
    for world in (1, 2, 3, 4)
    for dtype in (torch.float64, torch.float32)
    for way in WAYS
    if not (world == 1 and (way[0] or way[2] == "ring" and way[3] == "contrastive"))
]


def tiny_model(dtype: torch.dtype, loss: str) -> HFCLIPModel:
    torch.manual_seed(0)
    ids = {"vocab_size": 60, "bos_token_id": 58, "eos_token_id": 59, "max_position_embeddings": 10}
    sigmoid = {"logit_bias_init_value": -3.0} if loss == "sigmoid" else {}
    config = HFCLIPConfig(
        projection_dim=12,
        vision_config={**TOWER, "model_type": "hfclip_vit", "image_size": 16, "patch_size": 4, "patch_dropout": 0.5},
        text_config={**TOWER, **ids},
        **sigmoid,
    )
    return HFCLIPModel(config).to(dtype).train()


def global_batch() -> dict[str, torch.Tensor]:
    """13 pairs with captions of many lengths, some of which are positives of each other."""
    generator = torch.Generator().manual_seed(1)
    lengths, place = torch.randint(2, 9, (BATCH, 1), generator=generator), torch.arange(10)
    ids = torch.randint(1, 58, (BATCH, 10), generator=generator).where(place < lengths, 59)
    return {
        "pixel_values": torch.randint(0, 256, (BATCH, 3, 16, 16), generator=generator, dtype=torch.uint8),
        "input_ids": ids,
        "attention_mask": (place <= lengths).long(),
        "group_id": torch.arange(BATCH) % 9,
    }


def share(batch: dict, rank: int, world: int) -> dict:
    slots = rank_slice(BATCH, rank, world)
    return {name: values[slots.start : slots.stop] for name, values in batch.items()}


def settings(sharded: bool, micro: int | None, exchange: str, loss: str) -> Config:
    return Config.from_dict(
        {
            "model": {"preset": "ViT-B/32", "tokenizer": "none of them is read"},
            "optim": {
                "batch_size": BATCH,
                "micro_batch_size": micro,
                "exchange": exchange,
                "loss": loss if loss in LOSSES else "contrastive",
            },
            "run": {"shard_weights": sharded, "precision": "fp32"},
        }
    )


class Mean(Contrastive):
    """A loss of pairs each on their own, whose mean needs no other process's embeddings."""

    couples_pairs = False

    def loss(self, embeds, scalars, inputs):
        images, texts = embeds
        assert inputs["group_id"].shape == images.shape[:1]
        return -(scalars["logit_scale"].exp() * (images * texts).sum(dim=1)).mean()


OBJECTIVES = {"mean": Mean}  # the others are losses of `Contrastive`


def step_of(core, model, accelerator, config, objective) -> training_step.TrainingStep:
    return training_step.TrainingStep(
        config=config,
        accelerator=accelerator,
        model=model,
        core=core,
        objective=objective(config),
        flops=ModelFlops(core.config, "none"),
        optimizer=None,
        **training_step.pixel_statistics(HFCLIPImageProcessor(size=16), torch.device("cpu")),
        total_steps=10,
        watch=Stopwatch(torch.device("cpu")),
        phases=Phases([], Phase(16, 10, 0.5), stride=4, steps_per_epoch=10, total_steps=10),
    )


def one_rank(rank: int, world: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(world)}
    os.environ |= {**group, "RANK": str(rank), "LOCAL_RANK": str(rank)}
    accelerator = Accelerator(cpu=True)
    for case in (case for case in CASES if case[0] == world):
        _, dtype, sharded, micro, exchange, loss = case
        core = tiny_model(dtype, loss)
        if sharded:
            model = parallel.shard(core, accelerator)
        else:
            model = DistributedDataParallel(core) if world > 1 else core
        step = step_of(
            core, model, accelerator, settings(sharded, micro, exchange, loss), OBJECTIVES.get(loss, Contrastive)
        )
        step._seed(0)
        value = step._backward(share(global_batch(), rank, world))
        if sharded:
            parallel.average_scalars(core)
        found = {name: parallel.full_tensor(p.grad) for name, p in core.named_parameters()}
        if rank == 0:
            torch.save({"loss": value, **found}, Path(folder) / f"{CASES.index(case)}.pt")
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()


@lru_cache
def results(world: int) -> dict[tuple, dict]:
    """What all cases of a world found."""
    with TemporaryDirectory() as folder:
        fork(one_rank, world, free_port(), folder, processes=world)
        return {case: torch.load(Path(folder) / f"{CASES.index(case)}.pt") for case in CASES if case[0] == world}


@lru_cache
def reference(world: int, micro: int | None, loss: str) -> dict[str, torch.Tensor]:
    """Loss and gradients of one float64 graph over all pieces, each with the random numbers that its rank draws."""
    core = tiny_model(torch.float64, loss)
    config = settings(False, micro, "gather", loss)
    count, batch, embeds = training_step.num_micro_batches(config.optim, world), global_batch(), []
    for rank in range(world):
        alone = Accelerator(cpu=True)
        as_rank = SimpleNamespace(process_index=rank, device=alone.device, autocast=alone.autocast)
        step = step_of(core, core, as_rank, config, OBJECTIVES.get(loss, Contrastive))
        step._seed(0)
        pieces = share(batch, rank, world)
        pieces["text_lengths"] = pieces["attention_mask"].sum(dim=1).tolist()
        embeds += [step._embed(piece) for piece in training_step.split(pieces, count)]
    images, texts = (torch.cat(parts) for parts in zip(*embeds, strict=True))
    ids = batch["group_id"]
    positives = ids[:, None] == ids
    logits = core.logit_scale.exp() * images @ texts.T
    if loss == "contrastive":
        targets = positives.double() / positives.sum(dim=1, keepdim=True)
        value = (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets)) / 2
    elif loss == "mean":
        value = -logits.diagonal().mean()
    else:
        signs = torch.where(positives, 1.0, -1.0)
        value = -F.logsigmoid(signs * (logits + core.logit_bias)).sum() / BATCH
    value.backward()
    return {"loss": value.detach(), **{name: p.grad for name, p in core.named_parameters()}}


def name_of(case: tuple) -> str:
    world, dtype, sharded, micro, exchange, loss = case
    how = f"{'FSDP' if sharded else 'DDP'}-{'cached' if micro else 'plain'}-{exchange}"
    return f"{world}-{str(dtype).removeprefix('torch.')}-{how}-{loss}"


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_loss_and_gradient_of_every_parameter_are_those_of_the_definition(case):
    world, dtype, _, micro, _, loss = case
    expected, found = reference(world, micro, loss), results(world)[case]
    # float64: sums in another order. float32: rounding of the towers, which both directions of the loss go through.
    tolerance = 1e-10 if dtype == torch.float64 else 1e-5
    assert found.keys() == expected.keys() and "logit_scale" in found
    assert found["loss"].item() == pytest.approx(expected["loss"].item(), rel=tolerance)
    total = torch.stack([value.norm() for value in expected.values()]).norm()
    for name, value in expected.items():
        # The key's bias has no gradient but rounding noise, since softmax ignores it: the second term.
        assert (found[name] - value).norm() <= tolerance * value.norm() + 1e-2 * tolerance * total, name

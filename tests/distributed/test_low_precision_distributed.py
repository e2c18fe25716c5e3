"""Half-precision moments, half-precision text weights and the moving average, over real processes."""

from contextlib import nullcontext
from functools import lru_cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from training_utils import fork

from hfclip import HFCLIPConfig, HFCLIPModel, contrastive_loss
from hfclip.grad_cache import cached_backward
from training.config import OptimConfig
from training.ema import EMA
from training.low_precision import LowPrecisionAdamW, halve_text_weights
from training.optim import build_optimizer


WORLD, STEPS = 2, 4
TOWER = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}


def tiny_clip():
    torch.manual_seed(0)
    vision = {**TOWER, "image_size": 16, "patch_size": 8}
    text = {**TOWER, "vocab_size": 50, "bos_token_id": 48, "eos_token_id": 49, "max_position_embeddings": 8}
    config = HFCLIPConfig(vision_config=vision, text_config=text, projection_dim=8)
    return halve_text_weights(HFCLIPModel(config)).train()


def pairs(seed):
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randn(4, 3, 16, 16, generator=generator)
    ids = torch.randint(1, 40, (4, 6), generator=generator)
    ids[:, 0], ids[:, -1] = 48, 49
    return {"pixel_values": pixels, "input_ids": ids}


def embeds_of(model, batch):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(**batch, embeds_only=True)
    return output.image_embeds.float(), output.text_embeds.float()


def loss_of(images, texts, logit_scale):
    return contrastive_loss(images, texts, logit_scale.exp())


def run_clip(rank):
    """Everything halved, under DistributedDataParallel: the weights of this rank after some steps."""
    core = tiny_clip()
    optimizer = build_optimizer(core, OptimConfig(lr=1e-2, bfloat16=["moments", "text_weights"]), seed=5)
    model = DistributedDataParallel(core)
    torch.manual_seed(rank + 1)  # each rank has pairs, and a global generator, of its own
    for step in range(STEPS):
        loss_of(*embeds_of(model, pairs(WORLD * step + rank)), core.logit_scale).backward()
        optimizer.step()
        optimizer.zero_grad()
    return core.state_dict()


def cached_gradients(core, model, seeds):
    """By the cache, pair by pair, of the batches of these seeds."""
    batches = [{name: values[[i]] for name, values in pairs(seed).items()} for seed in seeds for i in range(4)]
    no_sync = getattr(model, "no_sync", nullcontext)
    embed = partial(embeds_of, model)
    cached_backward(embed, batches, loss_of, [core.logit_scale], weights=core.parameters(), no_sync=no_sync)
    return {name: p.grad.clone() for name, p in core.named_parameters()}


def run_cached(rank):
    """The gradients of two steps; the second finds what the first left behind."""
    core, found = tiny_clip(), []
    model = DistributedDataParallel(core, gradient_as_bucket_view=True)
    for step in range(2):
        found.append(cached_gradients(core, model, [WORLD * step + rank]))
        model.zero_grad()
    return found


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.GELU(), nn.Linear(5, 3))


def train_network(model, average_of):
    """Some steps on the same batches in every process; `average_of` makes a gradient whole. Weights and averages."""
    groups = [{"params": list(model.parameters()), "weight_decay": 0.2}]
    optimizer = LowPrecisionAdamW(groups, 1e-2, (0.9, 0.98), 1e-6, moments=torch.bfloat16)
    ema = EMA(model, 0.9)
    generator = torch.Generator().manual_seed(3)
    for step in range(STEPS):
        model(torch.randn(8, 6, generator=generator)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        ema.update(step)
    live = {name: average_of(p.detach()).clone() for name, p in model.named_parameters()}
    average = {name: average_of(tensor).clone() for name, tensor in ema.state_dict().items()}
    with ema.swapped_in():
        shown = {name: average_of(p.detach()).clone() for name, p in model.named_parameters()}
    after = {name: average_of(p.detach()).clone() for name, p in model.named_parameters()}
    ema.load_state_dict({name: torch.zeros_like(tensor) for name, tensor in average.items()})
    emptied = {name: average_of(tensor) for name, tensor in ema.state_dict().items()}
    moments = [optimizer.state[p]["exp_avg"] for p in model.parameters()]
    kinds = {(moment.dtype, isinstance(moment, DTensor)) for moment in moments}
    return {"live": live, "average": average, "shown": shown, "after": after, "emptied": emptied, "kinds": kinds}


def worker(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=WORLD)
    mesh = dist.device_mesh.init_device_mesh("cpu", (WORLD,))
    results = {"clip": run_clip(rank), "cached": run_cached(rank)}
    sharded = train_network(fully_shard(network(), mesh=mesh), lambda tensor: tensor.full_tensor())
    torch.save({**results, "sharded": sharded}, Path(folder) / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@lru_cache
def results():
    with TemporaryDirectory() as folder:
        fork(worker, folder, processes=WORLD)
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(WORLD)]


def test_weights_stay_equal_on_all_ranks():
    first, second = (found["clip"] for found in results())
    assert {value.dtype for value in first.values()} == {torch.float32, torch.bfloat16}
    assert all(torch.equal(value, second[name]) for name, value in first.items())


@pytest.mark.parametrize("step", range(2))
def test_cached_gradients_are_those_of_one_process(step):
    core = tiny_clip()
    expected = cached_gradients(core, core, range(WORLD * step, WORLD * (step + 1)))
    first, second = (found["cached"][step] for found in results())
    for name, gradient in expected.items():
        assert torch.equal(first[name], second[name]) and first[name].dtype == gradient.dtype
        # Each process rounds its sum to bfloat16 twice, and their mean is rounded again: 0.16 % each time.
        assert (first[name].float() - gradient.float()).norm() <= 0.01 * gradient.float().norm(), name


@pytest.mark.parametrize("rank", range(WORLD))
def test_sharded_weights_and_averages_are_those_of_one_process(rank):
    found, expected = results()[rank]["sharded"], train_network(network(), lambda tensor: tensor)
    assert found["kinds"] == {(torch.bfloat16, True)} and expected["kinds"] == {(torch.bfloat16, False)}
    for kind in ("live", "average"):
        for name, value in expected[kind].items():
            # Other noise for other shards: moments differ by 2^-8 of their size in each of four steps of 0.01.
            torch.testing.assert_close(found[kind][name], value, rtol=0, atol=1e-3)
            assert not torch.equal(value, dict(network().named_parameters())[name])


@pytest.mark.parametrize("rank", range(WORLD))
def test_sharded_averages_are_swapped_in_and_loaded_whole(rank):
    found = results()[rank]["sharded"]
    for name, average in found["average"].items():
        assert torch.equal(found["shown"][name], average)
        assert torch.equal(found["after"][name], found["live"][name])
        assert not torch.equal(average, found["live"][name])
        assert not found["emptied"][name].any()

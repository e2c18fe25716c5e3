"""The planner: what it counts is what is published, and what it predicts is what torch allocates."""

import os
import re
import subprocess
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from torch.distributed.tensor import DTensor
from training_utils import fork, free_port
from transformers import BertConfig, ConvNextConfig, Dinov2Config

from hfclip import HFCLIPConfig, HFCLIPModel
from hfclip.errors import UsageError
from training.config import OptimConfig, PhaseConfig
from training.footprint import Towers
from training.low_precision import halve_text_weights
from training.model import checkpoint_activations
from training.optim import build_optimizer
from training.parallel import shard
from training.plan import DEVICES, PlannedRun, batches_ahead, implied_share, make_plan, model_bytes, parse_run, report


# Millions of parameters (OpenCLIP's model_profile.csv)
PUBLISHED = {
    "RN50": 102.01,
    "RN101": 119.69,
    "RN50x4": 178.3,
    "RN50x16": 290.98,
    "RN50x64": 623.26,
    "ViT-B/32": 151.28,
    "ViT-B/16": 149.62,
    "ViT-L/14": 427.62,
    "ViT-L/14@336px": 427.94,
}
TEXT = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 4}
TEXT |= {"vocab_size": 1000, "eos_token_id": 999, "bos_token_id": 998, "max_position_embeddings": 77}
VIT = {"hidden_size": 96, "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 4}
VIT |= {"image_size": 112, "patch_size": 8}
IMAGE_TOWERS = {
    "vit": VIT,
    "vit_that_drops_patches": {**VIT, "patch_dropout": 0.5},
    "vit_with_gelu_and_mean": {**VIT, "hidden_act": "gelu", "pooling": "mean"},
    "resnet": {"model_type": "hfclip_resnet", "image_size": 64, "depths": [1, 2, 2, 1], "stem_width": 16},
    "dino": Dinov2Config(hidden_size=64, num_hidden_layers=3, num_attention_heads=4, image_size=112, patch_size=14),
    "convnext": ConvNextConfig(hidden_sizes=[16, 32], depths=[1, 2], num_stages=2, image_size=64),
}


def architecture(tower: str = "vit", text=TEXT) -> HFCLIPConfig:
    return HFCLIPConfig(projection_dim=32, vision_config=IMAGE_TOWERS[tower], text_config=text)


@cache
def towers(preset: str, freeze: str = "none", bfloat16: tuple[str, ...] = ()) -> Towers:
    return Towers(HFCLIPConfig.from_preset(preset), freeze, bfloat16)


def planned(arguments: str = "", preset: str = "ViT-B/32") -> PlannedRun:
    """What the command line plans: the paper's batch of this model on A100s, but for the arguments."""
    run, _ = parse_run(
        ["--model.preset", preset, "--optim.batch_size", "32768", "--device", "a100", *arguments.split()]
    )
    return replace(run, towers=towers(preset, run.config.model.freeze, tuple(run.config.optim.bfloat16)))


# ---------------------------------------------------------------------------------------------------------------------
# Counted = published
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", PUBLISHED)
def test_parameters_are_the_published_ones(preset):
    count = towers(preset).parameters
    assert count.total / 1e6 == pytest.approx(PUBLISHED[preset], abs=0.006)  # published to 0.01, once to 0.1
    assert count.trained == count.total and count.weights == count.gradients == 4 * count.total
    assert count.weights > 2 * count.copies > 2 * count.unit


@pytest.mark.parametrize(("preset", "world", "days"), [("RN50x64", 592, 18), ("ViT-L/14", 256, 12)])
def test_the_papers_runs_imply_a_sensible_share_of_the_peak(preset, world, days):
    settings = "--device v100 --run.precision fp16 --model.gradient_checkpointing true --text-tokens 77"
    of_model, of_all = implied_share(planned(f"--world {world} {settings}", preset), days)
    assert 0.15 < of_model < of_all < 0.5
    assert of_all / of_model == pytest.approx(4 / 3, rel=0.02)  # checkpointing: a forward pass more


# ---------------------------------------------------------------------------------------------------------------------
# Predicted = allocated
# ---------------------------------------------------------------------------------------------------------------------


def kept_for_backward(model: HFCLIPModel, half: bool, **inputs) -> int:
    """Bytes of all storages that autograd keeps, but for weights and their half-precision copies."""
    own = {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers()]}
    shapes = {tuple(p.shape) for p in model.parameters()} | {
        tuple(p.T.shape) for p in model.parameters() if p.ndim == 2
    }
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        copy_of_weight = half and tensor.dtype == torch.bfloat16 and tuple(tensor.shape) in shapes
        if storage.data_ptr() not in own and not copy_of_weight:
            kept[storage.data_ptr()] = storage  # held, lest its place is used again
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            model(embeds_only=True, **inputs)
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize(
    ("tower", "half", "checkpointing"),
    [("vit", False, False), ("resnet", True, True), *((tower, True, tower == "vit") for tower in IMAGE_TOWERS)],
)
def test_activations_are_what_autograd_keeps_of_real_pairs(tower, half, checkpointing):
    config = architecture(tower)
    model = HFCLIPModel(config).train()
    lengths = torch.tensor([77, *[19] * 58, *[20] * 5])  # 20 on average, 1280 in all: a round number
    input_ids = torch.randint(1, 900, (64, 77))
    input_ids[torch.arange(64), lengths - 1] = 999
    pixel_values = torch.randn(16, 3, config.image_size, config.image_size)
    predicted = Towers(config).kept(half, checkpointing, text_tokens=20)
    if checkpointing:
        checkpoint_activations(model)
    images, texts = (
        kept_for_backward(model, half, **inputs)
        for inputs in ({"pixel_values": pixel_values}, {"input_ids": input_ids})
    )
    # No block is computed again yet. Indices and positions are kept once, by however many inputs: a percent of so few.
    assert predicted.total - checkpointing * predicted.block == pytest.approx(images / 16 + texts / 64, rel=0.02)
    assert 0 < predicted.block < predicted.total


def test_texts_of_other_families_keep_what_their_padding_takes():
    bert = BertConfig(**{name: TEXT[name] for name in ("hidden_size", "num_hidden_layers", "num_attention_heads")})
    config = architecture(text=bert.from_dict({**bert.to_dict(), "max_position_embeddings": 77}))
    short, long = (Towers(config).kept(False, False, tokens).total for tokens in (10, 77))
    assert short == pytest.approx(long, rel=0.01)
    own_short, own_long = (Towers(architecture()).kept(False, False, tokens).total for tokens in (10, 77))
    assert own_short < own_long


@pytest.mark.parametrize("halved", [[], ["moments"], ["text_weights"], ["moments", "text_weights"]])
@pytest.mark.parametrize("freeze", ["none", "vision"])
def test_weights_gradients_and_moments_are_what_the_optimizer_holds(halved, freeze):
    config = architecture()
    model = HFCLIPModel(config)
    if freeze != "none":
        model.freeze(freeze)
    if "text_weights" in halved:
        halve_text_weights(model)
    optimizer = build_optimizer(model, OptimConfig(lr=1e-3, bfloat16=halved))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    trained = [p for p in model.parameters() if p.requires_grad]
    states = [t for s in optimizer.state.values() for t in s.values() if torch.is_tensor(t) and t.numel() > 1]
    held = {
        "weights": sum(p.nbytes for p in model.parameters()),
        "gradients": sum(p.grad.nbytes for p in trained),
        "moments": sum(t.nbytes for t in states),
    }
    run = planned(f"--optim.bfloat16 {','.join(halved) or []} --model.freeze {freeze}")
    sizes = model_bytes(replace(run, towers=Towers(config, freeze, halved)), cached=False)
    for name, size in held.items():
        assert sizes[name] == pytest.approx(size, rel=1e-3), name  # the scalar's moments are not counted above


def held_by_rank(rank: int, world: int, port: int, folder: str) -> None:
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in names.items()}, MASTER_ADDR="127.0.0.1")
    torch.set_num_threads(1)
    accelerator, model = Accelerator(cpu=True), HFCLIPModel(architecture())
    shard(model, accelerator)
    optimizer = build_optimizer(model, OptimConfig(lr=1e-3))
    pixel_values, input_ids = torch.randn(2, 3, 112, 112), torch.full((2, 5), 999)
    output = model(pixel_values=pixel_values, input_ids=input_ids, embeds_only=True)
    (output.image_embeds * output.text_embeds).sum().backward()
    optimizer.step()
    parameters = [p for p in model.parameters() if p.grad is not None]
    held = {
        "weights": sum(local(p).nbytes for p in model.parameters()),
        "gradients": sum(local(p.grad).nbytes for p in parameters),
        "moments": sum(
            local(optimizer.state[p][name]).nbytes for p in parameters for name in ("exp_avg", "exp_avg_sq")
        ),
    }
    torch.save(held, Path(folder) / f"{rank}.pt")
    accelerator.end_training()


def local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def test_processes_that_share_the_weights_hold_their_part(tmp_path):
    world = 3  # few tensors divide evenly
    fork(held_by_rank, world, free_port(), str(tmp_path), processes=world)
    run = planned(f"--world {world} --run.shard_weights true --run.precision fp32")
    sizes = model_bytes(replace(run, towers=Towers(architecture())), cached=False)
    for rank in range(world):
        for name, size in torch.load(tmp_path / f"{rank}.pt").items():
            # Rows that do not divide evenly: rank 0 has up to one more of each tensor.
            assert size == pytest.approx(sizes[name], rel=0.03), (rank, name)


# ---------------------------------------------------------------------------------------------------------------------
# The plan
# ---------------------------------------------------------------------------------------------------------------------


def test_largest_micro_batch_is_the_largest_that_fits():
    fp16 = "--device v100 --world 16 --run.precision fp16"
    largest = make_plan(planned(fp16, "ViT-B/16")).largest
    assert 0 < largest < 2048
    assert make_plan(planned(f"{fp16} --optim.micro_batch_size {largest}", "ViT-B/16")).fits
    too_large = make_plan(planned(f"{fp16} --optim.micro_batch_size {largest + 1}", "ViT-B/16"))
    assert not too_large.fits and too_large.bottleneck.startswith("memory")


def test_what_saves_memory_lets_larger_micro_batches_fit():
    base = "--world 64 --optim.batch_size 65536 --memory 32"
    largest = make_plan(planned(base, "ViT-B/16")).largest
    settings = ("model.gradient_checkpointing true", "optim.bfloat16 moments", "run.shard_weights true")
    for saving in (*settings, "optim.exchange ring"):
        assert make_plan(planned(f"{base} --{saving}", "ViT-B/16")).largest > largest, saving
    assert make_plan(planned(f"{base} --optim.ema_decay 0.999", "ViT-B/16")).largest < largest


def test_recomputing_costs_a_forward_pass():
    seconds = make_plan(planned("--world 64", "ViT-B/16")).seconds["towers"]
    # Backward is twice the forward pass, less the gradient of the pixels.
    for setting in ("--model.gradient_checkpointing true", "--optim.micro_batch_size 64"):
        again = make_plan(planned(f"--world 64 {setting}", "ViT-B/16")).seconds["towers"]
        assert again / seconds == pytest.approx(4 / 3, rel=0.02)


def test_frozen_tower_costs_its_forward_pass_and_no_activations():
    base = "--world 8 --optim.micro_batch_size 128"
    plan, locked = (make_plan(planned(f"{base} {more}", "ViT-B/16")) for more in ("", "--model.freeze vision"))
    assert locked.seconds["towers"] < 0.55 * plan.seconds["towers"]
    assert locked.memory["activations"] < 0.2 * plan.memory["activations"]
    assert locked.memory["moments"] < 0.5 * plan.memory["moments"]


@pytest.mark.parametrize(
    ("arguments", "bottleneck"),
    [
        ("--world 8 --decode 1000", "arithmetic"),
        ("--world 8 --data.num_workers 1 --decode 10", "data"),
        ("--world 8 --data.num_workers 0 --decode 10", "data"),
        ("--world 8 --data.num_workers 0 --decode 1e6", "arithmetic"),
        ("--world 512 --decode 1e6 --link 0.1", "the link"),
        ("--world 8 --optim.micro_batch_size 4096 --device v100 --run.precision fp16", "memory"),
    ],
)
def test_names_the_bottleneck(arguments, bottleneck):
    plan = make_plan(planned(arguments))
    assert plan.bottleneck.startswith(bottleneck)
    assert f"bottleneck: {bottleneck}" in report(plan)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--optim.micro_batch_size 4096 --memory 16", "the activations of 4096 pairs, "),
        (
            "--run.precision fp32 --optim.batch_size 8 --memory 7.3",
            "not even the activations of one pair fit. Try --model.gradient_checkpointing true or",
        ),
        (
            "--memory 1",
            "the most are moments, 3.2 GiB. Try --run.shard_weights true on several devices or --optim.bfloat16 moments",
        ),
        (
            "--optim.bfloat16 moments --run.shard_weights true --memory 1",
            "Try more devices or a device with more memory",
        ),
        (
            "--optim.batch_size 8_000_000 --world 8000 --memory 16",
            "the most are texts of all, 45.8 GiB. Try --optim.exchange ring or",
        ),
        (
            "--optim.batch_size 8_000_000 --world 2 --optim.exchange ring --memory 40",
            "the most are own embeddings, ",
        ),
    ],
)
def test_names_what_does_not_fit_and_what_makes_it_smaller(arguments, message):
    plan = make_plan(planned(f"--world 8 {arguments}", "ViT-L/14"))
    assert not plan.fits and message in plan.bottleneck
    if plan.largest:
        assert plan.bottleneck.endswith(f"Try --optim.micro_batch_size {plan.largest} or less")


@pytest.mark.parametrize(("world", "images"), [(8, 4096), (1, 100)], ids=["0.6 GB", "4.9 GB"])
def test_images_on_the_device_are_those_of_the_batch_or_of_a_micro_batch_if_they_are_many(world, images):
    plan = make_plan(planned(f"--world {world} --optim.micro_batch_size 100"))
    assert plan.memory["images (uint8)"] == images * 3 * 224**2


@pytest.mark.parametrize(
    ("world", "local", "workers", "batches"),
    [
        (1, 1000, 2, 8),  # 0.14 GiB each: 4 of each worker
        (1, 4096, 4, 4),  # 0.57 GiB each: 7 are in 4 GiB, one of each worker
        (1, 4096, 3, 6),
        (1, 32768, 8, 8),  # 4.6 GiB each: one of each worker all the same
        (1, 4096, 0, 1),
        (8, 1000, 1, 3),  # 4 GiB for eight processes
        (64, 1000, 1, 3),  # of each machine
    ],
)
def test_workers_read_four_batches_or_four_gib_a_machine_ahead(world, local, workers, batches):
    run = planned(f"--optim.batch_size {world * local} --world {world} --data.num_workers {workers}")
    assert batches_ahead(run) == batches
    size = batches * local * 3 * 224**2 / 2**30
    assert f"host memory of a process: {batches} batches read ahead, {size:.2f} GiB" in report(make_plan(run))


def test_days_follow_from_the_steps():
    plan = make_plan(planned("--world 64 --optim.epochs 32 --pairs 400e6"))
    assert plan.run.steps == 390_625  # 12.8 billion pairs in batches of 32,768
    assert plan.days == pytest.approx(plan.run.steps * plan.seconds["step"] / 86400)


def test_phases_of_smaller_images_take_less_time():
    base, half = planned("--world 64 --decode 1e6", "ViT-B/16"), planned("--world 64 --decode 1e6", "ViT-B/16")
    half.config.data.phases = [PhaseConfig(epochs=16, image_size=112, text_length=16)]
    small = make_plan(half).days / make_plan(base).days
    assert 0.5 < small < 0.7  # half of the run, with a quarter of the patches


def test_settings_are_the_trainers_own():
    arguments = "--config vit_b_32 --optim.batch_size 4096 --model.gradient_checkpointing false --world 8"
    config = parse_run(arguments.split())[0].config
    assert (config.optim.batch_size, config.model.gradient_checkpointing) == (4096, False)
    assert (config.optim.bfloat16, config.run.precision, config.optim.micro_batch_size) == (
        ["moments", "text_weights"],
        "bf16",
        2048,
    )


def test_length_of_the_run_is_that_of_the_settings():
    assert parse_run(["--config", "quickstart"])[0].steps == 1100
    assert parse_run(["--config", "quickstart", "--optim.steps", "7"])[0].steps == 7


def test_another_device_is_described_by_memory_and_peak():
    device = planned("--memory 24 --peak 165").device
    assert (device.memory, device.half) == (24, 165)


def test_precision_that_is_left_to_the_machine_is_what_the_trainer_takes_there():
    assert [planned(f"--device {name}").config.run.precision for name in DEVICES] == ["fp32", "bf16", "bf16", "bf16"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--model.preset RN51", "Did you mean 'RN50'"),
        ("--config no_such_file", "found no file"),
        ("--model.preset RN50 --micro-batch 3", "Unknown argument '--micro-batch'"),
        ("--model.preset RN50 --device v100 --run.precision bf16", "no bfloat16"),
        ("--model.preset RN50 --device rtx4090", "give its own figures: --memory GIB and --peak TFLOP/s"),
        ("--model.preset RN50 --world 0", "--world: found 0"),
        ("--model.preset RN50 --optim.batch_size 4 --world 8", "a pair for each of 8 processes"),
        ("--model.preset RN50 --peak 0", "--peak: found 0.0, expected a number above 0"),
        ("--model.preset RN50 --actual-days 0", "--actual-days: found 0.0"),
        ("--model.preset RN50 --memory -1", "--memory: found -1.0"),
        ("--model.preset RN50 --data.num_workers -1", "data.num_workers: found -1, expected null or 0 or more"),
        ("--model.preset RN50 --share nan", "--share: found nan"),
        ("--model.preset RN50 --share 5", "--share: found 5.0, expected a number above 0, at most 1"),
        ("--model.preset RN50 --link inf", "--link: found inf"),
        ("--model.preset RN50 --run.shard_weights true", "run.shard_weights: found one process"),
        (
            "--model.preset RN50 --world 8 --run.precision fp16 --optim.bfloat16 text_weights",
            "optim.bfloat16: text_weights need run.precision bf16",
        ),
    ],
)
def test_rejects_what_cannot_be_planned_or_trained(arguments, message):
    with pytest.raises(UsageError, match=re.escape(message)):
        parse_run(arguments.split())


def test_command_prints_a_plan():
    script = Path(__file__).parents[1] / "training" / "plan.py"
    command = [sys.executable, str(script), "--model.preset", "ViT-B/32", "--world", "592", "--device", "v100"]
    arguments = ["--optim.batch_size", "32768", "--run.precision", "fp16", "--actual-days", "18"]
    result = subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    for words in ("memory of a device", "largest micro-batch", "time of a step", "bottleneck: ", "18 days: "):
        assert words in result.stdout

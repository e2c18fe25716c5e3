"""The planner: what it counts is what is published, and what it predicts is what torch allocates."""

import os
import re
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from torch.distributed.tensor import DTensor
from training_utils import fork, free_port

from hfclip import HFCLIPConfig, HFCLIPModel
from training.config import Config, OptimConfig, UsageError, load_yaml
from training.flops import tower_flops
from training.low_precision import halve_text_weights
from training.machine import _check_settings
from training.model import checkpoint_activations
from training.optim import build_optimizer
from training.parallel import shard
from training.plan import (
    DEVICES,
    Run,
    _parser,
    batches_ahead,
    check_run,
    count_parameters,
    from_config,
    image_activations,
    implied_share,
    make_plan,
    model_bytes,
    parse_run,
    report,
    text_activations,
    usable,
)


# preset: millions of parameters, GFLOPs of an image and a text of 77 tokens (OpenCLIP's model_profile.csv, which counts
# a multiplication and an addition as two)
PUBLISHED = {
    "RN50": (102.01, 18.18),
    "RN101": (119.69, 25.5),
    "RN50x4": (178.3, 51.82),
    "RN50x16": (290.98, 162.69),
    "RN50x64": (623.26, 552.65),
    "ViT-B/32": (151.28, 14.78),
    "ViT-B/16": (149.62, 41.09),
    "ViT-L/14": (427.62, 175.33),
    "ViT-L/14@336px": (427.94, 395.22),
}
TEXT = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 4}
TEXT |= {"vocab_size": 1000, "eos_token_id": 999, "bos_token_id": 998, "max_position_embeddings": 77}
VIT = {"hidden_size": 96, "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 4}
VIT |= {"image_size": 112, "patch_size": 8}
TOWERS = {
    "vit": VIT,
    "vit_that_drops_patches": {**VIT, "patch_dropout": 0.5},
    "vit_with_gelu_and_mean": {**VIT, "hidden_act": "gelu", "pooling": "mean"},
    "resnet": {"model_type": "hfclip_resnet", "image_size": 64, "depths": [1, 2, 2, 1], "stem_width": 16},
}


def architecture(tower: str = "vit") -> HFCLIPConfig:
    return HFCLIPConfig(projection_dim=32, vision_config=TOWERS[tower], text_config=TEXT)


def run(preset: str = "ViT-B/32", device: str = "a100", **settings) -> Run:
    return Run(architecture=HFCLIPConfig.from_preset(preset), device=DEVICES[device], **settings)


# ---------------------------------------------------------------------------------------------------------------------
# Counted = published
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", PUBLISHED)
def test_parameters_are_the_published_ones(preset):
    count = count_parameters(HFCLIPConfig.from_preset(preset))
    assert count.total / 1e6 == pytest.approx(PUBLISHED[preset][0], abs=0.006)  # published to 0.01, once to 0.1
    assert count.trained == count.total > count.matrices > count.text > count.unit


@pytest.mark.parametrize("preset", PUBLISHED)
def test_flops_are_the_published_ones(preset):
    flops = tower_flops(HFCLIPConfig.from_preset(preset), text_tokens=77, all_positions=True)
    # Published figures leave out some products of the attention; they differ by up to 2 % from tool to tool.
    assert sum(flops.values()) / 1e9 == pytest.approx(PUBLISHED[preset][1], rel=0.02)


@pytest.mark.parametrize(("preset", "gmacs"), [("RN50", 6.1), ("RN50x64", 265.9)])
def test_image_towers_are_as_large_as_on_the_papers_figure(preset, gmacs):
    # Figure 9 of Radford et al. 2021 counts a multiplication and an addition as one.
    image = tower_flops(HFCLIPConfig.from_preset(preset), all_positions=True)["image"]
    assert image / 2e9 == pytest.approx(gmacs, rel=0.02)


@pytest.mark.parametrize(("preset", "world", "days"), [("RN50x64", 592, 18), ("ViT-L/14", 256, 12)])
def test_the_papers_runs_imply_a_sensible_share_of_the_peak(preset, world, days):
    paper = run(preset, "v100", world=world, precision="fp16", checkpointing=True, text_tokens=77)
    of_model, of_all = implied_share(paper, days)
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


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("tower", TOWERS)
def test_activations_of_images_are_what_autograd_keeps(tower, half, checkpointing):
    config, batch = architecture(tower), 8
    for attention in ("eager", "sdpa") if tower.startswith("vit") else ("eager",):
        model = HFCLIPModel(config).train()
        if tower.startswith("vit"):
            model.set_attn_implementation(attention)
        if checkpointing:
            checkpoint_activations(model)
        kept = kept_for_backward(model, half, pixel_values=torch.randn(batch, 3, config.image_size, config.image_size))
        activations = image_activations(config, half, eager=attention == "eager")
        predicted = activations.kept(checkpointing) - checkpointing * max(activations.blocks)  # none is recomputed yet
        # Left out are statistics of norms, indices and what comes after the blocks: a few percent of towers so narrow.
        assert batch * predicted == pytest.approx(kept, rel=0.05)


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_activations_of_texts_follow_their_real_length(attention, half):
    config = architecture()
    model = HFCLIPModel(config).train()
    model.set_attn_implementation(attention)
    lengths = torch.tensor([10, 20, 14, 30, 24, 12, 18, 32] * 4)  # 20 on average, 640 in all: a round number
    input_ids = torch.randint(1, 900, (len(lengths), 77))
    input_ids[torch.arange(len(lengths)), lengths - 1] = 999
    kept = kept_for_backward(model, half, input_ids=input_ids)
    activations = text_activations(config, half, tokens=20, longest=32, eager=attention == "eager")
    assert len(lengths) * activations.kept(False) == pytest.approx(kept, rel=0.05)


@pytest.mark.parametrize("moments", ["float32", "bfloat16"])
@pytest.mark.parametrize("text_weights", ["float32", "bfloat16"])
@pytest.mark.parametrize("freeze", ["none", "vision"])
def test_weights_gradients_and_moments_are_what_the_optimizer_holds(moments, text_weights, freeze):
    config = architecture()
    model = HFCLIPModel(config)
    if freeze != "none":
        model.freeze(freeze)
    if text_weights == "bfloat16":
        halve_text_weights(model)
    optimizer = build_optimizer(model, OptimConfig(moments=moments, text_weights=text_weights))
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
    planned = Run(
        architecture=config, device=DEVICES["a100"], moments=moments, text_weights=text_weights, freeze=freeze
    )
    sizes = model_bytes(planned, cached=False)
    for name, size in held.items():
        assert sizes[name] == pytest.approx(size, rel=1e-3), name  # the scalar's moments are not counted above


def held_by_rank(rank: int, world: int, port: int, folder: str) -> None:
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in names.items()}, MASTER_ADDR="127.0.0.1")
    torch.set_num_threads(1)
    accelerator, model = Accelerator(cpu=True), HFCLIPModel(architecture())
    shard(model, accelerator)
    optimizer = build_optimizer(model, OptimConfig())
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
    planned = Run(
        architecture=architecture(), device=DEVICES["a100"], world=world, shard_weights=True, precision="fp32"
    )
    sizes = model_bytes(planned, cached=False)
    for rank in range(world):
        for name, size in torch.load(tmp_path / f"{rank}.pt").items():
            # Rows that do not divide evenly: rank 0 has up to one more of each tensor.
            assert size == pytest.approx(sizes[name], rel=0.03), (rank, name)


# ---------------------------------------------------------------------------------------------------------------------
# The plan
# ---------------------------------------------------------------------------------------------------------------------


def test_largest_micro_batch_is_the_largest_that_fits():
    planned = run("ViT-L/14", "v100", world=16, precision="fp16")
    largest = make_plan(planned).largest
    assert 0 < largest < planned.local
    assert make_plan(replace(planned, micro_batch=largest)).fits
    too_large = make_plan(replace(planned, micro_batch=largest + 1))
    assert not too_large.fits and too_large.bottleneck.startswith("memory")


def test_what_saves_memory_lets_larger_micro_batches_fit():
    base = run("ViT-L/14", "v100", world=64, precision="fp16", batch=65536)
    largest = make_plan(base).largest
    savings = [{"checkpointing": True}, {"moments": "bfloat16"}, {"shard_weights": True}, {"exchange": "ring"}]
    for saving in savings:
        assert make_plan(replace(base, **saving)).largest > largest, saving
    assert make_plan(replace(base, ema=True)).largest < largest


def test_recomputing_costs_a_forward_pass():
    base = run("ViT-B/16", world=64)
    seconds = make_plan(base).seconds["towers"]
    # Backward is twice the forward pass, less the gradient of the pixels.
    for settings in ({"checkpointing": True}, {"micro_batch": 64}):
        assert make_plan(replace(base, **settings)).seconds["towers"] / seconds == pytest.approx(4 / 3, rel=0.02)


def test_frozen_tower_costs_its_forward_pass_and_no_activations():
    base = run("ViT-L/14", world=8, micro_batch=128)
    plan, locked = make_plan(base), make_plan(replace(base, freeze="vision"))
    assert locked.seconds["towers"] < 0.55 * plan.seconds["towers"]
    assert locked.memory["activations"] < 0.2 * plan.memory["activations"]
    assert locked.memory["moments"] < 0.5 * plan.memory["moments"]


@pytest.mark.parametrize(
    ("settings", "bottleneck"),
    [
        ({"world": 8, "workers": 8, "decode": 1000.0}, "arithmetic"),
        ({"world": 8, "workers": 1, "decode": 10.0}, "data"),
        ({"world": 8, "workers": 0, "decode": 10.0}, "data"),
        ({"world": 8, "workers": 0, "decode": 1e6}, "arithmetic"),
        ({"world": 512, "decode": 1e6, "link": 0.1}, "the link"),
        ({"world": 8, "micro_batch": 4096, "device": "v100", "precision": "fp16"}, "memory"),
    ],
)
def test_names_the_bottleneck(settings, bottleneck):
    plan = make_plan(run(**settings))
    assert plan.bottleneck.startswith(bottleneck)
    assert f"bottleneck: {bottleneck}" in report(plan)


@pytest.mark.parametrize(
    ("settings", "memory", "message"),
    [
        ({"micro_batch": 4096}, 16, "the activations of 4096 pairs, "),
        ({"precision": "fp32", "batch": 8}, 7.3, "not even the activations of one pair fit. Try --checkpointing or"),
        ({}, 1, "the most are moments, 3.2 GiB. Try --shard-weights on several devices or --moments bfloat16 or"),
        ({"moments": "bfloat16", "shard_weights": True}, 1, "Try more devices or a device with more memory"),
        ({"batch": 8_000_000, "world": 8000}, 16, "the most are texts of all, 45.8 GiB. Try --exchange ring or"),
        ({"batch": 8_000_000, "world": 2, "exchange": "ring"}, 40, "the most are own embeddings, "),
    ],
)
def test_names_what_does_not_fit_and_what_makes_it_smaller(settings, memory, message):
    planned = run("ViT-L/14", **{"world": 8, **settings})
    plan = make_plan(replace(planned, device=replace(planned.device, memory=memory)))
    assert not plan.fits and message in plan.bottleneck
    if plan.largest:
        assert plan.bottleneck.endswith(f"Try --micro-batch {plan.largest} or less")


@pytest.mark.parametrize(("world", "pictures"), [(8, 4096), (1, 100)], ids=["0.6 GB", "4.9 GB"])
def test_pictures_on_the_device_are_those_of_the_batch_or_of_a_micro_batch_if_they_are_many(world, pictures):
    plan = make_plan(run(world=world, micro_batch=100))
    assert plan.memory["pictures (uint8)"] == pictures * 3 * 224**2


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
    planned = run(batch=world * local, world=world, workers=workers)
    assert batches_ahead(planned) == batches
    size = batches * local * 3 * 224**2 / 2**30
    assert f"host memory of a process: {batches} batches read ahead, {size:.2f} GiB" in report(make_plan(planned))


def test_days_follow_from_the_steps():
    plan = make_plan(run(world=64, epochs=32, pairs=400e6))
    assert plan.steps == 390_625  # 12.8 billion pairs in batches of 32,768
    assert plan.days == pytest.approx(plan.steps * plan.seconds["step"] / 86400)


def test_phases_of_smaller_images_take_less_time():
    base = run("ViT-B/16", world=64, decode=1e6)
    half = ({"epochs": 16, "image_size": 112, "text_length": 16},)
    small = make_plan(replace(base, phases=half)).days / make_plan(base).days
    assert 0.5 < small < 0.7  # half of the run, with a quarter of the patches


def test_usable_memory_leaves_a_reserve():
    assert usable(DEVICES["h200"]) < DEVICES["h200"].memory * 2**30


def parsed(*arguments: str) -> Run:
    return parse_run(_parser().parse_args(list(arguments)))


def test_flags_override_the_recipe():
    planned = parsed("--config", "vit_b_32", "--batch", "4096", "--no-checkpointing", "--world", "8")
    assert (planned.batch, planned.checkpointing, planned.world) == (4096, False, 8)
    assert (planned.moments, planned.precision, planned.micro_batch) == ("bfloat16", "bf16", 2048)


def test_length_of_the_run_is_that_of_the_settings():
    quickstart = parsed("--config", "quickstart")
    assert quickstart.pairs == 140_800 and make_plan(quickstart).steps == 1100
    values = load_yaml("quickstart")
    values["optim"] |= {"steps": 7}
    fields = from_config(Config.from_dict(values))
    assert fields["pairs"] * fields["epochs"] == 7 * 128


def test_another_device_is_described_by_memory_and_peak():
    device = parsed("--model", "RN50", "--memory", "24", "--peak", "165").device
    assert (device.memory, device.half) == (24, 165)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "either --model or --config"),
        (["--model", "RN50", "--config", "rn50"], "either --model or --config"),
        (["--model", "RN51"], "Did you mean 'RN50'"),
        (["--config", "no_such_file"], "found no file"),
        (["--model", "RN50", "--device", "v100"], "no bfloat16"),
        (["--model", "RN50", "--device", "rtx4090"], "give its own figures: --memory GIB and --peak TFLOP/s"),
        (["--model", "RN50", "--world", "0"], "--world: found 0"),
        (["--model", "RN50", "--batch", "4", "--world", "8"], "a pair for each of 8 devices"),
        (["--model", "RN50", "--peak", "0"], "--peak: found 0.0, expected a number above 0"),
        (["--model", "RN50", "--took", "0"], "--took: found 0.0"),
        (["--model", "RN50", "--memory", "-1"], "--memory: found -1.0"),
        (["--model", "RN50", "--workers", "-1"], "--workers: found -1, expected 0 or more"),
        (["--model", "RN50", "--share", "nan"], "--share: found nan"),
        (["--model", "RN50", "--share", "5"], "--share: found 5.0, expected a number above 0, at most 1"),
        (["--model", "RN50", "--link", "inf"], "--link: found inf"),
        (["--model", "RN50", "--shard-weights"], "run.shard_weights: found one process"),
    ],
)
def test_rejects_what_cannot_be_planned(arguments, message):
    with pytest.raises(UsageError, match=re.escape(message)):
        parsed(*arguments)


@dataclass
class Machine:
    """What the trainer's check of the settings asks of Accelerate."""

    num_processes: int
    device: torch.device = torch.device("cuda")


@pytest.mark.parametrize("world", [1, 2, 256])
@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("shard_weights", [False, True])
@pytest.mark.parametrize("text_weights", ["float32", "bfloat16"])
def test_refuses_what_the_trainer_refuses(world, precision, shard_weights, text_weights):
    of_run = {"precision": precision, "shard_weights": shard_weights}
    config = Config.from_dict(
        {
            "model": {"preset": "ViT-B/32", "tokenizer": "train"},
            "optim": {"text_weights": text_weights, "batch_size": 256},
            "run": of_run,
        }
    )
    planned = run(world=world, batch=256, text_weights=text_weights, **of_run)
    said = []
    for check in (lambda: _check_settings(config, Machine(world)), lambda: check_run(planned)):
        try:
            said.append(check())
        except UsageError as error:
            said.append(str(error))
    assert said[0] == said[1]


def test_command_prints_a_plan():
    script = Path(__file__).parents[1] / "training" / "plan.py"
    command = [sys.executable, str(script), "--model", "RN50x64", "--world", "592", "--device", "v100"]
    result = subprocess.run(
        [*command, "--precision", "fp16", "--took", "18"], capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    for words in ("memory of a device", "largest micro-batch", "time of a step", "bottleneck: ", "18 days: "):
        assert words in result.stdout

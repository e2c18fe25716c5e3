"""Predicts what a run needs before a machine is rented: memory of a device, time of a step, days, and the bottleneck.

    python training/plan.py --model ViT-L/14 --world 256 --device v100 --precision fp16 --checkpointing
    python training/plan.py --config vit_l_14 --world 64 --device h100          # a recipe, or the YAML of a run
    python training/plan.py --config vit_b_32 --world 8 --device a100 --micro-batch 512 --epochs 1 --pairs 12e6
    python training/plan.py --model RN50x64 --world 592 --device v100 --precision fp16 --text-tokens 77 --took 18

    architecture -> parameters, FLOPs, bytes that autograd keeps for a pair -> bytes on a device, seconds of a step

Memory follows from what the code allocates: weights, gradients, moments, activations of a micro-batch, embeddings,
tiles of the loss. Time follows from counted arithmetic at an assumed share of the device's peak (--share), from bytes
at an assumed speed of the link (--link), and from an assumed speed of reading pictures (--decode). These three are
assumptions: measure them on your machine with a short run, then plan. Formulas and tables: docs/scaling.md.
"""

import argparse
import math
import sys
from dataclasses import dataclass, replace
from pathlib import Path


if not __package__:  # run as a script, Python looks for modules in this folder; they are named from the one above
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from torch import nn
from transformers import PreTrainedConfig

from hfclip import HFCLIPConfig, HFCLIPModel
from hfclip.losses.tiles import DEVICE_TILE
from training.config import Config, UsageError, _require, load_yaml
from training.data.batches import BYTES_AHEAD
from training.flops import tower_flops, training_flops
from training.low_precision import text_matrices
from training.model import build_architecture
from training.parallel import fsdp_units, loss_scalars
from training.redaction import redacted
from training.step import MOST_ON_DEVICE


GIB, HALF, FULL = 2**30, 2, 4  # bytes; bytes of a number in half and in single precision
RESERVED = 0.1  # share of a device's memory for its context, communication buffers and the allocator's gaps
PER_PAIR = ("activations", "pictures (uint8)")  # what grows with the micro-batch
TILES = 4  # tiles of the loss that are alive at a time
SECONDS_A_DAY = 86400
AHEAD = 4  # batches that a worker reads ahead, at most
DEVICES_A_MACHINE = 8  # at most, which share what is read ahead


@dataclass(frozen=True)
class Device:
    """Data sheet: memory in GiB as reported, its speed in GB/s, dense peaks in TFLOP/s (multiply and add are two)."""

    memory: float
    bandwidth: float
    half: float
    single: float


DEVICES = {
    "v100": Device(memory=31.7, bandwidth=900, half=125, single=15.7),
    "a100": Device(memory=79.2, bandwidth=2039, half=312, single=19.5),
    "h100": Device(memory=79.6, bandwidth=3350, half=989, single=67),
    "h200": Device(memory=139.8, bandwidth=4800, half=989, single=67),
}


@dataclass(frozen=True, kw_only=True)
class Run:
    """What is planned. Sizes in pairs; `share` of the peak; `link` in GB/s; `decode` in images/s of a worker."""

    architecture: HFCLIPConfig
    device: Device
    batch: int = 32768
    world: int = 1
    micro_batch: int | None = None
    precision: str = "bf16"
    checkpointing: bool = False
    shard_weights: bool = False
    exchange: str = "gather"
    moments: str = "float32"
    text_weights: str = "float32"
    ema: bool = False
    freeze: str = "none"
    text_tokens: int = 20
    phases: tuple[dict, ...] = ()
    pairs: float = 400e6
    epochs: float = 32.0
    share: float = 0.3
    link: float = 25.0
    workers: int = 8
    decode: float = 200.0

    @property
    def local(self) -> int:
        """Pairs of one process."""
        return math.ceil(self.batch / self.world)

    @property
    def half(self) -> bool:
        return self.precision != "fp32"

    @property
    def picture(self) -> int:
        """Bytes of one, uint8, as it travels to the device."""
        return 3 * self.architecture.image_size**2


# ---------------------------------------------------------------------------------------------------------------------
# Parameters
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Parameters:
    """Numbers of parameters."""

    total: int
    trained: int
    matrices: int
    """Of linear layers and convolutions, which autocast copies to half precision."""
    text: int
    """Of the text tower's linear layers and token embedding, which `optim.text_weights` halves."""
    tokens: int
    """Of the token embedding."""
    unit: int
    """Of the largest part that FSDP2 puts together at a time."""


def count_parameters(architecture: HFCLIPConfig, freeze: str = "none") -> Parameters:
    """Counts them in a model without memory."""
    with torch.device("meta"):
        model = HFCLIPModel(architecture)
    if freeze != "none":
        model.freeze(freeze)
    blocks = fsdp_units(model)
    inside = {id(p) for block in blocks for p in block.parameters()} | {id(p) for p in loss_scalars(model)}
    rest = sum(p.numel() for p in model.parameters() if id(p) not in inside)
    return Parameters(
        total=_numel(model.parameters()),
        trained=_numel(p for p in model.parameters() if p.requires_grad),
        matrices=_numel(m.weight for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d))),
        text=_numel(module.weight for module in text_matrices(model)),
        tokens=model.get_input_embeddings().weight.numel(),
        unit=max([rest, *(_numel(block.parameters()) for block in blocks)]),
    )


def _numel(parameters) -> int:
    return sum(parameter.numel() for parameter in parameters)


# ---------------------------------------------------------------------------------------------------------------------
# Activations: the bytes that autograd keeps of one image and one text, with fused attention unless `eager`
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Activations:
    """Bytes that one input leaves between forward and backward: outside of blocks, in blocks, and what a checkpointed
    block leaves, its input."""

    around: int
    blocks: tuple[int, ...]
    inputs: tuple[int, ...]

    def kept(self, checkpointing: bool) -> int:
        """With checkpointing, one block at a time is computed again."""
        if checkpointing:
            return self.around + sum(self.inputs) + max(self.blocks, default=0)
        return self.around + sum(self.blocks)

    @property
    def in_flight(self) -> int:
        """Gradients of the block that the backward pass is in, at most as large as what it kept."""
        return max(self.blocks, default=0)


def image_activations(architecture: HFCLIPConfig, half: bool, eager: bool = False) -> Activations:
    """Of the image tower in training, at the config's image size and patch dropout."""
    tower = architecture.vision_config
    if tower.model_type == "hfclip_resnet":
        return _resnet(tower, half)
    if tower.model_type != "hfclip_vit":
        raise UsageError(f"The plan knows hfclip's own towers, found an image tower of type {tower.model_type}.")
    num_patches = (tower.image_size // tower.patch_size) ** 2
    tokens = 1 + (max(1, round(num_patches * (1 - tower.patch_dropout))) if tower.patch_dropout else num_patches)
    num_last = 1 if tower.pooling == "cls" else tokens
    blocks = (tower.num_hidden_layers - 1) * (_block(tower, tokens, tokens, tokens, half, eager),)
    around = _pixels(tower, half) + FULL * tokens * tower.hidden_size * tower.pre_layer_norm
    if tower.patch_dropout:
        around += FULL * (1 + num_patches) * tower.hidden_size  # what the patches are chosen from
    if tower.pooling == "mean":
        around += FULL * tokens * tower.hidden_size  # what the last LayerNorm reads
    return Activations(
        around=around,
        blocks=(*blocks, _block(tower, tokens, num_last, tokens, half, eager)),
        inputs=tower.num_hidden_layers * (FULL * tokens * tower.hidden_size,),
    )


def text_activations(
    architecture: HFCLIPConfig, half: bool, tokens: int, longest: int | None = None, eager: bool = False
) -> Activations:
    """Of the text tower. Attention alone sees padding, up to the `longest` text of a micro-batch (default: the
    context)."""
    tower = architecture.text_config
    if tower.model_type == "hfclip_bag_of_words":
        return Activations(around=FULL * 2 * tokens * tower.hidden_size, blocks=(), inputs=())
    if tower.model_type != "hfclip_text":
        raise UsageError(f"The plan knows hfclip's own towers, found a text tower of type {tower.model_type}.")
    longest = longest or tower.max_position_embeddings
    tokens = longest if tower.reads_padding else min(tokens, longest)
    block = _block(tower, tokens, tokens, longest, half, eager, packed=not tower.reads_padding)
    return Activations(
        around=FULL * tokens * tower.hidden_size,  # what the last LayerNorm reads
        blocks=tower.num_hidden_layers * (block,),
        inputs=tower.num_hidden_layers * (FULL * tokens * tower.hidden_size,),
    )


def _pixels(tower: PreTrainedConfig, half: bool) -> int:
    """What the first convolution reads."""
    return (HALF if half else FULL) * tower.num_channels * tower.image_size**2


def _block(
    tower: PreTrainedConfig,
    tokens: int,
    queries: int,
    padded: int,
    half: bool,
    eager: bool,
    packed: bool = False,
) -> int:
    """A transformer block. The residual stream, which the LayerNorms read, is single precision under autocast; each
    linear layer there keeps a half-precision copy of its input."""
    width, number = tower.hidden_size, HALF if half else FULL
    kept = FULL * width * tokens  # what the first LayerNorm reads
    kept += number * width * ((2 * tokens + queries) if half else tokens)  # what query, key and value read
    padded_queries = padded if queries == tokens else queries
    kept += number * width * 2 * (padded + padded_queries)  # keys, values; queries and what attention gives
    kept += number * width * 4 * tokens * packed  # the three that are padded, and what the output projection reads
    if eager:
        kept += tower.num_attention_heads * padded_queries * padded * (FULL + HALF * half)
    kept += FULL * width * queries  # what the second LayerNorm reads
    kept += number * width * queries  # what the MLP reads
    activation = 3 if tower.hidden_act == "quick_gelu" else 2  # in, (sigmoid,) out
    return kept + number * activation * tower.intermediate_size * queries


def _resnet(tower: PreTrainedConfig, half: bool) -> Activations:
    """A BatchNorm keeps what it reads, and a ReLU, in place, what the next convolution reads: two maps for each pair of
    them. An average pool leaves one map, and a block its sum."""
    number, width = HALF if half else FULL, tower.stem_width
    area = (tower.image_size // 2) ** 2
    stem = 2 * area * (width // 2 + width // 2 + width) + (area // 4) * width
    side, incoming = tower.image_size // 4, width
    blocks, inputs = [], []
    for stage, depth in enumerate(tower.depths):
        channels = width * 2**stage
        for index in range(depth):
            strided = stage > 0 and index == 0
            before, side = side**2, side // 2 if strided else side
            after = side**2
            inputs.append(number * before * incoming)
            kept = 4 * before * channels + 2 * after * 4 * channels
            kept += after * (channels + incoming) * strided  # two pools
            kept += after * 4 * channels * (index == 0)  # of the shortcut's BatchNorm
            blocks.append(number * kept)
            incoming = 4 * channels
    tokens = side**2 + 1
    pool = number * tokens * incoming * (4 if half else 3)  # keys, values and what they read
    return Activations(around=_pixels(tower, half) + number * stem + pool, blocks=tuple(blocks), inputs=tuple(inputs))


# ---------------------------------------------------------------------------------------------------------------------
# Memory of a device
# ---------------------------------------------------------------------------------------------------------------------


def model_bytes(run: Run, cached: bool) -> dict[str, float]:
    """Bytes of weights and of what the optimizer keeps on one device. `cached`: in micro-batches."""
    count = count_parameters(run.architecture, run.freeze)
    text = count.text if run.text_weights == "bfloat16" else 0
    split = run.world if run.shard_weights else 1
    trained_text = 0 if run.freeze == "text" else text
    gradients = FULL * count.trained - HALF * trained_text
    sizes = {
        "weights": (FULL * count.total - HALF * text) / split,
        # Until their last micro-batch is through, gradients are whole on each process.
        "gradients": gradients if cached else gradients / split,
        "moments": count.trained * 2 * (HALF if run.moments == "bfloat16" else FULL) / split,
    }
    if run.ema:
        sizes["moving average"] = FULL * count.trained / split
    if run.shard_weights:
        sizes["weights put together"] = 2 * FULL * count.unit  # a unit, and the next one
    if run.half:  # autocast makes them in the forward pass, for the backward pass too
        halved = count.text - count.tokens if text else 0
        sizes["half-precision copies"] = HALF * (count.matrices - halved)
    return sizes


def batch_bytes(run: Run) -> dict[str, float]:
    """Bytes of a batch on one device, whatever its micro-batches: embeddings and loss. Pictures wait on the host."""
    dim = run.architecture.projection_dim
    columns = 2 * run.local if run.exchange == "ring" and run.world > 1 else run.batch
    vectors = 6 * FULL * (run.local + run.batch)
    return {
        "own embeddings": 2 * 2 * FULL * run.local * dim,  # images and texts, with their gradients
        "texts of all": 2 * FULL * columns * dim if run.world > 1 else 0,
        "loss tiles": TILES * FULL * min(DEVICE_TILE, run.local) * min(DEVICE_TILE, run.batch) + vectors,
    }


def activation_bytes(run: Run) -> float:
    """Bytes of one pair of a micro-batch. A frozen tower keeps none."""
    total, in_flight = 0, 0
    for tower, activations in (
        ("vision", image_activations(run.architecture, run.half)),
        ("text", text_activations(run.architecture, run.half, run.text_tokens)),
    ):
        if run.freeze != tower:
            total += activations.kept(run.checkpointing)
            in_flight = max(in_flight, activations.in_flight)
    return total + in_flight


def pictures_bytes(run: Run, micro: int) -> int:
    """Of the pictures on the device: all of a process's part of the batch, or of a micro-batch if these are too many."""
    whole = run.local * run.picture
    return whole if whole <= MOST_ON_DEVICE else micro * run.picture


def batches_ahead(run: Run) -> int:
    """Batches of one process that its workers hold on the host, at most: one for each of them at least."""
    if not run.workers:
        return 1  # read when it is needed
    each = BYTES_AHEAD // (min(run.world, DEVICES_A_MACHINE) * run.workers * run.local * run.picture)
    return run.workers * max(1, min(AHEAD, each))


# ---------------------------------------------------------------------------------------------------------------------
# Time of a step
# ---------------------------------------------------------------------------------------------------------------------


def step_seconds(run: Run, num_micro: int) -> dict[str, float]:
    """Seconds of the parts of a step, and "step", which is less than their sum where parts overlap."""
    device, cached = run.device, num_micro > 1
    count, dim = count_parameters(run.architecture, run.freeze), run.architecture.projection_dim
    model, again = pair_flops(run, cached)
    speed = run.share * 1e12
    half, single = (device.half if run.half else device.single) * speed, device.single * speed
    towers = run.local * (model + again) / half
    loss = 8 * run.local * run.batch * dim / single  # a product forward; it again and two more backward
    memory_bytes = count.trained * (2 * FULL + FULL + 4 * (HALF if run.moments == "bfloat16" else FULL))
    update = memory_bytes / (run.world if run.shard_weights else 1) / (device.bandwidth * 1e9)

    link, others = run.link * 1e9, (run.world - 1) / run.world
    trips = 3 if run.exchange == "ring" else 2
    embeddings = others * trips * FULL * run.batch * dim / link
    text = count.text if run.text_weights == "bfloat16" and run.freeze != "text" else 0
    gradients = FULL * count.trained - HALF * text
    if run.shard_weights:
        rounds = 3 * num_micro if cached else 2
        weights = others * (rounds * FULL * count.total + gradients) / link
        hidden = min(weights, towers)
    else:
        weights = 2 * others * gradients / link
        # Buckets travel during the backward pass of the last micro-batch, about two thirds of its time.
        hidden = min(weights, towers / num_micro * 2 / 3)
    data = run.local / (run.workers * run.decode) if run.workers else run.local / run.decode
    compute = towers + loss + update + embeddings + weights - hidden
    return {
        "towers": towers,
        "loss": loss,
        "update": update,
        "exchange of embeddings": embeddings,
        "exchange of weights" if run.shard_weights else "exchange of gradients": weights,
        "of it hidden": hidden,
        "data": data,
        "step": max(compute, data) if run.workers else compute + data,
    }


def pair_flops(run: Run, cached: bool) -> tuple[float, float]:
    """FLOPs of a pair, forward and backward, and those that are spent again for memory's sake."""
    options = {"text_tokens": run.text_tokens}
    model = training_flops(run.architecture, freeze=run.freeze, **options)
    forward = tower_flops(run.architecture, **options)
    again = sum(forward.values()) * cached
    if run.checkpointing:
        again += sum(flops for tower, flops in forward.items() if {"image": "vision"}.get(tower, tower) != run.freeze)
    return sum(model.values()), again


# ---------------------------------------------------------------------------------------------------------------------
# The plan
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """A run's prediction. `memory` in bytes, `seconds` of a step at the model's full size, `days` with all phases."""

    run: Run
    micro_batch: int
    num_micro: int
    largest: int
    """Pairs of the largest micro-batch that fits; 0 if none does."""
    memory: dict[str, float]
    seconds: dict[str, float]
    steps: int
    days: float

    @property
    def fits(self) -> bool:
        return sum(self.memory.values()) <= usable(self.run.device)

    @property
    def bottleneck(self) -> str:
        run, seconds = self.run, self.seconds
        if not self.fits:
            return f"memory: {_lack(self)}"
        exchanged = sum(value for name, value in seconds.items() if "exchange" in name) - seconds["of it hidden"]
        computed = seconds["towers"] + seconds["loss"] + seconds["update"]
        if seconds["data"] >= computed + exchanged:
            needed = math.ceil(run.local / ((computed + exchanged) * run.decode))
            return f"data: the devices wait for pictures. {needed} workers a process would keep them busy"
        if exchanged > computed:
            return "the link: the devices wait for each other. A faster link, or a larger batch a device, helps"
        return "arithmetic: the towers. More or faster devices help"


def _lack(plan: Plan) -> str:
    """What does not fit, and what to try."""
    run, limit = plan.run, usable(plan.run.device)
    if plan.largest:
        size = plan.memory["activations"] / GIB
        return (
            f"the activations of {plan.micro_batch} pairs, {size:.1f} GiB, do not fit. Try --micro-batch "
            f"{plan.largest} or less"
        )
    fixed = {name: size for name, size in plan.memory.items() if name not in PER_PAIR}
    if sum(fixed.values()) <= limit:
        found, tries = "not even the activations of one pair fit", [] if run.checkpointing else ["--checkpointing"]
    else:
        largest = max(fixed, key=fixed.get)
        found = (
            f"even without activations, {sum(fixed.values()) / GIB:.1f} GiB do not fit into {limit / GIB:.1f}; the "
            f"most are {largest}, {fixed[largest] / GIB:.1f} GiB"
        )
        tries = _savers(run, largest)
    return f"{found}. Try {' or '.join([*tries, 'a device with more memory'])}"


def _savers(run: Run, what: str) -> list[str]:
    """Settings that make an entry of the memory smaller."""
    if what == "texts of all":
        return ["--exchange ring"] if run.exchange == "gather" else ["more devices"]
    if what in ("own embeddings", "loss tiles"):
        return ["more devices", "a smaller --batch"]
    can_share = not run.shard_weights and run.precision != "fp16" and run.text_weights == "float32"
    tries = ["--shard-weights on several devices"] if can_share else []
    if run.shard_weights:
        tries.append("more devices")
    return tries if run.moments == "bfloat16" else [*tries, "--moments bfloat16"]


def usable(device: Device) -> float:
    return device.memory * GIB * (1 - RESERVED)


def make_plan(run: Run) -> Plan:
    """Predicts a run; without a micro-batch size, takes the whole share of a process, or the largest power of two that
    fits."""
    each = activation_bytes(run)
    fitting = {}
    for cached in (False, True):
        fixed = sum(model_bytes(run, cached).values()) + sum(batch_bytes(run).values())
        # Pictures of the whole batch, or of a micro-batch each with its pair.
        picture = 0 if pictures_bytes(run, 0) else run.picture
        room = usable(run.device) - fixed - pictures_bytes(run, 0)
        fitting[cached] = max(0, min(run.local, int(room // (each + picture))))
    largest = run.local if fitting[False] == run.local else fitting[True]
    whole = largest == run.local
    micro = run.micro_batch or (run.local if whole else 2 ** max(0, largest.bit_length() - 1))
    micro = min(micro, run.local)
    num_micro = math.ceil(run.local / micro)
    per_pair = dict(zip(PER_PAIR, (micro * each, pictures_bytes(run, micro)), strict=True))
    memory = {**model_bytes(run, num_micro > 1), **per_pair, **batch_bytes(run)}
    seconds, steps = step_seconds(run, num_micro), int(run.pairs * run.epochs // run.batch)
    return Plan(run, micro, num_micro, largest, memory, seconds, steps, _days(run, num_micro, steps))


def _days(run: Run, num_micro: int, steps: int) -> float:
    """Of all phases, each with steps of its own length."""
    total, left = 0.0, steps
    for phase in run.phases:
        vision = run.architecture.vision_config
        fields = {**vision.to_dict(), "image_size": phase.get("image_size", vision.image_size)}
        if "patch_dropout" in phase:
            fields["patch_dropout"] = phase["patch_dropout"]
        architecture = HFCLIPConfig.from_dict(
            {**run.architecture.to_dict(), "vision_config": type(vision)(**fields).to_dict()}
        )
        tokens = min(run.text_tokens, phase.get("text_length", run.text_tokens))
        of_phase = replace(run, architecture=architecture, text_tokens=tokens)
        done = min(left, round(run.pairs * phase["epochs"] / run.batch))
        total += done * step_seconds(of_phase, num_micro)["step"]
        left -= done
    return (total + left * step_seconds(run, num_micro)["step"]) / SECONDS_A_DAY


def implied_share(run: Run, days: float, num_micro: int = 1) -> tuple[float, float]:
    """Share of the devices' peak that a run of so many days made use of: for the model's own FLOPs, and for all."""
    model, again = pair_flops(run, num_micro > 1)
    peak = (run.device.half if run.half else run.device.single) * 1e12
    able = run.world * peak * days * SECONDS_A_DAY
    pairs = run.pairs * run.epochs
    return pairs * model / able, pairs * (model + again) / able


def report(plan: Plan) -> str:
    """The plan as plain text."""
    run, count = plan.run, count_parameters(plan.run.architecture, plan.run.freeze)
    model, again = pair_flops(run, plan.num_micro > 1)
    ahead = batches_ahead(run)
    lines = [
        f"{count.total / 1e6:.1f}M parameters, {count.trained / 1e6:.1f}M trained; forward and backward "
        f"{model / 1e9:.1f} GFLOPs a pair, and {again / 1e9:.1f} again to save memory",
        f"{run.batch} pairs on {run.world} devices: {run.local} each, in {plan.num_micro} x "
        f"{plan.micro_batch} at a time; texts of {run.text_tokens} tokens",
        "",
        "memory of a device                 GiB",
        *(f"  {name:<28} {size / GIB:>9.2f}" for name, size in plan.memory.items() if size),
        f"  {'sum':<28} {sum(plan.memory.values()) / GIB:>9.2f}   of {usable(run.device) / GIB:.1f} usable",
        f"  largest micro-batch that fits {plan.largest:>8}",
        f"host memory of a process: {ahead} batches read ahead, {ahead * run.local * run.picture / GIB:.2f} GiB",
        "",
        "time of a step                       s",
        *(f"  {name:<28} {value:>9.3f}" for name, value in plan.seconds.items() if value and name != "step"),
        f"  {'step':<28} {plan.seconds['step']:>9.3f}   {run.batch / plan.seconds['step']:.0f} pairs/s",
        "",
        f"{plan.steps} steps: {plan.days:.1f} days ({plan.days * run.world:.0f} device days)",
        f"bottleneck: {plan.bottleneck}",
    ]
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------------------------------------------


def main() -> None:
    try:
        options = _parser().parse_args()
        run = parse_run(options)
        print(report(make_plan(run)))
        if options.took is not None:
            model, total = implied_share(run, options.took)
            print(
                f"{options.took:g} days: {model:.1%} of the peak for the model's FLOPs, {total:.1%} with recomputed ones"
            )
        print(f"Predicted, at {run.share:.0%} of the peak, {run.link:g} GB/s and {run.decode:g} pictures/s a worker.")
    except UsageError as error:
        print(f"error: {redacted(str(error))}", file=sys.stderr)
        sys.exit(2)


def _parser() -> argparse.ArgumentParser:
    default = {field: value for field, value in Run.__dataclass_fields__.items()}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)

    def add(group, name: str, text: str, **more):
        field = default.get(name.lstrip("-").replace("-", "_"))
        shown = f" (default: {field.default:g})" if field and type(field.default) in (int, float) else ""
        group.add_argument(name, help=text.replace("%", "%%") + shown, **more)

    what = parser.add_argument_group("what is trained (the flags override --config)")
    add(what, "--config", "a YAML of a run, or a recipe of training/configs", metavar="FILE")
    add(what, "--model", 'a published architecture: "ViT-L/14", "RN50x64" ...')
    add(what, "--batch", "pairs of a step, over all devices", type=int)
    add(what, "--micro-batch", "pairs that a device embeds at a time; default: what fits", type=int)
    add(what, "--precision", "V100s have no bf16", choices=["bf16", "fp16", "fp32"])
    add(what, "--checkpointing", "gradient checkpointing", action=argparse.BooleanOptionalAction, default=None)
    add(what, "--shard-weights", "FSDP2", action=argparse.BooleanOptionalAction, default=None)
    add(what, "--exchange", "how embeddings travel", choices=["gather", "ring"])
    add(what, "--moments", "of AdamW", choices=["float32", "bfloat16"])
    add(what, "--text-weights", "of the text tower", choices=["float32", "bfloat16"])
    add(what, "--ema", "a moving average of the weights", action=argparse.BooleanOptionalAction, default=None)
    add(what, "--text-tokens", "tokens of a caption on average; padding costs nothing. The paper's code: 77", type=int)
    add(what, "--pairs", "in the data", type=float)
    add(what, "--epochs", "passes over them", type=float)

    on = parser.add_argument_group("on what, and how well (assumptions: measure them)")
    add(on, "--device", f"a data sheet: {', '.join(DEVICES)}", metavar="NAME", default="h100")
    add(on, "--memory", "GiB of another device", type=float)
    add(on, "--peak", "TFLOP/s of another device in the precision of the run", type=float)
    add(on, "--world", "devices", type=int)
    add(on, "--share", "share of the peak that is achieved", type=float)
    add(on, "--link", "GB/s that a device sends to the others and receives at the same time", type=float)
    add(on, "--workers", "processes a device that read pictures", type=int)
    add(on, "--decode", "pictures a second of such a process", type=float)
    add(on, "--took", "days a known run took: prints the share of the peak that it made use of", type=float)
    return parser


def parse_run(options: argparse.Namespace) -> Run:
    """What the command line asks for.

    Raises:
        UsageError: without a model, for values out of range, bf16 on V100s, and as `check_run`.
    """
    if (options.config is None) == (options.model is None):
        raise UsageError("Expected either --model or --config. `--help` shows examples.")
    if options.model is not None:
        try:
            fields = {"architecture": HFCLIPConfig.from_preset(options.model)}
        except ValueError as error:
            raise UsageError(f"--model: {error}") from error
    else:
        fields = from_config(Config.from_dict(load_yaml(options.config)))
    names = Run.__dataclass_fields__.keys() - {"architecture", "device"}
    fields |= {n: value for n in names if (value := getattr(options, n, None)) is not None}
    _check_numbers({**fields, "memory": options.memory, "peak": options.peak, "took": options.took})
    if options.device not in DEVICES:
        raise UsageError(
            f"--device: found {options.device!r}, expected one of {', '.join(DEVICES)}. For another device take the one "
            "most like it, and give its own figures: --memory GIB and --peak TFLOP/s."
        )
    device = DEVICES[options.device]
    if options.device == "v100" and fields.get("precision", "bf16") == "bf16":
        raise UsageError("--precision: V100s have no bfloat16. Plan with --precision fp16.")
    if options.memory is not None:
        device = replace(device, memory=options.memory)
    if options.peak is not None:
        device = replace(device, **{"single" if fields.get("precision") == "fp32" else "half": options.peak})
    run = Run(device=device, **fields)
    check_run(run)
    return run


def _check_numbers(given: dict) -> None:
    for name, value in given.items():
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            flag = f"--{name.replace('_', '-')}"
            if name == "workers":
                _require(value >= 0, flag, value, "0 or more")
            elif name == "share":
                _require(0 < value <= 1, flag, value, "a number above 0, at most 1")
            else:
                _require(0 < value < math.inf, flag, value, "a number above 0")


def check_run(run: Run) -> None:
    """Refuses what the trainer refuses (machine.py), in its words.

    Raises:
        UsageError: for settings that do not go together.
    """
    if run.batch < run.world:
        raise UsageError(f"--batch: found {run.batch}, expected a pair for each of {run.world} devices at least.")
    if run.shard_weights and run.world == 1:
        raise UsageError("run.shard_weights: found one process, expected several to split the weights over.")
    if run.shard_weights and run.precision == "fp16":
        raise UsageError("run.shard_weights: found run.precision fp16, expected bf16 or fp32.")
    if run.text_weights == "bfloat16" and (run.precision != "bf16" or run.shard_weights):
        raise UsageError("optim.text_weights: bfloat16 needs run.precision bf16, and run.shard_weights false.")


def from_config(config: Config) -> dict:
    """What a run's settings say about its cost, as fields of `Run`."""
    optim = config.optim
    fields = {
        "architecture": build_architecture(config),
        "batch": optim.batch_size,
        "micro_batch": optim.micro_batch_size,
        "checkpointing": config.model.gradient_checkpointing,
        "shard_weights": config.run.shard_weights,
        "ema": optim.ema_decay is not None,
        "freeze": config.model.freeze,
        "phases": tuple(config.data.phases),
        "epochs": optim.epochs,
        **{name: getattr(optim, name) for name in ("exchange", "moments", "text_weights")},
    }
    # What is left to the machine is planned as `Run` has it: of these devices, all but V100s have bfloat16.
    if config.run.precision != "auto":
        fields["precision"] = config.run.precision
    if config.data.num_workers is not None:
        fields["workers"] = config.data.num_workers
    if config.data.max_samples is not None:
        fields["pairs"] = config.data.max_samples
    return fields if optim.steps is None else {**fields, "pairs": optim.steps * optim.batch_size, "epochs": 1.0}


if __name__ == "__main__":
    main()

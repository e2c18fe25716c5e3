"""Predicts what a run needs before a machine is rented: memory of a device, time of a step, days, and the bottleneck.

    hfclip plan --config vit_l_14 --world 64 --device h100          # a recipe, or the YAML of a run
    hfclip plan --config vit_b_32 --world 8 --device a100 --optim.micro_batch_size 512 --optim.epochs 1
    hfclip plan --model.preset RN50x64 --optim.batch_size 32768 --run.precision fp16 \\
        --world 592 --device v100 --text-tokens 77 --actual-days 18

All settings of `hfclip train` are taken as it takes them (its --help lists them); below are those of the machine.

    settings -> towers run once without memory -> FLOPs, parameters, bytes that autograd keeps of a pair
             -> bytes on a device, seconds of a step

Memory follows from what the code allocates: weights, gradients, moments, activations of a micro-batch, embeddings,
tiles of the loss. Time follows from counted arithmetic at an assumed share of the device's peak (--share), from bytes
at an assumed speed of the link (--link), and from an assumed speed of reading images (--decode). These three are
assumptions: measure them on your machine with a short run, then plan. Formulas and tables: docs/scaling.md.
"""

import argparse
import math
import sys
from dataclasses import dataclass, replace

from hfclip_errors import start_program


if __name__ == "__main__":
    start_program(__file__, __spec__, "train")

from hfclip.errors import UsageError, run
from hfclip.losses.tiles import DEVICE_TILE

from .command import ArgumentParser, parse_arguments
from .config import Config, PhaseConfig
from .data.batches import BYTES_AHEAD
from .defaults import fill_numbers
from .footprint import Towers
from .machine import check_settings
from .model import build_architecture
from .step import MOST_ON_DEVICE
from .typed import require


GIB, HALF, FULL = 2**30, 2, 4  # bytes; bytes of a number in half and in single precision
RESERVED = 0.1  # share of a device's memory for its context, communication buffers and the allocator's gaps
PER_PAIR = ("activations", "images (uint8)")  # what grows with the micro-batch
TILES = 4  # tiles of the loss that are alive at a time
SECONDS_A_DAY = 86400
AHEAD = 4  # batches that a worker reads ahead, at most
DEVICES_A_MACHINE = 8  # at most, which share what is read ahead
WORKERS = 8  # of a device, where the settings leave that to the machine


@dataclass(frozen=True)
class Device:
    """Data sheet: memory in GiB as reported, its speed in GB/s, dense peaks in TFLOP/s (multiply and add are two)."""

    memory: float
    bandwidth: float
    half: float
    single: float
    has_bfloat16: bool = True

    @property
    def usable(self) -> float:
        """Bytes for a run."""
        return self.memory * GIB * (1 - RESERVED)


DEVICES = {
    "v100": Device(memory=31.7, bandwidth=900, half=125, single=15.7, has_bfloat16=False),
    "a100": Device(memory=79.2, bandwidth=2039, half=312, single=19.5),
    "h100": Device(memory=79.6, bandwidth=3350, half=989, single=67),
    "h200": Device(memory=139.8, bandwidth=4800, half=989, single=67),
}


# ---------------------------------------------------------------------------------------------------------------------
# What is planned
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class PlannedRun:
    """A run's settings, and what they leave open. `share` of the peak; `link` in GB/s; `decode` in images/s a worker."""

    config: Config
    towers: Towers
    device: Device
    world: int = 1
    text_tokens: int = 20
    pairs: float = 400e6
    share: float = 0.3
    link: float = 25.0
    decode: float = 200.0

    @property
    def local(self) -> int:
        """Pairs of one process."""
        return math.ceil(self.config.optim.batch_size / self.world)

    @property
    def half(self) -> bool:
        return self.config.run.precision != "fp32"

    @property
    def peak(self) -> float:
        """FLOP/s of the device in the precision of the run."""
        return (self.device.half if self.half else self.device.single) * 1e12

    @property
    def workers(self) -> int:
        return WORKERS if self.config.data.num_workers is None else self.config.data.num_workers

    @property
    def image_bytes(self) -> int:
        """Of one image, uint8, as it travels to the device."""
        return 3 * self.towers.architecture.image_size**2

    @property
    def steps(self) -> int:
        optim = self.config.optim
        return optim.steps or int(self.pairs * optim.epochs // optim.batch_size)

    @property
    def activation_bytes(self) -> float:
        """Of one pair of a micro-batch; the gradients in the block of the backward pass are as large as what it kept."""
        kept = self.towers.kept(self.half, self.config.model.gradient_checkpointing, self.text_tokens)
        return kept.total + kept.block


# ---------------------------------------------------------------------------------------------------------------------
# Memory of a device
# ---------------------------------------------------------------------------------------------------------------------


def model_bytes(run: PlannedRun, cached: bool) -> dict[str, float]:
    """Bytes of weights and of what the optimizer keeps on one device. `cached`: in micro-batches."""
    count, optim, sharded = run.towers.parameters, run.config.optim, run.config.run.shard_weights
    split = run.world if sharded else 1
    sizes = {
        "weights": count.weights / split,
        # Until their last micro-batch is through, gradients are whole on each process.
        "gradients": count.gradients / (1 if cached else split),
        "moments": count.trained * 2 * (HALF if "moments" in optim.bfloat16 else FULL) / split,
    }
    if optim.ema_decay is not None:
        sizes["moving average"] = FULL * count.trained / split
    if sharded:
        sizes["weights put together"] = 2 * count.unit  # a unit, and the next one
    if run.half:  # made in the forward pass, for the backward pass too
        sizes["half-precision copies"] = count.copies
    return sizes


def batch_bytes(run: PlannedRun) -> dict[str, float]:
    """Bytes of a batch on one device, whatever its micro-batches: embeddings and loss."""
    dim, batch = run.towers.architecture.projection_dim, run.config.optim.batch_size
    columns = 2 * run.local if run.config.optim.exchange == "ring" and run.world > 1 else batch
    vectors = 6 * FULL * (run.local + batch)
    return {
        "own embeddings": 2 * 2 * FULL * run.local * dim,  # images and texts, with their gradients
        "texts of all": 2 * FULL * columns * dim if run.world > 1 else 0,
        "loss tiles": TILES * FULL * min(DEVICE_TILE, run.local) * min(DEVICE_TILE, batch) + vectors,
    }


def image_bytes(run: PlannedRun, micro: int) -> int:
    """Bytes of images on the device: all of a process's part of the batch, or a micro-batch's if these are too many."""
    whole = run.local * run.image_bytes
    return whole if whole <= MOST_ON_DEVICE else micro * run.image_bytes


def batches_ahead(run: PlannedRun) -> int:
    """Batches of one process that its workers hold on the host, at most: one for each of them at least."""
    if not run.workers:
        return 1  # read when it is needed
    each = BYTES_AHEAD // (min(run.world, DEVICES_A_MACHINE) * run.workers * run.local * run.image_bytes)
    return run.workers * max(1, min(AHEAD, each))


# ---------------------------------------------------------------------------------------------------------------------
# Time of a step
# ---------------------------------------------------------------------------------------------------------------------


def step_seconds(run: PlannedRun, num_micro: int, phase: PhaseConfig | None = None) -> dict[str, float]:
    """Seconds of the parts of a step, and "step", which is less than their sum where parts overlap."""
    count, dim, optim = run.towers.parameters, run.towers.architecture.projection_dim, run.config.optim
    sharded, cached = run.config.run.shard_weights, num_micro > 1
    model, recomputed = pair_flops(run, cached, phase)
    towers = run.local * (model + recomputed) / (run.peak * run.share)
    # A product forward; it again and two more backward.
    loss = 8 * run.local * optim.batch_size * dim / (run.device.single * 1e12 * run.share)
    memory_bytes = count.trained * (2 * FULL + FULL + 4 * (HALF if "moments" in optim.bfloat16 else FULL))
    update = memory_bytes / (run.world if sharded else 1) / (run.device.bandwidth * 1e9)

    link, others = run.link * 1e9, (run.world - 1) / run.world
    trips = 3 if optim.exchange == "ring" else 2
    embeddings = others * trips * FULL * optim.batch_size * dim / link
    if sharded:
        rounds = 3 * num_micro if cached else 2
        weights = others * (rounds * count.weights + count.gradients) / link
        hidden = min(weights, towers)
    else:
        weights = 2 * others * count.gradients / link
        # Buckets travel during the backward pass of the last micro-batch, about two thirds of its time.
        hidden = min(weights, towers / num_micro * 2 / 3)
    data = run.local / (max(run.workers, 1) * run.decode)
    compute = towers + loss + update + embeddings + weights - hidden
    return {
        "towers": towers,
        "loss": loss,
        "update": update,
        "exchange of embeddings": embeddings,
        "exchange of weights" if sharded else "exchange of gradients": weights,
        "of it hidden": hidden,
        "data": data,
        "step": max(compute, data) if run.workers else compute + data,
    }


def pair_flops(run: PlannedRun, cached: bool, phase: PhaseConfig | None = None) -> tuple[float, float]:
    """FLOPs of a pair, forward and backward, and those that are spent again to save memory."""
    flops, settings = run.towers.flops, run.config.model
    image = flops.of_image(phase and phase.image_size, phase and phase.patch_dropout)
    text = flops.of_text(min(run.text_tokens, phase and phase.text_length or run.text_tokens))
    recomputed = cached * (image.forward + text.forward)
    if settings.gradient_checkpointing:
        recomputed += image.forward * (settings.freeze != "vision") + text.forward * (settings.freeze != "text")
    return image.training + text.training, recomputed


# ---------------------------------------------------------------------------------------------------------------------
# The plan
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """A run's prediction. `memory` in bytes, `seconds` of a step at the model's full size, `days` with all phases."""

    run: PlannedRun
    micro_batch: int
    num_micro: int
    largest: int
    """Pairs of the largest micro-batch that fits; 0 if none does."""
    memory: dict[str, float]
    seconds: dict[str, float]
    days: float

    @property
    def fits(self) -> bool:
        return sum(self.memory.values()) <= self.run.device.usable

    @property
    def bottleneck(self) -> str:
        run, seconds = self.run, self.seconds
        if not self.fits:
            return f"memory: {_why_it_does_not_fit(self)}"
        exchanged = sum(value for name, value in seconds.items() if "exchange" in name) - seconds["of it hidden"]
        computed = seconds["towers"] + seconds["loss"] + seconds["update"]
        if seconds["data"] >= computed + exchanged:
            needed = math.ceil(run.local / ((computed + exchanged) * run.decode))
            return f"data: the devices wait for images. --data.num_workers {needed} would keep them busy"
        if exchanged > computed:
            return "the link: the devices wait for each other. A faster link, or a larger batch per device, helps"
        return "arithmetic: the towers. More or faster devices help"


def _why_it_does_not_fit(plan: Plan) -> str:
    """What does not fit, and what to try."""
    limit, checkpointing = plan.run.device.usable, plan.run.config.model.gradient_checkpointing
    if plan.largest:
        found = f"the activations of {plan.micro_batch} pairs, {plan.memory['activations'] / GIB:.1f} GiB, do not fit"
        return f"{found}. Try --optim.micro_batch_size {plan.largest} or less"
    fixed = {name: size for name, size in plan.memory.items() if name not in PER_PAIR}
    if sum(fixed.values()) <= limit:
        found = "not even the activations of one pair fit"
        options = [] if checkpointing else ["--model.gradient_checkpointing true"]
    else:
        largest = max(fixed, key=fixed.get)
        found = (
            f"even without activations, {sum(fixed.values()) / GIB:.1f} GiB do not fit into {limit / GIB:.1f}; the "
            f"most are {largest}, {fixed[largest] / GIB:.1f} GiB"
        )
        options = _memory_options(plan.run, largest)
    return f"{found}. Try {' or '.join([*options, 'a device with more memory'])}"


def _memory_options(run: PlannedRun, what: str) -> list[str]:
    """Settings that make an entry of the memory smaller."""
    optim, settings = run.config.optim, run.config.run
    if what == "texts of all":
        return ["--optim.exchange ring"] if optim.exchange == "gather" else ["more devices"]
    if what in ("own embeddings", "loss tiles"):
        return ["more devices", "a smaller --optim.batch_size"]
    can_shard = settings.precision != "fp16" and "text_weights" not in optim.bfloat16
    options = ["more devices"] if settings.shard_weights else []
    if can_shard and not settings.shard_weights:
        options.append("--run.shard_weights true on several devices")
    return (
        options
        if "moments" in optim.bfloat16
        else [*options, f"--optim.bfloat16 {','.join(['moments', *optim.bfloat16])}"]
    )


def make_plan(run: PlannedRun) -> Plan:
    """Predicts a run; its micro-batch by default is a process's whole share, or the largest power of two that fits."""
    each, fitting = run.activation_bytes, {}
    for cached in (False, True):
        fixed = sum(model_bytes(run, cached).values()) + sum(batch_bytes(run).values())
        # Images of the whole batch, or of a micro-batch each with its pair.
        image = 0 if image_bytes(run, 0) else run.image_bytes
        room = run.device.usable - fixed - image_bytes(run, 0)
        fitting[cached] = max(0, min(run.local, int(room // (each + image))))
    largest = run.local if fitting[False] == run.local else fitting[True]
    fits_whole = largest == run.local
    micro = run.config.optim.micro_batch_size or (run.local if fits_whole else 2 ** max(0, largest.bit_length() - 1))
    micro = min(micro, run.local)
    num_micro = math.ceil(run.local / micro)
    per_pair = dict(zip(PER_PAIR, (micro * each, image_bytes(run, micro)), strict=True))
    memory = model_bytes(run, num_micro > 1) | per_pair | batch_bytes(run)
    return Plan(run, micro, num_micro, largest, memory, step_seconds(run, num_micro), _days(run, num_micro))


def _days(run: PlannedRun, num_micro: int) -> float:
    """Days of all phases, each with steps of its own length."""
    total, left = 0.0, run.steps
    for phase in run.config.data.phases:
        done = min(left, round(run.pairs * phase.epochs / run.config.optim.batch_size))
        total += done * step_seconds(run, num_micro, phase)["step"]
        left -= done
    return (total + left * step_seconds(run, num_micro)["step"]) / SECONDS_A_DAY


def implied_share(run: PlannedRun, days: float, num_micro: int = 1) -> tuple[float, float]:
    """Share of the devices' peak that a run of `days` made use of: for the model's own FLOPs, and for all."""
    model, recomputed = pair_flops(run, num_micro > 1)
    able = run.world * run.peak * days * SECONDS_A_DAY
    pairs = run.steps * run.config.optim.batch_size
    return pairs * model / able, pairs * (model + recomputed) / able


def report(plan: Plan) -> str:
    """The plan as plain text."""
    run, count, batch = plan.run, plan.run.towers.parameters, plan.run.config.optim.batch_size
    model, recomputed = pair_flops(run, plan.num_micro > 1)
    ahead = batches_ahead(run)
    lines = [
        f"{count.total / 1e6:.1f}M parameters, {count.trained / 1e6:.1f}M trained; forward and backward "
        f"{model / 1e9:.1f} GFLOPs per pair, and {recomputed / 1e9:.1f} again to save memory",
        f"{batch} pairs on {run.world} devices, {run.config.run.precision}: {run.local} each, in {plan.num_micro} x "
        f"{plan.micro_batch} at a time; texts of {run.text_tokens} tokens",
        "",
        "memory of a device                 GiB",
        *(f"  {name:<28} {size / GIB:>9.2f}" for name, size in plan.memory.items() if size),
        f"  {'sum':<28} {sum(plan.memory.values()) / GIB:>9.2f}   of {run.device.usable / GIB:.1f} usable",
        f"  largest micro-batch that fits {plan.largest:>8}",
        f"host memory of a process: {ahead} batches read ahead, {ahead * run.local * run.image_bytes / GIB:.2f} GiB",
        "",
        "time of a step                       s",
        *(f"  {name:<28} {value:>9.3f}" for name, value in plan.seconds.items() if value and name != "step"),
        f"  {'step':<28} {plan.seconds['step']:>9.3f}   {batch / plan.seconds['step']:.0f} pairs/s",
        "",
        f"{run.steps} steps: {plan.days:.1f} days ({plan.days * run.world:.0f} device days)",
        f"bottleneck: {plan.bottleneck}",
    ]
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------------------------------------------


def main() -> None:
    planned, actual_days = parse_run(sys.argv[1:])
    print(report(make_plan(planned)))
    if actual_days is not None:
        model, total = implied_share(planned, actual_days)
        print(f"{actual_days:g} days: {model:.1%} of the peak for the model's FLOPs, {total:.1%} with recomputed ones")
    assumed = f"{planned.share:.0%} of the peak, {planned.link:g} GB/s and {planned.decode:g} images/s per worker"
    print(f"Predicted, at {assumed}.")


def _parser() -> argparse.ArgumentParser:
    usage = "%(prog)s [--config FILE] [--section.setting VALUE ...] [--device NAME] [...]"
    layout = {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False}
    parser = ArgumentParser(description=__doc__, usage=usage, **layout)

    def add(name: str, text: str, **more):
        field = PlannedRun.__dataclass_fields__.get(name.lstrip("-").replace("-", "_"))
        shown = f" (default: {field.default:g})" if field and name != "--device" else ""
        parser.add_argument(name, help=text.replace("%", "%%") + shown, **{"type": float, **more})

    add("--device", f"a data sheet: {', '.join(DEVICES)} (default: h100)", metavar="NAME", default="h100", type=str)
    add("--memory", "GiB of another device")
    add("--peak", "TFLOP/s of another device in the precision of the run")
    add("--world", "devices", type=int)
    add("--pairs", "in the data; --data.max_samples, if that is set")
    add("--text-tokens", "tokens of a caption on average; padding costs nothing. The paper's code: 77", type=int)
    add("--share", "share of the peak that is achieved")
    add("--link", "GB/s that a device sends to the others and receives at the same time")
    add("--decode", "images per second of each process of --data.num_workers")
    add("--actual-days", "days a known run took: prints the share of the peak that it made use of")
    return parser


def parse_run(argv: list[str]) -> tuple[PlannedRun, float | None]:
    """The run that the command line describes, and the days that it took if they are known.

    Raises:
        UsageError: as the trainer's `parse_arguments` and `check_settings`, for unknown devices, numbers out of range,
            and bf16 on V100s.
    """
    options, settings = _parser().parse_known_args(argv)
    # What the tokenizer is makes no difference here; a model from scratch would want one.
    config, _ = parse_arguments(["--model.tokenizer", "train", *settings])
    given = {name: value for name, value in vars(options).items() if value is not None and name != "device"}
    for name, value in given.items():
        expected, highest = ("above 0, at most 1", 1) if name == "share" else ("above 0", math.inf)
        require(
            0 < value <= highest and value < math.inf, f"--{name.replace('_', '-')}", value, f"a number {expected}"
        )
    if options.device not in DEVICES:
        raise UsageError(
            f"--device: found {options.device!r}, expected one of {', '.join(DEVICES)}. For another device take the one "
            "most like it, and give its own figures: --memory GIB and --peak TFLOP/s."
        )
    device = DEVICES[options.device]
    if config.run.precision == "auto":
        config.run.precision = "bf16" if device.has_bfloat16 else "fp32"
    if config.run.precision == "bf16" and not device.has_bfloat16:
        raise UsageError(f"run.precision: {options.device}s have no bfloat16. Plan with --run.precision fp16.")
    memory, peak, actual_days = (given.pop(name, None) for name in ("memory", "peak", "actual_days"))
    peak_of_run = {"single" if config.run.precision == "fp32" else "half": peak} if peak else {}
    device = replace(device, memory=memory or device.memory, **peak_of_run)
    if config.data.max_samples is not None:
        given.setdefault("pairs", config.data.max_samples)
    fill_numbers(config, int(given.get("pairs", PlannedRun.pairs)))
    check_settings(config, given.get("world", 1), "cuda")
    towers = Towers(build_architecture(config), config.model.freeze, config.optim.bfloat16)
    return PlannedRun(config=config, towers=towers, device=device, **given), actual_days


if __name__ == "__main__":
    run(main)

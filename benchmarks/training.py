"""Training steps of hfclip: beside a peer's, and with batches larger than memory.

    python benchmarks/training.py --photos FOLDER              # prints the tables; FOLDER holds JPEGs
    python benchmarks/training.py --photos FOLDER --write      # also stores them, dated, in benchmarks/results/

Throughput: ViT-B/32 on the photos, each with a caption of natural length, batch 32, AdamW, decoded by two workers while
it trains; bfloat16 where this machine has it in hardware, else float32. The peer is transformers' CLIPModel at its 77
tokens, with whichever of its two attentions is faster here; data, crops and token ids are the same. Both take turns in
one process, workers and all.

Gradient cache: a batch of 1,024 pairs in micro-batches of 32 beside the same pairs in 32 batches of 32, and a tiny
model at growing batches; a fresh process each. Memory is the process's peak, of which the first line of the second
table is what interpreter, libraries and the model take anyway.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import date
from functools import cache
from pathlib import Path


if not __package__:  # the trainer's modules are named from the folder above
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
import transformers
from accelerate import Accelerator
from transformers import CLIPModel

import hfclip
from hfclip import HFCLIPConfig, HFCLIPImageProcessor, HFCLIPModel, HFCLIPTokenizer
from hfclip.data.scenes import Scenes, describe
from hfclip.precision import autocast_for, settled_precision
from training.config import Config
from training.data.batches import Collate, PairDataset, build_loader
from training.data.batches import open_data as open_source
from training.machine import tune_cpu
from training.model import adapt_to_device
from training.objectives.contrastive import Contrastive
from training.phases import Phase, Phases
from training.report.timing import Stopwatch
from training.step import TrainingStep, build_step, normalized


RESULTS = Path(__file__).parent / "results"
BATCH = 32
TINY = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2, "num_hidden_layers": 2}
GROWING = (32, 1024, 8192, 32768)


def captions(number: int) -> list[str]:
    """Captions of the built-in scenes, of about 13 tokens each with start and end."""
    scenes = Scenes("train", size=32, num_scenes=number)
    return [describe(scenes.attributes(i)) if i % 3 else scenes.caption(i) for i in range(number)]


def settings(folder: str, **optim) -> Config:
    return Config.from_dict(
        {
            "model": {"preset": "ViT-B/32", "tokenizer": "given"},
            "data": {"train": folder, "num_workers": 2},
            "optim": {"batch_size": BATCH, "lr": 5e-4, "warmup_steps": 10, **optim},
        }
    )


@cache
def here() -> str:
    """The precision of both sides, as a run takes it by default."""
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    return settled_precision("auto", device)[0]


def build(architecture: HFCLIPConfig, config: Config) -> TrainingStep:
    """hfclip's step as the trainer makes it."""
    tune_cpu()
    precision = here()
    accelerator = Accelerator(
        cpu=not torch.accelerator.is_available(), mixed_precision="no" if precision == "fp32" else precision
    )
    config.run.precision = precision
    torch.manual_seed(0)
    core = adapt_to_device(accelerator, HFCLIPModel(architecture).train(), config)
    full = Phase(architecture.image_size, architecture.text_config.max_position_embeddings, 0.0)
    return build_step(
        core,
        config,
        accelerator,
        HFCLIPImageProcessor(size=architecture.image_size),
        objective=Contrastive(config),
        total_steps=1000,
        watch=Stopwatch(accelerator.device),
        phases=Phases([], full, stride=32, steps_per_epoch=1000, total_steps=1000),
    )


# ---------------------------------------------------------------------------------------------------------------------
# Throughput
# ---------------------------------------------------------------------------------------------------------------------


def write_shard(photos: Path, folder: str, number: int) -> list[str]:
    """`number` pairs of a photo and a caption in a WebDataset tar. Returns the captions."""
    files = sorted(p for p in photos.iterdir() if p.suffix.lower() in (".jpg", ".jpeg"))
    if not files:
        raise SystemExit(f"{photos}: found no JPEG files.")
    texts = captions(number)
    with tarfile.open(f"{folder}/0.tar", "w") as tar:
        for i, text in enumerate(texts):
            tar.add(files[i % len(files)], f"{i:06d}.jpg")
            Path(folder, "caption").write_text(text)
            tar.add(f"{folder}/caption", f"{i:06d}.txt")
    return texts


def peer_step(architecture: HFCLIPConfig, statistics: tuple, attention: str) -> Callable[[dict], float]:
    """A step of transformers' CLIPModel: forward with its loss, backward, AdamW, clamp; in half precision by autocast."""
    config = transformers.CLIPConfig()
    for name in ("vocab_size", "bos_token_id", "eos_token_id"):
        setattr(config.text_config, name, getattr(architecture.text_config, name))
    torch.manual_seed(0)
    model = CLIPModel._from_config(config, attn_implementation=attention).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.98), eps=1e-6, fused=True)

    def step(batch: dict) -> float:
        with autocast_for(here(), torch.device("cpu")):
            pixels = normalized(batch["pixel_values"], *statistics)
            loss = model(batch["input_ids"], pixels, batch["attention_mask"], return_loss=True).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            model.logit_scale.clamp_(max=4.6052)
        return loss.item()

    return step


def timed(step: Callable[[dict], object], loader) -> tuple[float, float]:
    """(pairs a second, share of the time that waited for data) over the loader's batches but the first two."""
    waited = started = 0.0
    count, batches = 0, iter(loader)
    while True:
        asked = time.perf_counter()
        batch = next(batches, None)
        if batch is None:
            break
        del batch["counts"]
        waited += time.perf_counter() - asked if count >= 2 else 0
        if count == 2:
            started = asked
        step(batch)
        count += 1
    elapsed = time.perf_counter() - started
    return BATCH * (count - 2) / elapsed, waited / elapsed


def throughput(photos: Path, rounds: int, steps: int) -> list[str]:
    with tempfile.TemporaryDirectory() as folder:
        texts = write_shard(photos, folder, BATCH * (steps + 2))
        tokenizer = HFCLIPTokenizer.train_new_from_iterator(texts, 2000, show_progress=False)
        tokenizer.model_max_length = 77
        architecture = HFCLIPConfig.from_preset("ViT-B/32")
        text = architecture.text_config.to_dict() | {"vocab_size": len(tokenizer), "pad_token_id": 0}
        text |= {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
        architecture = HFCLIPConfig(text_config=text, vision_config=architecture.vision_config, projection_dim=512)
        config = settings(folder)
        dataset = PairDataset(open_source(folder, config.data, "train", 224), config, 224)

        def loader(pad_to_max: bool):
            collate = Collate(tokenizer, pad_to_max=pad_to_max, group=False)
            return build_loader(dataset, collate, config, start=0, stop=steps + 2, rank=0, num_ranks=1)

        ours = build(architecture, config)
        counter = iter(range(10**6))
        sides = {"hfclip": (lambda batch: ours(batch, next(counter)), loader(False))}
        for attention in ("sdpa", "eager"):
            sides[f"CLIPModel, {attention}"] = (
                peer_step(architecture, (ours.pixel_mean, ours.pixel_std), attention),
                loader(True),
            )
        found = {name: [] for name in sides}
        for _ in range(rounds):
            for name, (step, batches) in sides.items():
                found[name].append(timed(step, batches))
                print(f"{name}: {found[name][-1][0]:.2f} pairs/s", flush=True)
        tokens = statistics.mean(len(ids) for ids in tokenizer(texts)["input_ids"])
    return throughput_table(found, tokens)


def throughput_table(found: dict[str, list[tuple[float, float]]], tokens: float) -> list[str]:
    rates = {name: statistics.median(rate for rate, _ in rounds) for name, rounds in found.items()}
    peer = max((name for name in found if name != "hfclip"), key=rates.get)
    ratio = statistics.median(a / b for (a, _), (b, _) in zip(found["hfclip"], found[peer], strict=True))
    rows = [
        f"| {name} | {rates[name]:.2f} | {statistics.median(share for _, share in rounds):.1%} |"
        for name, rounds in found.items()
    ]
    return [
        f"## Throughput: ViT-B/32, {here()}, batch {BATCH}, captions of {tokens:.1f} tokens, decoding included",
        "",
        f"hfclip is {ratio:.2f}x {peer}, the faster one (median of the rounds' ratios).",
        "",
        "| | pairs/s | waiting for data |",
        "|---|---|---|",
        *rows,
        "",
    ]


# ---------------------------------------------------------------------------------------------------------------------
# Gradient cache
# ---------------------------------------------------------------------------------------------------------------------


def random_batches(architecture: HFCLIPConfig, size: int, number: int) -> Iterator[dict]:
    """Random pixels, and ids of the lengths that captions have: 7 to 20 tokens, 13 on average."""
    text, place = architecture.text_config, torch.arange(20)
    for seed in range(number):
        generator = torch.Generator().manual_seed(seed)
        lengths = torch.randint(6, 20, (size, 1), generator=generator).sort(0, descending=True).values
        ids = torch.randint(1, 500, (size, 20), generator=generator).where(place < lengths, text.eos_token_id)
        side = architecture.image_size
        pixels = torch.randint(0, 256, (size, 3, side, side), generator=generator, dtype=torch.uint8)
        yield {"pixel_values": pixels, "input_ids": ids, "attention_mask": (place <= lengths).long()}


def one_measurement(model: str, batch_size: int, micro_batch_size: int, number: int) -> dict:
    """Seconds of `number` steps after one to warm up, and the peak memory of this process, in bytes."""
    if model == "tiny":
        ids = {"vocab_size": 512, "bos_token_id": 510, "eos_token_id": 511, "max_position_embeddings": 20}
        vision = {**TINY, "model_type": "hfclip_vit", "image_size": 32, "patch_size": 8}
        architecture = HFCLIPConfig(projection_dim=512, vision_config=vision, text_config={**TINY, **ids})
    else:
        architecture = HFCLIPConfig.from_preset(model)
    step = build(architecture, settings("none", batch_size=batch_size, micro_batch_size=micro_batch_size))
    warm = build_warm_up(step, architecture, micro_batch_size)
    warm()
    started = time.perf_counter()
    for i, batch in enumerate(random_batches(architecture, batch_size, number)):
        step(batch, i)
    seconds = time.perf_counter() - started
    return {"seconds": seconds, "peak": peak_memory()}


def peak_memory() -> int:
    """The most memory that this process has held, in bytes (Linux)."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def build_warm_up(step: TrainingStep, architecture: HFCLIPConfig, size: int) -> Callable[[], None]:
    """Kernels chosen and Adam's moments allocated, on one micro-batch."""

    def warm() -> None:
        kept, step.config = step.config, settings("none", batch_size=size)
        step(next(random_batches(architecture, size, 1)), 0)
        step.config = kept

    return warm


def measured(*arguments: object) -> dict:
    """`one_measurement` in a fresh process."""
    line = [sys.executable, __file__, "--measure", json.dumps(arguments)]
    done = subprocess.run(line, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    result = json.loads(done.stdout.splitlines()[-1])
    print(*arguments, result, flush=True)
    return result


def cache_tables(model: str, batch: int) -> list[str]:
    small, cached = measured(model, BATCH, BATCH, batch // BATCH), measured(model, batch, BATCH, 1)
    growing = [(size, measured("tiny", size, min(size, 1024), 1)) for size in GROWING]
    tiny = measured("tiny", BATCH, BATCH, GROWING[-1] // BATCH)
    return [
        f"## Gradient cache: {batch:,} pairs, {model}, {here()}, captions of 13 tokens",
        "",
        f"The cache takes {cached['seconds'] / small['seconds']:.2f} times as long.",
        "",
        "| | time | peak memory |",
        "|---|---|---|",
        f"| {batch // BATCH} steps of {BATCH} | {small['seconds']:.1f} s | {small['peak'] / 2**30:.2f} GiB |",
        f"| one step of {batch:,} in micro-batches of {BATCH} | {cached['seconds']:.1f} s "
        f"| {cached['peak'] / 2**30:.2f} GiB |",
        "",
        "## Gradient cache: a tiny model with 512-dimensional embeddings, micro-batches of 1,024",
        "",
        f"The same {GROWING[-1]:,} pairs in batches of {BATCH} take {tiny['seconds']:.1f} s.",
        "",
        "| pairs | time | peak memory | of it embeddings, their gradients, pixels and ids |",
        "|---|---|---|---|",
        *(
            f"| {size:,} | {result['seconds']:.1f} s | {result['peak'] / 2**20:,.0f} MiB "
            f"| {size * (4 * 512 * 4 + 3 * 32 * 32 + 2 * 20 * 8) / 2**20:,.0f} MiB |"
            for size, result in growing
        ),
        "",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path, help="folder of JPEG files")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each side")
    parser.add_argument("--steps", type=int, default=6, help="measured steps a turn")
    parser.add_argument("--batch", type=int, default=1024, help="pairs of the large batch")
    parser.add_argument("--write", action="store_true", help="store the tables in benchmarks/results/")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(one_measurement(*json.loads(arguments.measure))))
        return
    lines = [
        f"# Training, {date.today().isoformat()}",
        "",
        f"{torch.get_num_threads()} threads of {platform.machine()} ({os.cpu_count()} cores), torch {torch.__version__}, "
        f"transformers {transformers.__version__}, hfclip {hfclip.__version__}. `python benchmarks/training.py "
        "--photos FOLDER --write`",
        "",
    ]
    if arguments.photos is None:
        parser.error("--photos FOLDER is needed: a folder of JPEG files")
    lines += throughput(arguments.photos, arguments.rounds, arguments.steps)
    lines += cache_tables("ViT-B/32", arguments.batch)
    print("\n".join(lines))
    if arguments.write:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"{date.today().isoformat()}_training.md").write_text("\n".join(lines))


if __name__ == "__main__":
    main()

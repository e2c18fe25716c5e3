"""Trains a CLIP model from pairs of images and captions.

    accelerate launch training/pretrain.py                                     a demonstration, minutes on a CPU
    accelerate launch training/pretrain.py --config cifar10 --data.train 'data/train/{0..7}.tar'
    accelerate launch training/pretrain.py --config my.yaml --optim.lr 1e-3    a YAML names a run, flags override it
    accelerate launch training/pretrain.py --config runs/my/config.yaml --resume auto

Reading order: `main`, `build`, `train`, `train_step`, `finish`. A step is: batch, forward, global loss, backward, clip,
AdamW, clamp the scale. Everything that a step depends on is a function of the settings and the number of the step.
"""

import math
import os
import signal
import sys
import time
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

if not __package__:  # launched as a script: Python put this folder on the path, but modules are named from its parent
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs
from accelerate.utils import broadcast_object_list
from torch import nn
from torch.utils.data import DataLoader

from hfclip import HFCLIPModel, HFCLIPProcessor, contrastive_loss, sigmoid_loss
from training import checkpoint, optim
from training.config import Config, UsageError, parse_arguments
from training.data import Collate, PairDataset, build_loader
from training.evaluation import Evaluator
from training.model import build_architecture, build_model, build_processor, describe, synchronise_batch_norm
from training.sources import open_source
from training.tracking import Tracking, check_trackers


# Settings that decide what a step means; a resumed run must have them as they were.
FIXED_ON_RESUME = (
    *(f"model.{key}" for key in ("preset", "config", "freeze", "tokenizer")),
    *(f"data.{key}" for key in ("train", "split", "max_samples")),
    *("optim.loss", "optim.batch_size", "run.seed"),
)


@dataclass(kw_only=True, slots=True)
class Run:
    """All that a run consists of. `model` is wrapped for several processes, `core` is the model itself."""

    config: Config
    accelerator: Accelerator
    model: nn.Module
    core: HFCLIPModel
    processor: HFCLIPProcessor
    optimizer: torch.optim.Optimizer
    loader: DataLoader
    evaluator: Evaluator
    tracking: Tracking
    steps_per_epoch: int
    start: int
    stop: int
    interrupted: list[signal.Signals] = field(default_factory=list)


def main() -> None:
    try:
        config, resume = parse_arguments(sys.argv[1:])
        run = build(config, resume)
        done = train(run)
        finish(run, done)
    except UsageError as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"\nerror: {error}", file=sys.stderr, flush=True)
        sys.exit(2)


# ---------------------------------------------------------------------------------------------------------------------
# Build: everything that can be wrong is found here, before the first step
# ---------------------------------------------------------------------------------------------------------------------


def build(config: Config, resume: str | None) -> Run:
    """Opens the data, builds the model and restores what is resumed."""
    check_trackers(config.run.trackers)
    accelerator = build_accelerator(config)
    folder = Path(config.run.output_dir)
    resumed = find_resumed(config, resume, accelerator)
    state = check_resumed(resumed, config)

    architecture = build_architecture(config)
    image_size = architecture.image_size
    with accelerator.local_main_process_first():  # one process fetches and indexes; the others find it done
        source = open_source(config.data.train, config.data, split=config.data.split, image_size=image_size)
        dataset = PairDataset(source, config, image_size)
    start, stop = state["step"], optim.total_steps(config.optim, dataset.steps_per_epoch)
    with accelerator.main_process_first():
        processor = build_processor(config, architecture, source, folder / "tokenizer")
    evaluator = Evaluator(config, processor, image_size)
    core = build_model(config, architecture, resumed)
    optimizer = optim.build_optimizer(core, config.optim)

    wrapped = synchronise_batch_norm(core) if accelerator.num_processes > 1 and accelerator.device.type == "cuda" else core
    if config.model.compile:
        wrapped.compile()
    model, optimizer = accelerator.prepare(wrapped, optimizer)
    if resumed:
        restore(accelerator, optimizer, resumed)

    collate = Collate(
        processor.tokenizer, pad_to_max=config.model.compile, group=config.data.group_captions
    )
    rank, num_ranks = accelerator.process_index, accelerator.num_processes
    loader = build_loader(dataset, collate, config, start=start, stop=stop, rank=rank, num_ranks=num_ranks)
    if accelerator.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        config.save(folder / "config.yaml")
    tracking = Tracking(accelerator, config, start, stop)
    ...

"""Numbers that the settings leave open: they follow the number of pairs, and whether a model is trained or tuned.

From scratch they are the paper's (Radford et al. 2021), as far as there is data for them. From a checkpoint they are
what fine-tuning of CLIP is published with: a rate of 1e-5, few epochs (FLYP, arXiv:2212.00638, has 10 of ImageNet and
100 of small sets), and a short warm-up.
"""

import math
from typing import Any

from .config import Config, OptimConfig


# Their values are kept by a run that goes on, whatever they would be now.
OPEN = (
    "optim.batch_size",
    "optim.epochs",
    "optim.lr",
    "optim.warmup_steps",
    "run.log_every",
    "run.save_every",
    "eval.every",
)
BATCH_SIZE = 256
EPOCHS, LR = 32, 5e-4
TUNED_EPOCHS, TUNED_LR = 5, 1e-5
MOST_WARMUP = 2000  # steps
FEW_STEPS = 100  # a run has as many, and a part of it that ends with a checkpoint
LINES = 20  # of metrics.jsonl, at least; and the steps between them, at most


def keep_numbers(config: Config, before: Config) -> None:
    """Takes what is open from the run that goes on."""
    for name in OPEN:
        _set(config, name, before.value(name))


def fill_numbers(config: Config, pairs: int, largest_batch: int | None = None) -> list[str]:
    """Gives what is open in `config` its number, and returns a line for each.

    Args:
        pairs: that an epoch has.
        largest_batch: that the data can fill, where this is not all pairs.
    """
    optim, said, most = config.optim, [], largest_batch or pairs

    def fill(name: str, value: float, reason: str) -> None:
        if _set(config, name, value):
            said.append(f"{name} {value} (auto: {reason})")

    is_tuned = config.model.checkpoint is not None
    origin, epochs, lr = ("from a checkpoint", TUNED_EPOCHS, TUNED_LR) if is_tuned else ("from scratch", EPOCHS, LR)
    whose = "all" if most == pairs <= BATCH_SIZE else "of" if most >= BATCH_SIZE else "the most that fit a mixture of"
    fill("optim.batch_size", max(min(BATCH_SIZE, most), 2), f"{whose} {pairs:,} pairs")
    per_epoch = max(pairs // optim.batch_size, 1)
    enough = math.ceil(FEW_STEPS / per_epoch)  # epochs
    if optim.steps is None:
        reason = origin if epochs >= enough else f"{enough * per_epoch} steps, as the data are few"
        fill("optim.epochs", float(max(epochs, enough)), reason)
    fill("optim.lr", lr, origin)
    total = num_steps(optim, per_epoch)
    warmup = min(total // 10, MOST_WARMUP)
    fill("optim.warmup_steps", warmup, "the paper's" if warmup == MOST_WARMUP else f"a tenth of {total} steps")
    fill("run.log_every", max(min(total // LINES, LINES), 1), f"{LINES} lines or more")
    every = enough * per_epoch
    reason = "each epoch" if enough == 1 else f"each {enough} epochs"
    for name in ("run.save_every", "eval.every"):
        fill(name, every if every < total else 0, reason if every < total else "at the end")
    return said


def num_steps(config: OptimConfig, per_epoch: int) -> int:
    """Length of a run in steps."""
    return config.steps or max(round(config.epochs * per_epoch), 1)


def _set(config: Config, name: str, value: Any) -> bool:
    """Sets `section.key` if it is open."""
    section, key = name.split(".")
    is_open = config.value(name) is None and value is not None
    if is_open:
        setattr(getattr(config, section), key, value)
    return is_open

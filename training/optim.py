"""AdamW with the paper's weight decay, and a learning rate that is a pure function of the step."""

import math

import torch
from torch import nn

from .config import OptimConfig, UsageError


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Trainable parameters in two groups: those that decay and those that do not.

    Matrices, convolutions and embeddings decay. Gains, biases, the class embedding, `logit_scale` and `logit_bias`,
    that is everything with fewer than two dimensions, do not (Radford et al. 2021, section 2.5: "all weights that are
    not gains or biases").
    """
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """AdamW over the trainable parameters; beta2 and epsilon default to the paper's for the kind of vision tower.

    Raises:
        UsageError: if a parameter is not float32. Adam's small updates vanish in half-precision weights.
    """
    halves = [f"{name} ({p.dtype})" for name, p in model.named_parameters() if p.dtype != torch.float32]
    if halves:
        raise UsageError(
            f"Training needs float32 weights, found {len(halves)} others, first {halves[0]}. Load the model with "
            "dtype=torch.float32; run.precision chooses the precision of the computation."
        )
    # Radford et al. 2021, table 18
    has_batch_norm = any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())
    beta2, eps = (0.999, 1e-8) if has_batch_norm else (0.98, 1e-6)
    betas = (0.9, beta2 if config.beta2 is None else config.beta2)
    groups = parameter_groups(model, config.weight_decay)
    return torch.optim.AdamW(groups, lr=config.lr, betas=betas, eps=config.eps or eps, fused=True)


def learning_rate(step: int, total_steps: int, config: OptimConfig) -> float:
    """Rate of step `step` (from 0): a linear warm-up that reaches `lr` after `warmup_steps`, then a cosine to zero."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(total_steps - config.warmup_steps, 1)
    return config.lr * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


def total_steps(config: OptimConfig, steps_per_epoch: int) -> int:
    """Length of the run in steps.

    Raises:
        UsageError: if the warm-up would not end within it.
    """
    total = config.steps or max(round(config.epochs * steps_per_epoch), 1)
    if config.warmup_steps >= total:
        raise UsageError(
            f"optim.warmup_steps: found {config.warmup_steps}, expected fewer than the {total} steps of the run "
            f"({steps_per_epoch} an epoch). Lower it, or train longer."
        )
    return total

"""AdamW with the paper's weight decay, and a learning rate that is a pure function of the step and the layer."""

import math
from collections import defaultdict

import torch
from torch import nn

from hfclip.errors import UsageError
from hfclip.towers_hfclip import blocks_of

from .config import OptimConfig
from .defaults import num_steps
from .low_precision import LowPrecisionAdamW, text_matrices


def parameter_groups(model: nn.Module, weight_decay: float, layer_decay: float = 1.0) -> list[dict]:
    """Trainable parameters in groups of one `weight_decay` and one `lr_scale`, a factor on the learning rate.

    Matrices, convolutions and embeddings decay. Gains, biases, the class embedding, `logit_scale` and `logit_bias`,
    that is everything with fewer than two dimensions, do not (Radford et al. 2021, section 2.5: "all weights that are
    not gains or biases").

    The top block of a tower has factor 1, each block below it `layer_decay` times the factor of the block above, and
    the embeddings that of a block below the lowest. What follows the blocks, the projections and the logit scale have
    factor 1. Blocks of a ResNet are its stem, its four stages and its attention pool.

    Raises:
        UsageError: if a tower that is to be trained with `layer_decay` below 1 has no list of blocks.
    """
    scales = {}
    if layer_decay != 1:
        for tower in (model.vision_model, model.text_model):
            levels = _levels(tower) if any(p.requires_grad for p in tower.parameters()) else []
            for height, level in enumerate(reversed(levels)):
                scales |= {id(parameter): layer_decay**height for parameter in level}
    groups = defaultdict(list)
    for parameter in model.parameters():
        if parameter.requires_grad:
            decay = weight_decay if parameter.ndim >= 2 else 0.0
            groups[scales.get(id(parameter), 1.0), parameter.ndim >= 2, decay].append(parameter)
    return [
        {"params": groups[key], "weight_decay": key[2], "lr_scale": key[0]} for key in sorted(groups, reverse=True)
    ]


def _levels(tower: nn.Module) -> list[list[nn.Parameter]]:
    """The parameters of a tower, from its embeddings up to its last block and what follows that."""
    parameters, blocks = list(tower.parameters()), blocks_of(tower)
    if blocks == []:
        return [parameters]
    if blocks is None:
        raise UsageError(
            f"optim.layer_decay: found no list of blocks in the {tower.config.model_type} tower, expected one. Set "
            "it to 1, or freeze that tower."
        )
    levels = [list(block.parameters()) for block in blocks]
    inside = {id(parameter) for level in levels for parameter in level}
    first = next(place for place, parameter in enumerate(parameters) if id(parameter) in inside)
    after = [parameter for parameter in parameters[first:] if id(parameter) not in inside]
    return [parameters[:first], *levels[:-1], levels[-1] + after]


def build_optimizer(model: nn.Module, config: OptimConfig, seed: int = 0) -> torch.optim.Optimizer:
    """AdamW over the trainable parameters; beta2 and epsilon default to the paper's for the kind of vision tower.

    It is torch's fused AdamW, or `LowPrecisionAdamW` where something is kept in bfloat16.

    Args:
        model: in float32 but for what `halve_text_weights` halves, if `config.bfloat16` says so.
        seed: of the noise of stochastic rounding.

    Raises:
        UsageError: if a parameter is of another type. Adam's small updates vanish in half-precision weights.
    """
    halved = {id(m.weight) for m in text_matrices(model)} if "text_weights" in config.bfloat16 else set()
    expected = {True: torch.bfloat16, False: torch.float32}
    wrong = [f"{name} ({p.dtype})" for name, p in model.named_parameters() if p.dtype != expected[id(p) in halved]]
    if wrong:
        exception = " (bfloat16 for the text tower's matrices, see halve_text_weights)" if halved else ""
        raise UsageError(
            f"Training needs float32 weights{exception}, found {len(wrong)} others, first {wrong[0]}. Load the model "
            "with dtype=torch.float32; run.precision chooses the precision of the computation."
        )
    # Radford et al. 2021, table 18
    has_batch_norm = any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())
    beta2, eps = (0.999, 1e-8) if has_batch_norm else (0.98, 1e-6)
    betas = (0.9, beta2 if config.beta2 is None else config.beta2)
    groups = parameter_groups(model, config.weight_decay, config.layer_decay)
    if not config.bfloat16:
        return torch.optim.AdamW(groups, lr=config.lr, betas=betas, eps=config.eps or eps, fused=True)
    moments = torch.bfloat16 if "moments" in config.bfloat16 else torch.float32
    return LowPrecisionAdamW(groups, config.lr, betas, config.eps or eps, moments=moments, seed=seed)


def apply_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Sets the rate of every group: `lr` times its `lr_scale`."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]


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
    total = num_steps(config, steps_per_epoch)
    if config.warmup_steps >= total:
        raise UsageError(
            f"optim.warmup_steps: found {config.warmup_steps}, expected fewer than the {total} steps of the run "
            f"({steps_per_epoch} an epoch). Lower it, or train longer."
        )
    return total

"""Memory savers of the paper: Adam's moments and the text tower's weights in bfloat16, rounded stochastically.

A step computes in float32 and rounds only what it stores. A bfloat16 has 8 bits of precision: rounded to the nearest,
a change of less than 1/512 would be lost, in every step anew. Rounded up or down at random, with the odds of where the
value lies in between, the stored number is right on average (Radford et al. 2021, section 2.5, after Dhariwal et al.
2020).

Bytes that a parameter takes with its gradient and moments, from float32 16: 12 with halved moments, 8 with a halved
weight too. What it costs: noise of 2^-9 of each stored number per step, and a loop over the parameters in place of one
fused kernel.
"""

import math

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from .parallel import local_shard


MOMENTS = ("exp_avg", "exp_avg_sq")
# Elements that are updated at a time: what is computed in float32 beside the parameters stays below 64 MB.
CHUNK = 1 << 20


def text_matrices(model: nn.Module) -> list[nn.Module]:
    """The layers of the text tower whose `weight` may be bfloat16: linear maps and the token embedding.

    Positions, gains and biases stay float32. They are less than 1 % of a tower, and a float32 position keeps the
    residual stream in float32.
    """
    tower = model.text_model
    tokens = tower.get_input_embeddings()
    plain = tokens if type(tokens) in (nn.Embedding, HalvedEmbedding) else None
    return [module for module in tower.modules() if isinstance(module, nn.Linear) or module is plain]


def halve_text_weights(model: nn.Module) -> nn.Module:
    """The same model, the weights of `text_matrices` in bfloat16; their gradients are bfloat16 too.

    Forward and backward need autocast to bfloat16, as float32 activations meet bfloat16 weights. Values that are
    bfloat16 already, as those of a checkpoint of such a run, do not change.
    """
    for module in text_matrices(model):
        module.weight.data = module.weight.data.bfloat16()
        if isinstance(module, nn.Embedding):
            module.__class__ = HalvedEmbedding
    return model


class HalvedEmbedding(nn.Embedding):
    """A bfloat16 embedding that sums up its gradient in float32.

    The start token is in every text. Summed in bfloat16, as torch does on CPUs, its gradient would stop growing after
    some hundred texts.
    """

    def forward(self, input_ids: Tensor) -> Tensor:
        return _Lookup.apply(self.weight, input_ids, -1 if self.padding_idx is None else self.padding_idx)


class _Lookup(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight: Tensor, ids: Tensor, padding_idx: int) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.num_tokens, ctx.padding_idx, ctx.dtype = len(weight), padding_idx, weight.dtype
        return F.embedding(ids, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        (ids,) = ctx.saved_tensors
        summed = torch.ops.aten.embedding_dense_backward(grad.float(), ids, ctx.num_tokens, ctx.padding_idx, False)
        return summed.to(ctx.dtype), None, None


def rounded_stochastically(values: Tensor, noise: Tensor) -> Tensor:
    """float32 -> bfloat16, up or down with the odds of the distance: the mean over `noise` is the value itself.

    `noise` is int32, of the shape of `values`, uniform over 0 ... 2^16 - 1. Infinities and NaN stay what they are.
    """
    # A bfloat16 is the upper half of a float32. The noise carries into it as often as the lower half is large.
    rounded = (values.view(torch.int32) + noise).bitwise_and_(-(1 << 16)).view(torch.float32)
    return torch.where(values.isnan(), values, rounded).bfloat16()


class LowPrecisionAdamW(torch.optim.Optimizer):
    """AdamW (`torch.optim.AdamW`'s update, computed in float32) with stored numbers that may be bfloat16.

    The noise of the rounding is a pure function of `seed`, the step and the place of the parameter in the groups: a
    resumed run repeats it, and all processes on devices of one kind round alike, so that their weights stay equal.
    Parameters may be sharded (DTensor): the moments are then sharded like them.

    Args:
        groups: parameters, float32 or bfloat16, with `weight_decay` and whatever else a group carries.
        moments: `torch.bfloat16` or `torch.float32`.
    """

    def __init__(
        self,
        groups: list[dict],
        lr: float,
        betas: tuple[float, float],
        eps: float,
        *,
        moments: torch.dtype,
        seed: int = 0,
    ):
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0})
        self.moments, self.seed = moments, seed

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        places = [(group, parameter) for group in self.param_groups for parameter in group["params"]]
        for index, (group, parameter) in enumerate(places):
            if parameter.grad is not None:
                self._update(index, parameter, group)

    def _update(self, index: int, parameter: Tensor, group: dict) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = 0
            state |= {name: torch.zeros_like(parameter, dtype=self.moments) for name in MOMENTS}
        # A plain number: of a tensor on a device, as earlier states have it, the host would have to wait.
        step = state["step"] = int(state["step"]) + 1
        seed = np.random.SeedSequence([self.seed, step, index]).generate_state(1, np.uint64)[0]
        generator = torch.Generator(parameter.device).manual_seed(int(seed >> 1))
        # Shards of one parameter share their noise: each number is still rounded without bias, and copies of a shard on
        # other processes stay equal.
        stored = [
            torch.atleast_1d(local_shard(tensor))
            for tensor in (parameter, parameter.grad, *(state[name] for name in MOMENTS))
        ]
        rows = max(CHUNK // max(stored[0][:1].numel(), 1), 1)
        for chunk in zip(*(tensor.split(rows) for tensor in stored), strict=True):
            _update_chunk(*chunk, step, group, generator)


def _update_chunk(weight, grad, mean, square, step: int, group: dict, generator: torch.Generator) -> None:
    """Updates views of one parameter and of its moments in place. What is stored as float32 is computed in its place."""
    (beta1, beta2), lr = group["betas"], group["lr"]
    grad, new_weight, new_mean, new_square = grad.float(), weight.float(), mean.float(), square.float()
    new_mean.lerp_(grad, 1 - beta1)
    new_square.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    denominator = new_square.sqrt().div_(math.sqrt(1 - beta2**step)).add_(group["eps"])
    new_weight.mul_(1 - lr * group["weight_decay"]).addcdiv_(new_mean, denominator, value=-lr / (1 - beta1**step))
    if mean.dtype == torch.bfloat16:
        first, second = _two_noises(weight, generator)
        mean.copy_(rounded_stochastically(new_mean, first))
        square.copy_(rounded_stochastically(new_square, second))
    if weight.dtype == torch.bfloat16:
        weight.copy_(rounded_stochastically(new_weight, _two_noises(weight, generator)[0]))


def _two_noises(like: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Two independent draws from 0 ... 2^16 - 1: the halves of 32 random bits."""
    bits = torch.randint(-(1 << 31), 1 << 31, like.shape, dtype=torch.int32, device=like.device, generator=generator)
    return bits & 0xFFFF, (bits >> 16) & 0xFFFF

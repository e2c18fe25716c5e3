"""Weights split over processes (FSDP2), and states that are whole whatever the number of processes.

Without splitting every process holds the whole model and DistributedDataParallel averages gradients. With
`run.shard_weights` each process keeps 1/W of every weight, gradient and moment, and the blocks of the towers are put
together when they compute. The computation is the same; checkpoints are, too: they hold whole tensors under the
model's names, so a run goes on with any number of processes, split or not.

torch's `fully_shard` is called here and not by Accelerate, which would not keep out `logit_scale` (scalars cannot be
split) and drops FSDP without a word on CPUs. The scalars stay whole on each process, and `average_scalars` averages
their gradients.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from hfclip import HFCLIPModel


def shard(core: HFCLIPModel, accelerator: Accelerator) -> HFCLIPModel:
    """Splits the weights over all processes, in place: one unit for each block, one for the rest."""
    core.to(accelerator.device)
    mesh = dist.device_mesh.init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    for module in fsdp_units(core):
        fully_shard(module, mesh=mesh)
    return fully_shard(core, mesh=mesh, ignored_params=set(loss_scalars(core)))


def fsdp_units(model: nn.Module) -> list[nn.Module]:
    """The blocks of the towers that are put together one at a time; those inside of others come first."""
    names = {name for module in model.modules() for name in getattr(module, "_no_split_modules", None) or ()}
    return [module for module in model.modules() if type(module).__name__ in names][::-1]


@contextmanager
def no_sync(model: nn.Module) -> Iterator[None]:
    """Backward passes inside leave gradients on each process as they are."""
    if isinstance(model, DistributedDataParallel):
        with model.no_sync():
            yield
    elif is_sharded(model):
        model.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            model.set_requires_gradient_sync(True)
    else:
        yield


def is_sharded(model: nn.Module) -> bool:
    return isinstance(model, FSDPModule)


def loss_scalars(core: nn.Module) -> list[Tensor]:
    """`logit_scale` and its like, without dimensions: read by the loss, not by the towers."""
    return [parameter for parameter in core.parameters() if parameter.ndim == 0]


def average_scalars(core: HFCLIPModel) -> None:
    """The mean over processes of the scalars' gradients, which FSDP leaves alone; collective."""
    for parameter in loss_scalars(core):
        if parameter.grad is not None:
            dist.all_reduce(parameter.grad)
            parameter.grad /= dist.get_world_size()


def full_tensor(tensor: Tensor) -> Tensor:
    """A split tensor put together, on every process; collective."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def replica(core: HFCLIPModel) -> HFCLIPModel:
    """The model with whole weights on each process, in eval mode: to measure and to save it. Collective."""
    model = type(core)(core.config)
    model.load_state_dict(full_state_dict(core, keep=True))
    return model.to(core.device).eval()


def full_state_dict(core: HFCLIPModel, keep: bool) -> dict[str, Tensor]:
    """The model's weights and buffers on the CPU, whole; empty where `keep` is False. Collective, tensor by tensor."""
    return full_tensors(core.state_dict(), keep)


def full_tensors(values: dict, keep: bool) -> dict:
    state = {}
    for name, value in values.items():
        value = full_tensor(value.detach()) if isinstance(value, Tensor) else value
        if keep:
            state[name] = value.cpu() if isinstance(value, Tensor) else value
    return state


def full_optimizer_state(core: HFCLIPModel, optimizer: torch.optim.Optimizer, keep: bool) -> dict[str, dict]:
    """What the optimizer knows of each weight, by the weight's name, on the CPU; as `full_state_dict`."""
    known = {name: optimizer.state[p] for name, p in core.named_parameters() if optimizer.state.get(p)}
    return {name: full_tensors(values, keep) for name, values in known.items()}


def load_optimizer_state(core: HFCLIPModel, optimizer: torch.optim.Optimizer, state: dict[str, dict]) -> None:
    """Restores what `full_optimizer_state` gave; each process takes its part."""
    for name, parameter in core.named_parameters():
        if name in state:
            optimizer.state[parameter] = {key: shard_like(value, parameter) for key, value in state[name].items()}


def local_shard(tensor: Tensor) -> Tensor:
    """The part of a tensor that this process holds: a view."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def shard_like(value, like: Tensor):
    """This process's part of a whole tensor, split as `like` is."""
    if not isinstance(value, Tensor):
        return value
    value = value.to(like.device)
    if isinstance(like, DTensor) and value.shape == like.shape:
        return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)
    return value

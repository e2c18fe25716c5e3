"""The machine a run finds itself on: Accelerate as the launcher set it up, its precision, threads and workers."""

import ctypes
import os
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, PartialState
from accelerate.utils import DistributedType, broadcast_object_list

from hfclip.cores import cores_of_this_process, usual_workers
from hfclip.errors import UsageError
from hfclip.precision import settled_precision

from .config import Config
from .state.resuming import precision_of
from .threads import threads_are_given


M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h


def build_accelerator(config: Config, resume: str | None = None) -> Accelerator:
    """Accelerate as the launcher set it up, on the CPU where there is nothing else.

    Settles `config.run.precision`: after this it is not "auto".

    Args:
        resume: as `parse_arguments` gives it; a run that goes on keeps its precision.

    Raises:
        UsageError: for what the machine cannot do.
    """
    # Not told so, Accelerate leaves each of several processes on a machine without GPU to itself.
    # Others wait while one process fetches the data: hence the hours.
    state = PartialState(cpu=computes_on_cpu(), timeout=timedelta(hours=2))
    if state.device.type == "cpu":
        tune_cpu()
    folder, asked = Path(config.run.output_dir), config.run.precision
    settle = lambda: settled_precision(asked, state.device, precision_of(folder, resume))
    config.run.precision, reason = on_main_process(state, settle)
    check_settings(config, state.num_processes, state.device.type, reason)
    try:
        accelerator = Accelerator(
            mixed_precision="no" if config.run.precision == "fp32" else config.run.precision,
            log_with=config.run.trackers or None,
            project_dir=config.run.output_dir,
            kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True)],
        )
    except (ValueError, ImportError) as error:
        raise UsageError(
            f"Accelerate cannot start with run.precision {config.run.precision} and the launcher's settings: {error}"
        ) from error
    if accelerator.distributed_type == DistributedType.XLA:
        raise UsageError("The launcher started XLA (tpu), expected processes of torch.distributed on GPUs or CPUs.")
    if reason:
        accelerator.print(f"precision {config.run.precision} ({reason})")
    return accelerator


def computes_on_cpu() -> bool:
    return not torch.accelerator.is_available() or os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true"


def check_settings(config: Config, processes: int, device_type: str, reason: str = "") -> None:
    """Raises UsageError for settings that do not go together on this many processes of a kind of device."""
    optim, run = config.optim, config.run
    if optim.batch_size is not None and optim.batch_size < processes:
        raise UsageError(
            f"optim.batch_size: found {optim.batch_size}, expected a pair for each of {processes} processes at least."
        )
    if run.precision == "fp16" and device_type == "cpu":
        # Accelerate would say nothing and compute in float32
        raise UsageError("run.precision: fp16 needs a GPU, found none. Use bf16 or fp32.")
    if run.shard_weights and processes == 1:
        raise UsageError("run.shard_weights: found one process, expected several to split the weights over.")
    if run.shard_weights and run.precision == "fp16":
        raise UsageError("run.shard_weights: found run.precision fp16, expected bf16 or fp32.")
    if "text_weights" in optim.bfloat16 and (run.precision != "bf16" or run.shard_weights):
        found = f" Found {run.precision} ({reason}): take text_weights out of optim.bfloat16." if reason else ""
        raise UsageError(f"optim.bfloat16: text_weights need run.precision bf16, and run.shard_weights false.{found}")


def on_main_process(state: Accelerator | PartialState, function, *arguments):
    """The result of `function` on the main process, sent to all."""
    result = [function(*arguments) if state.is_main_process else None]
    return broadcast_object_list(result)[0]


# ---------------------------------------------------------------------------------------------------------------------
# Threads and workers
# ---------------------------------------------------------------------------------------------------------------------


def tune_cpu() -> None:
    """A thread on each core for the processes of this machine, unless the user says otherwise by OMP_NUM_THREADS; and no
    memory given back to the system between two layers.
    """
    if not threads_are_given():
        torch.set_num_threads(cores_of_this_process())
    try:
        mallopt = ctypes.CDLL(None).mallopt  # of glibc; a training step takes about 30 % less time with it
    except (AttributeError, OSError, TypeError):
        return
    mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
    mallopt(M_MMAP_THRESHOLD, 2**30)


def num_workers(asked: int | None) -> int:
    """Processes that read and decode for this one: `data.num_workers`, or what the machine has for it."""
    return usual_workers(computes_on_cpu()) if asked is None else asked

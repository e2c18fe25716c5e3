"""The machine a run finds itself on: Accelerate as the launcher set it up, and CPUs used well."""

import ctypes
import os
from datetime import timedelta

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs
from accelerate.utils import broadcast_object_list

from .config import NO_ACCUMULATION, Config, UsageError


PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h


def build_accelerator(config: Config) -> Accelerator:
    """Accelerate as the launcher set it up, on the CPU where there is nothing else.

    Raises:
        UsageError: for what the machine cannot do, or the launcher's settings would make wrong.
    """
    _check_launcher()
    precision = config.run.precision
    try:
        accelerator = Accelerator(
            # Not told so, Accelerate leaves each of several processes on a machine without GPU to itself.
            cpu=not torch.accelerator.is_available(),
            mixed_precision="no" if precision == "fp32" else precision,
            log_with=config.run.trackers or None,
            project_dir=config.run.output_dir,
            kwargs_handlers=[
                DistributedDataParallelKwargs(gradient_as_bucket_view=True),
                InitProcessGroupKwargs(timeout=timedelta(hours=2)),  # others wait while one fetches the data
            ],
        )
    except ValueError as error:
        raise UsageError(f"run.precision: {error} Use bf16 or fp32.") from error
    _check_settings(config, accelerator)
    if accelerator.device.type == "cpu":
        make_the_most_of_the_cpu()
    return accelerator


def _check_launcher() -> None:
    """Refuses what an `accelerate` configuration may ask for and CLIP cannot use."""
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        raise UsageError(
            "The launcher's configuration has fsdp settings, with which the scalar logit_scale cannot be trained. Take "
            "them out (as in training/launch/nodes.yaml) and set run.shard_weights to true, which is FSDP2."
        )
    steps = os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    if steps not in ("1", ""):
        raise UsageError(f"The launcher's configuration has gradient_accumulation_steps {steps}.{NO_ACCUMULATION}")


def _check_settings(config: Config, accelerator: Accelerator) -> None:
    optim, run, processes = config.optim, config.run, accelerator.num_processes
    if optim.batch_size < processes:
        raise UsageError(
            f"optim.batch_size: found {optim.batch_size}, expected a pair for each of {processes} processes at least."
        )
    if run.precision == "fp16" and accelerator.device.type == "cpu":
        # Accelerate would say nothing and compute in float32
        raise UsageError("run.precision: fp16 needs a GPU, found none. Use bf16 or fp32.")
    if run.shard_weights and processes == 1:
        raise UsageError("run.shard_weights: found one process, expected several to split the weights over.")
    if run.shard_weights and run.precision == "fp16":
        raise UsageError("run.shard_weights: found run.precision fp16, expected bf16 or fp32.")
    if optim.text_weights == "bfloat16" and (run.precision != "bf16" or run.shard_weights):
        raise UsageError("optim.text_weights: bfloat16 needs run.precision bf16, and run.shard_weights false.")


def make_the_most_of_the_cpu() -> None:
    """All cores for the processes of this machine, and no memory given back to the system between two layers."""
    launched = "ACCELERATE_MIXED_PRECISION" in os.environ or "LOCAL_WORLD_SIZE" in os.environ
    if launched and os.environ.get("OMP_NUM_THREADS") == "1":  # which launchers set where the user says nothing
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        torch.set_num_threads(max(cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")), 1))
    try:
        mallopt = ctypes.CDLL(None).mallopt  # of glibc; a training step takes about 30 % less time with it
    except (AttributeError, OSError, TypeError):
        return
    mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
    mallopt(M_MMAP_THRESHOLD, 2**30)


def on_main_process(accelerator: Accelerator, function, *arguments):
    """The result of `function` on the main process, sent to all."""
    result = [function(*arguments) if accelerator.is_main_process else None]
    return broadcast_object_list(result)[0]

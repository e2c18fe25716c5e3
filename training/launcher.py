"""The command that started this process: `accelerate launch`, torchrun, or Python alone, with the launcher's own settings.

python /venv/bin/accelerate launch --num_processes 8 training/pretrain.py --config my.yaml
`------------------------ what `prefix` gives ------------------------'
"""

import os
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from functools import cache, wraps
from pathlib import Path
from typing import Any, NoReturn

import psutil

from hfclip_errors import UsageError, redact

from .config import Config
from .typed import NO_ACCUMULATION


PROGRAMS = ("accelerate", "accelerate-launch", "torchrun", "hfclip")
SECONDS_TO_SPEAK = 3.0  # of a machine's first process, which launchers end when another one ends before it
MODULES = ("accelerate.commands.launch", "accelerate.commands.accelerate_cli", "torch.distributed.run")


LAUNCH_FOLDER = Path(__file__).parent / "launch"  # configurations of `accelerate`
TAKE_OUT = f"Take them out (as in {LAUNCH_FOLDER / 'nodes.yaml'})"

# What an `accelerate` configuration may switch on, by the environment variable that tells, and what to do instead.
NOT_FOR_CLIP = {
    "ACCELERATE_USE_FSDP": (
        "fsdp settings, with which the scalar logit_scale cannot be trained. "
        f"{TAKE_OUT} and set run.shard_weights to true, which is FSDP2."
    ),
    "ACCELERATE_USE_DEEPSPEED": (
        "DeepSpeed settings, whose engine would run the loss and the optimizer in the trainer's place. "
        f"{TAKE_OUT}; run.shard_weights true splits weights and optimizer over the processes, and "
        "optim.micro_batch_size saves memory."
    ),
    "ACCELERATE_USE_MEGATRON_LM": (
        "Megatron-LM settings, which are for its own language models. "
        f"{TAKE_OUT}; run.shard_weights true splits weights and optimizer over the processes."
    ),
    "ACCELERATE_USE_PARALLELISM_CONFIG": (
        f"parallelism settings (parallelism_config). {TAKE_OUT}: the run is data parallel, and "
        "run.shard_weights true splits weights and optimizer over the processes."
    ),
}


def check_settings(config: Config) -> None:
    """Refuses what an `accelerate` configuration may ask for and CLIP cannot use; its precision is what "auto" means.

    Raises:
        UsageError: with what to do instead.
    """
    found = "The launcher's configuration has"
    for variable, what in NOT_FOR_CLIP.items():
        if os.environ.get(variable, "").lower() in ("true", "1", "yes"):
            raise UsageError(f"{found} {what}")
    if started_too_few():
        raise UsageError(
            "The launcher was asked for several processes and started one, as it does where it finds no GPUs. Launch with "
            f"`--config_file {LAUNCH_FOLDER / 'cpu_processes.yaml'} --num_processes N`, or without --num_processes."
        )
    steps = os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    if steps not in ("1", ""):
        raise UsageError(f"{found} gradient_accumulation_steps {steps}.{NO_ACCUMULATION}")
    backend = os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no").lower()
    if backend not in ("no", ""):
        raise UsageError(
            f"{found} dynamo_backend {backend}. Take it out; model.compile true compiles the model, with captions of one "
            "length."
        )
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    if precision in ("bf16", "fp16") and config.run.precision == "auto":
        config.run.precision = precision
    if precision not in ("no", "", config.run.precision):
        raise UsageError(
            f"{found} mixed_precision {precision}, but run.precision, which decides, is {config.run.precision}. Set the "
            "launcher's to no, and run.precision to bf16, fp16 or fp32."
        )


def program(function: Callable[[], Any]) -> Callable[[], Any]:
    """Lets a mistake of the user's end the process with a message; a traceback, of a bug, is shown without credentials."""

    @wraps(function)
    def run() -> Any:
        try:
            return function()
        except UsageError as error:
            exit_with_message(f"error: {error}", status=2)
        except KeyboardInterrupt:
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            exit_with_message("Stopped at once. Nothing is lost but what came after the last checkpoint.", status=130)
        except Exception:
            sys.stderr.write(redact(traceback.format_exc()))
            sys.exit(1)

    return run


def end_on_interrupt() -> None:
    """Lets Ctrl-C end this process at once, with one line, while it imports its libraries and nothing has begun."""
    signal.signal(signal.SIGINT, lambda number, frame: (os.write(2, b"\nStopped.\n"), os._exit(128 + number)))


def raise_on_interrupt() -> None:
    """Makes the first Ctrl-C a KeyboardInterrupt, as Python does; launchers send it once more, and this is not heard."""

    def interrupt(number, frame):
        signal.signal(number, signal.SIG_IGN)
        raise KeyboardInterrupt

    signal.signal(signal.SIGINT, interrupt)


def exit_with_message(message: str, status: int) -> NoReturn:
    """Ends this process without traceback; the first one of each machine speaks."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"\n{redact(message)}", file=sys.stderr, flush=True)
        if reports_failures():
            print("(What follows is the launcher's; `accelerate launch --quiet` leaves it out.)\n", file=sys.stderr)
    elif status == 2:
        time.sleep(SECONDS_TO_SPEAK)
    sys.exit(status)


# ---------------------------------------------------------------------------------------------------------------------
# Its command
# ---------------------------------------------------------------------------------------------------------------------


@cache
def prefix() -> list[str]:
    """The words that stand before the trainer's arguments, so that the same launcher starts it again.

    Must be called while the launcher runs, and before `sys.argv` is changed; after that it is remembered.
    """
    words = _launcher_words() or sys.orig_argv
    words = words[: max(len(words) - len(sys.argv[1:]), 1)]
    start = next((i for i, word in enumerate(words) if Path(word).name in PROGRAMS), 0)  # else: python -m MODULE
    return [_as_typed(words[start]), *words[start + 1 :]]


@cache
def reports_failures() -> bool:
    """Whether the launcher prints a traceback of its own when this process ends with another status than 0."""
    words = _launcher_words()
    quiet = {"--quiet", "-q", "hfclip"} & {Path(word).name for word in words or ()}
    return words is not None and "LOCAL_RANK" not in os.environ and not quiet


@cache
def started_too_few() -> bool:
    """Whether `accelerate launch` was asked for several processes and started this one alone, as it does on CPUs."""
    if _launcher_words() is None or "LOCAL_RANK" in os.environ or "MASTER_ADDR" not in os.environ:
        return False
    try:  # only then does it set an address at which they would meet
        return "MASTER_ADDR" not in psutil.Process(os.getppid()).environ()
    except psutil.Error:
        return False


def _launcher_words() -> list[str] | None:
    """The command line of the process that started this one, if it is a launcher."""
    arguments = sys.argv[1:]
    try:
        words = psutil.Process(os.getppid()).cmdline()
    except psutil.Error:  # it is gone, or another user's
        return None
    is_launcher = any(Path(word).name in PROGRAMS or word in MODULES for word in words)
    return words if is_launcher and words[len(words) - len(arguments) :] == arguments else None


def _as_typed(program: str) -> str:
    """`accelerate` for /venv/bin/accelerate where the shell finds the same."""
    name = Path(program).name
    return name if shutil.which(name) == program else program

"""Where a run begins or goes on: its folder is free or locked, its newest whole checkpoint is found, and what the settings
and the data were then is compared with what they are now.
"""

import os
import shlex
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from hfclip_errors import UsageError

from ..config import CONFIG_FILE, PATHS, Config
from ..launcher import prefix
from ..removed import translate
from .checkpoint import MODEL_FOLDER, STATE_FILE, list_checkpoints, read_json, read_state, recover, step_of


if TYPE_CHECKING:  # torch takes seconds to import; a folder that is in the way is told before
    from hfclip import HFCLIPModel


# Settings, by section, that decide what a step sees or what the weights are.
FIXED_ON_RESUME = {
    "model": ("preset", "config", "tokenizer"),
    "data": ("train", "split", "max_samples", "phases", "disk", "group_captions"),
    "optim": ("loss", "batch_size", "layer_decay", "bfloat16"),
    "run": ("seed",),
}
HARMLESS_ON_RESUME = ("data.num_workers", "optim.exchange")
LOCK_FILE = ".lock"
LEFT_BY_A_START = (LOCK_FILE, "hfclip", "wandb")  # that was killed before its first step: trackers have folders


def newest_checkpoint(run_folder: Path) -> tuple[Path, dict] | None:
    """Finds the newest checkpoint that is whole, and its state. Sets damaged ones aside as `damaged-...` and names them.

    Raises:
        UsageError: if there are checkpoints, and all of them are damaged.
    """
    recover(run_folder)
    damaged = {}
    for checkpoint in reversed(list_checkpoints(run_folder)):
        try:
            found = checkpoint, read_state(checkpoint)
        except UsageError as error:
            damaged[checkpoint] = error
            continue
        for other, error in damaged.items():
            aside = run_folder / f"damaged-{other.name}"
            print(f"WARNING: {error} Setting it aside as {aside.name} and taking an older one.", flush=True)
            shutil.rmtree(aside, ignore_errors=True)
            os.replace(other, aside)
        return found
    if damaged:
        told = "\n".join(map(str, damaged.values()))
        raise UsageError(f"{told}\nNo checkpoint is left to go on from. Move them away to start from the beginning.")
    if (run_folder / MODEL_FOLDER).exists():
        raise UsageError(
            f"{run_folder} holds a trained model and no checkpoint to go on from. Choose another folder by "
            "`--run.output_dir`, or move the model away to start from the beginning."
        )
    return None


def lock_run_folder(run_folder: Path) -> FileLock:
    """Makes the run's folder if it is not there, and locks it until this process ends.

    Raises:
        UsageError: if another process trains in it, or it cannot be made.
    """
    lock = FileLock(run_folder / LOCK_FILE)
    try:
        run_folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout as error:
        raise UsageError(
            f"run.output_dir {str(run_folder)!r}: another process trains there. Wait for its end, end it, or choose "
            "another folder."
        ) from error
    except OSError as error:
        raise UsageError(f"run.output_dir {str(run_folder)!r} cannot be used: {error}.") from error
    return lock


@contextmanager
def undo_if_start_fails(run_folder: Path, is_main: bool) -> Iterator[None]:
    """Removes what a start has made in the run's folder if it fails before there is a config.yaml, so that the corrected
    command meets no run there.
    """
    before = set(run_folder.iterdir()) if run_folder.is_dir() else None
    try:
        yield
    except BaseException:
        if is_main and run_folder.is_dir() and not (run_folder / CONFIG_FILE).exists():
            for path in set(run_folder.iterdir()) - (before or set()):
                shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
            if before is None:
                with suppress(OSError):
                    run_folder.rmdir()
        raise


def check_free(run_folder: Path, resume: str | None) -> None:
    """Refuses a new run where another process trains, or where there is a run already.

    Raises:
        UsageError: naming what is there.
    """
    if (run_folder / LOCK_FILE).exists() and os.environ.get("WORLD_SIZE", "1") == "1":  # several would meet each other
        lock_run_folder(run_folder).release()
    if resume is None:
        _refuse_if_occupied(run_folder, "holds a run already")


def _refuse_if_occupied(run_folder: Path, problem: str) -> None:
    if run_folder.is_dir() and any(path.name not in LEFT_BY_A_START for path in run_folder.iterdir()):
        raise UsageError(
            f"run.output_dir {str(run_folder)!r} {problem}. Go on with it by `--resume auto`, choose another folder by "
            "`--run.output_dir`, or remove it."
        )


def find_resumed(run_folder: Path, resume: str | None) -> tuple[Path, dict] | None:
    """Finds the checkpoint to go on from and its state; None for a new run.

    Raises:
        UsageError: if a new run would overwrite an old one, or `resume` names no checkpoint that is whole.
    """
    if resume == "auto":
        found = newest_checkpoint(run_folder)
        if found is None:
            print(f"--resume auto: no checkpoint in {run_folder.absolute()}, starting anew.", flush=True)
        return found
    if resume is None:
        _refuse_if_occupied(run_folder, "holds a run already")
        return None
    checkpoint = Path(resume)
    state = read_state(checkpoint)
    if checkpoint.resolve().parent != run_folder.resolve():
        _refuse_if_occupied(run_folder, f"holds a run, and --resume {resume} is of another run")
    elif step_of(list_checkpoints(run_folder)[-1]) > state["step"]:
        raise UsageError(
            f"--resume {resume}: {str(run_folder)!r} has newer checkpoints, which the run would overwrite. Remove "
            "them, or choose another folder by `--run.output_dir`."
        )
    return checkpoint, state


def precision_of(run_folder: Path, resume: str | None) -> str | None:
    """Returns `run.precision` of the run to be resumed, by its newest readable checkpoint; None if there is none.

    Needed before the process group is set up. What is wrong with a checkpoint is told by `find_resumed`.
    """
    checkpoints = reversed(list_checkpoints(run_folder)) if resume == "auto" else [Path(resume)] if resume else []
    for checkpoint in checkpoints:
        with suppress(OSError, ValueError, KeyError, TypeError):
            return read_json(checkpoint / STATE_FILE)["config"]["run"]["precision"]
    return None


def settings_of(state: dict) -> Config:
    """Returns the settings of a checkpoint, also of one from an earlier version."""
    return Config.from_dict(translate(state["config"], strict=False))


def check_settings(saved: Config, config: Config) -> list[str]:
    """Returns a line for each setting that differs from the checkpoint's and changes what the steps compute.

    Raises:
        UsageError: for one that decides what a step sees or what the weights are.
    """
    changes, earlier = [], saved.record()
    for section, settings in config.record().items():
        for key, value in settings.items():
            name = f"{section}.{key}"
            before = earlier[section][key]
            # The order of the data depends on whether it is streamed, not on how much of it is kept.
            if before == value or name == "data.disk" and before and value:
                continue
            is_moved = name in PATHS and _last_names(before) == _last_names(value)
            if key in FIXED_ON_RESUME.get(section, ()) and not is_moved:
                raise UsageError(
                    f"{name}: found {value!r}, but the checkpoint was trained with {before!r}. Put it back, or start "
                    "a new run from these weights by `--model.checkpoint`."
                )
            if name == "run.precision" or section not in ("run", "eval") and name not in HARMLESS_ON_RESUME:
                changes.append(f"{name} is {value!r} and was {before!r}")
    return changes


def _last_names(value: Any) -> Any:
    """Returns what is the same of data or a file that was moved. `check_data` compares the number of samples."""
    if isinstance(value, dict):
        return [(_last_names(name), weight) for name, weight in value.items()]
    return Path(value).name if isinstance(value, str) else value


def check_data(saved: dict, samples: list[int], num_steps: int) -> None:
    """Refuses other data than the checkpoint's, whose order is a function of the number of samples, or fewer steps.

    Args:
        saved: what `read_state` gave.
        samples: usable pairs of each source.
        num_steps: of the whole run.

    Raises:
        UsageError: if the samples are not the checkpoint's, or the run would end before it.
    """
    if saved["step"] > num_steps:
        raise UsageError(
            f"The checkpoint is at step {saved['step']}, beyond the {num_steps} steps of the run. Raise optim.epochs or "
            "optim.steps."
        )
    before = saved.get("samples", samples)
    if before != samples:
        raise UsageError(
            f"data.train: found {samples} usable pairs, but the checkpoint was trained with {before}: in another order, "
            "some would be seen twice. Put the data back, or start a new run from these weights by "
            "`--model.checkpoint`."
        )


def changes_of_processes(core: "HFCLIPModel", before: int | None, now: int) -> list[str]:
    """Returns a line if another number of processes changes what the steps compute, beyond the order of sums."""
    dropouts = ("patch_dropout", "attention_dropout", "hidden_dropout_prob", "attention_probs_dropout_prob")
    towers = (core.vision_model.config, core.text_model.config)
    drops = any(getattr(tower, name, 0) for tower in towers for name in dropouts)
    norms = any("BatchNorm" in type(module).__name__ for module in core.modules())
    if before == now or not (drops or norms):
        return []
    return [f"{now} processes and were {before}: each draws its own dropout, and sees its own pairs in BatchNorm"]


def command(config: Config) -> str:
    """Returns what goes on with the run when it is pasted: the same launcher, and what no file keeps."""
    words = [*prefix(), "--config", str(Path(config.run.output_dir) / CONFIG_FILE), "--resume", "auto"]
    masked = config.masked()
    for name, value in masked.items():
        words += [f"--{name}", value]
    return shlex.join(words) + ("\n(with its credentials in the place of ***)" if masked else "")

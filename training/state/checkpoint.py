"""Checkpoints that are usable models: `<run>/checkpoint-<step>/` is a folder for `from_pretrained` or the Hub, with a
`trainer_state/` beside the weights from which the run goes on.

A checkpoint is written next to its place, flushed to disk, and renamed: a folder of that name is whole, or was damaged
later. `trainer_state/state.json` lists every file with size and CRC-32: damage is found before a run starts from it.
Nothing random needs saving: data, crops and dropout are functions of (seed, step, rank).

While it is written a folder is `.tmp-<name>`, and one that is being replaced is `.old-<name>`: a killed process leaves
them behind, and the next one puts back or removes them.
"""

import json
import os
import re
import shutil
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout
from safetensors import SafetensorError

from ..config import CONFIG_FILE, PATHS, Config, UsageError, recorded


if TYPE_CHECKING:  # torch takes seconds to import; a folder that is in the way is told before
    from torch import Tensor

    from hfclip import HFCLIPModel, HFCLIPProcessor


# Settings that decide what a step sees, or what the weights are.
FIXED_ON_RESUME = (
    "model.preset",
    "model.config",
    "model.tokenizer",
    "data.train",
    "data.split",
    "data.max_samples",
    "data.phases",
    "data.disk",
    "data.group_captions",
    "optim.loss",
    "optim.batch_size",
    "optim.layer_decay",
    "optim.moments",
    "optim.text_weights",
    "run.seed",
)
HARMLESS_ON_RESUME = ("data.num_workers", "data.cache_dir", "data.max_bad_in_a_row", "optim.exchange")
LOCK_FILE = ".lock"
LEFT_BY_A_START = (LOCK_FILE, "hfclip", "wandb")  # that was killed before its first step: trackers have folders
STATE_FOLDER = "trainer_state"
STATE_FILE = f"{STATE_FOLDER}/state.json"
MODEL_FOLDER = "model"
# Of the values in state.json: those that each has, and those that a run's checkpoints have besides.
STATE_TYPES = {"step": int, "checksum": int, "files": dict}
STATE_TYPES_OF_RUNS = {
    "saved_at": float,
    "config": dict,
    "num_processes": int,
    "counts": dict,
    "samples": list,
    "trackers": dict,
}


def save_model(
    folder: Path,
    model: "HFCLIPModel",
    processor: "HFCLIPProcessor",
    state_dict: "dict[str, Tensor] | None" = None,
    card: str | None = None,
) -> None:
    """Writes weights, config, tokenizer, image processor and code so that `folder` appears at once or not at all.

    Args:
        state_dict: all weights, where `model` itself holds but a shard of them.
        card: README.md of the folder.

    Raises:
        UsageError: if it cannot be written, because the disk is full for instance.
    """
    with _replacing(folder) as temporary:
        _write_model(temporary, model, processor, state_dict)
        if card is not None:
            (temporary / "README.md").write_text(card, encoding="utf-8")


def save_checkpoint(
    run_folder: Path,
    step: int,
    model: "HFCLIPModel",
    processor: "HFCLIPProcessor",
    states: dict[str, Any],
    about: dict,
    *,
    keep: int,
    keep_every_hours: float | None = None,
    state_dict: "dict[str, Tensor] | None" = None,
) -> Path:
    """Writes `checkpoint-<step>`, then removes older ones.

    Args:
        states: state dicts by name ("optimizer", "scaler" ...), given back by `load_states`.
        about: JSON values that say what the run was, given back by `read_state`.
        keep: the newest so many stay.
        keep_every_hours: of the others, one of every so many hours stays for good.
        state_dict: all weights, where `model` itself holds but a shard of them.

    Raises:
        UsageError: if it cannot be written, because the disk is full for instance. Older ones are as they were.
    """
    folder = run_folder / f"checkpoint-{step}"
    with _replacing(folder) as temporary:
        _write_model(temporary, model, processor, state_dict)
        (temporary / STATE_FOLDER).mkdir()
        for name, state in states.items():
            _write_tensors(temporary / STATE_FOLDER / f"{name}.pt", state)
        files = {name: _fingerprint(temporary / name) for name in _files(temporary)}
        state = {"step": step, "saved_at": time.time(), **about, "files": files}
        text = json.dumps({**state, "checksum": _checksum(state)}, indent=1)
        (temporary / STATE_FILE).write_text(text, encoding="utf-8")
    for old in _superfluous(list_checkpoints(run_folder), keep, keep_every_hours):
        _remove(old)
    return folder


def load_states(checkpoint: Path) -> dict[str, Any]:
    """The `states` of `save_checkpoint` by name, tensors on the CPU."""
    import torch

    files = sorted((checkpoint / STATE_FOLDER).glob("*.pt"))
    return {file.stem: torch.load(file, map_location="cpu", weights_only=True) for file in files}


def save_offending_batch(run_folder: Path, step: int, rank: int, batch: dict) -> Path:
    """Keeps what a rank was fed in the step that ended a run, for `torch.load`: `offending/step-<step>-rank-<rank>.pt`.

    Raises:
        UsageError: if it cannot be written.
    """
    file = run_folder / "offending" / f"step-{step}-rank-{rank}.pt"
    temporary = file.with_name(f".tmp-{file.name}")
    with _told_if_not_written(file, temporary):
        file.parent.mkdir(parents=True, exist_ok=True)
        _write_tensors(temporary, batch)
        _flush(temporary)
        os.replace(temporary, file)
        _flush(file.parent)
    return file


def list_checkpoints(run_folder: Path) -> list[Path]:
    """All `checkpoint-<step>` folders, oldest first."""
    found = [p for p in run_folder.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", p.name)]
    return sorted(found, key=step_of)


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("checkpoint-"))


def read_state(checkpoint: Path) -> dict:
    """What `save_checkpoint` was told `about` the run, `step` and `saved_at` (seconds since 1970), after comparing
    every file with its record.

    Raises:
        UsageError: if the folder is no checkpoint of a run, or a file is missing or damaged.
    """
    try:
        state = _read_json(checkpoint / STATE_FILE)
    except (OSError, ValueError) as error:
        newest = next(reversed(list_checkpoints(checkpoint)), None)  # of a run's folder
        hint = f" The newest in that folder is {newest}." if newest else ""
        raise UsageError(
            f"{checkpoint} has no readable {STATE_FILE}: not a checkpoint to resume from.{hint}"
        ) from error
    checksum, files = state.pop("checksum"), state["files"]
    if checksum != _checksum(state):
        raise UsageError(f"{checkpoint / STATE_FILE} is damaged: {checkpoint.name} cannot be resumed.")
    for name, expected in files.items():
        path = checkpoint / name
        found = _fingerprint(path) if path.is_file() else None
        if found != expected:
            raise UsageError(f"{path} is {'damaged' if found else 'missing'}: {checkpoint.name} cannot be resumed.")
    del state["files"]
    return state


def _read_json(path: Path) -> dict:
    """A state.json. Raises OSError if it cannot be read, and ValueError if it is not what `save_checkpoint` writes."""
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if not isinstance(state, dict):
        raise ValueError(f"found {type(state).__name__}, expected an object")
    for name, kind in (STATE_TYPES | {n: kind for n, kind in STATE_TYPES_OF_RUNS.items() if n in state}).items():
        if type(state.get(name)) is not kind:
            raise ValueError(f"found {name} {state.get(name)!r}, expected {kind.__name__}")
    sections = [*state.get("config", {}).values(), *state.get("trackers", {}).values()]
    numbers = [state["step"], *state.get("counts", {}).values()]
    files = [Path(name) for name in state["files"]]
    if (
        not all(isinstance(section, dict) for section in sections)
        or not all(type(number) is int and number >= 0 for number in numbers)
        or any(file.is_absolute() or ".." in file.parts for file in files)
    ):
        raise ValueError("found other values than a checkpoint has")
    return state


def newest_checkpoint(run_folder: Path) -> tuple[Path, dict] | None:
    """The newest checkpoint that is whole, and its state. Damaged ones are set aside as `damaged-...`, and named.

    Raises:
        UsageError: if there are checkpoints, and all of them are damaged.
    """
    _tidy(run_folder)
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


def claim(run_folder: Path) -> FileLock:
    """Makes the run's folder if it is not there, and holds it for this process until that ends.

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
def taken_back_if_it_fails(run_folder: Path, is_main: bool) -> Iterator[None]:
    """Removes what a start has made in the run's folder if it fails before there is a config.yaml: then no run is there,
    and the mended command is not in anybody's way.
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
        claim(run_folder).release()
    if resume is None:
        _refuse_if_occupied(run_folder)


def _refuse_if_occupied(run_folder: Path) -> None:
    if _is_occupied(run_folder):
        raise UsageError(
            f"run.output_dir {str(run_folder)!r} holds a run already. Go on with it by `--resume auto`, choose "
            "another folder by `--run.output_dir`, or remove it."
        )


def _is_occupied(run_folder: Path) -> bool:
    return run_folder.is_dir() and any(path.name not in LEFT_BY_A_START for path in run_folder.iterdir())


def find_resumed(run_folder: Path, resume: str | None) -> tuple[Path, dict] | None:
    """The checkpoint to go on from and its state; None for a new run.

    Raises:
        UsageError: if a new run would overwrite an old one, or `resume` names no checkpoint that is whole.
    """
    if resume == "auto":
        found = newest_checkpoint(run_folder)
        if found is None:
            print(f"--resume auto: no checkpoint in {run_folder.absolute()}, starting anew.", flush=True)
        return found
    if resume is None:
        _refuse_if_occupied(run_folder)
        return None
    checkpoint = Path(resume)
    state = read_state(checkpoint)
    if checkpoint.resolve().parent != run_folder.resolve():
        if _is_occupied(run_folder):
            raise UsageError(
                f"--resume {resume} is of another run, and run.output_dir {str(run_folder)!r} is not empty."
            )
    elif step_of(list_checkpoints(run_folder)[-1]) > state["step"]:
        raise UsageError(
            f"--resume {resume}: {str(run_folder)!r} has newer checkpoints, which the run would overwrite. Remove "
            "them, or choose another folder by `--run.output_dir`."
        )
    return checkpoint, state


def precision_of(run_folder: Path, resume: str | None) -> str | None:
    """`run.precision` of the run that is about to be resumed, of its newest checkpoint that can be read; else None.

    Read before the process group is set up for it. What is wrong with a checkpoint is told by `find_resumed`.
    """
    checkpoints = reversed(list_checkpoints(run_folder)) if resume == "auto" else [Path(resume)] if resume else []
    for checkpoint in checkpoints:
        with suppress(OSError, ValueError, KeyError, TypeError):
            return _read_json(checkpoint / STATE_FILE)["config"]["run"]["precision"]
    return None


def check_settings(saved: dict, config: Config) -> list[str]:
    """Settings that change what the steps compute and differ from the checkpoint's, as lines to show.

    Raises:
        UsageError: for one that decides what a step sees or what the weights are.
    """
    changes = []
    for section, settings in config.record().items():
        for key, value in settings.items():
            name = f"{section}.{key}"
            before = recorded(name, saved.get(section, {}).get(key))
            # The order of the data depends on whether it is streamed, not on how much of it is kept.
            if before == value or name == "data.disk" and before and value:
                continue
            if name in FIXED_ON_RESUME and not (name in PATHS and _last_names(before) == _last_names(value)):
                raise UsageError(
                    f"{name}: found {value!r}, but the checkpoint was trained with {before!r}. Put it back, or start "
                    "a new run from these weights by `--model.checkpoint`."
                )
            if name == "run.precision" or section not in ("run", "eval") and name not in HARMLESS_ON_RESUME:
                changes.append(f"{name} is {value!r} and was {before!r}")
    return changes


def _last_names(value: Any) -> Any:
    """What is the same of data or a file that was moved. How many samples there are, `check_data` compares."""
    if isinstance(value, dict):
        return [(_last_names(name), weight) for name, weight in value.items()]
    return Path(value).name if isinstance(value, str) else value


def check_data(saved: dict, samples: list[int]) -> None:
    """Refuses to go on with other data than a checkpoint's: its order, a function of the number of samples, differs.

    Args:
        saved: what `read_state` gave.
        samples: usable pairs of each source.

    Raises:
        UsageError: if the numbers are not the checkpoint's.
    """
    before = saved.get("samples", samples)
    if before != samples:
        raise UsageError(
            f"data.train: found {samples} usable pairs, but the checkpoint was trained with {before}: in another order, "
            "some would be seen twice. Put the data back, or start a new run from these weights by "
            "`--model.checkpoint`."
        )


def _write_model(
    folder: Path, model: "HFCLIPModel", processor: "HFCLIPProcessor", state_dict: "dict[str, Tensor] | None"
) -> None:
    from transformers.utils import logging

    logging.disable_progress_bar()  # of save_pretrained, which would break into the training's
    try:
        model.save_pretrained(folder, state_dict=None if state_dict is None else dict(state_dict))  # which it empties
        processor.save_pretrained(folder)
    finally:
        logging.enable_progress_bar()
    for path in folder.glob("*.safetensors"):  # which safetensors lets nobody else read
        path.chmod((folder / "config.json").stat().st_mode)


def _write_tensors(path: Path, value: Any) -> None:
    import torch

    try:
        with open(path, "wb") as file:  # given the path, torch would not say why it could not write
            torch.save(value, file)
    except RuntimeError as error:
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise


@contextmanager
def _replacing(folder: Path) -> Iterator[Path]:
    """A temporary folder beside `folder` that takes its place when the block ends without an exception."""
    temporary, old = (folder.with_name(f".{kind}-{folder.name}") for kind in ("tmp", "old"))
    with _told_if_not_written(folder, temporary):
        _tidy(folder.parent)
        temporary.mkdir(parents=True)
        yield temporary
        for path in [*temporary.rglob("*"), temporary]:
            _flush(path)
        if folder.exists():
            os.replace(folder, old)
        os.replace(temporary, folder)
        _flush(folder.parent)
        shutil.rmtree(old, ignore_errors=True)


@contextmanager
def _told_if_not_written(target: Path, temporary: Path) -> Iterator[None]:
    """Removes `temporary` if the block fails, and turns errors of the disk into a `UsageError`."""
    try:
        yield
    except BaseException as error:
        there = next(path for path in target.absolute().parents if path.exists())
        free = shutil.disk_usage(there).free
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        elif temporary.exists():
            temporary.unlink()
        # tokenizers says what the system said in an exception of no class of its own.
        if not (isinstance(error, (OSError, SafetensorError)) or "(os error " in str(error)):
            raise
        raise UsageError(
            f"{target} could not be written: {error}. {free / 2**20:.0f} MiB are free on that disk. What was saved "
            "before is as it was. Make room, or mend what else is wrong there, and go on with --resume auto."
        ) from error


def _tidy(parent: Path) -> None:
    """Puts right what a process left that was killed while it replaced or removed a folder."""
    for path in parent.glob(".*-*"):
        match = re.fullmatch(rf"\.(tmp|old)-(checkpoint-\d+|{MODEL_FOLDER})", path.name)
        if match and match[1] == "old" and not (parent / match[2]).exists():
            os.replace(path, parent / match[2])
        elif match:
            shutil.rmtree(path)


def _superfluous(checkpoints: list[Path], keep: int, keep_every_hours: float | None) -> Iterator[Path]:
    """Those of `checkpoints`, oldest first, that are neither among the newest nor to stay for good."""
    stayed_at = None
    for checkpoint in checkpoints[:-keep]:
        saved_at = _saved_at(checkpoint) if keep_every_hours else None
        if saved_at is None or stayed_at is not None and abs(saved_at - stayed_at) < keep_every_hours * 3600:
            yield checkpoint
        else:
            stayed_at = saved_at


def _saved_at(checkpoint: Path) -> float | None:
    try:
        return _read_json(checkpoint / STATE_FILE)["saved_at"]
    except (OSError, ValueError, KeyError):  # damaged: not to stay for good
        return None


def _remove(folder: Path) -> None:
    """At once, as far as the name goes: half a checkpoint is never seen."""
    temporary = folder.with_name(f".tmp-{folder.name}")
    os.replace(folder, temporary)
    shutil.rmtree(temporary)


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def _fingerprint(path: Path) -> list[int]:
    """Size in bytes and CRC-32."""
    checksum, size = 0, 0
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            checksum, size = zlib.crc32(block, checksum), size + len(block)
    return [size, checksum]


def _checksum(state: dict) -> int:
    """CRC-32 of JSON values, the same before and after they were written."""
    return zlib.crc32(json.dumps(json.loads(json.dumps(state)), sort_keys=True).encode())

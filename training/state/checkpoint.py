"""Checkpoints that are usable models: `<run>/checkpoint-<step>/` is a folder for `from_pretrained` or the Hub, with a
`trainer_state/` beside the weights from which the run goes on.

A checkpoint is written next to its place, flushed to disk, and renamed: a folder of that name is whole, or was damaged
later. `trainer_state/state.json` lists every file with size and CRC-32: damage is found before a run starts from it.
Nothing random needs saving: data, crops and dropout are functions of (seed, step, rank).

A folder that is being written is `.tmp-<name>`, one that is being replaced `.old-<name>`: after a kill the next process
removes them or puts them back.
"""

import json
import os
import re
import shutil
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from hfclip_errors import UsageError


if TYPE_CHECKING:  # torch takes seconds to import; a folder that is in the way is told before
    from torch import Tensor

    from hfclip import HFCLIPModel, HFCLIPProcessor


STATE_FOLDER = "trainer_state"
STATE_FILE = f"{STATE_FOLDER}/state.json"
MODEL_FOLDER = "model"
# Values of state.json; those of runs have all of them.
NEEDED = ("step", "checksum", "files")
TYPES = {"step": int, "checksum": int, "files": dict, "saved_at": float, "config": dict, "num_processes": int}
TYPES |= {"counts": dict, "samples": list, "trackers": dict}


def save_model(folder: Path, model: "HFCLIPModel", processor: "HFCLIPProcessor") -> None:
    """Writes weights, config, tokenizer, image processor and code so that `folder` appears at once or not at all.

    Raises:
        UsageError: if it cannot be written, because the disk is full for instance.
    """
    with _replacing(folder) as temporary:
        _write_model(temporary, model, processor)


def save_checkpoint(
    run_folder: Path,
    step: int,
    model: "HFCLIPModel",
    processor: "HFCLIPProcessor",
    states: dict[str, Any],
    metadata: dict,
    *,
    keep: int,
    state_dict: "dict[str, Tensor] | None" = None,
) -> Path:
    """Writes `checkpoint-<step>`, then removes older ones.

    Args:
        states: state dicts by name ("optimizer", "scaler" ...), given back by `load_states`.
        metadata: JSON values that say what the run was, given back by `read_state`.
        keep: number of newest checkpoints that stay.
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
        paths = sorted(path for path in temporary.rglob("*") if path.is_file())
        files = {str(path.relative_to(temporary)): _fingerprint(path) for path in paths}
        state = {"step": step, "saved_at": time.time(), **metadata, "files": files}
        text = json.dumps({**state, "checksum": _checksum(state)}, indent=1)
        (temporary / STATE_FILE).write_text(text, encoding="utf-8")
    for old in list_checkpoints(run_folder)[:-keep]:
        _remove(old)
    return folder


def load_states(checkpoint: Path) -> dict[str, Any]:
    """Returns the `states` of `save_checkpoint` by name, tensors on the CPU."""
    import torch

    files = sorted((checkpoint / STATE_FOLDER).glob("*.pt"))
    return {file.stem: torch.load(file, map_location="cpu", weights_only=True) for file in files}


def save_offending_batch(run_folder: Path, step: int, rank: int, batch: dict) -> Path:
    """Keeps what a rank was fed in the step that ended a run, for `torch.load`: `offending/step-<step>-rank-<rank>.pt`.

    Raises:
        UsageError: if it cannot be written.
    """
    file = run_folder / "offending" / f"step-{step}-rank-{rank}.pt"
    with _disk_errors(file, file):
        file.parent.mkdir(parents=True, exist_ok=True)
        _write_tensors(file, batch)
    return file


def list_checkpoints(run_folder: Path) -> list[Path]:
    """Returns all `checkpoint-<step>` folders, oldest first."""
    found = [p for p in run_folder.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", p.name)]
    return sorted(found, key=step_of)


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("checkpoint-"))


def read_state(checkpoint: Path) -> dict:
    """Returns the `metadata` of `save_checkpoint`, `step` and `saved_at` (seconds since 1970), after comparing every
    file with its record.

    Raises:
        UsageError: if the folder is no checkpoint of a run, or a file is missing or damaged.
    """
    try:
        state = read_json(checkpoint / STATE_FILE)
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


def read_json(path: Path) -> dict:
    """Reads a state.json. Raises OSError if that fails, and ValueError if it is not what `save_checkpoint` writes."""
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if not isinstance(state, dict) or not _is_state(state):
        raise ValueError("found other values than a checkpoint has")
    return state


def _is_state(state: dict) -> bool:
    """Whether the values have the types that `save_checkpoint` writes, and the files lie in the checkpoint."""
    if any(type(state.get(name)) is not kind for name, kind in TYPES.items() if name in state or name in NEEDED):
        return False
    sections = [*state.get("config", {}).values(), *state.get("trackers", {}).values()]
    numbers = [state["step"], *state.get("counts", {}).values()]
    files = map(Path, state["files"])
    return (
        all(isinstance(section, dict) for section in sections)
        and all(type(number) is int and number >= 0 for number in numbers)
        and not any(file.is_absolute() or ".." in file.parts for file in files)
    )


def _write_model(
    folder: Path, model: "HFCLIPModel", processor: "HFCLIPProcessor", state_dict: "dict[str, Tensor] | None" = None
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
    """Gives a temporary folder beside `folder` that takes its place when the block ends without an exception."""
    temporary, old = (folder.with_name(f".{kind}-{folder.name}") for kind in ("tmp", "old"))
    with _disk_errors(folder, temporary):
        recover(folder.parent)
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
def _disk_errors(target: Path, temporary: Path) -> Iterator[None]:
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
            "before is as it was. Make room, or fix what else is wrong there, and go on with --resume auto."
        ) from error


def recover(parent: Path) -> None:
    """Completes or undoes what a process was doing that was killed while it replaced or removed a folder."""
    for path in parent.glob(".*-*"):
        match = re.fullmatch(rf"\.(tmp|old)-(checkpoint-\d+|{MODEL_FOLDER})", path.name)
        if match and match[1] == "old" and not (parent / match[2]).exists():
            os.replace(path, parent / match[2])
        elif match:
            shutil.rmtree(path)


def _remove(folder: Path) -> None:
    """Removes at once, as far as the name goes: half a checkpoint is never seen."""
    temporary = folder.with_name(f".tmp-{folder.name}")
    os.replace(folder, temporary)
    shutil.rmtree(temporary)


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _fingerprint(path: Path) -> list[int]:
    """Returns size in bytes and CRC-32."""
    checksum, size = 0, 0
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            checksum, size = zlib.crc32(block, checksum), size + len(block)
    return [size, checksum]


def _checksum(state: dict) -> int:
    """Computes the CRC-32 of JSON values, the same before and after they were written."""
    return zlib.crc32(json.dumps(json.loads(json.dumps(state)), sort_keys=True).encode())

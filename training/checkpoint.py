"""Checkpoints that are usable models: `<run>/checkpoint-<step>/` is a folder for `from_pretrained` or the Hub, with a
`trainer_state/` beside the weights from which the run goes on.

A checkpoint is written next to its place, flushed to disk, and renamed: a folder of that name is whole, or was damaged
later. `trainer_state/state.json` lists every file with size and CRC-32: damage is found before a run starts from it.
Nothing random needs saving: data, crops and dropout are functions of (seed, step, rank).
"""

import json
import os
import re
import shutil
import zlib
from pathlib import Path

import torch
from transformers.utils import logging

from hfclip import HFCLIPModel, HFCLIPProcessor

from .config import Config, UsageError


# Settings that decide what a step sees, or what the weights are.
FIXED_ON_RESUME = (
    "model.preset",
    "model.config",
    "model.tokenizer",
    "data.train",
    "data.split",
    "data.max_samples",
    "optim.loss",
    "optim.batch_size",
    "run.seed",
)
HARMLESS_ON_RESUME = ("data.num_workers", "data.cache_dir", "data.max_bad_in_a_row")
STATE_FILE = Path("trainer_state/state.json")
OPTIMIZER_FILE = Path("trainer_state/optimizer.pt")


def save_model(folder: Path, model: HFCLIPModel, processor: HFCLIPProcessor) -> None:
    """Writes weights, config, tokenizer, image processor and code so that `folder` appears at once or not at all."""
    with _Replacing(folder) as temporary:
        _write_model(temporary, model, processor)


def save_checkpoint(
    run_folder: Path,
    step: int,
    model: HFCLIPModel,
    processor: HFCLIPProcessor,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler | None,
    about: dict,
    keep: int,
) -> Path:
    """Writes `checkpoint-<step>` and removes all but the newest `keep`.

    Args:
        optimizer, scaler: put back by `restore`.
        about: JSON values that say what the run was, given back by `read_state`.
    """
    folder = run_folder / f"checkpoint-{step}"
    with _Replacing(folder) as temporary:
        _write_model(temporary, model, processor)
        (temporary / STATE_FILE).parent.mkdir()
        state = {"optimizer": optimizer.state_dict(), "scaler": scaler.state_dict() if scaler else {}}
        torch.save(state, temporary / OPTIMIZER_FILE)
        state = {"step": step, **about, "files": {name: _fingerprint(temporary / name) for name in _files(temporary)}}
        (temporary / STATE_FILE).write_text(json.dumps(state, indent=1), encoding="utf-8")
    for old in list_checkpoints(run_folder)[:-keep]:
        shutil.rmtree(old)
    return folder


def list_checkpoints(run_folder: Path) -> list[Path]:
    """All `checkpoint-<step>` folders, oldest first."""
    found = [p for p in run_folder.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", p.name)]
    return sorted(found, key=step_of)


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("checkpoint-"))


def read_state(checkpoint: Path) -> dict:
    """What `save_checkpoint` was told `about` the run, after comparing every file with its record.

    Raises:
        UsageError: if the folder is no checkpoint of a run, or a file is missing or damaged.
    """
    try:
        state = json.loads((checkpoint / STATE_FILE).read_text(encoding="utf-8"))
        files = state.pop("files")
    except (OSError, ValueError, KeyError) as error:
        raise UsageError(f"{checkpoint} has no readable {STATE_FILE}: not a checkpoint to resume from.") from error
    for name, expected in files.items():
        path = checkpoint / name
        found = _fingerprint(path) if path.is_file() else None
        if found != expected:
            raise UsageError(f"{path} is {'damaged' if found else 'missing'}: {checkpoint.name} cannot be resumed.")
    return state


def newest_checkpoint(run_folder: Path) -> tuple[Path, dict] | None:
    """The newest checkpoint that is whole, and its state. Damaged ones are set aside as `damaged-...`, and named."""
    for checkpoint in reversed(list_checkpoints(run_folder)):
        try:
            return checkpoint, read_state(checkpoint)
        except UsageError as error:
            aside = run_folder / f"damaged-{checkpoint.name}"
            print(f"WARNING: {error} Setting it aside as {aside.name} and looking for an older one.", flush=True)
            shutil.rmtree(aside, ignore_errors=True)
            checkpoint.rename(aside)
    return None


def restore(checkpoint: Path, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler | None) -> None:
    """Puts back what `save_checkpoint` kept of optimizer and scaler."""
    state = torch.load(checkpoint / OPTIMIZER_FILE, map_location="cpu", weights_only=True)
    optimizer.load_state_dict(state["optimizer"])
    if scaler is not None and state["scaler"]:
        scaler.load_state_dict(state["scaler"])


def find_resumed(run_folder: Path, resume: str | None) -> tuple[Path, dict] | None:
    """The checkpoint to go on from and its state; None for a new run.

    Raises:
        UsageError: if a new run would overwrite an old one, or `resume` names no checkpoint that is whole.
    """
    if resume == "auto":
        return newest_checkpoint(run_folder)
    occupied = run_folder.is_dir() and any(run_folder.iterdir())
    if resume is None:
        if occupied:
            raise UsageError(
                f"run.output_dir {str(run_folder)!r} holds a run already. Go on with it by `--resume auto`, choose "
                "another folder by `--run.output_dir`, or remove it."
            )
        return None
    checkpoint = Path(resume)
    state = read_state(checkpoint)
    if checkpoint.resolve().parent != run_folder.resolve():
        if occupied:
            raise UsageError(
                f"--resume {resume} is of another run, and run.output_dir {str(run_folder)!r} is not empty."
            )
    elif step_of(list_checkpoints(run_folder)[-1]) > state["step"]:
        raise UsageError(
            f"--resume {resume}: {str(run_folder)!r} has newer checkpoints, which the run would overwrite. Remove "
            "them, or choose another folder by `--run.output_dir`."
        )
    return checkpoint, state


def check_settings(saved: dict, config: Config) -> list[str]:
    """Settings that change what the steps compute and differ from the checkpoint's, as lines to show.

    Raises:
        UsageError: for one that decides what a step sees or what the weights are.
    """
    changes = []
    for section, settings in config.to_dict().items():
        for key, value in settings.items():
            name, before = f"{section}.{key}", saved.get(section, {}).get(key)
            if before == value:
                continue
            if name in FIXED_ON_RESUME:
                raise UsageError(
                    f"{name}: found {value!r}, but the checkpoint was trained with {before!r}. Put it back, or start "
                    "a new run from these weights by `--model.checkpoint`."
                )
            if name == "run.precision" or section not in ("run", "eval") and name not in HARMLESS_ON_RESUME:
                changes.append(f"{name} is {value!r} and was {before!r}")
    return changes


def _write_model(folder: Path, model: HFCLIPModel, processor: HFCLIPProcessor) -> None:
    logging.disable_progress_bar()  # of save_pretrained, which would break into the training's
    try:
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
    finally:
        logging.enable_progress_bar()


class _Replacing:
    """A temporary folder beside `folder` that takes its place when the block ends without an exception."""

    def __init__(self, folder: Path):
        self.folder, self.temporary = folder, folder.with_name(f".tmp-{folder.name}")

    def __enter__(self) -> Path:
        shutil.rmtree(self.temporary, ignore_errors=True)  # of a run that was killed while saving
        self.temporary.mkdir(parents=True)
        return self.temporary

    def __exit__(self, exception_type, *_) -> None:
        if exception_type is not None:
            shutil.rmtree(self.temporary, ignore_errors=True)
            return
        for path in [*self.temporary.rglob("*"), self.temporary]:
            _flush(path)
        if self.folder.exists():
            shutil.rmtree(self.folder)
        os.replace(self.temporary, self.folder)
        _flush(self.folder.parent)


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

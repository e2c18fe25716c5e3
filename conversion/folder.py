"""Folders that appear whole or not at all: written beside `OUT`, renamed to `OUT`, refused where they cannot be."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from hfclip.errors import UsageError


@contextmanager
def new_folder(path: Path, source: Path, overwrite: bool = False) -> Iterator[Path]:
    """A folder to write into that becomes `path` when the block ends well, and vanishes when it does not."""
    path = Path(os.path.realpath(path))  # a link stays, what it points at is replaced
    with partial_folder(path) as partial:
        require_free(path, source, overwrite)
        yield partial
        if path.exists():
            replaced = path.with_name(f".{path.name}.hfclip-replaced")
            shutil.rmtree(replaced, ignore_errors=True)
            path.rename(replaced)
            partial.rename(path)
            shutil.rmtree(replaced)
        else:
            partial.rename(path)


@contextmanager
def partial_folder(path: Path) -> Iterator[Path]:
    """A folder beside `path`, empty and for this process alone, until the block ends. What a killed run left there goes first."""
    path = Path(os.path.realpath(path))
    if not path.name:
        raise UsageError(f"{path} cannot be written. Choose the name of a new folder.")
    partial, lock_file = (path.with_name(f".{path.name}.hfclip-{kind}") for kind in ("partial", "lock"))
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(lock_file)
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise UsageError(f"Another process is writing {path}. Wait for it, or choose another name.") from error
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        yield partial
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        with suppress(OSError):  # Windows keeps a file that is open
            lock_file.unlink()
        lock.release()


def require_free(path: Path, source: Path, overwrite: bool, is_file: bool = False) -> None:
    """Raises UsageError unless a folder (or a file, if `is_file`) can be written at `path`.

    It cannot where something is that is not to be replaced, or that holds the source or is no model, and where this
    user may not write.
    """
    if os.path.exists(path):  # False where this user may not look
        require_replaceable(path, source, overwrite, is_file)
    require_writable(path.resolve().parent)


def require_replaceable(path: Path, source: Path, overwrite: bool, is_file: bool) -> None:
    if not overwrite:
        raise UsageError(f"{path} exists already. Choose another name, or pass --overwrite to replace it.")
    path, source = path.resolve(), source.resolve()
    if path.is_file() != is_file:
        found, expected = ("file", "folder") if path.is_file() else ("folder", "file")
        raise UsageError(f"{path} is a {found}, expected a {expected} or nothing. Choose another name.")
    if path in (source, *source.parents) or source in path.parents:
        raise UsageError(
            f"{path} holds the source or a part of it, which --overwrite would delete. Choose another name."
        )
    if path.is_dir() and any(path.iterdir()) and not is_model_folder(path):
        raise UsageError(
            f"{path} is no folder of a model, or holds other folders; --overwrite replaces models only. Choose another "
            "name, or empty it."
        )


def require_writable(folder: Path) -> None:
    """Raises UsageError unless files can be made in `folder`, or in what is there of the way to it."""
    while not os.path.exists(folder):
        folder = folder.parent
    try:
        with tempfile.TemporaryFile(dir=folder):  # tried out: permissions alone do not tell
            pass
    except OSError as error:
        raise UsageError(
            f"{folder} is not writable ({error.strerror}). Choose another place for the output, or change its "
            "permissions."
        ) from error


def is_model_folder(path: Path) -> bool:
    """Whether a folder holds a model and no folder of another kind."""
    has_config = any((path / name).is_file() for name in ("config.json", "open_clip_config.json"))
    return has_config and all(item.name == "onnx" for item in path.iterdir() if item.is_dir())


def require_space(folder: Path, needed: int) -> None:
    """Raises UsageError if the disk that holds `folder` has less than `needed` bytes free."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UsageError(
            f"{folder} needs {needed / 1e9:.2f} GB, but its disk has {free / 1e9:.2f} GB free. Make room, or choose a "
            "folder on another disk."
        )

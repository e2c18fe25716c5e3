"""Model folders written tensor by tensor, which appear whole or not at all.

    tensors, one at a time -> safetensors files (sharded when large) in a folder beside `OUT` -> rename to `OUT`

A conversion never holds more than a tensor or two of the model, so it fits in little memory whatever the model's size.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from safetensors import safe_open
from tqdm import tqdm

from .errors import UsageError


MAX_SHARD_BYTES = 5_000_000_000
DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


@contextmanager
def new_folder(path: Path, source: Path, overwrite: bool = False) -> Iterator[Path]:
    """A folder to write into that becomes `path` when the block ends well, and vanishes when it does not.

    Raises:
        UsageError: `path` is not free (see `require_free`), or written by another process.
    """
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
    """A folder beside `path`, empty and for this process alone, until the block ends. What a killed run left there goes first.

    Raises:
        UsageError: another process is at it.
    """
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
    if path.is_file() and not is_file:
        raise UsageError(f"{path} is a file, expected a folder or nothing. Choose another name.")
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


def num_bytes(tensors: Mapping[str, torch.Tensor]) -> int:
    """Size of (meta) tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def require_space(folder: Path, needed: int) -> None:
    """Raises UsageError if the disk that holds `folder` has less than `needed` bytes free."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UsageError(
            f"{folder} needs {needed / 1e9:.2f} GB, but its disk has {free / 1e9:.2f} GB free. Make room, or choose a "
            "folder on another disk."
        )


def write_weights(
    folder: Path,
    layout: Mapping[str, torch.Tensor],
    items: Iterable[tuple[str, torch.Tensor]],
    max_shard_bytes: float = MAX_SHARD_BYTES,
) -> list[Path]:
    """Writes `items` as they come into `model.safetensors`, or into shards with an index.

    Args:
        layout: name -> meta tensor of the dtype and shape that will come.
        items: the tensors, in any order. Written in the layout's dtype.

    Returns:
        The weight files.

    Raises:
        UsageError: values that are not finite; too little space.
        ValueError: a tensor that is not in the layout or of another shape, or one that never came.
    """
    total = num_bytes(layout)
    require_space(folder, total + 10_000_000)
    shards = _shards(layout, max_shard_bytes)
    if len(shards) == 1:
        names = ["model.safetensors"]
    else:
        names = [f"model-{n:05d}-of-{len(shards):05d}.safetensors" for n in range(1, len(shards) + 1)]
        weight_map = {tensor: name for name, shard in zip(names, shards) for tensor in shard}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    files = [open(folder / name, "wb") for name in names]
    try:
        places = {}
        for file, shard in zip(files, shards):
            places |= {name: (file, offset) for name, offset in _write_header(file, layout, shard).items()}
        bar = tqdm(total=total, desc="writing weights", unit="B", unit_scale=True, disable=None)
        for name, tensor in items:
            if name not in places or tensor.shape != layout[name].shape:
                raise ValueError(f"Found a tensor {name!r} of shape {tuple(tensor.shape)} that nothing expects.")
            file, offset = places.pop(name)
            file.seek(offset)
            stored = tensor.detach().to(layout[name].dtype)
            require_finite(name, tensor, stored)
            data = stored.contiguous().reshape(-1).view(torch.uint8).numpy()
            file.write(memoryview(data))
            bar.update(data.nbytes)
        bar.close()
        if places:
            raise ValueError(f"{len(places)} tensors never came, such as {next(iter(places))!r}.")
        for file in files:
            file.flush()
            os.fsync(file.fileno())
    finally:
        for file in files:
            file.close()
    return [folder / name for name in names]


def require_finite(name: str, tensor: torch.Tensor, stored: torch.Tensor) -> None:
    """Raises UsageError if a tensor, as it is stored, has values that are not finite."""
    if stored.isfinite().all():
        return
    if tensor.isfinite().all():
        raise UsageError(
            f"{name!r} reaches {tensor.abs().max():.3g}, more than {stored.dtype} holds. Choose another --dtype."
        )
    raise UsageError(
        f"{name!r} has {int((~tensor.isfinite()).sum())} values that are not finite (NaN or infinite): the training "
        "went wrong, or the file is damaged. Choose another checkpoint."
    )


def _shards(layout: Mapping[str, torch.Tensor], max_shard_bytes: float) -> list[list[str]]:
    shards, size = [[]], 0
    for name, tensor in layout.items():
        added = tensor.numel() * tensor.element_size()
        if shards[-1] and size + added > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += added
    return shards


def _write_header(file, layout: Mapping[str, torch.Tensor], names: list[str]) -> dict[str, int]:
    """Writes the head of a safetensors file and returns where in the file each tensor goes."""
    # Large items first keeps each tensor aligned to its item size.
    names = sorted(names, key=lambda name: (-layout[name].element_size(), name))
    header, places, end = {"__metadata__": {"format": "pt"}}, {}, 0
    for name in names:
        tensor = layout[name]
        if tensor.dtype not in DTYPE_NAMES:
            raise UsageError(f"{name!r} is of {tensor.dtype}, which safetensors files do not hold here.")
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": DTYPE_NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
        places[name] = start
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    file.write(len(encoded).to_bytes(8, "little") + encoded)
    file.truncate(8 + len(encoded) + end)  # tensors without elements write nothing
    return {name: 8 + len(encoded) + start for name, start in places.items()}


class WrittenWeights(Mapping):
    """The tensors of written weight files, each read when it is asked for."""

    def __init__(self, files: Iterable[Path]):
        self.files = {}
        for path in files:
            with safe_open(path, framework="pt") as file:
                self.files |= dict.fromkeys(file.keys(), path)

    def __getitem__(self, name: str) -> torch.Tensor:
        # Opened anew each time: a file kept open stays mapped, and all that was ever read counts as memory in use.
        with safe_open(self.files[name], framework="pt") as file:
            return file.get_tensor(name).clone()

    def __iter__(self) -> Iterator[str]:
        return iter(self.files)

    def __len__(self) -> int:
        return len(self.files)

"""Uncompressed tars as files: found by a path, URL or pattern, fetched if they are remote, indexed by their headers.

    find_shards: name -> paths, copied to the cache first -> load_index: where each sample's members lie

`sources.ShardSource` reads the samples. Damage to a tar costs what it hits, and is told.
"""

import glob
import hashlib
import os
import re
import shutil
import tarfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import BinaryIO

import fsspec
import numpy as np
from tqdm import tqdm

from .config import UsageError


IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
NUM_THREADS = 16  # that fetch and index shards: they wait for networks and disks
FETCH_ATTEMPTS = 3

# Where one sample's members lie in its tar: byte offset and size, -1 where there is none.
MEMBERS = [(f"{member}_{what}", np.int64) for member in ("image", "text", "json") for what in ("offset", "size")]


def in_threads(function: Callable, tars: list, description: str, stop: threading.Event | None = None) -> list:
    """The results of `function`, in order. The first exception, or Ctrl-C, ends all: what has not begun never does, and
    what is under way is told to end by `stop`."""
    pool = ThreadPoolExecutor(NUM_THREADS)
    try:
        futures = [pool.submit(function, tar) for tar in tars]
        done = as_completed(futures)
        for future in tqdm(done, desc=description, unit="tar", total=len(tars), disable=None, leave=False):
            future.result()
        return [future.result() for future in futures]
    finally:
        if stop is not None:
            stop.set()
        pool.shutdown(cancel_futures=True)


# ---------------------------------------------------------------------------------------------------------------------
# Find and fetch
# ---------------------------------------------------------------------------------------------------------------------


def find_shards(name: str, cache: Path) -> list[Path]:
    """The tars that a path, URL, glob, brace pattern or folder names; remote ones are fetched into the cache first.

    Returns:
        Paths in sorted order; none if `name` means something else than tars.
    """
    patterns = _expand_braces(os.path.expanduser(name))
    if "://" in name:
        return _fetch_shards(patterns, cache / "shards")
    if Path(patterns[0]).is_dir():
        return sorted(Path(patterns[0]).glob("*.tar"))
    if not name.endswith(".tar"):
        return []
    paths = [found for pattern in patterns for found in sorted(glob.glob(pattern)) or [pattern]]
    missing = [path for path in paths if not Path(path).is_file()]
    if missing:
        raise UsageError(f"{name!r}: found no file {missing[0]!r} ({len(missing)} of {len(paths)} tars are missing).")
    return [Path(path) for path in paths]


def _expand_braces(pattern: str) -> list[str]:
    """ "{00..02}.tar" -> ["00.tar", "01.tar", "02.tar"]; "{a,b}.tar" -> ["a.tar", "b.tar"]."""
    match = re.search(r"\{([^{}]*)\}", pattern)
    if not match:
        return [pattern]
    inside = match.group(1)
    numbers = re.fullmatch(r"(\d+)\.\.(\d+)", inside)
    if numbers:
        first, last = numbers.groups()
        words = [str(n).zfill(len(first)) for n in range(int(first), int(last) + 1)]
    else:
        words = inside.split(",")
    before, after = pattern[: match.start()], pattern[match.end() :]
    return [expanded for word in words for expanded in _expand_braces(before + word + after)]


def _fetch_shards(urls: list[str], cache: Path) -> list[Path]:
    """Copies remote tars into the cache, several at a time. Those that are there already are not fetched again.

    Raises:
        UsageError: before anything is fetched if the disk is too small; if a tar is not there or cannot be had. What
            was fetched until then stays.
    """
    try:
        files, paths = fsspec.url_to_fs(urls[0])[0], []
        for url in urls:
            url += "*.tar" if url.endswith("/") else ""
            path = files._strip_protocol(url)
            if url.endswith(".tar"):
                paths += sorted(files.glob(path)) if glob.has_magic(path) else [path]
        sizes = in_threads(lambda path: files.info(path).get("size"), paths, "looking up shards")
        found = [(path, size, _local_name(files, path, cache)) for path, size in zip(paths, sizes, strict=True)]
        missing = [shard for shard in found if not _is_fetched(*shard[1:])]
        if missing:
            _check_space(urls[0], sum(size or 0 for _, size, _ in missing), cache)
            _fetch_all(files, missing)
        return [local for _, _, local in found]
    except UsageError:
        raise
    except Exception as error:  # each store has errors of its own
        raise UsageError(f"{urls[0]!r} cannot be fetched: {type(error).__name__}: {error}") from error


def _local_name(files: fsspec.AbstractFileSystem, path: str, cache: Path) -> Path:
    folder = cache / hashlib.sha256(files.unstrip_protocol(path).encode()).hexdigest()[:16]
    return folder / path.rsplit("/", 1)[-1]


def _is_fetched(size: int | None, local: Path) -> bool:
    return local.is_file() and size in (None, local.stat().st_size)


def _check_space(url: str, needed: int, cache: Path) -> None:
    cache.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(cache).free
    if needed > free:
        raise UsageError(
            f"{url!r}: the tars that are still to be fetched take {needed / 1e9:,.1f} GB, but {cache} has "
            f"{free / 1e9:,.1f} GB free. Set data.cache_dir to a larger disk, or mount the store (s3fs, rclone ...) "
            "and name the tars by their path there: local ones are read in place."
        )


def _fetch_all(files: fsspec.AbstractFileSystem, shards: list[tuple[str, int | None, Path]]) -> None:
    stop = threading.Event()
    total = sum(size or 0 for _, size, _ in shards) or None
    with tqdm(total=total, desc="bytes", unit="B", unit_scale=True, disable=None, leave=False) as bar:
        in_threads(lambda shard: _fetch(files, *shard, _Progress(bar, stop)), shards, "fetching shards", stop)


class _Progress(fsspec.Callback):
    """Bytes of one copy on the bar of all; ends the copy when told to."""

    def __init__(self, bar: tqdm, stop: threading.Event):
        super().__init__()
        self.bar, self.stop = bar, stop

    def relative_update(self, inc: int = 1) -> None:
        self.absolute_update(self.value + inc)

    def absolute_update(self, value: int) -> None:
        if self.stop.is_set():
            raise InterruptedError("stopped")
        with self.bar.get_lock():
            self.bar.update(value - self.value)
        self.value = value


def _fetch(files: fsspec.AbstractFileSystem, path: str, size: int | None, local: Path, progress: _Progress) -> None:
    """Copies one tar so that `local` appears whole or not at all; tries again when the connection breaks off."""
    local.parent.mkdir(parents=True, exist_ok=True)
    for old in local.parent.glob("*.tmp"):  # of a process that was killed
        if time.time() - old.stat().st_mtime > 24 * 3600:
            old.unlink(missing_ok=True)
    temporary = local.with_name(f"{local.name}.{uuid.uuid4().hex}.tmp")
    for attempt in range(1, FETCH_ATTEMPTS + 1):
        try:
            files.get_file(path, str(temporary), callback=progress)
            if size not in (None, temporary.stat().st_size):
                raise OSError(f"{path} broke off after {temporary.stat().st_size} of {size} bytes")
            os.replace(temporary, local)
            return
        except (FileNotFoundError, PermissionError, InterruptedError):
            raise
        except Exception as error:  # each store has errors of its own
            if attempt == FETCH_ATTEMPTS or progress.stop.is_set():
                raise OSError(f"{error} ({path}, {attempt} attempts). Run again to go on from here.") from error
            progress.absolute_update(0)
            time.sleep(2**attempt / 2)
        finally:
            temporary.unlink(missing_ok=True)


# ---------------------------------------------------------------------------------------------------------------------
# Index
# ---------------------------------------------------------------------------------------------------------------------


def load_index(shard: Path, cache: Path) -> tuple[np.ndarray, set[str]]:
    """`_index_tar`, kept in the cache where the tar is whole."""
    state = shard.stat()
    identity = f"{shard.resolve()}|{state.st_size}|{state.st_mtime_ns}"
    path = cache / f"{hashlib.sha256(identity.encode()).hexdigest()[:32]}.npy"
    if path.is_file():
        return np.load(path), set()
    index, damage = _index_tar(shard)
    if not damage:
        cache.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f"{path.stem}.{uuid.uuid4().hex}.tmp.npy")
        np.save(temporary, index)
        os.replace(temporary, path)
    return index, damage


def _index_tar(shard: Path) -> tuple[np.ndarray, set[str]]:
    """The `MEMBERS` of each sample, and what is wrong with the tar."""
    rows, last_name, damage = [], None, set()
    size = shard.stat().st_size
    with open(shard, "rb", buffering=0) as file:
        for name, start, length in files_of(file, damage):
            folder, _, base = name.rpartition("/")
            stem, _, extension = base.partition(".")
            extension = extension.lower()
            kind = "image" if extension in IMAGE_EXTENSIONS else {"txt": "text"}.get(extension, extension)
            if kind not in ("image", "text", "json") or start + length > size:  # cut off
                continue
            if (folder, stem) != last_name or rows[-1][f"{kind}_offset"] >= 0:
                last_name = (folder, stem)
                rows.append(dict.fromkeys((name for name, _ in MEMBERS), -1))
            rows[-1][f"{kind}_offset"], rows[-1][f"{kind}_size"] = start, length
    return np.array([tuple(row.values()) for row in rows], MEMBERS), damage


def files_of(file: BinaryIO, damage: set[str]) -> Iterator[tuple[str, int, int]]:
    """Name, first byte and size of each regular file of a tar. What is wrong with the tar is put into `damage`."""
    offset, headers = 0, 0
    while True:
        file.seek(offset)
        block = file.read(tarfile.BLOCKSIZE)
        if plain := _plain_header(block):
            start = offset + tarfile.BLOCKSIZE
            yield plain[0], start, plain[1]
            offset = start + -(-plain[1] // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
            headers += 1
            continue
        member, following = _any_header(file, offset)
        if member is not None:
            if member.isfile():
                yield member.name, member.offset_data, member.size
            offset = following
            headers += 1
        elif len(block) < tarfile.BLOCKSIZE:
            damage.add("truncated shard")
            break
        elif not any(block):  # a whole tar ends with blocks of zeros
            break
        else:
            damage.add("damaged shard")
            offset = _next_header(file, offset + tarfile.BLOCKSIZE)
    if damage and not headers:
        damage.clear()
        damage.add("not a tar")


def _plain_header(block: bytes) -> tuple[str, int] | None:
    """Name and size, if this is the header of a regular file and all of it: many times faster than tarfile."""
    if len(block) < tarfile.BLOCKSIZE or block[156:157] not in (tarfile.REGTYPE, tarfile.AREGTYPE):
        return None
    try:
        checksum, size = (int(block[a:b].rstrip(b"\0 "), 8) for a, b in ((148, 156), (124, 136)))
    except ValueError:
        return None
    if checksum != sum(block) - sum(block[148:156]) + 8 * 32:  # itself taken as blanks
        return None
    parts = [block[:100]]
    if block[257:263] == b"ustar\0":
        parts.insert(0, block[345:500])
    name = b"/".join(filter(None, (part.partition(b"\0")[0] for part in parts)))
    # An old way to say that it is a folder.
    return None if name.endswith(b"/") else (name.decode("utf-8", "surrogateescape"), size)


def _any_header(file: BinaryIO, offset: int) -> tuple[tarfile.TarInfo | None, int]:
    """The member that begins at `offset`, with its long name and other extensions, and where the next one does."""
    file.seek(offset)
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            return tar.next(), tar.offset
    except tarfile.ReadError:
        return None, offset


def _next_header(file: BinaryIO, offset: int) -> int:
    """Where the next block lies that is a header, by its checksum; else the zeros that end the tar, or its end."""
    file.seek(offset)
    last = b"\xff"
    while len(block := file.read(tarfile.BLOCKSIZE)) == tarfile.BLOCKSIZE:
        try:
            tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
            return offset
        except tarfile.HeaderError:
            offset, last = offset + tarfile.BLOCKSIZE, block
    return offset if any(last) else offset - tarfile.BLOCKSIZE

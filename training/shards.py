"""Uncompressed tars as files: found by a path, URL or pattern, fetched if they are remote, indexed by their headers.

    find_shards: name -> paths, copied to the cache first -> load_index: where each sample's members lie
    ShardCache: the same for remote tars of which the disk holds a few at a time

`sources.ShardSource` reads the samples. Damage to a tar costs what it hits, and is told.
"""

import glob
import hashlib
import os
import queue
import re
import shutil
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from functools import lru_cache, partial
from pathlib import Path
from typing import BinaryIO

import fsspec
import numpy as np
from tqdm import tqdm

from .config import UsageError
from .tars import files_of


IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
NUM_THREADS = 16  # that fetch and index shards: they wait for networks and disks
FETCH_ATTEMPTS = 3
THREADS_AHEAD = 4  # of each process that reads, for shards that come next

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
    patterns = expand_braces(os.path.expanduser(name))
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


def expand_braces(pattern: str) -> list[str]:
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
    return [expanded for word in words for expanded in expand_braces(before + word + after)]


def _fetch_shards(urls: list[str], cache: Path) -> list[Path]:
    """Copies remote tars into the cache, several at a time. Those that are there already are not fetched again.

    Raises:
        UsageError: before anything is fetched if the disk is too small; if a tar is not there or cannot be had. What
            was fetched until then stays.
    """
    try:
        files, shards = look_up(urls)
        found = [(path, size, _local_name(files, path, cache)) for path, size in shards]
        missing = [shard for shard in found if not _is_fetched(*shard[1:])]
        if missing:
            check_space(urls[0], sum(size or 0 for _, size, _ in missing), cache)
            _fetch_all(files, missing)
        return [local for _, _, local in found]
    except UsageError:
        raise
    except Exception as error:  # each store has errors of its own
        raise UsageError(f"{urls[0]!r} cannot be fetched: {type(error).__name__}: {error}") from error


def look_up(urls: list[str]) -> tuple[fsspec.AbstractFileSystem, list[tuple[str, int | None]]]:
    """The store, and path and size (None where it does not tell) of each tar that URLs without braces name."""
    files, paths = fsspec.url_to_fs(urls[0])[0], []
    for url in urls:
        url += "*.tar" if url.endswith("/") else ""
        path = files._strip_protocol(url)
        if url.endswith(".tar"):
            paths += sorted(files.glob(path)) if glob.has_magic(path) else [path]
    sizes = in_threads(lambda path: files.info(path).get("size"), paths, "looking up shards")
    return files, list(zip(paths, sizes, strict=True))


def _local_name(files: fsspec.AbstractFileSystem, path: str, cache: Path) -> Path:
    folder = cache / hashlib.sha256(files.unstrip_protocol(path).encode()).hexdigest()[:16]
    return folder / path.rsplit("/", 1)[-1]


def _is_fetched(size: int | None, local: Path) -> bool:
    return local.is_file() and size in (None, local.stat().st_size)


def check_space(url: str, needed: int, cache: Path) -> None:
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
    """Copies one tar so that `local` appears whole or not at all."""
    with temporary_file(local) as temporary:
        persist(lambda: copy(files, path, size, temporary, progress), path, again=lambda: progress.absolute_update(0))
        os.replace(temporary, local)


@contextmanager
def temporary_file(path: Path) -> Iterator[Path]:
    """A name beside `path` that nobody else has; removed in the end, as are those of processes that were killed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for old in path.parent.glob("*.tmp"):
        with suppress(FileNotFoundError):  # another thread's, which has just been removed
            if time.time() - old.stat().st_mtime > 24 * 3600:
                old.unlink()
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


def copy(
    files: fsspec.AbstractFileSystem, path: str, size: int | None, local: Path, progress: fsspec.Callback
) -> None:
    """Copies one tar, and raises OSError if less than `size` bytes arrive."""
    files.get_file(path, str(local), callback=progress)
    if size not in (None, local.stat().st_size):
        raise OSError(f"{path} broke off after {local.stat().st_size} of {size} bytes")


def persist(
    fetch: Callable[[], None], path: str, attempts: int = FETCH_ATTEMPTS, again: Callable[[], None] = lambda: None
) -> None:
    """Calls `fetch` until it gets through, after longer and longer waits; `again` before each.

    Raises:
        FileNotFoundError, PermissionError, InterruptedError, UsageError: at once.
        OSError: after so many attempts.
    """
    for attempt in range(1, attempts + 1):
        try:
            return fetch()
        except (FileNotFoundError, PermissionError, InterruptedError, UsageError):
            raise
        except Exception as error:  # each store has errors of its own
            if attempt == attempts:
                raise OSError(f"{error} ({path}, {attempt} attempts). Run again to go on from here.") from error
            again()
            time.sleep(2**attempt / 2)


# ---------------------------------------------------------------------------------------------------------------------
# Some at a time
# ---------------------------------------------------------------------------------------------------------------------


class ShardCache:
    """Remote tars on the local disk, at most `limit` bytes of them, shared by all processes of the machine.

    A tar is `<key>.tar`, with its members (`MEMBERS`) in `<key>.npy`; while it is fetched it is `<key>.tmp`, an empty
    file at first that keeps its room. The key ends with the size, so that what is there or on its way can be added up.
    Whoever fetches or removes a tar holds its lock, and the lock of the room while room is made; the system gives the
    locks of a killed process back. A tar that is removed stays readable to those that have opened it.

    Args:
        url: of any of the tars, which names the store.
        shards: path in the store and size of each tar.
        folder: for this purpose alone. What other runs left in it counts, and goes first.
    """

    ATTEMPTS = 6  # waits of 31 seconds together
    SECONDS_BETWEEN_TOUCHES = 5

    def __init__(self, url: str, shards: list[tuple[str, int]], folder: Path, limit: int):
        self.url, self.shards, self.folder, self.limit = url, shards, folder, limit
        self.touched: dict[int, float] = {}
        (folder / "locks").mkdir(parents=True, exist_ok=True)

    def open(self, shard: int) -> BinaryIO:
        """A tar to read from, fetched first if it is not there.

        Raises:
            UsageError: if it cannot be fetched, or is not of its size any more.
        """
        path = self._file(shard, "tar")
        while True:
            try:
                file = open(path, "rb", buffering=0)
            except FileNotFoundError:
                try:
                    self.fetch(shard)
                except OSError as error:
                    raise UsageError(f"{self.shards[shard][0]} cannot be kept in {self.folder}: {error}") from error
                continue
            self._touch(shard, path)
            return file

    def members(self, shard: int) -> np.ndarray:
        """The `MEMBERS` of a tar's samples; fetches it as `open` does."""
        while True:
            with self.open(shard):
                try:
                    return np.load(self._file(shard, "npy"))
                except (OSError, ValueError, EOFError):  # removed meanwhile, or damaged: it comes with the tar
                    self._file(shard, "tar").unlink(missing_ok=True)

    def prefetch(self, shards: Iterable[int]) -> None:
        """Fetches tars in the background, the first ones first. What is wrong with one is told when it is opened."""
        for shard in shards:
            _tasks(os.getpid()).put(partial(self.fetch, shard, ahead=True))

    def fetch(self, shard: int, ahead: bool = False) -> None:
        """Puts a tar into the folder if it is not there, once however many ask for it.

        Args:
            ahead: It is not needed yet: leave it where another process fetches it, where there is no room, and where it
                does not come at once.
        """
        local = self._file(shard, "tar")
        with _lock(self._lock_of(local), wait=not ahead) as is_ours:
            if not is_ours:
                return
            if local.exists():
                return self._touch(shard, local)
            temporary = self._file(shard, "tmp")
            while not self._make_room(self.shards[shard][1], temporary):  # others are being fetched: they will end
                if ahead:
                    return
                time.sleep(0.1)
            try:
                self._copy(shard, temporary, 1 if ahead else self.ATTEMPTS)
                members, _ = index_tar(temporary)
                with open(self._file(shard, "npy"), "wb") as file:
                    np.save(file, members)
                with _lock(self.folder / "locks" / "room"):
                    os.replace(temporary, local)
            finally:
                temporary.unlink(missing_ok=True)

    def _copy(self, shard: int, temporary: Path, attempts: int) -> None:
        path, size = self.shards[shard]

        def once() -> None:
            files = fsspec.url_to_fs(self.url)[0]  # of this process: connections do not survive a fork
            files.get_file(path, str(temporary))
            found = temporary.stat().st_size
            if found != size and found == files.info(path).get("size"):
                raise UsageError(
                    f"{path} has {found} bytes, but had {size} when the shards were counted. Count them again by "
                    "training/index.py, for a new run; for this one, put back what was there."
                )
            if found != size:
                raise OSError(f"{path} broke off after {found} of {size} bytes")

        try:
            persist(once, path, attempts)
        except UsageError:
            raise
        except Exception as error:  # each store has errors of its own
            raise UsageError(f"{path} cannot be fetched: {type(error).__name__}: {error}") from error

    def _make_room(self, size: int, temporary: Path) -> bool:
        """Whether `size` more bytes fit, without those tars that were not read for longest; keeps their place if so."""
        with _lock(self.folder / "locks" / "room"):
            there = sorted(_last_read(self.folder))
            used = sum(_size_of(path) for _, path in there)
            for _, path in there:
                if used + size <= self.limit:
                    break
                with _lock(self._lock_of(path), wait=False) as is_ours:
                    if is_ours:  # else it is being fetched
                        for kind in ("tar", "tmp", "npy"):
                            path.with_suffix(f".{kind}").unlink(missing_ok=True)
                        used -= _size_of(path)
            if used + size > self.limit:
                return False
            temporary.touch()
            return True

    def check_disk(self) -> None:
        """Refuses a limit that the disk does not have.

        Raises:
            UsageError: with the numbers.
        """
        used = sum(_size_of(path) for _, path in _last_read(self.folder))
        there = used + shutil.disk_usage(self.folder).free
        needed = min(self.limit, sum(size for _, size in self.shards))
        if there < needed:
            raise UsageError(
                f"data.disk: {self.folder} has {there / 1e9:,.1f} GB for shards, expected {needed / 1e9:,.1f}. Lower it, "
                "or set data.cache_dir to a larger disk."
            )

    def _touch(self, shard: int, path: Path) -> None:
        now = time.time()
        if now - self.touched.get(shard, 0) > self.SECONDS_BETWEEN_TOUCHES:
            self.touched[shard] = now
            with suppress(FileNotFoundError):  # was removed after it was opened
                os.utime(path)

    def _file(self, shard: int, kind: str) -> Path:
        path, size = self.shards[shard]
        name = hashlib.sha256(f"{self.url}|{path}".encode()).hexdigest()[:24]
        return self.folder / f"{name}-{size}.{kind}"

    def _lock_of(self, path: Path) -> Path:
        return self.folder / "locks" / path.stem


def _size_of(path: Path) -> int:
    return int(path.stem.rpartition("-")[2])


def _last_read(folder: Path) -> Iterator[tuple[float, Path]]:
    for entry in os.scandir(folder):
        if entry.name.endswith((".tar", ".tmp")):
            with suppress(FileNotFoundError):  # a fetch that failed meanwhile
                yield entry.stat().st_mtime, Path(entry.path)


@contextmanager
def _lock(path: Path, wait: bool = True) -> Iterator[bool]:
    """Whether the lock that the file stands for is ours; others of this machine, threads too, do not have it then."""
    import fcntl  # not there on Windows

    with open(path, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        try:
            yield True
        finally:
            fcntl.flock(file, fcntl.LOCK_UN)  # closing is not enough where a forked process has the file, too


@lru_cache(maxsize=1)
def _tasks(process: int) -> queue.SimpleQueue:
    """What is put here is done by threads of this process, which may end without waiting for them."""
    tasks = queue.SimpleQueue()

    def work() -> None:
        while True:
            with suppress(Exception):
                tasks.get()()

    for _ in range(THREADS_AHEAD):
        threading.Thread(target=work, daemon=True).start()
    return tasks


# ---------------------------------------------------------------------------------------------------------------------
# Index
# ---------------------------------------------------------------------------------------------------------------------


def load_index(shard: Path, cache: Path) -> tuple[np.ndarray, set[str]]:
    """`index_tar`, kept in the cache where the tar is whole."""
    state = shard.stat()
    identity = f"{shard.resolve()}|{state.st_size}|{state.st_mtime_ns}"
    path = cache / f"{hashlib.sha256(identity.encode()).hexdigest()[:32]}.npy"
    if path.is_file():
        return np.load(path), set()
    index, damage = index_tar(shard)
    if not damage:
        cache.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f"{path.stem}.{uuid.uuid4().hex}.tmp.npy")
        np.save(temporary, index)
        os.replace(temporary, path)
    return index, damage


def index_tar(shard: Path) -> tuple[np.ndarray, set[str]]:
    """The `MEMBERS` of each sample, and what is wrong with the tar."""
    rows, last_name, damage = [], None, set()
    with open(shard, "rb", buffering=0) as file:
        for name, start, length in files_of(file, damage):
            folder, _, base = name.rpartition("/")
            stem, _, extension = base.partition(".")
            extension = extension.lower()
            kind = "image" if extension in IMAGE_EXTENSIONS else {"txt": "text"}.get(extension, extension)
            if kind not in ("image", "text", "json"):
                continue
            if (folder, stem) != last_name or rows[-1][f"{kind}_offset"] >= 0:
                last_name = (folder, stem)
                rows.append(dict.fromkeys((name for name, _ in MEMBERS), -1))
            rows[-1][f"{kind}_offset"], rows[-1][f"{kind}_size"] = start, length
    return np.array([tuple(row.values()) for row in rows], MEMBERS), damage


def usable(members: np.ndarray, key: str | None, damage: set[str]) -> tuple[np.ndarray, np.ndarray, Counter]:
    """Which samples have an image and a caption, whose caption is in the .json, and what is left out by kind.

    Args:
        key: `data.caption_key`. With one, only .json members count; without, .txt members come first.
    """
    has_image = members["image_offset"] >= 0
    is_json = (members["text_offset"] < 0) | (key is not None)
    has_caption = np.where(is_json, members["json_offset"], members["text_offset"]) >= 0
    missing = {"missing image": int((~has_image).sum()), "missing caption": int((~has_caption).sum())}
    return has_image & has_caption, is_json, +Counter({**missing, **dict.fromkeys(damage, 1)})

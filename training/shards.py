"""Uncompressed tars as files: found by a path, URL or pattern, fetched if they are remote, indexed by their headers.

    find_shards: name -> paths, copied to the cache first -> load_index: where each sample's members lie
    ShardCache: the same for remote tars of which the disk holds a few at a time

`sources.ShardSource` reads the samples. Damage to a tar costs what it hits, and is told.
"""

import glob
import hashlib
import itertools
import os
import queue
import re
import shutil
import tempfile
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache, partial
from pathlib import Path
from typing import BinaryIO

import fsspec
import numpy as np
from tqdm import tqdm

from .config import UsageError
from .stores import ChangedFile, RemoteFile, fetch, look_up, open_store, paths_of, reason
from .tars import files_of


IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
MAX_PATTERNS = 1_000_000
NUM_THREADS = 16  # that fetch and index shards: they wait for networks and disks
SECONDS_TO_END = 5  # for those that are told to
THREADS_AHEAD = 4  # of each process that reads, for shards that come next

# Where one sample's members lie in its tar: byte offset and size, -1 where there is none.
MEMBERS = [(f"{member}_{what}", np.int64) for member in ("image", "text", "json") for what in ("offset", "size")]


def in_threads(function: Callable, tars: list, description: str, stop: threading.Event | None = None) -> list:
    """The results of `function`, in order. The first exception, or Ctrl-C, ends all: what has not begun never does, and
    what is under way is told to end by `stop`, and not waited for if it does not."""
    stop, results, done, todo = stop or threading.Event(), [None] * len(tars), queue.SimpleQueue(), queue.SimpleQueue()

    def work() -> None:
        while not stop.is_set():
            try:
                number = todo.get_nowait()
            except queue.Empty:
                return
            try:
                done.put((number, function(tars[number]), None))
            except BaseException as error:
                done.put((number, None, error))

    for number in range(len(tars)):
        todo.put(number)
    threads = [threading.Thread(target=work, daemon=True) for _ in range(min(NUM_THREADS, len(tars)))]
    try:
        for thread in threads:
            thread.start()
        for _ in tqdm(tars, desc=description, unit="tar", disable=None, leave=False):
            number, results[number], error = done.get()
            if error is not None:
                raise error
        return results
    finally:
        stop.set()
        end = time.monotonic() + SECONDS_TO_END
        for thread in threads:
            if thread.is_alive():
                thread.join(max(end - time.monotonic(), 0))


# ---------------------------------------------------------------------------------------------------------------------
# Find and fetch
# ---------------------------------------------------------------------------------------------------------------------


def find_shards(name: str, cache: Path) -> list[Path]:
    """The tars that a path, URL, glob, brace pattern or folder names, or several of these joined by `::`; remote ones are
    fetched into the cache first.

    Returns:
        Paths, those of a glob or folder in sorted order; none if `name` means something else than tars.

    Raises:
        UsageError: for tars that are not there or are no files, and where only a part of `name` means tars.
    """
    found = []
    for protocol, group in itertools.groupby(patterns_of(name), key=_protocol):
        patterns = list(group)
        if protocol:
            found.append((patterns[0], _fetch_shards(patterns, cache / "shards")))
        else:
            found += [(pattern, _local_shards(pattern)) for pattern in patterns]
    others = [pattern for pattern, paths in found if not paths]
    if 0 < len(others) < len(found):
        raise UsageError(f"{name!r}: {others[0]!r} names no tars, but other parts of it do. Give data of one kind.")
    paths = [path for _, paths in found for path in paths]
    missing = [path for path in paths if not path.is_file()]
    if missing:
        hint = " Join patterns by '::'." if set(name) & set(", ") else ""
        raise UsageError(
            f"{name!r}: {_what_is_there(missing[0])}, expected a tar file ({len(missing)} of {len(paths)} tars are "
            f"missing).{hint}"
        )
    return paths


def _local_shards(pattern: str) -> list[Path]:
    path = Path(pattern)
    if path.is_dir():
        return sorted(path.glob("*.tar")) or ([path] if path.suffix == ".tar" else [])
    if not pattern.endswith(".tar"):
        return []
    return [Path(found) for found in sorted(glob.glob(pattern)) or [pattern]]


def _what_is_there(path: Path) -> str:
    if path.is_symlink():
        return f"{str(path)!r} is a link to {os.readlink(path)!r}, which is no file"
    if path.is_dir():
        return f"{str(path)!r} is a folder"
    return f"{str(path)!r} is no ordinary file" if path.exists() else f"found no file {str(path)!r}"


def patterns_of(name: str) -> list[str]:
    """What is named, without `::` and braces: paths and globs, and URLs of all but files of this machine.

    Raises:
        UsageError: if a part is empty, or for more than `MAX_PATTERNS`.
    """
    parts = [""]
    for word in name.split("::"):
        # A protocol alone is joined to what follows by `::` as fsspec has it: simplecache::https://...
        chained = parts[-1] in fsspec.available_protocols()
        parts = [*parts[:-1], f"{parts[-1]}::{word}"] if chained else [*parts, word]
    if "" in parts[1:]:
        raise UsageError(f"{name!r}: found an empty part, expected patterns of tars joined by '::'.")
    local = (os.path.expanduser(part.removeprefix("file://")) for part in parts[1:])
    patterns = list(itertools.islice(itertools.chain(*map(expand_braces, local)), MAX_PATTERNS + 1))
    if len(patterns) > MAX_PATTERNS:
        raise UsageError(f"{name!r} names more than {MAX_PATTERNS:,} tars. Use a folder or a glob, or fewer of them.")
    return patterns


def expand_braces(pattern: str) -> Iterator[str]:
    """Gives the words of a pattern in the shell's order: "{00..02}.tar", "{2..0}", "{0..8..2}", "{a..c}", "{a,b{1,2}}".

    Braces that hold neither a range nor a comma, or are not closed, stand for themselves.
    """
    for opening in (match.start() for match in re.finditer("{", pattern)):
        depth, cuts = 0, [opening]
        for place in range(opening, len(pattern)):
            depth += {"{": 1, "}": -1}.get(pattern[place], 0)
            if depth == 0:
                break
            if depth == 1 and pattern[place] == ",":
                cuts.append(place)
        if depth > 0:
            continue
        words = _range(pattern[opening + 1 : place])
        if words is None and len(cuts) > 1:
            ends = itertools.pairwise([*cuts, place])
            words = itertools.chain(*(expand_braces(pattern[start + 1 : end]) for start, end in ends))
        if words is not None:
            for word in words:
                yield from (pattern[:opening] + word + rest for rest in expand_braces(pattern[place + 1 :]))
            return
    yield pattern


def _range(inside: str) -> Iterator[str] | None:
    """The words of "000..299", "9..0", "0..10..2" or "a..z"; None if it is no range."""
    match = re.fullmatch(r"(-?\d+|[a-zA-Z])\.\.(-?\d+|[a-zA-Z])(?:\.\.-?(\d+))?", inside)
    if not match or match[1].isalpha() != match[2].isalpha():
        return None
    ends, step = match.group(1, 2), int(match[3] or 1) or 1
    first, last = map(ord if match[1].isalpha() else int, ends)
    numbers = range(first, last + 1, step) if first <= last else range(first, last - 1, -step)
    if match[1].isalpha():
        return map(chr, numbers)
    is_padded = any(re.match("-?0.", end) for end in ends)
    width = max(map(len, ends)) if is_padded else 0
    return (str(number).zfill(width) for number in numbers)


def _protocol(pattern: str) -> str:
    """Of a URL; empty for a path."""
    return pattern.partition("://")[0] if "://" in pattern else ""


def _fetch_shards(urls: list[str], cache: Path) -> list[Path]:
    """Copies remote tars into the cache, several at a time. Those that are there already are not fetched again, and one
    of which a part is there is fetched from there on.

    Raises:
        UsageError: before anything is fetched if the disk is too small; if a tar is not there or cannot be had. What
            was fetched until then stays.
    """
    try:
        files, shards = look_up_all(urls)
        found = [(shard, _local_name(files, shard.path, cache)) for shard in shards]
        missing = [(shard, local) for shard, local in found if not _is_fetched(shard, local)]
        if missing:
            needed = sum((shard.size or 0) - _size_on_disk(_part(shard, local)) for shard, local in missing)
            check_space(urls[0], needed, cache)
            _fetch_all(files, missing)
        return [local for _, local in found]
    except UsageError:
        raise
    except Exception as error:  # each store has errors of its own
        raise UsageError(f"{urls[0]!r} cannot be fetched: {reason(error)}") from error


def look_up_all(urls: list[str]) -> tuple[fsspec.AbstractFileSystem, list[RemoteFile]]:
    """The store, and the tars in it that URLs without braces name; none if they name something else."""
    if len(protocols := set(map(_protocol, urls))) > 1:
        raise UsageError(f"{urls[0]!r}: found URLs of {' and '.join(sorted(protocols))}, expected those of one store.")
    files, others = open_store(urls[0]), [url for url in urls if not url.endswith((".tar", "/"))]
    if 0 < len(others) < len(urls):
        raise UsageError(f"{others[0]!r} names no tars, but {urls[0]!r} does. Give data of one kind.")
    paths = [] if others else [path for url in urls for path in paths_of(files, url)]
    return files, in_threads(partial(look_up, files), paths, "looking up shards")


def _local_name(files: fsspec.AbstractFileSystem, path: str, cache: Path) -> Path:
    folder = cache / hashlib.sha256(files.unstrip_protocol(path).encode()).hexdigest()[:16]
    return folder / path.rsplit("/", 1)[-1]


def _part(shard: RemoteFile, local: Path) -> Path:
    """What has come of a tar; of another one, should it change."""
    version = hashlib.sha256(f"{shard.size}|{shard.version}".encode()).hexdigest()[:16]
    return local.with_name(f"{local.name}.{version}.part")


def _is_fetched(shard: RemoteFile, local: Path) -> bool:
    return local.is_file() and shard.size in (None, local.stat().st_size)


def _size_on_disk(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def check_space(url: str, needed: int, cache: Path) -> None:
    make_folder(cache)
    free = shutil.disk_usage(cache).free
    if needed > free:
        raise UsageError(
            f"{url!r}: the tars that are still to be fetched take {needed / 1e9:,.1f} GB, but {cache} has "
            f"{free / 1e9:,.1f} GB free. Set data.cache_dir to a larger disk, or mount the store (s3fs, rclone ...) "
            "and name the tars by their path there: local ones are read in place."
        )


def make_folder(path: Path) -> None:
    """Makes a folder of the cache.

    Raises:
        UsageError: if it cannot be written.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise UsageError(
            f"data.cache_dir: {path} cannot be written ({error.strerror}). Name another folder."
        ) from error


def _fetch_all(files: fsspec.AbstractFileSystem, shards: list[tuple[RemoteFile, Path]]) -> None:
    stop = threading.Event()
    total = sum(shard.size or 0 for shard, _ in shards) or None
    with tqdm(total=total, desc="bytes", unit="B", unit_scale=True, disable=None, leave=False) as bar:
        in_threads(lambda shard: _fetch(files, *shard, _Progress(bar, stop)), shards, "fetching shards", stop)


class _Progress(fsspec.Callback):
    """Bytes of one copy on the bar of all; ends the copy when told to."""

    def __init__(self, bar: tqdm, stop: threading.Event):
        super().__init__()
        self.bar, self.stop = bar, stop

    def call(self, *_, **__) -> None:
        if self.stop.is_set():
            raise InterruptedError("stopped")

    def relative_update(self, inc: int = 1) -> None:
        self.absolute_update(self.value + inc)

    def absolute_update(self, value: int) -> None:
        self.call()
        with self.bar.get_lock():
            self.bar.update(value - self.value)
        self.value = value


def _fetch(files: fsspec.AbstractFileSystem, shard: RemoteFile, local: Path, progress: _Progress) -> None:
    """Copies one tar so that `local` appears whole or not at all; what has come of it stays, to go on with."""
    part = _part(shard, local)
    local.parent.mkdir(parents=True, exist_ok=True)
    with _lock(part, mode="ab"):  # other runs may want the same tar
        if _is_fetched(shard, local):  # meanwhile
            return part.unlink(missing_ok=True)
        for old in set(local.parent.glob("*.part")) - {part}:
            old.unlink(missing_ok=True)
        try:
            fetch(files, shard.path, shard.size, part, progress)
            os.replace(part, local)
        finally:
            if _size_on_disk(part) == 0:
                part.unlink(missing_ok=True)


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
        make_folder(folder / "locks")

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
        try:
            fetch(open_store(self.url), path, size, temporary, attempts=attempts)
        except ChangedFile as error:
            raise UsageError(
                f"{path} has {error.found} bytes, but had {size} when the shards were counted. Count them again by "
                "training/index.py, for a new run; for this one, put back what was there."
            ) from error
        except Exception as error:  # each store has errors of its own
            raise UsageError(f"{path} cannot be fetched: {reason(error)}") from error

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
def _lock(path: Path, wait: bool = True, mode: str = "w") -> Iterator[bool]:
    """Whether the lock that the file stands for is ours; others of this machine, threads too, do not have it then."""
    import fcntl  # not there on Windows

    with open(path, mode) as file:
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


def load_index(shard: Path, cache: Path | None) -> tuple[np.ndarray, set[str]]:
    """`index_tar`, kept in the cache, if there is one, where the tar is whole."""
    if cache is None:
        return index_tar(shard)
    state = shard.stat()
    identity = f"{shard.resolve()}|{state.st_size}|{state.st_mtime_ns}"
    path = cache / f"{hashlib.sha256(identity.encode()).hexdigest()[:32]}.npy"
    with suppress(OSError, ValueError, EOFError):  # not there, or damaged
        return np.load(path), set()
    index, damage = index_tar(shard)
    if not damage:
        temporary = path.with_name(f"{path.stem}.{uuid.uuid4().hex}.tmp.npy")
        with suppress(OSError):  # a full disk: it is made again next time
            np.save(temporary, index)
            os.replace(temporary, path)
        temporary.unlink(missing_ok=True)
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

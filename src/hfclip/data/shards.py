"""Uncompressed tars as files: found by a path, URL or pattern, and copied to the cache first if they are remote."""

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
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import fsspec
from tqdm import tqdm

from ..errors import UsageError, as_usage_error
from .stores import RemoteFile, fetch, look_up, open_store, paths_of, reason


COMPRESSED = {"gz": "gunzip", "tgz": "gunzip", "bz2": "bunzip2", "xz": "unxz", "zst": "unzstd"}  # and what unpacks it
MAX_PATTERNS = 1_000_000
NUM_THREADS = 16  # that fetch and index shards: they wait for networks and disks
SECONDS_TO_END = 5  # for those that are told to


def map_in_threads(function: Callable, tars: Sequence, description: str, stop: threading.Event | None = None) -> list:
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
    for pattern in patterns_of(name):
        refuse_compressed(pattern)
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


def refuse_compressed(path: str) -> None:
    """Raises UsageError for a tar that is compressed by its name, with the command that helps."""
    first, _, kind = path.lower().rpartition(".")
    if kind == "tgz" or kind in COMPRESSED and first.endswith(".tar"):
        raise UsageError(
            f"{path!r} is compressed, and samples are read at random. Unpack it once, and name the .tar files: "
            f"`{COMPRESSED[kind]} {path}`."
        )


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
    that is there in part is fetched from there on.

    Raises:
        UsageError: before anything is fetched if the disk is too small; if a tar is not there or not available. What
            was fetched until then stays.
    """
    with as_usage_error(f"{urls[0]!r} cannot be fetched", reason):
        files, shards = list_remote_tars(urls)
        found = [(shard, _local_name(files, shard.path, cache)) for shard in shards]
        missing = [(shard, local) for shard, local in found if not _is_fetched(shard, local)]
        if missing:
            needed = sum((shard.size or 0) - _size_on_disk(_part(shard, local)) for shard, local in missing)
            check_space(urls[0], needed, cache)
            _fetch_all(files, missing)
        return [local for _, local in found]


def list_remote_tars(urls: list[str]) -> tuple[fsspec.AbstractFileSystem, list[RemoteFile]]:
    """The store, and the tars in it that URLs without braces name; none if they name something else."""
    if len(protocols := set(map(_protocol, urls))) > 1:
        raise UsageError(f"{urls[0]!r}: found URLs of {' and '.join(sorted(protocols))}, expected those of one store.")
    files, others = open_store(urls[0]), [url for url in urls if not url.endswith((".tar", "/"))]
    if 0 < len(others) < len(urls):
        raise UsageError(f"{others[0]!r} names no tars, but {urls[0]!r} does. Give data of one kind.")
    paths = [] if others else [path for url in urls for path in paths_of(files, url)]
    return files, map_in_threads(partial(look_up, files), paths, "looking up shards")


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


def cache_folder() -> Path:
    """Where remote files and indices are kept: HFCLIP_CACHE, else hfclip/ in XDG_CACHE_HOME or in ~/.cache."""
    caches = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.environ.get("HFCLIP_CACHE") or Path(caches, "hfclip")).expanduser()


def check_space(url: str, needed: int, cache: Path) -> None:
    make_folder(cache)
    free = shutil.disk_usage(cache).free
    if needed > free:
        raise UsageError(
            f"{url!r}: the tars that are still to be fetched take {needed / 1e9:,.1f} GB, but {cache} has "
            f"{free / 1e9:,.1f} GB free. Set HFCLIP_CACHE to a larger disk, or mount the store (s3fs, rclone ...) "
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
            f"The cache {path} cannot be written ({error.strerror}). Set HFCLIP_CACHE to another folder."
        ) from error


def _fetch_all(files: fsspec.AbstractFileSystem, shards: list[tuple[RemoteFile, Path]]) -> None:
    stop = threading.Event()
    total = sum(shard.size or 0 for shard, _ in shards) or None
    with tqdm(total=total, desc="bytes", unit="B", unit_scale=True, disable=None, leave=False) as bar:
        map_in_threads(lambda shard: _fetch(files, *shard, _Progress(bar, stop)), shards, "fetching shards", stop)


class UntilStopped(fsspec.Callback):
    """Ends a copy when told to."""

    def __init__(self, stop: threading.Event):
        super().__init__()
        self.stop = stop

    def call(self, *_, **__) -> None:
        if self.stop.is_set():
            raise InterruptedError("stopped")


class _Progress(UntilStopped):
    """Bytes of one copy on the bar of all."""

    def __init__(self, bar: tqdm, stop: threading.Event):
        super().__init__(stop)
        self.bar = bar

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
    with locked(part, mode="ab"):  # other runs may want the same tar
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
def locked(path: Path, wait: bool = True, mode: str = "w") -> Iterator[bool]:
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

"""Remote tars that the disk holds a few at a time."""

import hashlib
import os
import queue
import shutil
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from functools import lru_cache, partial
from pathlib import Path
from typing import BinaryIO

import numpy as np

from ..errors import UsageError
from .counts import command, read_counts
from .samples import Source
from .shards import locked, make_folder, patterns_of
from .stores import ChangedFile, fetch, open_store, reason
from .tars import MEMBERS, index_tar, select_samples
from .webdataset import ShardSource


THREADS_AHEAD = 4  # of each process that reads, for shards that come next


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
                    members = np.load(self._file(shard, "npy"))
                    if members.dtype == MEMBERS:
                        return members
                    raise ValueError("of another version")
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
        with locked(self._lock_of(local), wait=not ahead) as is_ours:
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
                with locked(self.folder / "locks" / "room"):
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
                "`python -m hfclip.training.index`, for a new run; for this one, put back what was there."
            ) from error
        except Exception as error:  # each store has errors of its own
            raise UsageError(f"{path} cannot be fetched: {reason(error)}") from error

    def _make_room(self, size: int, temporary: Path) -> bool:
        """Whether `size` more bytes fit, without those tars that were not read for longest; keeps their place if so."""
        with locked(self.folder / "locks" / "room"):
            there = sorted(_last_read(self.folder))
            used = sum(_size_of(path) for _, path in there)
            for _, path in there:
                if used + size <= self.limit:
                    break
                with locked(self._lock_of(path), wait=False) as is_ours:
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
                f"disk: {self.folder} has {there / 1e9:,.1f} GB for shards, expected {needed / 1e9:,.1f}. Lower it, "
                "or set HFCLIP_CACHE to a larger disk."
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


class StreamSource(ShardSource):
    """Remote tars in `limit` bytes of the disk, which holds those read last and those that come next.

    A file of counts (`training/index.py`) says how many samples each holds, so that the order of the data is known
    before any is fetched. Reading a sample fetches its tar if it is not there.

    Args:
        name: URL of the tars.
        limit: bytes of the disk.

    Raises:
        UsageError: if there are no counts, if `name` is no URL of tars; later, where a sample is read, if its tar cannot
            be fetched or is not the one that was counted.
    """

    ROWS_IN_MEMORY = 256  # tars whose samples each process knows the places of

    def __init__(self, name: str, caption_key: str | None, folder: Path, limit: int):
        Source.__init__(self)
        urls = patterns_of(name)
        if not all("://" in url and url.endswith((".tar", "/")) for url in urls):
            raise UsageError(
                f"disk: {name!r} is no URL of tars (s3://bucket/{{0000..0999}}.tar). Unset it: only those are "
                "fetched while a run goes on; local tars are read in place."
            )
        self.key, counted = caption_key, read_counts(name, folder)
        which = int(self.key is not None)
        self.counts = [shard.usable[which] for shard in counted]
        self.starts = np.cumsum([0, *self.counts])
        for shard in counted:
            self.skipped.update(shard.left_out[which])
        self.shards = [Path(shard.path) for shard in counted]
        self.count_again = command(name)
        self.cache = ShardCache(urls[0], [shard[:2] for shard in counted], folder / "streamed", limit)
        self.fingerprint = hashlib.sha256(repr(counted).encode()).hexdigest()
        self.rows: dict[int, np.ndarray] = {}
        self.length = int(self.starts[-1])
        self._check_key()

    def prefetch(self, shards: list[int]) -> None:
        """Begins to fetch tars that are going to be read, the first ones first."""
        self.cache.prefetch(shards)

    def _row(self, index: int) -> np.void:
        shard = self._shard_of(index)
        rows = self.rows.pop(shard, None)
        if rows is None:
            rows, _, _ = select_samples(self.cache.members(shard), self.key, set())
            if len(rows) != self.counts[shard]:
                raise UsageError(
                    f"{self.shards[shard]} has {len(rows)} usable pairs, but had {self.counts[shard]} when they were "
                    f"counted. Put back what was there; or remove the counts and make them anew (`{self.count_again}`), "
                    "for a new run."
                )
            if len(self.rows) >= self.ROWS_IN_MEMORY:
                del self.rows[next(iter(self.rows))]
        self.rows[shard] = rows  # at the end: the first one was not used for longest
        return rows[index - self.starts[shard]]

    def _open(self, shard: int) -> BinaryIO:
        return self.cache.open(shard)

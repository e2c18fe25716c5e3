"""Counts of the samples of remote tars, so that a run knows them before it fetches any.

Every tar is read once, several at a time, and none is kept. The counts go line by line into a file in the cache folder:
after Ctrl-C or a crash counting goes on, and later it reads only those tars whose sizes have changed.
"""

import hashlib
import json
import os
import shlex
import threading
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import fsspec

from ..errors import UsageError, as_usage_error
from .shards import (
    NUM_THREADS,
    UntilStopped,
    check_space,
    list_remote_tars,
    make_folder,
    map_in_threads,
    patterns_of,
    temporary_file,
)
from .stores import fetch, open_store, reason
from .tars import index_tar, select_samples


class CountedShard(NamedTuple):
    """A tar as its store names it, and what it holds, without and with a `caption_key`."""

    path: str
    size: int
    usable: list[int]
    left_out: list[dict[str, int]]


def count_shards(url: str, cache: Path) -> tuple[Path, list[CountedShard]]:
    """Reads the tars that are not counted yet, and writes the file of all counts.

    Raises:
        UsageError: if there is no tar, or one is not available. What was counted until then stays.
    """
    path = _index_file(url, cache)
    partial = path.with_suffix(".partial")
    known = {shard[:2]: shard for file in (path, partial) for shard in _read(file)}
    make_folder(path.parent)
    with as_usage_error(f"{url!r} cannot be counted", reason):
        files, shards = list_remote_tars(patterns_of(url))
        shards = [shard[:2] for shard in shards]
        todo = [shard for shard in shards if shard not in known]
        largest = sorted((size or 0 for _, size in todo), reverse=True)[:NUM_THREADS]
        check_space(url, sum(largest), path.parent)
        stop = threading.Event()
        with open(partial, "a", encoding="utf-8") as lines:
            lines.write("\n")  # ends the line at which a killed process may have stopped
            for counted in map_in_threads(_counter(files, path.parent, lines, stop), todo, "counting samples", stop):
                known[counted.path, counted.size] = counted
    by_path = {shard.path: shard for shard in known.values()}
    counted = [known.get(shard, by_path[shard[0]]) for shard in shards]  # without a size where the store tells none
    if not counted or all("not a tar" in shard.left_out[0] for shard in counted):
        raise UsageError(f"{url!r}: found no uncompressed tar file. Unpack .tar.gz shards first.")
    with temporary_file(path) as temporary:
        temporary.write_text("".join(json.dumps(shard) + "\n" for shard in counted), encoding="utf-8")
        os.replace(temporary, path)
    partial.unlink()
    return path, counted


def _counter(files: fsspec.AbstractFileSystem, folder: Path, lines, stop: threading.Event) -> Callable:
    """Counts one tar and writes its line."""
    lock = threading.Lock()

    def count(shard: tuple[str, int | None]) -> CountedShard:
        path, size = shard
        with temporary_file(folder / "tar") as temporary:
            fetch(files, path, size, temporary, UntilStopped(stop))
            members, damage = index_tar(temporary)
            size = temporary.stat().st_size
        both = [select_samples(members, key, damage) for key in (None, "any")]
        counted = CountedShard(path, size, [len(samples) for samples, _, _ in both], [left for _, left, _ in both])
        with lock:
            lines.write(json.dumps(counted) + "\n")
            lines.flush()
        return counted

    return count


def read_counts(url: str, cache: Path) -> list[CountedShard]:
    """The counts of the tars that `url` names: those beside the tars, which all machines see, else those in the cache.

    Raises:
        UsageError: if there are none, with the command that makes them.
    """
    path = _index_file(url, cache)
    try:
        files, remote = _beside(url, path)
        with temporary_file(path) as temporary:
            fetch(files, remote, None, temporary)
            counted = _read(temporary)
            os.replace(temporary, path)
            return counted
    except Exception as error:  # each store has errors of its own for what is not there, or may not be listed
        if not path.is_file():
            raise UsageError(
                f"disk: found no counts of {url!r}, neither in {path.parent} nor beside the tars "
                f"({reason(error)}). Make them once by `{command(url)}`."
            ) from error
    return _read(path)


def command(url: str) -> str:
    return shlex.join(["python", "-m", "hfclip.training.index", url, "--upload"])


def upload(url: str, path: Path) -> str:
    """Puts the file beside the tars.

    Raises:
        UsageError: if the store cannot be written.
    """
    try:
        files, remote = _beside(url, path)
        files.put_file(str(path), remote)
    except Exception as error:  # each store has errors of its own
        raise UsageError(
            f"--upload: {reason(error)}. The counts are in {path}; copy it to the same place on each machine instead."
        ) from error
    return files.unstrip_protocol(remote)


def _index_file(url: str, cache: Path) -> Path:
    return cache / "counts" / f"hfclip-{hashlib.sha256(url.encode()).hexdigest()[:16]}.jsonl"


def _beside(url: str, path: Path) -> tuple[fsspec.AbstractFileSystem, str]:
    """The store, and the place in it of the file of counts: the folder of the first pattern."""
    pattern = patterns_of(url)[0]
    files = open_store(pattern)
    return files, f"{files._strip_protocol(pattern).rpartition('/')[0]}/{path.name}"


def _read(path: Path) -> list[CountedShard]:
    """The whole lines of a file."""
    if not path.is_file():
        return []
    counted = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            counted.append(CountedShard(*json.loads(line)))
        except (ValueError, TypeError):  # the process was killed when it wrote it
            continue
    return counted

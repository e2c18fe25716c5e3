"""Counts the samples of remote tars, so that a run knows them before it fetches any (`data.disk`).

    python training/index.py 's3://bucket/{00000..39999}.tar'

Every tar is read once, several at a time, and none is kept. The counts go line by line into a file in the cache folder:
after Ctrl-C or a crash the same command goes on, and later it reads only those tars whose sizes have changed. A run on
several machines needs the same file on each: `--upload` puts it beside the tars, where runs find it; else copy it.
"""

import argparse
import hashlib
import json
import os
import shlex
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple


if not __package__:  # run as a script, Python looks for modules in this folder; they are named from the one above
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import fsspec

from training.config import DataConfig, UsageError
from training.redaction import redacted
from training.shards import (
    NUM_THREADS,
    check_space,
    in_threads,
    index_tar,
    look_up_all,
    make_folder,
    patterns_of,
    temporary_file,
    usable,
)
from training.stores import fetch, open_store, reason


HOW = ("without data.caption_key", "with one")  # samples may be usable or not


class CountedShard(NamedTuple):
    """A tar as its store names it, and what it holds, without and with a `data.caption_key`."""

    path: str
    size: int
    usable: list[int]
    left_out: list[dict[str, int]]


def main() -> None:
    parser = argparse.ArgumentParser(description="Counts the samples of remote tars for runs with data.disk.")
    parser.add_argument("url", help="what data.train will be")
    parser.add_argument("--cache_dir", default=DataConfig().cache_dir, help="as data.cache_dir (default: %(default)s)")
    parser.add_argument("--upload", action="store_true", help="put the file beside the tars, for all machines")
    arguments = parser.parse_args()
    try:
        if arguments.upload and redacted(arguments.url) != arguments.url:
            raise UsageError(
                "--upload: found credentials in the URL, which the file would publish. Leave --upload out, and copy the "
                "file to the same place on each machine."
            )
        path, counted = count_shards(arguments.url, Path(arguments.cache_dir).expanduser())
        counts = [f"{sum(shard.usable[key] for shard in counted)} usable pairs {how}" for key, how in enumerate(HOW)]
        print(
            f"{len(counted)} tars, {sum(shard.size for shard in counted) / 1e9:,.1f} GB, {', '.join(counts)}: {path}"
        )
        if arguments.upload:
            print(f"Uploaded to {redacted(upload(arguments.url, path))}")
    except UsageError as error:
        print(f"error: {redacted(str(error))}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\nStopped. The same command goes on from here.", file=sys.stderr)
        sys.exit(130)


def count_shards(url: str, cache: Path) -> tuple[Path, list[CountedShard]]:
    """Reads the tars that are not counted yet, and writes the file of all counts.

    Raises:
        UsageError: if there is no tar, or one cannot be had. What was counted until then stays.
    """
    path = _index_file(url, cache)
    partial = path.with_suffix(".partial")
    known = {shard[:2]: shard for file in (path, partial) for shard in _read(file)}
    make_folder(path.parent)
    try:
        files, shards = look_up_all(patterns_of(url))
        shards = [shard[:2] for shard in shards]
        todo = [shard for shard in shards if shard not in known]
        largest = sorted((size or 0 for _, size in todo), reverse=True)[:NUM_THREADS]
        check_space(url, sum(largest), path.parent)
        stop = threading.Event()
        with open(partial, "a", encoding="utf-8") as lines:
            lines.write("\n")  # ends the line at which a killed process may have stopped
            for counted in in_threads(_counter(files, path.parent, lines, stop), todo, "counting samples", stop):
                known[counted.path, counted.size] = counted
    except UsageError:
        raise
    except Exception as error:  # each store has errors of its own
        raise UsageError(f"{url!r} cannot be counted: {reason(error)}") from error
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

    class UntilStopped(fsspec.Callback):
        def call(self, *_, **__) -> None:
            if stop.is_set():
                raise InterruptedError("stopped")

    def count(shard: tuple[str, int | None]) -> CountedShard:
        path, size = shard
        with temporary_file(folder / "tar") as temporary:
            fetch(files, path, size, temporary, UntilStopped())
            members, damage = index_tar(temporary)
            size = temporary.stat().st_size
        both = [usable(members, key, damage) for key in (None, "any")]
        counted = CountedShard(path, size, [int(kept.sum()) for kept, _, _ in both], [left for _, _, left in both])
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
                f"data.disk: found no counts of {url!r}, neither in {path.parent} nor beside the tars "
                f"({reason(error)}). Make them once by `{command(url, cache)}`."
            ) from error
    return _read(path)


def command(url: str, cache: Path) -> str:
    words = ["python", "training/index.py", url, "--upload"]
    if cache != Path(DataConfig().cache_dir).expanduser():
        words += ["--cache_dir", str(cache)]
    return shlex.join(words)


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


if __name__ == "__main__":
    main()

"""WebDataset tars: samples are members with one name, `0001.jpg` with `0001.txt` or `0001.json`."""

import json
import os
import sys
from collections import Counter
from pathlib import Path
from typing import BinaryIO

import numpy as np
from tqdm import tqdm

from ..errors import UsageError
from .samples import CAPTION_KEYS, BadSample, Sample, Source, caption_list
from .shards import in_threads, make_folder
from .tars import load_index, usable


# Bytes that no image and no caption has: what says so is not read into memory.
LARGEST = {"image": 1 << 30, "caption": 1 << 24}

# Where the bytes of a sample lie in its tar. All of them are in memory: 33 bytes each.
_SAMPLE = np.dtype(
    [
        ("image_offset", np.int64),
        ("image_size", np.int64),
        ("caption_offset", np.int64),
        ("caption_size", np.int64),
        ("is_json", np.bool_),
    ]
)


class ShardSource(Source):
    """Uncompressed tars whose samples are neighbouring members with one name: `0001.jpg`, `0001.txt` or `0001.json`.

    The headers of each tar are read once and kept in the cache folder; then each sample is two reads at known offsets.
    Members are never unpacked, so that their names lead nowhere. Links, folders and other kinds of files are ignored;
    a second image or caption of one name begins another sample. Left out and counted are samples without image or
    caption, and what damage to a tar took with it: "truncated shard" (it ends too early), "damaged shard" (something in
    the middle is no header; reading goes on with the next one that is) and "not a tar", each once a tar.
    """

    def __init__(self, shards: list[Path], caption_key: str | None, cache: Path):
        self.shards, self.key = shards, caption_key
        indices = _index_folder(cache)
        found = in_threads(lambda shard: _samples(shard, caption_key, indices), shards, "indexing shards")
        self.skipped = sum((skipped for _, skipped in found), Counter())
        if self.skipped["not a tar"] == len(shards) > 0:
            raise UsageError(f"{shards[0]} is not an uncompressed tar file. Unpack .tar.gz shards first.")
        parts = [samples for samples, _ in found]
        self.index = np.concatenate([np.empty(0, _SAMPLE), *parts])
        self.starts = np.cumsum([0] + [len(part) for part in parts])
        self.length = len(self.index)
        self._check_key()

    def _check_key(self) -> None:
        """Refuses a `caption_key` that the first sample has not, if it has others."""
        if self.key is None or not len(self):
            return
        try:
            record = json.loads(self._read(0, "caption"))
        except (BadSample, ValueError, RecursionError):  # counted when it comes up
            return
        if isinstance(record, dict) and self.key not in record:
            raise UsageError(
                f"caption_key: {self.shards[0].name} has the keys {sorted(record)}, expected {self.key!r} among them. "
                "Set it to the one that holds the captions, or to null where .txt files do."
            )

    def __getitem__(self, index: int) -> Sample:
        shard, row = self._shard_of(index), self._row(index)
        key = f"{self.shards[shard].name}/{int(row['image_offset'])}"
        return Sample(self._read(index, "image"), self.captions(index), key)

    def captions(self, index: int) -> list[str]:
        data = self._read(index, "caption")
        try:
            if not self._row(index)["is_json"]:
                return [data.decode("utf-8")]
            record = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise BadSample("unreadable caption") from error
        if not isinstance(record, dict):
            raise BadSample("unreadable caption")
        key = self.key or next((key for key in CAPTION_KEYS if key in record), None)
        return caption_list(record.get(key))

    def _read(self, index: int, what: str) -> bytes:
        row = self._row(index)
        offset, size = int(row[f"{what}_offset"]), int(row[f"{what}_size"])
        if size > LARGEST[what]:
            raise BadSample("too large image" if what == "image" else "unreadable caption")
        shard = self._shard_of(index)
        try:
            with self._open(shard) as file:
                file.seek(offset)
                data = file.read(size)
        except OSError as error:
            lost = f"{self.shards[shard]} cannot be read any more ({error.strerror or error})"
            raise BadSample("unreadable shard", lost) from error
        if len(data) != size:
            raise BadSample("truncated shard", f"{self.shards[shard]} is shorter than it was")
        return data

    def _shard_of(self, index: int) -> int:
        return int(np.searchsorted(self.starts, index, side="right")) - 1

    def _row(self, index: int) -> np.void:
        return self.index[index]

    def _open(self, shard: int) -> BinaryIO:
        return open(self.shards[shard], "rb", buffering=0)


def _samples(shard: Path, key: str | None, indices: Path | None) -> tuple[np.ndarray, Counter]:
    """The `_SAMPLE` of each usable sample of a tar, and what was left out."""
    try:
        members, damage = load_index(shard, indices)
    except OSError as error:
        raise UsageError(f"{shard} cannot be read: {error.strerror or error}.") from error
    return usable_samples(members, key, damage)


def _index_folder(cache: Path) -> Path | None:
    """Where the indices of tars are kept; None, and a word on the screen, if nothing can be written there."""
    folder = cache / "indices"
    try:
        make_folder(folder)
    except UsageError as error:
        if os.environ.get("LOCAL_RANK", "0") == "0":
            tqdm.write(f"{error} Without it, tars are indexed anew at each start.", file=sys.stderr)
        return None
    return folder


def usable_samples(members: np.ndarray, key: str | None, damage: set[str]) -> tuple[np.ndarray, Counter]:
    """The `_SAMPLE` of each usable sample among the `MEMBERS` of a tar, and what was left out."""
    kept, is_json, left_out = usable(members, key, damage)
    samples = np.empty(int(kept.sum()), _SAMPLE)
    for what in ("offset", "size"):
        samples[f"image_{what}"] = members[f"image_{what}"][kept]
        captions = np.where(is_json, members[f"json_{what}"], members[f"text_{what}"])
        samples[f"caption_{what}"] = captions[kept]
    samples["is_json"] = is_json[kept]
    return samples, left_out

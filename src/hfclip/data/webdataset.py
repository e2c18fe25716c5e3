"""WebDataset tars: members of one name are a sample, `0001.jpg` with `0001.txt`, `0001.json`, `0001.cls` or `0001.npy`."""

import io
import json
import re
from collections import Counter
from pathlib import Path
from typing import BinaryIO

import numpy as np

from ..errors import UsageError
from .files import CLASS_NAMES, NUMBER_OF_SHARDS, read_lines
from .samples import (
    LARGEST,
    BadSample,
    Keys,
    Sample,
    Source,
    json_captions,
    say,
    text_captions,
    too_large,
)
from .shards import make_folder, map_in_threads
from .tars import BLOCK, PLACED, SAMPLE, load_index, name_in, select_samples


class ShardSource(Source):
    """Uncompressed tars, whose members of one name are a sample (`tars.index_tar`).

    The headers of each tar are read once and kept in the cache folder; then each sample is two reads at known offsets.
    Members are never unpacked, so that their names lead nowhere. Links, folders and other kinds of files are ignored.
    Left out and counted are samples without image or caption, and what damage to a tar took with it: "truncated shard"
    (it ends too early), "damaged shard" (something in the middle is no header; reading goes on with the next one that
    is) and "not a tar", each once a tar.

    Where `classnames.txt` lies beside the tars or above, the numbers in .cls members are labels, and the name of its
    class is the caption of a sample without another; a .npy member has a number per class, above 0 for those of the
    image. Where `nshards.txt` lies there, too, as clip-benchmark publishes data, each line of a .txt is a caption.
    """

    a_caption_per_line = False

    def __init__(self, shards: list[Path], keys: Keys, cache: Path):
        super().__init__()
        self.shards, self.key, self.required = shards, keys.caption, keys.required
        self.labels = read_lines(shards[0].parent, CLASS_NAMES)
        if self.labels and all(re.match(r"[a-z_]+:\S", line) for line in self.labels):
            self.labels = None  # values of several attributes, "age:0-2": no sample has a row of them
        self.a_caption_per_line = read_lines(shards[0].parent, NUMBER_OF_SHARDS) is not None
        folder = _index_folder(cache)
        found = map_in_threads(lambda shard: self._samples_of(shard, folder), shards, "indexing shards")
        for _, left_out, examples in found:
            for reason, count in left_out.items():
                self.skip(reason, examples.get(reason), count)
        if self.skipped["not a tar"] == len(shards) > 0:
            raise UsageError(f"{shards[0]} is not an uncompressed tar file. {_how_to_unpack(shards[0])}")
        self.index = np.concatenate([np.empty(0, SAMPLE), *(samples for samples, _, _ in found)])
        self.starts = np.cumsum([0, *(len(samples) for samples, _, _ in found)])
        self.length = len(self.index)
        if self.labels and (self.index["caption_offset"] < 0).any():
            say(f"{shards[0].parent}: the names of {len(self.labels)} classes are captions ({self.labels[0]} ...).")
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
        data = self._read(index, "image", before=BLOCK)
        return Sample(data[BLOCK:], self.captions(index), self._name(index, data[:BLOCK]), self.label(index))

    def name(self, index: int) -> str:
        try:
            with self._open(self._shard_of(index)) as file:
                file.seek(int(self._row(index)["image_offset"]) - BLOCK)
                return self._name(index, file.read(BLOCK))
        except OSError:  # the tar is gone
            return self._name(index, b"")

    def _name(self, index: int, header: bytes) -> str:
        name = name_in(header) or f"byte {self._row(index)['image_offset']}"
        return f"{self.shards[self._shard_of(index)].name}/{name}"

    def captions(self, index: int) -> list[str]:
        row = self._row(index)
        if row["caption_offset"] >= 0:
            kind = PLACED[row["kind"]]
            if kind == "labels":
                return [self.labels[number] for number in np.flatnonzero(self.label_row(index) > 0)]
            data = self._read(index, "caption")
            if kind == "json":
                return json_captions(data, self.key)
            (text,) = text_captions(data)
            return text.splitlines() if self.a_caption_per_line else [text]
        if not self.labels or row["label"] < 0:
            return []
        if row["label"] >= len(self.labels):
            raise BadSample("unreadable caption") from IndexError(
                f"found class {row['label']}, expected 0 to {len(self.labels) - 1}, a line of {CLASS_NAMES}"
            )
        return [self.labels[row["label"]]]

    def label(self, index: int) -> int | None:
        """The number of a sample's class, if the classes have names and it has one."""
        number = int(self._row(index)["label"])
        return number if self.labels and number >= 0 else None

    def label_row(self, index: int) -> np.ndarray | None:
        row = self._row(index)
        if not self.labels or row["caption_offset"] < 0 or PLACED[row["kind"]] != "labels":
            return None
        try:
            numbers = np.load(io.BytesIO(self._read(index, "caption")), allow_pickle=False)
        except (ValueError, EOFError) as error:
            raise BadSample("unreadable caption") from error
        if numbers.shape != (len(self.labels),) or numbers.dtype.kind not in "biuf":
            raise BadSample("unreadable caption") from ValueError(
                f"found {numbers.dtype} {numbers.shape}, expected a number for each of {len(self.labels)} lines of "
                f"{CLASS_NAMES}"
            )
        return numbers

    def _read(self, index: int, what: str, before: int = 0) -> bytes:
        """The bytes of a member, and those `before` it."""
        row = self._row(index)
        offset, size = int(row[f"{what}_offset"]) - before, int(row[f"{what}_size"]) + before
        if size > LARGEST[what] + before:
            raise too_large(what)
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

    def _samples_of(self, shard: Path, folder: Path | None) -> tuple[np.ndarray, Counter, dict[str, str]]:
        """The `SAMPLE` of each usable sample of a tar; what was left out, with examples."""
        try:
            members, damage = load_index(shard, folder)
            samples, left_out, places = select_samples(
                members, self.key, damage, self.labels is not None, self.required, self.required
            )
            examples = {reason: f"{shard.name}/{_name_at(shard, int(place))}" for reason, place in places.items()}
        except OSError as error:
            raise UsageError(f"{shard} cannot be read: {error.strerror or error}.") from error
        return samples, left_out, examples | dict.fromkeys(damage, shard.name)


def _index_folder(cache: Path) -> Path | None:
    """Where the indices of tars are kept; None, and a word on the screen, if nothing can be written there."""
    folder = cache / "indices"
    try:
        make_folder(folder)
    except UsageError as error:
        say(f"{error} Without it, tars are indexed anew at each start.")
        return None
    return folder


def _name_at(shard: Path, offset: int) -> str | None:
    with open(shard, "rb") as file:
        file.seek(offset - BLOCK)
        return name_in(file.read(BLOCK))


def _how_to_unpack(shard: Path) -> str:
    with open(shard, "rb") as file:
        if file.read(2) != b"\x1f\x8b":
            return "Fetch it again, or leave it out."
    return f"It is compressed. Unpack it by `gunzip < {shard} > {shard.with_suffix('')}-unpacked.tar`."

"""Where pairs come from: WebDataset tars, tables that `datasets` reads, the built-in scenes, and mixtures of them.

A source is a sequence of raw samples, `source[i] -> (encoded image, captions)`, read at random and never decoded here,
so that the order of the data is the sampler's alone. `open_source` finds out what a name means; whatever is wrong with
the whole is a `UsageError` before the run starts, whatever is wrong with one sample is a `BadSample` when it is read.
"""

import glob
import hashlib
import json
import math
import os
import re
import sys
import unicodedata
from collections import Counter
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np
from PIL import Image
from tqdm import tqdm

from hfclip.bpe_hfclip import clean
from hfclip.data.scenes import Scenes

from .config import DataConfig, UsageError
from .index import command, read_counts
from .shards import ShardCache, find_shards, in_threads, load_index, make_folder, patterns_of, usable


IMAGE_KEYS = ("image", "jpg", "png", "img")
CAPTION_KEYS = ("text", "caption", "captions", "texts", "sentences")
HELD_OUT = ("test", "validation", "val", "dev")  # splits, in the order of preference
NUM_SCENES = 50_000
INVISIBLE = ("Cc", "Cf", "Mn", "Zl", "Zp", "Zs")  # in Unicode: control, format, marks on nothing, and white space


class BadSample(Exception):
    """A sample that cannot be used; `kind` is what it is counted under, and `lost` tells of what went with it, if more
    than the sample itself is gone since the run began."""

    def __init__(self, kind: str, lost: str | None = None):
        super().__init__(kind)
        self.kind, self.lost = kind, lost


def not_blank(captions: list[str]) -> list[str]:
    """Those of which something is left when they are cleaned: no blanks, also in HTML (`&nbsp;`), marks of byte order or
    characters without width."""
    return [caption.strip() for caption in captions if not _is_blank(caption)]


def _is_blank(caption: str) -> bool:
    if "&" not in caption and re.search("[a-zA-Z0-9]", caption):  # nearly all, without the slow cleaning
        return False
    return all(unicodedata.category(sign) in INVISIBLE for sign in clean(caption))


class Source(Protocol):
    """Raw samples. `skipped` counts, by kind, what was left out when the source was opened."""

    skipped: Counter

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[bytes | Image.Image, list[str]]: ...

    def captions(self, index: int) -> list[str]: ...


def open_source(name: str | dict[str, float], config: DataConfig, split: str | None, image_size: int) -> Source:
    """Opens what `data.train` or `eval.retrieval` names.

    Args:
        name: Of one source, or a mapping of names to weights: a `MixtureSource`. All its sources are read with the
            same settings.
        split: of the built-in scenes, and of what `datasets` loads. None: the one that is held out.
        image_size: side in pixels of the built-in scenes.

    Raises:
        UsageError: where nothing usable is found, or a weight is not a number above 0.
    """
    if isinstance(name, dict):
        if config.disk is not None and name == config.train:
            raise UsageError("data.disk: found a mixture, expected one URL of tars. Unset it, or train on one source.")
        _check_weights(name)
        sources = {str(key): open_source(str(key), config, split, image_size) for key in name}
        return MixtureSource(sources, list(name.values()), config.max_samples)
    if config.disk is not None and name == config.train:
        return StreamSource(name, config)
    if name == "scenes":
        return SceneSource(split or "test", image_size, config.max_samples or NUM_SCENES)
    shards = find_shards(name, Path(config.cache_dir).expanduser())
    source = ShardSource(shards, config) if shards else TableSource.load(name, config, split)
    if len(source) == 0:
        raise UsageError(f"{name!r} holds no usable pair of image and caption. {_describe_counts(source.skipped)}")
    return source


def _check_weights(mixture: dict) -> None:
    if not mixture:
        raise UsageError("data.train: found an empty mapping, expected names of sources with their weights.")
    for name, weight in mixture.items():
        is_number = isinstance(weight, (int, float)) and not isinstance(weight, bool)
        if not (is_number and 0 < weight < math.inf):
            raise UsageError(
                f"data.train: {name!r} has the weight {weight!r}, expected a number above 0. Leave a source out that "
                "is not to be used."
            )


def num_samples(source: Source, config: DataConfig) -> int:
    """How many samples of a source training may use."""
    # A mixture has applied data.max_samples to each of its sources.
    limit = None if isinstance(source, MixtureSource) else config.max_samples
    return min(len(source), limit or len(source))


def _describe_counts(counts: Counter) -> str:
    return "Left out: " + (", ".join(f"{n} with {kind}" for kind, n in counts.items()) or "nothing") + "."


class MixtureSource:
    """Several sources, one after the other, and the weights by which batches are filled from them (`data.Order`).

    A weight is a source's share of each batch, relative to the other weights, whatever its size. Where data.max_samples
    is set, it holds for each source. An epoch of the run is as many pairs as the sources have together.
    """

    def __init__(self, sources: dict[str, Source], weights: list[float], max_samples: int | None = None):
        self.names, self.sources, self.weights = list(sources), list(sources.values()), weights
        self.lengths = [min(len(source), max_samples or len(source)) for source in self.sources]
        self.starts = np.cumsum([0, *self.lengths])
        self.skipped = sum((source.skipped for source in self.sources), Counter())

    def __len__(self) -> int:
        return sum(self.lengths)

    def __getitem__(self, index: int) -> tuple[bytes | Image.Image, list[str]]:
        source, index = self._find(index)
        return source[index]

    def captions(self, index: int) -> list[str]:
        source, index = self._find(index)
        return source.captions(index)

    def _find(self, index: int) -> tuple[Source, int]:
        number = int(np.searchsorted(self.starts, index, side="right")) - 1
        return self.sources[number], int(index - self.starts[number])


# ---------------------------------------------------------------------------------------------------------------------
# Built-in scenes
# ---------------------------------------------------------------------------------------------------------------------


class SceneSource:
    """The demonstration scenes of `hfclip.data.scenes`."""

    def __init__(self, split: str, image_size: int, num_scenes: int):
        self.scenes = Scenes(split, size=image_size, num_scenes=num_scenes)
        self.skipped = Counter()

    def __len__(self) -> int:
        return len(self.scenes)

    def __getitem__(self, index: int) -> tuple[Image.Image, list[str]]:
        scene = self.scenes[index]
        return scene["image"], [scene["text"]]

    def captions(self, index: int) -> list[str]:
        return [self.scenes.caption(index)]


# ---------------------------------------------------------------------------------------------------------------------
# WebDataset tars
# ---------------------------------------------------------------------------------------------------------------------


# Bytes that no picture and no caption has: what says so is not read into memory.
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


class ShardSource:
    """Uncompressed tars whose samples are neighbouring members with one name: `0001.jpg`, `0001.txt` or `0001.json`.

    The headers of each tar are read once and kept in the cache folder; then each sample is two reads at known offsets.
    Members are never unpacked, so that their names lead nowhere. Links, folders and other kinds of files are ignored;
    a second image or caption of one name begins another sample. Left out and counted are samples without image or
    caption, and what damage to a tar took with it: "truncated shard" (it ends too early), "damaged shard" (something in
    the middle is no header; reading goes on with the next one that is) and "not a tar", each once a tar.
    """

    def __init__(self, shards: list[Path], config: DataConfig):
        self.shards, self.key = shards, config.caption_key
        self.cache = _indices(config)
        found = in_threads(self._samples, shards, "indexing shards")
        self.skipped = sum((skipped for _, skipped in found), Counter())
        if self.skipped["not a tar"] == len(shards) > 0:
            raise UsageError(f"{shards[0]} is not an uncompressed tar file. Unpack .tar.gz shards first.")
        parts = [samples for samples, _ in found]
        self.index = np.concatenate([np.empty(0, _SAMPLE), *parts])
        self.starts = np.cumsum([0] + [len(part) for part in parts])
        self._check_key()

    def _check_key(self) -> None:
        """Refuses a `data.caption_key` that the first sample has not, if it has others."""
        if self.key is None or not len(self):
            return
        try:
            record = json.loads(self._read(0, "caption"))
        except (BadSample, ValueError, RecursionError):  # counted when it comes up
            return
        if isinstance(record, dict) and self.key not in record:
            raise UsageError(
                f"data.caption_key: {self.shards[0].name} has the keys {sorted(record)}, expected {self.key!r} among "
                "them. Set it to the one that holds the captions, or to null where .txt files do."
            )

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, index: int) -> tuple[bytes, list[str]]:
        return self._read(index, "image"), self.captions(index)

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
        return _caption_list(record.get(key))

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

    def _samples(self, shard: Path) -> tuple[np.ndarray, Counter]:
        """The `_SAMPLE` of each usable sample of a tar, and what was left out."""
        try:
            members, damage = load_index(shard, self.cache)
        except OSError as error:
            raise UsageError(f"{shard} cannot be read: {error.strerror or error}.") from error
        return _usable_samples(members, self.key, damage)


def _indices(config: DataConfig) -> Path | None:
    """Where the indices of tars are kept; None, and a word on the screen, if nothing can be written there."""
    folder = Path(config.cache_dir).expanduser() / "indices"
    try:
        make_folder(folder)
    except UsageError as error:
        if os.environ.get("LOCAL_RANK", "0") == "0":
            tqdm.write(f"{error} Without it, tars are indexed anew at each start.", file=sys.stderr)
        return None
    return folder


def _usable_samples(members: np.ndarray, key: str | None, damage: set[str]) -> tuple[np.ndarray, Counter]:
    kept, is_json, left_out = usable(members, key, damage)
    samples = np.empty(int(kept.sum()), _SAMPLE)
    for what in ("offset", "size"):
        samples[f"image_{what}"] = members[f"image_{what}"][kept]
        captions = np.where(is_json, members[f"json_{what}"], members[f"text_{what}"])
        samples[f"caption_{what}"] = captions[kept]
    samples["is_json"] = is_json[kept]
    return samples, left_out


class StreamSource(ShardSource):
    """Remote tars of which the machine keeps `data.disk` gigabytes: those read last, and those that come next.

    A file of counts (`training/index.py`) says how many samples each holds, so that the order of the data is known
    before any is fetched. Reading a sample fetches its tar if it is not there.

    Args:
        name: URL of the tars.

    Raises:
        UsageError: if there are no counts, if `name` is no URL of tars; later, where a sample is read, if its tar cannot
            be fetched or is not the one that was counted.
    """

    ROWS_IN_MEMORY = 256  # tars of which each process remembers where the samples lie

    def __init__(self, name: str, config: DataConfig):
        urls, folder = patterns_of(name), Path(config.cache_dir).expanduser()
        if not all("://" in url and url.endswith((".tar", "/")) for url in urls):
            raise UsageError(
                f"data.disk: {name!r} is no URL of tars (s3://bucket/{{0000..0999}}.tar). Unset it: only those are "
                "fetched while a run goes on; local tars are read in place."
            )
        self.key, counted = config.caption_key, read_counts(name, folder)
        which = int(self.key is not None)
        self.counts = [shard.usable[which] for shard in counted]
        self.starts = np.cumsum([0, *self.counts])
        self.skipped = sum((Counter(shard.left_out[which]) for shard in counted), Counter())
        self.shards = [Path(shard.path) for shard in counted]
        self.count_again = command(name, folder)
        self.cache = ShardCache(urls[0], [shard[:2] for shard in counted], folder / "streamed", int(config.disk * 1e9))
        self.fingerprint = hashlib.sha256(repr(counted).encode()).hexdigest()
        self.rows: dict[int, np.ndarray] = {}
        if len(self) == 0:
            raise UsageError(f"{name!r} holds no usable pair of image and caption. {_describe_counts(self.skipped)}")
        self._check_key()

    def __len__(self) -> int:
        return int(self.starts[-1])

    def prefetch(self, shards: list[int]) -> None:
        """Begins to fetch tars that are going to be read, the first ones first."""
        self.cache.prefetch(shards)

    def _row(self, index: int) -> np.void:
        shard = self._shard_of(index)
        rows = self.rows.pop(shard, None)
        if rows is None:
            rows, _ = _usable_samples(self.cache.members(shard), self.key, set())
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


# ---------------------------------------------------------------------------------------------------------------------
# Tables
# ---------------------------------------------------------------------------------------------------------------------


class TableSource:
    """A table that `datasets` reads (parquet, image folder, Hub): one column of images, one of captions."""

    def __init__(self, table, image_key: str, caption_key: str):
        from datasets import Image as ImageFeature

        self.table = table.select_columns([image_key, caption_key]).cast_column(image_key, ImageFeature(decode=False))
        self.texts = table.select_columns([caption_key])
        self.image_key, self.caption_key = image_key, caption_key
        self.skipped = Counter()

    @classmethod
    def load(cls, name: str, config: DataConfig, split: str | None) -> "TableSource":
        table = _load_table(name, split)
        image_key = _find_column(table.column_names, config.image_key, IMAGE_KEYS, "data.image_key", name)
        caption_key = _find_column(table.column_names, config.caption_key, CAPTION_KEYS, "data.caption_key", name)
        return cls(table, image_key, caption_key)

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int) -> tuple[bytes, list[str]]:
        row = self._row(self.table, index)
        image = row[self.image_key]
        if image is None:
            raise BadSample("missing image")
        if image["bytes"] is None:
            path = Path(image["path"])
            try:
                image["bytes"] = path.read_bytes()
            except OSError as error:
                lost = f"images of {path.parent} cannot be read any more ({error.strerror or error})"
                raise BadSample("missing image", lost) from error
        return image["bytes"], self._captions(row)

    def captions(self, index: int) -> list[str]:
        return self._captions(self._row(self.texts, index))

    def _row(self, table, index: int) -> dict:
        try:
            return table[index]
        except UnicodeDecodeError as error:
            raise BadSample("unreadable caption") from error

    def _captions(self, row: dict) -> list[str]:
        return _caption_list(row[self.caption_key])


def _caption_list(value: Any) -> list[str]:
    """A caption or a list of captions as a list."""
    captions = [value] if isinstance(value, str) else value
    if captions is None:
        raise BadSample("missing caption")
    if not isinstance(captions, list) or not all(isinstance(caption, str) for caption in captions):
        raise BadSample("unreadable caption")
    try:
        "".join(captions).encode()
    except UnicodeEncodeError as error:  # half a character, which JSON can say: "\\ud83d"
        raise BadSample("unreadable caption") from error
    return captions


def _load_table(name: str, split: str | None):
    from datasets import load_dataset

    path = Path(name).expanduser()
    # "owner/name" may be on the Hub; but not if "owner" is a folder here.
    looks_local = name.startswith((".", "/", "~")) or name.count("/") > 1 or "/" in name and path.parent.is_dir()
    if looks_local and "://" not in name and not glob.glob(str(path)):
        raise UsageError(f"{name!r}: found neither a file nor a folder there.")
    if path.is_dir() and not any(path.iterdir()):
        raise UsageError(f"{name!r} is an empty folder, expected tars, parquet files or images with metadata.")
    try:
        if name.endswith(".parquet"):
            return load_dataset("parquet", data_files=str(path) if "://" not in name else name, split="train")
        found = str(path) if path.exists() else name
        if path.exists() or split is None:
            split = _split_of(found, split)
        return load_dataset(found, split=split)
    except UsageError:
        raise
    except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: a data set that is a script
        raise UsageError(
            f"{name!r} is neither tars, parquet files nor an image folder here, and `datasets` cannot load it with "
            f"data.split {split!r}: {error}"
        ) from error


def _split_of(name: str, split: str | None) -> str:
    """The split that is asked for, or one that is held out where none is; but the only one, whatever it is called."""
    from datasets import get_dataset_split_names

    splits = get_dataset_split_names(name)
    # "test[:100]" is an expression, not a name.
    if len(splits) == 1 and (split is None or split.isidentifier()):
        return splits[0]
    if split is None and not (split := next((held_out for held_out in HELD_OUT if held_out in splits), None)):
        raise UsageError(
            f"eval.retrieval: {name!r} has the splits {splits}, expected {' or '.join(HELD_OUT)} among them. Name a "
            "folder or file that holds the pairs of the evaluation alone."
        )
    return split


def _find_column(columns: list[str], asked: str | None, usual: tuple[str, ...], setting: str, name: str) -> str:
    column = asked or next((key for key in usual if key in columns), None)
    if column not in columns:
        raise UsageError(
            f"{name!r}: found the columns {columns}, expected {asked or ' or '.join(usual)}; set {setting}."
        )
    return column

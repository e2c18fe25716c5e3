"""Where pairs come from: WebDataset tars, tables that `datasets` reads, and the built-in scenes.

A source is a sequence of raw samples, `source[i] -> (encoded image, captions)`, read at random and never decoded here,
so that the order of the data is the sampler's alone. `open_source` finds out what a name means; whatever is wrong with
the whole is a `UsageError` before the run starts, whatever is wrong with one sample is a `BadSample` when it is read.
"""

import glob
import hashlib
import json
import os
import re
import tarfile
from collections import Counter
from pathlib import Path
from typing import Protocol

import fsspec
import numpy as np
from fsspec.callbacks import TqdmCallback
from PIL import Image
from tqdm import tqdm

from hfclip.data.scenes import Scenes

from .config import DataConfig, UsageError


IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
IMAGE_KEYS = ("image", "jpg", "png", "img")
CAPTION_KEYS = ("text", "caption", "captions", "texts", "sentences")
NUM_SCENES = 50_000


class BadSample(Exception):
    """A sample that cannot be used; `kind` is what it is counted under."""

    def __init__(self, kind: str):
        super().__init__(kind)
        self.kind = kind


class Source(Protocol):
    """Raw samples. `skipped` counts, by kind, what was left out when the source was opened."""

    skipped: Counter

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[bytes | Image.Image, list[str]]: ...

    def captions(self, index: int) -> list[str]: ...


def open_source(name: str, config: DataConfig, split: str, image_size: int) -> Source:
    """Opens what `data.train` or `eval.retrieval` names.

    Args:
        split: of the built-in scenes, and of what `datasets` loads.
        image_size: side in pixels of the built-in scenes.

    Raises:
        UsageError: where nothing usable is found.
    """
    if name == "scenes":
        return SceneSource(split, image_size, config.max_samples or NUM_SCENES)
    shards = find_shards(name, Path(config.cache_dir).expanduser())
    source = ShardSource(shards, config) if shards else TableSource.load(name, config, split)
    if len(source) == 0:
        raise UsageError(f"{name!r} holds no usable pair of image and caption. {_describe_counts(source.skipped)}")
    return source


def _describe_counts(counts: Counter) -> str:
    return "Left out: " + (", ".join(f"{n} with {kind}" for kind, n in counts.items()) or "nothing") + "."


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

# Where one sample's members lie in its tar: byte offset and size, -1 where there is none.
_MEMBERS = [(f"{member}_{what}", np.int64) for member in ("image", "text", "json") for what in ("offset", "size")]


class ShardSource:
    """Uncompressed tars whose samples are neighbouring members with one name: `0001.jpg`, `0001.txt` or `0001.json`.

    The headers of each tar are read once and kept in the cache folder; then each sample is two reads at known offsets.
    Samples without image or caption are left out here, and counted.
    """

    def __init__(self, shards: list[Path], config: DataConfig):
        self.shards, self.key = shards, config.caption_key
        self.skipped = Counter()
        cache = Path(config.cache_dir).expanduser() / "indices"
        bar = tqdm(shards, desc="indexing shards", unit="tar", disable=None)
        parts = [self._usable(self._load_index(shard, cache)) for shard in bar]
        self.index = np.concatenate(parts) if parts else np.empty(0, _MEMBERS)
        self.starts = np.cumsum([0] + [len(part) for part in parts])
        self._check_key()

    def _check_key(self) -> None:
        """Refuses a `data.caption_key` that the first sample has not, if it has others."""
        if self.key is None or not len(self):
            return
        row = self.index[0]
        try:
            record = json.loads(self._read(0, row["json_offset"], row["json_size"]))
        except (BadSample, json.JSONDecodeError, UnicodeDecodeError):  # counted when it comes up
            return
        if isinstance(record, dict) and self.key not in record:
            raise UsageError(
                f"data.caption_key: {self.shards[0].name} has the keys {sorted(record)}, expected {self.key!r} among "
                "them. Set it to the one that holds the captions, or to null where .txt files do."
            )

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, index: int) -> tuple[bytes, list[str]]:
        row = self.index[index]
        image, caption = self._read(index, row["image_offset"], row["image_size"]), self.captions(index)
        return image, caption

    def captions(self, index: int) -> list[str]:
        row = self.index[index]
        if row["text_offset"] >= 0 and self.key is None:
            try:
                return [self._read(index, row["text_offset"], row["text_size"]).decode("utf-8")]
            except UnicodeDecodeError as error:
                raise BadSample("unreadable caption") from error
        try:
            record = json.loads(self._read(index, row["json_offset"], row["json_size"]))
            key = self.key or next(key for key in CAPTION_KEYS if key in record)
            return _caption_list(record[key])
        except (ValueError, KeyError, TypeError, StopIteration) as error:
            raise BadSample("unreadable caption") from error

    def _read(self, index: int, offset: int, size: int) -> bytes:
        shard = self.shards[np.searchsorted(self.starts, index, side="right") - 1]
        with open(shard, "rb", buffering=0) as file:
            file.seek(offset)
            data = file.read(size)
        if len(data) != size:
            raise BadSample("truncated shard")
        return data

    def _usable(self, index: np.ndarray) -> np.ndarray:
        has_image = index["image_offset"] >= 0
        has_caption = index["json_offset"] >= 0
        if self.key is None:
            has_caption |= index["text_offset"] >= 0
        self.skipped.update({"missing image": int((~has_image).sum()), "missing caption": int((~has_caption).sum())})
        self.skipped = +self.skipped  # without zeros
        return index[has_image & has_caption]

    def _load_index(self, shard: Path, cache: Path) -> np.ndarray:
        state = shard.stat()
        identity = f"{shard.resolve()}|{state.st_size}|{state.st_mtime_ns}"
        path = cache / f"{hashlib.sha256(identity.encode()).hexdigest()[:32]}.npy"
        if path.is_file():
            return np.load(path)
        index, complete = _index_tar(shard)
        if complete:
            cache.mkdir(parents=True, exist_ok=True)
            temporary = path.with_name(f"{path.stem}.{os.getpid()}.tmp.npy")
            np.save(temporary, index)
            os.replace(temporary, path)
        else:
            self.skipped["truncated shard"] += 1
        return index


def _index_tar(shard: Path) -> tuple[np.ndarray, bool]:
    """The `_MEMBERS` of each sample, and whether the tar is whole."""
    rows, last_name, complete = [], None, False
    try:
        with tarfile.open(shard, "r:") as tar:
            for member in tar:
                tar.members.clear()  # else tarfile keeps every header in memory
                folder, _, base = member.name.rpartition("/")
                stem, _, extension = base.partition(".")
                extension = extension.lower()
                kind = "image" if extension in IMAGE_EXTENSIONS else {"txt": "text"}.get(extension, extension)
                if not member.isfile() or kind not in ("image", "text", "json"):
                    continue
                if (folder, stem) != last_name:
                    last_name = (folder, stem)
                    rows.append(dict.fromkeys((name for name, _ in _MEMBERS), -1))
                rows[-1] |= {f"{kind}_offset": member.offset_data, f"{kind}_size": member.size}
            tar.fileobj.seek(tar.offset)  # a whole tar ends with blocks of zeros; tarfile does not insist on them
            complete = tar.fileobj.read(tarfile.BLOCKSIZE) == bytes(tarfile.BLOCKSIZE)
    except tarfile.ReadError as error:
        if not rows:
            raise UsageError(
                f"{shard} is not an uncompressed tar file: {error}. Unpack .tar.gz shards first."
            ) from error
    return np.array([tuple(row.values()) for row in rows], _MEMBERS), complete


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
    try:
        files, found = fsspec.url_to_fs(urls[0])[0], []
        for url in urls:
            url += "*.tar" if url.endswith("/") else ""
            path = files._strip_protocol(url)
            if url.endswith(".tar"):
                found += sorted(files.glob(path)) if glob.has_magic(path) else [path]
        return [_fetch(files, path, cache, f"{number}/{len(found)}") for number, path in enumerate(found, 1)]
    except (OSError, ValueError, ImportError) as error:
        raise UsageError(f"{urls[0]!r} cannot be fetched: {type(error).__name__}: {error}") from error


def _fetch(files: fsspec.AbstractFileSystem, path: str, cache: Path, number: str) -> Path:
    size = files.info(path).get("size")
    folder = cache / hashlib.sha256(files.unstrip_protocol(path).encode()).hexdigest()[:16]
    local = folder / path.rsplit("/", 1)[-1]
    if local.is_file() and size in (None, local.stat().st_size):
        return local
    folder.mkdir(parents=True, exist_ok=True)
    temporary = local.with_name(f"{local.name}.{os.getpid()}.tmp")
    bar = {"desc": f"fetching {number} {local.name}", "unit": "B", "unit_scale": True, "leave": False}
    files.get_file(path, str(temporary), callback=TqdmCallback(tqdm_kwargs=bar))
    if size not in (None, temporary.stat().st_size):
        raise OSError(f"{path} broke off after {temporary.stat().st_size} of {size} bytes; run again to fetch it anew")
    os.replace(temporary, local)
    return local


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
    def load(cls, name: str, config: DataConfig, split: str) -> "TableSource":
        table = _load_table(name, split)
        image_key = _find_column(table.column_names, config.image_key, IMAGE_KEYS, "data.image_key", name)
        caption_key = _find_column(table.column_names, config.caption_key, CAPTION_KEYS, "data.caption_key", name)
        return cls(table, image_key, caption_key)

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int) -> tuple[bytes, list[str]]:
        row = self.table[index]
        image = row[self.image_key]
        if image is None:
            raise BadSample("missing image")
        if image["bytes"] is None:
            try:
                image["bytes"] = Path(image["path"]).read_bytes()
            except OSError as error:
                raise BadSample("missing image") from error
        return image["bytes"], self._captions(row)

    def captions(self, index: int) -> list[str]:
        return self._captions(self.texts[index])

    def _captions(self, row: dict) -> list[str]:
        if row[self.caption_key] is None:
            raise BadSample("missing caption")
        try:
            return _caption_list(row[self.caption_key])
        except TypeError as error:
            raise BadSample("unreadable caption") from error


def _caption_list(value: str | list[str]) -> list[str]:
    captions = [value] if isinstance(value, str) else value
    if not isinstance(captions, list) or not all(isinstance(caption, str) for caption in captions):
        raise TypeError("expected a caption or a list of captions")
    return captions


def _load_table(name: str, split: str):
    from datasets import get_dataset_split_names, load_dataset

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
        if path.exists():
            splits = get_dataset_split_names(str(path))
            # A folder without splits has but one, whatever it is called. "test[:100]" is an expression, not a name.
            if split.isidentifier() and split not in splits and len(splits) == 1:
                split = splits[0]
            return load_dataset(str(path), split=split)
        return load_dataset(name, split=split)
    except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: a data set that is a script
        raise UsageError(
            f"{name!r} is neither tars, parquet files nor an image folder here, and `datasets` cannot load it with "
            f"data.split {split!r}: {error}"
        ) from error


def _find_column(columns: list[str], asked: str | None, usual: tuple[str, ...], setting: str, name: str) -> str:
    column = asked or next((key for key in usual if key in columns), None)
    if column not in columns:
        raise UsageError(
            f"{name!r}: found the columns {columns}, expected {asked or ' or '.join(usual)}; set {setting}."
        )
    return column

"""Where samples come from, by name: built-in scenes, WebDataset tars, tables, and mixtures of them."""

import glob
import itertools
import math
import os
import posixpath
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from ..errors import UsageError
from ..names import means_folder, nearest_folder
from ..open_image_hfclip import open_image
from .files import CLASS_NAMES, Files
from .folders import METADATA, SPLITS, TABLES, choose_split, ending, open_folder, open_tables
from .samples import HOW_CAPTIONS_ARE_GIVEN, IMAGE_ENDINGS, BadSample, Keys, Sample, Source, decoding, not_blank
from .scenes import Scenes
from .shards import COMPRESSED, cache_folder, find_shards, patterns_of, refuse_compressed
from .stores import reason
from .streaming import StreamSource
from .tables import open_hub, open_parquet, open_parquet_folder, open_saved
from .webdataset import ShardSource


NUM_SCENES = 50_000
NUM_PROBED = 8  # samples that are read when a source is opened
READ = (".tar", ".parquet", ".csv", ".tsv", ".jsonl", ".json", ".zip")


def open_source(
    name: str | Mapping[str, float],
    *,
    split: str | None = None,
    image_key: str | None = None,
    caption_key: str | None = None,
    require_captions: bool = True,
    max_samples: int | None = None,
    image_size: int = 224,
    cache_dir: str | os.PathLike | None = None,
    disk: float | None = None,
) -> Source:
    """Opens image-caption data by its name.

    Args:
        name: "scenes", a path, a URL, a pattern of these, or a data set on the Hub. A mapping of names to weights mixes
            them: a `MixtureSource`, whose sources are all read with the same settings.
        split: of the built-in scenes, of folders that are named as splits are, and of what `datasets` loads. None: the
            one that is held out.
        image_key: column of the images in a table. None: the usual names, whichever is there.
        caption_key: column of the captions, or their key in .json members of tars. None: .txt members, else the usual
            names.
        require_captions: leaves out samples without captions. If not, such a sample has an empty list of them.
        max_samples: uses only this number of samples, the first ones; of a mixture, those of each source.
        image_size: side in pixels of the built-in scenes.
        cache_dir: where remote files and the indices of tars are kept. None: `cache_folder()`.
        disk: gigabytes of remote tars that are kept at a time (`StreamSource`). None: all are fetched first.

    Raises:
        UsageError: where nothing usable is found, or a weight is not a number above 0.
    """
    cache = Path(cache_dir).expanduser() if cache_dir else cache_folder()
    keys = Keys(image_key, caption_key, require_captions)
    if isinstance(name, Mapping):
        if disk is not None:
            raise UsageError("disk: found a mixture, expected one URL of tars. Unset it, or name one source.")
        _check_weights(name)
        options = dict(zip(("image_key", "caption_key", "require_captions"), keys, strict=True))
        options |= dict(split=split, max_samples=max_samples, image_size=image_size, cache_dir=cache_dir)
        sources = {str(key): open_source(str(key), **options) for key in name}
        return MixtureSource(sources, list(name.values()))
    if name == "scenes" and disk is None:
        return SceneSource(split or "test", image_size, max_samples or NUM_SCENES)
    if disk is not None:
        source = StreamSource(name, caption_key, cache, int(disk * 1e9))
    else:
        try:
            source = _open(name, split, keys, cache)
        except ImportError as error:
            raise UsageError(f"{name!r} is read by {error.name}: `pip install {error.name}`.") from error
    if len(source) == 0:
        raise UsageError(
            f"{name!r} holds no usable pair of image and caption. Left out: {source.describe_skipped() or 'nothing'}. "
            f"{HOW_CAPTIONS_ARE_GIVEN}"
        )
    if disk is None:
        _check_some(name, source, require_captions)
    source.length = min(source.length, max_samples or source.length)
    return source


def _open(name: str, split: str | None, keys: Keys, cache: Path) -> Source:
    """What is read in place, by the kind of what is there."""
    if shards := find_shards(name, cache):
        folders = [Files(place) for place in patterns_of(name) if os.path.isdir(place)]
        return _open_shards(shards, [(files, files.names()) for files in folders], keys, cache)
    places = list(itertools.chain(*map(_matching, patterns_of(name))))
    kinds = sorted({_kind_of(place) for place in places})
    if len(kinds) > 1 or len(places) > 1 and kinds[0] not in (*TABLES, "image"):
        raise UsageError(
            f"{name!r} names {len(places)} places ({places[0]!r}, {places[1]!r} ...), expected one folder, zip file or "
            "data set, or several tables of one kind. Mix others by weights: {name: 1, other: 1}."
        )
    kind, place = kinds[0], places[0]
    if kind == "hub":
        return open_hub(place, split, keys)
    if kind == "image":
        return _open_images(places, keys)
    if kind == "parquet":
        return open_parquet(places, keys)
    if kind in TABLES:
        root = os.path.commonprefix([posixpath.dirname(table) + "/" for table in places]).rpartition("/")[0]
        root = root if posixpath.dirname(place) else "."
        return open_tables(Files(root), [table.removeprefix(f"{root}/") for table in places], keys)
    try:
        return _open_folder(Files(place), split, keys, cache)
    except (OSError, zipfile.BadZipFile, NotImplementedError) as error:
        raise UsageError(f"{name!r} cannot be read: {reason(error)}") from error


def _matching(pattern: str) -> list[str]:
    """What a pattern without braces names; itself, if it is none."""
    if "://" in pattern or not glob.has_magic(pattern) or os.path.exists(pattern):
        return [pattern]
    return sorted(glob.glob(pattern)) or [pattern]


def _kind_of(place: str) -> str:
    """What is there: a table by its ending, "zip", "folder" or "hub". Raises UsageError where nothing is."""
    kind, is_url = ending(place), "://" in place
    if os.path.isdir(place) or is_url and kind not in (*TABLES, "zip"):
        return "folder"
    if (is_url or os.path.exists(place)) and kind in (*TABLES, "zip"):
        return kind
    if os.path.exists(place):
        if kind in IMAGE_ENDINGS:
            return "image"
        raise UsageError(f"{place!r} is a file that is not read, expected one of {', '.join(READ)} or an image.")
    if means_folder(place) or kind in (*TABLES, "zip"):
        raise UsageError(f"{place!r}: found neither a file nor a folder there. {nearest_folder(place)}")
    return "hub"


def _open_images(places: list[str], keys: Keys) -> Source:
    """Images that a pattern names, with what lies beside them as in a folder."""
    files = Files(os.path.commonpath([posixpath.dirname(place) for place in places]) or ".")
    images = {posixpath.relpath(place, files.place) for place in places}
    stems = images | {image.rpartition(".")[0] for image in images}
    beside = {f"{stem}.{kind}" for stem in stems for kind in ("txt", "json")}
    beside |= {posixpath.join(posixpath.dirname(image), table) for image in images for table in METADATA}
    return open_folder(files, sorted({*images, *(name for name in beside if files.size(name) is not None)}), keys)


def _open_shards(shards: list[Path], folders: list[tuple[Files, list[str]]], keys: Keys, cache: Path) -> Source:
    """Tars, after a look at what else their folders hold, each given with the names in it.

    Raises:
        UsageError: for images, since either they or the tars may be meant.
    """
    taken, others = {os.path.abspath(shard) for shard in shards}, []
    for files, names in folders:
        others += [f"{files}/{name}" for name in names if os.path.abspath(files.folder / name) not in taken]
    others = [other for other in others if posixpath.basename(other) != CLASS_NAMES]
    if images := [other for other in others if ending(other) in IMAGE_ENDINGS]:
        raise UsageError(
            f"{str(folders[0][0])!r} holds tars ({len(shards)}, {shards[0].name}) and images ({len(images)}, {images[0]}), "
            f"expected the one or the other. Name the tars by '{folders[0][0]}/*.tar', or move them."
        )
    source = ShardSource(shards, keys, cache)
    for other in others:
        source.skip("tar in a folder below" if ending(other) == "tar" else "other format", other)
    return source


def _open_folder(files: Files, split: str | None, keys: Keys, cache: Path) -> Source:
    """What a folder or zip holds."""
    base, _, part = (split or "").partition("[")
    names = files.names()
    if not names:
        raise UsageError(f"{str(files)!r} is empty, expected tars, parquet files, or images with captions.")
    if files.folder is not None and "README.md" in names and _tells_files(files.folder / "README.md"):
        return open_hub(files.place, split, keys)
    files, names = choose_split(files, names, base or None)
    kinds = {ending(name) for name in names}
    if "tar" in kinds:
        if files.is_zip:
            raise UsageError(f"{str(files)!r} holds tars in a zip file. Unpack it: `unzip {files.place}`.")
        tars = [name for name in names if ending(name) == "tar"]
        if files.folder is not None:
            return _open_shards([files.folder / name for name in tars], [(files, names)], keys, cache)
        return ShardSource(find_shards("::".join(f"{files}/{name}" for name in tars), cache), keys, cache)
    if kinds & set(COMPRESSED) and not kinds & set(IMAGE_ENDINGS):
        for name in names:
            refuse_compressed(f"{files}/{name}")
    if "arrow" in kinds and files.folder is not None and "state.json" in map(posixpath.basename, names):
        return open_saved(str(files), base or None, keys)
    if "parquet" in kinds and not kinds & set(IMAGE_ENDINGS) and files.folder is not None:
        source = open_parquet_folder(str(files), split, keys)
        for name in names:
            if ending(name) != "parquet":
                source.skip("other format", name)
        return source
    source = open_folder(files, names, keys)
    return source.cut(split, base if posixpath.basename(files.below) in SPLITS else "train") if part else source


def _tells_files(path: Path) -> bool:
    """Whether the card of a data set says which files belong to which split."""
    card = path.read_bytes()
    return card.startswith(b"---") and b"data_files:" in card.split(b"\n---")[0]


def _check_some(name: str, source: Source, require_captions: bool) -> None:
    """Refuses a source without a usable sample, judged by a few, with the reason of the first one."""
    problems = []
    for index in range(0, len(source), max(len(source) // NUM_PROBED, 1))[:NUM_PROBED]:
        try:
            sample = source[index]
            if require_captions and not not_blank(sample.captions):
                raise BadSample("empty caption")
            with decoding(sample.image):
                open_image(sample.image)
            return
        except BadSample as bad:
            problems.append(bad)
    cause = problems[0].__cause__ or problems[0].lost
    raise UsageError(
        f"{name!r}: none of {len(problems)} samples that were tried can be used. The first one: {problems[0].kind}"
        f"{f' ({cause})' if cause else ''}."
    )


def _check_weights(mixture: Mapping) -> None:
    if not mixture:
        raise UsageError("Found an empty mixture, expected names of sources with their weights.")
    for name, weight in mixture.items():
        is_number = isinstance(weight, (int, float)) and not isinstance(weight, bool)
        if not (is_number and 0 < weight < math.inf):
            raise UsageError(
                f"{name!r} has the weight {weight!r}, expected a number above 0. Leave a source out that is not to be "
                "used."
            )


class MixtureSource(Source):
    """Several sources, one after the other, and the weights by which batches are filled from them.

    A weight is a source's share of each batch, relative to the other weights, whatever its size. An epoch is as many
    pairs as the sources have together.
    """

    def __init__(self, sources: Mapping[str, Source], weights: list[float]):
        super().__init__()
        self.names, self.sources, self.weights = list(sources), list(sources.values()), weights
        self.lengths = [len(source) for source in self.sources]
        self.starts, self.length = np.cumsum([0, *self.lengths]), sum(self.lengths)
        for source in self.sources:
            for kind, count in source.skipped.items():
                self.skip(kind, source.examples.get(kind), count)

    def __getitem__(self, index: int) -> Sample:
        source, index = self._find(index)
        return source[index]

    def content(self, index: int) -> Sample:
        source, index = self._find(index)
        return source.content(index)

    def captions(self, index: int) -> list[str]:
        source, index = self._find(index)
        return source.captions(index)

    def name(self, index: int) -> str:
        source, index = self._find(index)
        return source.name(index)

    def parts(self, name: str) -> tuple[list[str], list[int], list[float]]:
        return self.names, self.lengths, self.weights

    def _find(self, index: int) -> tuple[Source, int]:
        number = int(np.searchsorted(self.starts, index, side="right")) - 1
        return self.sources[number], int(index - self.starts[number])


class SceneSource(Source):
    """The demonstration scenes of `hfclip.data.scenes`."""

    def __init__(self, split: str, image_size: int, num_scenes: int):
        super().__init__()
        self.scenes = Scenes(split, size=image_size, num_scenes=num_scenes)
        self.length = len(self.scenes)

    def __getitem__(self, index: int) -> Sample:
        scene = self.scenes[index]
        return Sample(scene["image"], [scene["text"]], str(index))

    def captions(self, index: int) -> list[str]:
        return [self.scenes.caption(index)]

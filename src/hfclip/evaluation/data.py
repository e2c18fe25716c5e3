"""What a task is given: labelled images, images with captions, or a data set of which it opens the splits it needs."""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import PIL.Image

from ..data.files import CLASS_NAMES, NUMBER_OF_SHARDS, read_lines
from ..data.folders import SPLITS
from ..data.samples import BadSample, Sample, Source, decoding
from ..data.sources import open_source
from ..data.webdataset import ShardSource
from ..errors import UsageError, as_usage_error, redact
from ..open_image_hfclip import open_image
from ..zero_shot import DEFAULT_TEMPLATES, check_labels, check_templates
from .registry import fetch, find_local, registered


TEMPLATES_FILE = "zeroshot_classification_templates.txt"
INCOMPLETE = ("missing image", "missing caption", "truncated shard", "damaged shard", "not a tar")


class DataSet:
    """A data set by its name; its splits are opened when a task asks for them.

    Args:
        place: a name of the registry, what `hfclip.data.open_source` reads, or a place for each split,
            `{"train": ..., "test": ...}`. What is there goes before a name of the registry.
        root: folder in which names of the registry are looked for. None: they are fetched from the Hub.
        name: under which it is reported. None: the last part of the place.
        limit: images of each split at most, spread evenly over it: data sets are often sorted by class.
        only: file with the keys of the samples that count, such as the `clean.txt` of an overlap.
    """

    def __init__(
        self,
        place: str | os.PathLike | Mapping[str, str],
        *,
        root: str | os.PathLike | None = None,
        name: str | None = None,
        limit: int | None = None,
        only: str | os.PathLike | None = None,
    ):
        self.only = only
        if limit is not None and limit < 1:
            raise UsageError(f"limit is {limit}, expected at least 1.")
        places = place if isinstance(place, Mapping) else {None: place}
        self.places, self.limit = {split: os.path.expanduser(str(where)) for split, where in places.items()}, limit
        self.card = registered().get(self.place) if root or not os.path.exists(self.place) else None
        self.name = name or (self.card.name if self.card else _name_of(self.place))
        if root:
            root = Path(root).expanduser()
            self.places = {split: find_local(where, root) for split, where in self.places.items()}

    def labelled(self, split: str | None = None) -> "LabelledFolder":
        """Labels, templates and labelled images of a split; None: of that which is held out.

        Raises:
            UsageError: there is no such split, or it is not what `load_labelled_folder` reads.
        """
        folder = load_labelled_folder(*self._place_of(split), limit=None if self.only else self.limit)
        return folder if not self.only else folder._replace(samples=LazyImages(self.part(folder.samples.source)))

    def captioned(self, split: str | None = None) -> Source:
        """The samples of a split with their captions.

        Raises:
            UsageError: there is no such split, or it has no captions.
        """
        place, split = self._place_of(split)
        return self.part(open_source(place, split=split))

    def part(self, source: Source) -> Source:
        return evenly(select(source, self.only) if self.only else source, self.limit)

    def has(self, split: str) -> bool:
        """Whether a split is there."""
        try:
            self._place_of(split)
        except UsageError:
            return False
        return True

    def where(self) -> str:
        """Where what is held out lies; a registered data set is fetched."""
        return self._place_of(None)[0]

    def refuse_parts(self) -> None:
        """Raises UsageError for `limit` and `only`, of a task that takes a data set whole."""
        if self.limit or self.only:
            raise UsageError(f"{self.name}: found limit or only, expected none: this task reads it whole.")

    @property
    def place(self) -> str:
        """Where it lies; where its last split lies, if each has a place of its own."""
        return next(reversed(self.places.values()))

    def describe(self) -> dict[str, Any]:
        """What a record says of it; `fingerprint` is of the names and sizes of its files, and of its labels and templates."""
        contents = [[split, *_contents(place)] for split, place in self.places.items()]
        digest = hashlib.sha256(json.dumps(contents).encode()).hexdigest()
        found = {"name": self.name, **{split or "place": redact(place) for split, place in self.places.items()}}
        found |= {"limit": self.limit} if self.limit else {}
        if self.only:
            with as_usage_error(self.only):
                found["only"] = hashlib.sha256(Path(self.only).read_bytes()).hexdigest()
        found |= {"registered": self.card.name} if self.card else {}
        return {**found, "fingerprint": digest}

    def _place_of(self, split: str | None) -> tuple[str, str | None]:
        """Where a split lies, and the split of what lies there. Raises UsageError rather than reading another one."""
        if None not in self.places:
            wanted = split or next((name for name in ("test", "validation") if name in self.places), "test")
            if wanted not in self.places:
                raise UsageError(f"{self.name}: found the splits {', '.join(self.places)}, expected {wanted}.")
            return self.places[wanted], None
        place = self.places[None]
        if self.card and place == self.card.name:
            return fetch(place, split or "test"), split or "test"
        if split is None or not os.path.exists(place):  # what is not here says itself which splits it has
            return place, split
        there = sorted(entry.name for entry in os.scandir(place) if entry.is_dir()) if os.path.isdir(place) else []
        if split not in {SPLITS.get(name, name) for name in there} and not any(Path(place).glob("**/*.parquet")):
            raise UsageError(
                f"{place}: found {f'the folders {there[:5]}' if there else 'no folders of splits'}, expected one named "
                f"{split!r}. Name a place for each split: {{train: PLACE, test: PLACE}}."
            )
        return place, split


def _contents(place: str) -> list:
    """What tells a local place from another; a name on the Hub or a pattern is told by itself."""
    path = Path(place)
    if not path.exists():
        return [redact(place)]
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    sizes = [(file.relative_to(path).as_posix(), file.stat().st_size) for file in files]
    return [sizes, *(read_lines(path, name) for name in (CLASS_NAMES, TEMPLATES_FILE))]


def digest_of_data(place: str) -> str:
    """What tells data from others, as results tell them."""
    return DataSet(place).describe()["fingerprint"]


def digest_of_files(place: str) -> str:
    """64 hex digits of the content of a file, or of all files in a folder; of the name where there is neither."""
    path = Path(place).expanduser()
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    digest = hashlib.sha256()
    for file in files:
        content = file.read_bytes() if file.is_file() else str(place).encode()
        digest.update(f"{file.relative_to(path).as_posix()} {hashlib.sha256(content).hexdigest()} ".encode())
    return digest.hexdigest()


# Options of tasks that name what is read: a result belongs to what is there, which the function tells.
Data = Annotated[str, digest_of_data]
File = Annotated[str, digest_of_files]


class Part(Source):
    """Some samples of a source."""

    def __init__(self, source: Source, indices: Sequence[int]):
        super().__init__()
        self.source, self.indices, self.length = source, indices, len(indices)
        self.labels, self.skipped, self.examples = source.labels, source.skipped, source.examples

    def __getitem__(self, index: int) -> Sample:
        return self.source[self.indices[index]]

    def content(self, index: int) -> Sample:
        return self.source.content(self.indices[index])

    def captions(self, index: int) -> list[str]:
        return self.source.captions(self.indices[index])

    def label(self, index: int) -> int | None:
        return self.source.label(self.indices[index])

    def label_row(self, index: int) -> np.ndarray | None:
        return self.source.label_row(self.indices[index])


def _name_of(place: str) -> str:
    """The last parts of a place that say what it is: "cifar10/test" of "/data/cifar10/test"."""
    *_, above, last = ["", *redact(place).rstrip("/").split("/")]
    return f"{above}/{last}" if SPLITS.get(last) and above else last


def select(source: Source, path: str | os.PathLike) -> Part:
    """The samples of a source whose keys a file lists, a line each.

    Raises:
        UsageError: keys that the source has not, or none.
    """
    with as_usage_error(path):
        wanted, found = set(Path(path).read_text(encoding="utf-8").splitlines()), {}
    for place in range(len(source)):
        with suppress(BadSample):
            if (key := source[place].key) in wanted:
                found[key] = place
    if missing := sorted(wanted - found.keys()) or ([] if wanted else ["nothing"]):
        raise UsageError(f"{path} lists {missing[0]}, which the data have not: expected a list made of the same data.")
    return Part(source, sorted(found.values()))


def evenly(source: Source, limit: int | None) -> Source:
    """The source, or `limit` of its samples at equal distances."""
    if limit is None or limit >= len(source):
        return source
    return Part(source, np.linspace(0, len(source), limit, endpoint=False).astype(int).tolist())


class UndecodableImage(ValueError):
    """An image that an evaluation leaves out and counts."""


class LazyImages(Sequence):
    """`(PIL image, target)` pairs of a labelled source, read and decoded when asked for. Safe to share with worker
    processes.

    Raises UndecodableImage with the name of an image that cannot be decoded.

    Args:
        targets: `(num_samples, num_labels)`, where images may have several labels: above 0 for theirs, below 0 for what
            is ignored.
    """

    def __init__(self, source: Source, targets: np.ndarray | None = None):
        self.source, self.targets = source, targets

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[PIL.Image.Image, int]:
        name = f"sample {index}"
        try:
            image, _, name, target = self.source[index]
            with decoding(image):
                return open_image(image), target
        except BadSample as bad:
            raise UndecodableImage(f"{name} cannot be decoded: {bad.__cause__ or bad}") from bad


class LabelledFolder(NamedTuple):
    """`labels[target]` names the target of a sample; `templates` are those of the folder or the default."""

    labels: list[str]
    templates: list[str]
    samples: LazyImages


def load_labelled_folder(path: str | Path, split: str | None = None, limit: int | None = None) -> LabelledFolder:
    """Labels, templates and samples of images with labels; images are not opened yet.

    - WebDataset as clip-benchmark publishes it: uncompressed tars, in which each image has a `<key>.cls` with the index
      of its label, a line of `classnames.txt`, or, where it may have several, a `<key>.npy` with a number per line.
    - A folder or zip with two or more folders, one per class, with images anywhere below it. Targets count the folders
      in alphabetical order; labels are the lines of `classnames.txt`, or else the folders' names with underscores read
      as spaces.
    - A table with a column of class labels, here or on the Hub.

    `classnames.txt` (a label a line) and `zeroshot_classification_templates.txt` (a template a line, `{c}` for the
    label; empty lines do not count) are looked for in `path`, then in the folder above, which holds them for all splits.

    Args:
        split: of folders named as splits are. None: the one that is held out.
        limit: images at most, spread evenly.

    Raises:
        UsageError: nothing of these, files that do not fit together, damaged shards.
        ValueError: empty labels, a template without placeholder.
    """
    source = open_source(str(path), split=split)
    if len(set(source.labels or ())) < 2:
        raise UsageError(
            f"{path} has the labels {source.labels}, expected two or more: a folder per class, tars with .cls members and "
            f"a {CLASS_NAMES}, or a table with a column of class labels."
        )
    if broken := [kind for kind in INCOMPLETE if source.skipped[kind]]:
        raise UsageError(f"{path} is not whole: {source.describe_skipped()}. Mend or remove what has {broken[0]}.")
    labels = check_labels(source.labels)
    _check_shards(path, source)
    templates = [line for line in read_lines(Path(path), TEMPLATES_FILE) or () if line] or DEFAULT_TEMPLATES
    templates = check_templates(templates)
    if (rows := _label_rows(path, evenly(source, limit))) is not None:
        return LabelledFolder(labels, templates, LazyImages(evenly(source, limit), rows))
    targets = [source.label(index) for index in range(len(source))]
    if outside := [target for target in targets if target is None or target >= len(labels)]:
        raise UsageError(
            f"{path}: sample {targets.index(outside[0])} has class {outside[0]}, expected 0 to {len(labels) - 1}, a line "
            f"of {CLASS_NAMES}."
        )
    return LabelledFolder(labels, templates, LazyImages(evenly(source, limit)))


def _label_rows(path: str | Path, source: Source) -> np.ndarray | None:
    """The labels of each sample, if the first one has a row of them."""
    rows = []
    for index in range(len(source)):
        try:
            rows.append(source.label_row(index))
        except BadSample as bad:
            raise UsageError(f"{path}: the labels of sample {index} cannot be read: {bad.__cause__ or bad}.") from bad
        if rows[0] is None:
            return None
        if rows[-1] is None:
            raise UsageError(f"{path}: sample {index} has no .npy member, expected one for each image or for none.")
    return np.stack(rows)


def _check_shards(path: str | Path, source: Source) -> None:
    declared = read_lines(Path(path), NUMBER_OF_SHARDS)
    if declared and isinstance(source, ShardSource) and int(declared[0]) != len(source.shards):
        raise UsageError(
            f"{path} has {len(source.shards)} shards, but nshards.txt says {declared[0]}: fetch them all."
        )

"""Image files: listed in a table, with captions in files beside them, or in a folder per class."""

import os
import posixpath
import re
from collections import Counter
from typing import Any

from ..errors import UsageError, as_usage_error
from .files import CLASS_NAMES, Files, read_lines
from .records import as_text, find_columns, read_records
from .samples import (
    HELD_OUT,
    HOW_CAPTIONS_ARE_GIVEN,
    IMAGE_ENDINGS,
    SHORT,
    BadSample,
    Keys,
    Sample,
    Source,
    caption_list,
    is_empty,
    json_captions,
    say,
    text_captions,
)
from .stores import reason
from .tars import is_hidden


TABLES = ("csv", "tsv", "jsonl", "json", "parquet")
DRIVE = re.compile(r"^[a-zA-Z]:/(.*/)?")  # with the folders of another machine, whose images lie here by their names
METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
SPLITS = {"train": "train training", "validation": "validation valid val dev", "test": "test testing eval evaluation"}
SPLITS = {name: split for split, names in SPLITS.items() for name in names.split()}
TINY = {"txt": 8, "json": SHORT}  # bytes of files that may be empty: hardly a caption is as short, and few are opened


class FileSource(Source):
    """Image files and what is known of each.

    Args:
        images: their names in `files`.
        about: for each image a caption or a list of them; with `beside`, the name of the file that holds them; with
            `labels`, the number of its class, whose name is its caption.
    """

    def __init__(
        self,
        files: Files,
        images: list[str],
        about: list[Any],
        *,
        beside: bool = False,
        caption_key: str | None = None,
        labels: list[str] | None = None,
    ):
        super().__init__()
        self.files, self.images, self.about, self.length = files, images, about, len(images)
        self.beside, self.key, self.labels = beside, caption_key, labels

    def __getitem__(self, index: int) -> Sample:
        name = self.images[index]
        return Sample(self.files.read(name, "image"), self.captions(index), name, self.label(index))

    def captions(self, index: int) -> list[str]:
        value = self.about[index]
        if self.labels:
            return [self.labels[value]]
        if value is None and self.beside:
            return []
        if not self.beside:
            return caption_list(value)
        return _read_captions(self.files, value, self.key)

    def label(self, index: int) -> int | None:
        return self.about[index] if self.labels else None

    def name(self, index: int) -> str:
        return f"{self.files}/{self.images[index]}"

    def cut(self, split: str, name: str) -> "FileSource":
        """The samples that an expression such as "train[:10%]" means, where all of them are the split `name`."""
        from datasets import ReadInstruction

        try:
            [part] = ReadInstruction.from_spec(split).to_absolute({name: len(self)})
        except (AssertionError, ValueError) as error:
            raise UsageError(f"{self.files}: split {split!r} is not understood: {error}") from error
        self.images, self.about = self.images[part.from_ : part.to], self.about[part.from_ : part.to]
        self.length = len(self.images)
        return self


def _read_captions(files: Files, name: str, key: str | None) -> list[str]:
    """The captions in a .txt or .json file. Raises BadSample."""
    data = files.read(name, "caption")
    return json_captions(data, key) if ending(name) == "json" else text_captions(data)


def _holds_nothing(files: Files, name: str, key: str | None) -> bool:
    """Whether a tiny file on this machine has no caption; what else is wrong with it is told when it is read."""
    size = files.size(name)
    try:
        return size is not None and size <= TINY[ending(name)] and is_empty(_read_captions(files, name, key))
    except BadSample:
        return False


def ending(name: str) -> str:
    return name.lower().rpartition(".")[2]


def open_folder(files: Files, names: list[str], keys: Keys) -> FileSource:
    """Image files below a folder or in a zip, by what gives their captions.

    Args:
        names: of the files that are meant.

    Raises:
        UsageError: if there are no images or, where they are required, no captions.
    """
    images = [name for name in names if ending(name) in IMAGE_ENDINGS]
    if metadata := [name for name in names if posixpath.basename(name) in METADATA]:
        source = open_tables(files, metadata, keys, images)
        _skip_rest(source, names, {*source.images, *metadata}, image="no metadata", text="other format")
        return source
    if not images:
        kinds = " ".join(sorted({f".{ending(name)}" for name in names})[:8])
        raise UsageError(
            f"{str(files)!r} holds no images ({len(names)} files, {kinds}), expected tars, parquet files or images "
            f"({' '.join(IMAGE_ENDINGS)})."
        )
    if (source := _open_pairs(files, names, images, keys)) is not None:
        return source
    if tables := [name for name in names if "/" not in name and ending(name) in TABLES]:
        source = open_tables(files, tables, keys, images)
        _skip_rest(source, names, {*source.images, *tables}, image="no metadata", text="other format")
        return source
    if len({name.partition("/")[0] for name in images if "/" in name}) > 1 and all("/" in name for name in images):
        return _open_classes(files, names, images, sorted(_top_folders(files, names)))
    if keys.required:
        raise UsageError(f"{str(files)!r}: found {len(images)} images without captions. {HOW_CAPTIONS_ARE_GIVEN}")
    source = FileSource(files, images, [[]] * len(images))
    _skip_rest(source, names, set(images), text="other format")
    return source


def open_tables(files: Files, names: list[str], keys: Keys, known: list[str] | None = None) -> FileSource:
    """The rows of tables, whose images are named relative to the table.

    Args:
        known: the images that there are, if others are not to be looked for. The name alone of one of them is enough,
            if no other has it.

    Raises:
        UsageError: for a file that is not read, without the columns, or whose images are URLs.
    """
    source, paths = FileSource(files, [], []), known and _by_name(known)
    for name in names:
        where, folder = f"{files}/{name}", posixpath.dirname(name)
        with (
            as_usage_error(f"{where!r} cannot be read", reason),
            files.open(name) as data,
            as_text(data, where) as file,
        ):
            columns, rows = read_records(file, name, keys)
            image_column, caption_column = find_columns(columns, keys, where)
            for row in rows:
                if isinstance(row, str):
                    source.skip("broken row", f"{name}, {row}")
                    continue
                image = row.get(image_column)
                image = DRIVE.sub("", image.replace("\\", "/")) if isinstance(image, str) else None
                path = posixpath.join(folder, image) if image else None
                if path and paths is not None:
                    path = paths.get(posixpath.normpath(path)) or paths.get(image)
                if path is None:
                    source.skip("missing image", f"{name}: {row.get(image_column)!r:.80}")
                    continue
                about = row.get(caption_column) if caption_column else []
                if keys.required and (about is None or is_empty(about)):
                    source.skip("missing caption" if about is None else "empty caption", f"{name}: {image:.80}")
                    continue
                source.images.append(path)
                source.about.append(about)
    source.length = len(source.images)
    if source.images and all("://" in image for image in source.images[:8]):
        raise UsageError(
            f"{where!r} names images by URLs ({source.images[0]}), expected files. Fetch them once, with img2dataset for "
            "example, and name the folder that it makes."
        )
    return source


def _by_name(images: list[str]) -> dict[str, str]:
    """Images by their paths, and by their names without folder where that is one image's alone."""
    counts = Counter(map(posixpath.basename, images))
    alone = {posixpath.basename(image): image for image in images if counts[posixpath.basename(image)] == 1}
    return alone | {image: image for image in images}


def _open_pairs(files: Files, names: list[str], images: list[str], keys: Keys) -> FileSource | None:
    """Images with a .txt or .json of their name beside them; None if there is none of these."""
    endings = ("json",) if keys.caption else ("json", "txt")  # the last one counts
    texts = {name.rpartition(".")[0]: name for kind in endings for name in names if ending(name) == kind}
    partners = [texts.get(name.rpartition(".")[0]) or texts.get(name) for name in images]
    if not any(partners):
        return None
    pairs = [(image, text) for image, text in zip(images, partners, strict=True) if text or not keys.required]
    empty = {image: text for image, text in pairs if keys.required and _holds_nothing(files, text, keys.caption)}
    kept = [(image, text) for image, text in pairs if image not in empty]
    source = FileSource(files, *map(list, zip(*kept) if kept else ([], [])), beside=True, caption_key=keys.caption)
    for text in empty.values():
        source.skip("empty caption", text)
    stems = {*images, *(image.rpartition(".")[0] for image in images)}
    used = {name for name in names if ending(name) in ("txt", "json") and name.rpartition(".")[0] in stems}
    _skip_rest(source, names, used.union(source.images, empty))
    return source


def _open_classes(files: Files, names: list[str], images: list[str], folders: list[str]) -> FileSource:
    """A folder per class, whose names are the captions, too."""
    labels = files.folder and read_lines(files.folder, CLASS_NAMES)
    if labels and len(labels) != len(folders):
        raise UsageError(
            f"{CLASS_NAMES} has {len(labels)} lines but {files} {len(folders)} subfolders: expected as many."
        )
    labels = labels or [folder.replace("_", " ") for folder in folders]
    say(f"{files}: the names of {len(labels)} class folders are the captions ({', '.join(labels[:3])} ...).")
    numbers = {folder: number for number, folder in enumerate(folders)}
    source = FileSource(files, images, [numbers[name.partition("/")[0]] for name in images], labels=labels)
    for folder in sorted(set(folders) - {name.partition("/")[0] for name in images}):
        source.skip("class without images", folder)
    _skip_rest(source, [name for name in names if "/" in name], set(images), text="other format")
    return source


def _skip_rest(
    source: Source, names: list[str], used: set[str], image: str = "missing caption", text: str = "missing image"
) -> None:
    """Counts the files that are not used, by what they are."""
    for name in names:
        if name not in used:
            kind = ending(name)
            source.skip(image if kind in IMAGE_ENDINGS else text if kind in ("txt", "json") else "other format", name)


def _top_folders(files: Files, names: list[str]) -> set[str]:
    """Those of this machine include the empty ones: they may be classes."""
    there = () if files.folder is None else os.scandir(files.folder)
    folders = {entry.name for entry in there if entry.is_dir() and not is_hidden(entry.name)}
    return folders | {name.partition("/")[0] for name in names if "/" in name}


def choose_split(files: Files, names: list[str], split: str | None) -> tuple[Files, list[str]]:
    """The folder of a split, where folders are named as splits are; else the innermost one that holds all files."""
    tops = _top_folders(files, names)
    loose = any("/" not in name and ending(name) in (*IMAGE_ENDINGS, *TABLES, "tar") for name in names)
    known = {SPLITS[top] for top in tops & SPLITS.keys()}
    if loose or not tops or len(tops) > 1 and len(known) < 2 and not tops <= SPLITS.keys():
        return files, names
    if len(tops) == 1:
        chosen = next(iter(tops))
    else:
        wanted = [SPLITS.get(split, split)] if split else HELD_OUT
        chosen = next((top for want in wanted for top in sorted(tops) if want in (top, SPLITS.get(top))), None)
        if chosen is None:
            raise UsageError(
                f"{str(files)!r} has the splits {sorted(tops)}, expected {' or '.join(wanted)} among them. Name the "
                "folder or file that is meant, or set split."
            )
    if others := sorted(tops - SPLITS.keys() - {chosen}):
        say(f"{files}: {chosen} is the split, and {', '.join(others)} are not read.")
    inside = [name.removeprefix(f"{chosen}/") for name in names if name.startswith(f"{chosen}/")]
    return choose_split(files.below_folder(chosen), inside, split)

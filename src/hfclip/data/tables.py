"""Tables that `datasets` reads: parquet files, image folders with metadata, data sets on the Hub."""

import glob
from collections import Counter
from pathlib import Path

from ..errors import UsageError
from .samples import CAPTION_KEYS, BadSample, Sample, Source, caption_list


IMAGE_KEYS = ("image", "jpg", "png", "img")
HELD_OUT = ("test", "validation", "val", "dev")  # splits, in the order of preference


class TableSource(Source):
    """A table that `datasets` reads: one column of images, one of captions."""

    def __init__(self, table, image_key: str, caption_key: str):
        from datasets import Image as ImageFeature

        self.table = table.select_columns([image_key, caption_key]).cast_column(image_key, ImageFeature(decode=False))
        self.texts = table.select_columns([caption_key])
        self.image_key, self.caption_key = image_key, caption_key
        self.length, self.skipped = len(table), Counter()

    @classmethod
    def load(cls, name: str, image_key: str | None, caption_key: str | None, split: str | None) -> "TableSource":
        table = _load_table(name, split)
        image_key = _find_column(table.column_names, image_key, IMAGE_KEYS, "image_key", name)
        caption_key = _find_column(table.column_names, caption_key, CAPTION_KEYS, "caption_key", name)
        return cls(table, image_key, caption_key)

    def __getitem__(self, index: int) -> Sample:
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
        return Sample(image["bytes"], self._captions(row), image["path"] or str(index))

    def captions(self, index: int) -> list[str]:
        return self._captions(self._row(self.texts, index))

    def _row(self, table, index: int) -> dict:
        try:
            return table[index]
        except UnicodeDecodeError as error:
            raise BadSample("unreadable caption") from error

    def _captions(self, row: dict) -> list[str]:
        return caption_list(row[self.caption_key])


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
            f"split {split!r}: {error}"
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
            f"{name!r} has the splits {splits}, expected {' or '.join(HELD_OUT)} among them. Name a "
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

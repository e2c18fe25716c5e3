"""Tables that `datasets` reads: parquet files and data sets on the Hub."""

import posixpath
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any

import fsspec
import numpy as np

from ..errors import UsageError, as_usage_error
from .files import Files
from .records import find_columns
from .samples import HELD_OUT, SHORT, BadSample, Keys, Sample, Source, caption_list, is_empty, say
from .shards import map_in_threads
from .stores import reason


ROWS_AT_A_TIME = 10_000


class TableSource(Source):
    """A table that `datasets` reads: a column of images (structs, bytes or paths), one of captions or class labels.

    Args:
        folder: where the paths in it begin.
    """

    def __init__(self, table, keys: Keys, name: str, folder: str = "."):
        from datasets import ClassLabel, Image

        super().__init__()
        self.place, self.files, self.rows = name, Files(folder), None  # rows: those that are kept, if not all
        self.label_key = next((key for key, kind in table.features.items() if isinstance(kind, ClassLabel)), None)
        self.labels = self.label_key and [label.replace("_", " ") for label in table.features[self.label_key].names]
        without = keys._replace(required=keys.required and not self.labels)
        self.image_key, self.caption_key = find_columns(table.column_names, without, name)
        if self.labels and self.caption_key is None:
            say(f"{name}: the names of the classes in {self.label_key!r} are the captions ({self.labels[0]} ...).")
        if keys.required and self.caption_key:
            table = self._without_empty(table)
        texts = [key for key in (self.caption_key, self.label_key) if key]
        self.texts, self.table = table.select_columns(texts), table.select_columns([self.image_key, *texts])
        if isinstance(table.features[self.image_key], Image):
            self.table = self.table.cast_column(self.image_key, Image(decode=False))
        self.length = len(table)

    def _without_empty(self, table):
        """The rows with captions, where they are a column of texts; the others are counted."""
        import pyarrow
        import pyarrow.compute

        left_out, column = [], table.select_columns([self.caption_key]).with_format("arrow")
        for number, batch in enumerate(column.iter(ROWS_AT_A_TIME)):
            texts = batch[self.caption_key]
            if not (pyarrow.types.is_string(texts.type) or pyarrow.types.is_large_string(texts.type)):
                return table
            lengths = pyarrow.compute.fill_null(pyarrow.compute.binary_length(texts), -1).to_numpy()
            for row in np.flatnonzero(lengths <= SHORT).tolist():
                kind = "missing caption" if lengths[row] < 0 else "empty caption"
                with suppress(UnicodeDecodeError):  # told when it is read
                    if lengths[row] < 0 or is_empty(texts[row].as_py()):
                        left_out.append(number * ROWS_AT_A_TIME + row)
                        self.skip(kind, f"{self.place}, row {left_out[-1]}")
        if not left_out:
            return table
        self.rows = np.delete(np.arange(len(table)), left_out)
        return table.select(self.rows)

    def name(self, index: int) -> str:
        return f"{self.place}, row {index if self.rows is None else self.rows[index]}"

    def __getitem__(self, index: int) -> Sample:
        row = _row(self.table, index)
        image, path = row[self.image_key], str(index)
        if isinstance(image, dict):
            path, image = image.get("path") or path, image.get("bytes") or image.get("path")
        if isinstance(image, str):
            path, image = image, self.files.read(image, "image")
        if image is None:
            raise BadSample("missing image")
        if not isinstance(image, bytes):
            raise BadSample("not an image") from TypeError(f"found {type(image).__name__}, expected bytes or a path")
        return Sample(image, self._captions(row), path, self._label(row))

    def captions(self, index: int) -> list[str]:
        return self._captions(_row(self.texts, index))

    def label(self, index: int) -> int | None:
        return self._label(_row(self.texts, index))

    def _label(self, row: dict) -> int | None:
        number = row[self.label_key] if self.label_key else None
        return number if number is not None and number >= 0 else None

    def _captions(self, row: dict) -> list[str]:
        if self.caption_key:
            return caption_list(row[self.caption_key])
        number = self._label(row)
        return [] if number is None else [self.labels[number]]


def _row(table, index: int) -> dict[str, Any]:
    try:
        return table[index]
    except UnicodeDecodeError as error:
        raise BadSample("unreadable caption") from error


def open_parquet(paths: list[str], keys: Keys) -> TableSource:
    """The rows of parquet files; files that are damaged or lack the columns are left out and counted.

    Raises:
        UsageError: if none can be read.
    """
    from datasets import load_dataset

    looked_at = [path for path in paths if "://" not in path] or paths[:1]  # remote ones take their time
    found = dict(zip(looked_at, map_in_threads(_columns_in, looked_at, "reading headers"), strict=True))
    tables = {path: columns for path, columns in found.items() if isinstance(columns, list)}
    if not tables:
        raise UsageError(f"{paths[0]!r} cannot be read as a table: {reason(found[looked_at[0]])}")
    first = next(iter(tables.values()))
    tables |= {path: first for path in paths if path not in found}
    needed = {*find_columns(first, keys._replace(required=False), next(iter(tables)))} - {None}
    good = [path for path, columns in tables.items() if needed <= set(columns)]
    shared = [column for column in first if all(column in tables[path] for path in good)]
    options = {} if all(tables[path] == first for path in good) else {"columns": shared}
    try:
        table = load_dataset("parquet", data_files=good, split="train", **options)
    except Exception as error:  # of datasets and pyarrow
        whole = [path for path in good if _is_whole(path)]
        if 0 < len(whole) < len(good):
            source, good = open_parquet(whole, keys), whole
        else:
            raise UsageError(f"{paths[0]!r} cannot be loaded: {reason(error.__cause__ or error)}") from error
    else:
        source = TableSource(table, keys, paths[0], posixpath.dirname(paths[0]) or ".")
    for path in sorted(set(paths) - set(good)):
        if isinstance(found.get(path), Exception):
            source.skip("damaged file", f"{path}: {reason(found[path])}")
        else:
            source.skip("damaged file" if needed <= set(tables[path]) else "other columns", path)
    return source


def _columns_in(path: str) -> list[str] | Exception:
    import pyarrow.parquet

    try:
        with fsspec.open(path) as file:
            table = pyarrow.parquet.ParquetFile(file)
            return table.schema_arrow.names if table.metadata.num_rows else ValueError("it has no rows")
    except Exception as error:  # of stores and pyarrow
        return error


def _is_whole(path: str) -> bool:
    import pyarrow.parquet

    try:
        with fsspec.open(path) as file:
            return all(True for _ in pyarrow.parquet.ParquetFile(file).iter_batches())
    except Exception:  # of stores and pyarrow
        return False


def open_parquet_folder(path: str, split: str | None, keys: Keys) -> TableSource:
    """The parquet files of a split, which `datasets` tells by their names."""
    from datasets import load_dataset_builder

    with _loading(path, split):
        files = load_dataset_builder(path).config.data_files
    return open_parquet([str(file) for file in files[_split_of(path, list(files), split)]], keys)


def open_saved(path: str, split: str | None, keys: Keys) -> TableSource:
    """What `Dataset.save_to_disk` has written."""
    from datasets import DatasetDict, load_from_disk

    with _loading(path, split):
        table = load_from_disk(path)
        if isinstance(table, DatasetDict):
            table = table[_split_of(path, list(table), split)]
    return TableSource(table, keys, path)


def open_hub(name: str, split: str | None, keys: Keys) -> TableSource:
    """A data set on the Hub."""
    from datasets import get_dataset_split_names, load_dataset

    with _loading(name, split):
        if split is None or Path(name).is_dir() and split.isidentifier():  # "test[:100]" is an expression, not a name
            split = _split_of(name, get_dataset_split_names(name), split)
        table = load_dataset(name, split=split)
    return TableSource(table, keys, name)


def _loading(name: str, split: str | None) -> AbstractContextManager[None]:
    place = ":" if Path(name).exists() else " is no file or folder here, and"
    return as_usage_error(f"{name!r}{place} `datasets` cannot load it with split {split!r}", reason)


def _split_of(name: str, splits: list[str], split: str | None) -> str:
    """The split that is asked for, or one that is held out where none is; but the only one, whatever it is called."""
    if len(splits) == 1:
        return splits[0]
    wanted = [split] if split else HELD_OUT
    if not (found := next((want for want in wanted if want in splits), None)):
        raise UsageError(
            f"{name!r} has the splits {splits}, expected {' or '.join(wanted)} among them. Set split, or name a folder "
            "or file that holds what is meant alone."
        )
    return found

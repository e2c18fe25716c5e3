"""Rows of csv, tsv, json, jsonl and parquet files that name images by their paths, read one by one."""

import csv
import io
import itertools
import json
from collections.abc import Iterator

from ..errors import UsageError
from .samples import CAPTION_KEYS


IMAGE_KEYS = (
    "image",
    "jpg",
    "png",
    "img",
    "file_name",
    "filepath",
    "filename",
    "image_path",
    "img_path",
    "path",
    "file",
)
SEPARATORS = (",", "\t", ";", "|")

Row = dict | str  # of a broken one, where it is


def read_records(file: io.TextIOWrapper, name: str, keys: tuple[str | None, ...]) -> tuple[list[str], Iterator[Row]]:
    """The columns of a table and its rows; of a row that is broken, where it is.

    Args:
        name: of the file, whose ending says what it is.
        keys: names of columns that are looked for, by which the separator of a csv file is told.
    """
    kind = name.lower().rpartition(".")[2]
    if kind == "parquet":
        import pyarrow.parquet

        table = pyarrow.parquet.ParquetFile(file.buffer)
        return table.schema_arrow.names, (row for batch in table.iter_batches() for row in batch.to_pylist())
    if kind in ("csv", "tsv"):
        return _read_csv(file, keys)
    rows = _read_lines(file) if kind == "jsonl" else iter(json.load(file))
    first = next((row for row in rows if isinstance(row, dict)), {})
    return list(first), itertools.chain([first] if first else [], rows)


def _read_csv(file: io.TextIOWrapper, keys: tuple[str | None, ...]) -> tuple[list[str], Iterator[Row]]:
    header = file.readline()
    readings = {separator: next(csv.reader([header], delimiter=separator), []) for separator in SEPARATORS}
    separator = max(SEPARATORS, key=lambda sign: (len(set(readings[sign]) & set(keys)), len(readings[sign])))
    columns = readings[separator]
    return columns, _csv_rows(csv.reader(file, delimiter=separator), columns)


def _csv_rows(reader, columns: list[str]) -> Iterator[Row]:
    while True:
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield f"line {reader.line_num + 1}: {error}"
            continue
        if len(cells) == len(columns):
            yield dict(zip(columns, cells, strict=True))
        elif cells:
            yield f"line {reader.line_num + 1}: {len(cells)} columns, not {len(columns)}"


def _read_lines(file: io.TextIOWrapper) -> Iterator[Row]:
    for number, line in enumerate(file, start=1):
        try:
            row = json.loads(line) if line.strip() else None
        except (ValueError, RecursionError) as error:
            yield f"line {number}: {error}"
            continue
        if row is not None:
            yield row if isinstance(row, dict) else f"line {number}: {line:.40}"


def find_column(columns: list[str], asked: str | None, usual: tuple[str, ...], setting: str, name: str) -> str:
    """The column that is asked for, or the first of the usual ones that is there. Raises UsageError."""
    column = asked or next((key for key in usual if key in columns), None)
    if column not in columns:
        raise UsageError(
            f"{name!r}: found the columns {columns}, expected {asked or ' or '.join(usual)}; set {setting} to the one "
            f"that holds the {'captions' if setting == 'caption_key' else 'images'}."
        )
    return column


def find_columns(columns: list[str], image_key: str | None, caption_key: str | None, name: str) -> tuple[str, str]:
    image_key = find_column(columns, image_key, IMAGE_KEYS, "image_key", name)
    return image_key, find_column(columns, caption_key, CAPTION_KEYS, "caption_key", name)

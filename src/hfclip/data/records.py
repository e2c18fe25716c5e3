"""Rows of csv, tsv, json, jsonl and parquet files that name images by their paths, read one by one."""

import codecs
import csv
import io
import itertools
import json
from collections.abc import Iterator
from typing import BinaryIO

from ..errors import UsageError
from .samples import CAPTION_KEYS, Keys, say


IMAGE_KEYS = tuple("image jpg png img file_name filepath filename image_path img_path path file".split())
SEPARATORS = (",", "\t", ";", "|")

Row = dict | str  # of a broken one, where it is


def as_text(data: BinaryIO, name: str) -> io.TextIOWrapper:
    """The text of a table: UTF-8, or UTF-16 if its first bytes say so. Bytes that are neither are taken as Windows has
    them, which is told."""
    told = []

    def as_windows(error: UnicodeError) -> tuple[str, int]:
        if not told:
            told.append(True)
            say(
                f"{name} is not all UTF-8: its other letters are read as Windows-1252. Save it as UTF-8 if they are wrong."
            )
        return error.object[error.start : error.end].decode("cp1252", "replace"), error.end

    codecs.register_error("hfclip-windows", as_windows)
    encoding = "utf-16" if data.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "utf-8-sig"
    data.seek(0)
    return io.TextIOWrapper(data, encoding, "hfclip-windows", "")


def read_records(file: io.TextIOWrapper, name: str, keys: Keys) -> tuple[list[str], Iterator[Row]]:
    """The columns of a table and its rows; of a row that is broken, where it is.

    Args:
        name: of the file, whose ending says what it is.
        keys: which columns are looked for, by which the separator of a csv file is told.
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


def _read_csv(file: io.TextIOWrapper, keys: Keys) -> tuple[list[str], Iterator[Row]]:
    header, looked_for = file.readline(), {keys.image, keys.caption, *IMAGE_KEYS, *CAPTION_KEYS}
    readings = {separator: next(csv.reader([header], delimiter=separator), []) for separator in SEPARATORS}
    separator = max(SEPARATORS, key=lambda sign: (len(looked_for.intersection(readings[sign])), len(readings[sign])))
    columns = readings[separator]
    return columns, _csv_rows(csv.reader(file, delimiter=separator, strict=True), columns)


def _csv_rows(reader, columns: list[str]) -> Iterator[Row]:
    while True:
        before = reader.line_num
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:  # each line that a quote has swallowed is a broken row
            yield from [f"line {before + 2}: {error}"] * max(reader.line_num - before, 1)
            continue
        if len(cells) == len(columns):
            yield dict(zip(columns, cells, strict=True))
        elif cells:
            yield f"line {before + 2}: {len(cells)} columns, not {len(columns)}"


def _read_lines(file: io.TextIOWrapper) -> Iterator[Row]:
    for number, line in enumerate(file, start=1):
        try:
            row = json.loads(line) if line.strip() else None
        except (ValueError, RecursionError) as error:
            yield f"line {number}: {error}"
            continue
        if row is not None:
            yield row if isinstance(row, dict) else f"line {number}: {line:.40}"


def find_columns(columns: list[str], keys: Keys, name: str) -> tuple[str, str | None]:
    """The columns of images and of captions: those that are asked for, else the first of the usual ones.

    Raises:
        UsageError: if there is none; for captions, if they are required.
    """
    found = []
    for setting, asked, usual in (("image_key", keys.image, IMAGE_KEYS), ("caption_key", keys.caption, CAPTION_KEYS)):
        column = asked or next((key for key in usual if key in columns), None)
        if column not in columns and (column or setting == "image_key" or keys.required):
            raise UsageError(
                f"{name!r}: found the columns {columns}, expected {asked or ' or '.join(usual)}; set {setting} to the "
                f"one that holds the {'captions' if setting == 'caption_key' else 'images'}."
            )
        found.append(column)
    return found[0], found[1]

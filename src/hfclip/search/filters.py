"""Conditions on images: "folder=Spain after=2020-05 width>1000 name=beach" -> which rows meet all of them."""

import os
import re
import shlex
from datetime import datetime

import numpy as np
import pyarrow.compute as pc

from ..errors import UsageError
from .store import Snapshot


NUMBERS = ("width", "height", "size")
COMPARE = {"=": np.equal, "<": np.less, ">": np.greater, "<=": np.less_equal, ">=": np.greater_equal}
EXPECTED = (
    "expected conditions like folder=Spain, name=beach, after=2020-05, before=2021, width>1000, height<=800, size<1e6"
)


def select(snapshot: Snapshot, where: str) -> np.ndarray:
    """(rows,) which images meet all conditions.

    `folder=` and `name=` hold a part of the path, in any case: a folder (or several, a/b), or of the file's name.
    `after=` and `before=` take a year, month or day of the file's change, in local time; `after` includes it.

    Raises:
        UsageError: what is no condition.
    """
    try:
        words = shlex.split(where)
    except ValueError as error:
        raise UsageError(f"where: found {where!r} ({error}), {EXPECTED}.") from error
    selected = np.ones(len(snapshot.table), bool)
    for word in words:
        parts = re.fullmatch(r"(\w+)(<=|>=|=|<|>)(.+)", word, re.DOTALL)
        if parts is None:
            raise UsageError(f"where: found {word!r}, {EXPECTED}.")
        try:
            selected &= _condition(snapshot, *parts.groups())
        except (ValueError, KeyError, OverflowError) as error:
            raise UsageError(f"where: found {word!r}, {EXPECTED}.") from error
    return selected


def _condition(snapshot: Snapshot, name: str, sign: str, value: str) -> np.ndarray:
    if name in NUMBERS:
        return COMPARE[sign](snapshot.column(name), float(value))
    if sign != "=":
        raise ValueError(sign)
    if name in ("after", "before"):
        modified, moment = snapshot.column("modified"), _moment(value)
        return modified >= moment if name == "after" else modified < moment
    if name == "folder":
        value = value.rstrip("/")
        pattern = re.escape(value if value.startswith("/") else f"/{value}") + "/"
        pattern = f"^{pattern}" if value.startswith("/") else pattern
    elif name == "name":
        pattern = f"{re.escape(value)}[^/]*$"
    else:
        raise KeyError(name)
    found = pc.match_substring_regex(snapshot.table["path"], pattern=os.fsencode(pattern), ignore_case=True)
    return found.to_numpy()


def _moment(date: str) -> int:
    """Nanoseconds since 1970 of the begin of a year, month or day."""
    year, month, day = (*map(int, date.split("-")), 1, 1)[:3]
    return int(datetime(year, month, day).timestamp() * 1e9)

"""The image files below folders: what is excluded, what cannot be read, and nothing twice."""

import os
import stat
from collections.abc import Iterator
from typing import NamedTuple

from pathspec import GitIgnoreSpec

from ..data.samples import IMAGE_ENDINGS, LARGEST


IGNORE_FILE = ".hfclipignore"
# Folders of systems and programs that hold no images of the user's own, or those of other folders again.
SYSTEM_FOLDERS = {"$RECYCLE.BIN", "System Volume Information", "lost+found", "@eaDir", "#recycle", "__MACOSX"}
ENDINGS = tuple(f".{ending}" for ending in IMAGE_ENDINGS)


class File(NamedTuple):
    """An image file as a folder lists it. `modified` is in nanoseconds since 1970."""

    path: str
    size: int
    modified: int


class Problem(NamedTuple):
    """A file or folder that has no row, and why: a kind under which it is counted.

    `size` and `modified` are those of a file that was read: it is read again when they change.
    """

    path: str
    kind: str
    size: int | None = None
    modified: int | None = None


class _Rules(NamedTuple):
    """The patterns of one ignore file, which count for what lies below its folder."""

    folder: str
    patterns: GitIgnoreSpec


def scan(folders: list[str], include_hidden: bool = False) -> Iterator[File | Problem]:
    """Image files below folders in the order of their names, and what cannot be read there.

    Links are followed, and each folder is visited once. `.hfclipignore` files have the syntax of `.gitignore`; names
    that begin with a dot and folders of the system are left out unless `include_hidden`.
    """
    visited: set[tuple[int, int]] = set()
    for folder in folders:
        yield from _scan_folder(folder, (), visited, include_hidden)


def _scan_folder(
    folder: str, rules: tuple[_Rules, ...], visited: set[tuple[int, int]], include_hidden: bool
) -> Iterator[File | Problem]:
    """Walks with a stack of its own: a tree may be deeper than Python's."""
    waiting = [(folder, rules)]
    while waiting:
        folder, rules = waiting.pop()
        try:
            found = os.stat(folder)
            if (found.st_dev, found.st_ino) in visited:
                yield Problem(folder, "repeated folder")
                continue
            visited.add((found.st_dev, found.st_ino))
            with os.scandir(folder) as entries:
                entries = sorted(entries, key=lambda entry: entry.name)
            rules = _with_ignore_file(folder, rules)
        except OSError:
            yield Problem(folder, "unreadable folder")
            continue
        below = []
        for entry in entries:
            hidden = entry.name.startswith(".") or entry.name in SYSTEM_FOLDERS
            if hidden and not include_hidden:
                continue
            is_folder = _is_folder(entry)
            if not is_folder and not entry.name.lower().endswith(ENDINGS) or _is_ignored(entry.path, is_folder, rules):
                continue
            if is_folder:
                below.append((entry.path, rules))
            else:
                yield _look_at(entry.path)
        waiting += reversed(below)


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _with_ignore_file(folder: str, rules: tuple[_Rules, ...]) -> tuple[_Rules, ...]:
    path = os.path.join(folder, IGNORE_FILE)
    if not os.path.isfile(path):
        return rules
    with open(path, encoding="utf-8", errors="surrogateescape") as lines:
        return (*rules, _Rules(folder, GitIgnoreSpec.from_lines(lines.read().splitlines())))


def _is_ignored(path: str, is_folder: bool, rules: tuple[_Rules, ...]) -> bool:
    """What the nearest ignore file that says anything about a path says, as in git."""
    for folder, patterns in reversed(rules):
        relative = os.path.relpath(path, folder).replace(os.sep, "/") + "/" * is_folder
        if (decided := patterns.check_file(relative).include) is not None:
            return decided
    return False


def _look_at(path: str) -> File | Problem:
    try:
        found = os.stat(path)
    except OSError:
        return Problem(path, "broken link" if os.path.islink(path) else "missing image")
    if not stat.S_ISREG(found.st_mode):
        return Problem(path, "not a file")
    if found.st_size > LARGEST["image"]:
        return Problem(path, "too large image")
    return File(path, found.st_size, found.st_mtime_ns)

"""Files below a folder or in a zip, local or remote, listed once and read in place."""

import os
import posixpath
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import fsspec
from fsspec.implementations.zip import ZipFileSystem

from .samples import LARGEST, BadSample, too_large
from .tars import is_hidden


CLASS_NAMES = "classnames.txt"
NUMBER_OF_SHARDS = "nshards.txt"


class Files:
    """The files below a folder or in a zip, by their names relative to it.

    Args:
        place: a path or URL; of a zip file, if it ends with .zip.
        below: a folder in it.
    """

    def __init__(self, place: str, below: str = ""):
        self.place, self.below, self.is_zip = place, below, place.lower().endswith(".zip")
        self.folder = None if self.is_zip or "://" in place else Path(place, below)
        """Of this machine, if it is one."""
        # With the process that opened it: what is open does not survive a fork.
        self._store: tuple[int, tuple | None] = (0, None)

    def __reduce__(self):
        return Files, (self.place, self.below)

    def names(self) -> list[str]:
        """All of them, sorted, but for hidden ones."""
        if self.folder is not None:
            found = _walk(self.folder)
        else:
            store, root = self._opened()
            found = (posixpath.relpath(path, root) if root else path for path in store.find(root))
        return sorted(name for name in found if not is_hidden(name))

    def below_folder(self, name: str) -> "Files":
        return Files(self.place, posixpath.join(self.below, name))

    def open(self, name: str) -> BinaryIO:
        """Raises OSError."""
        if self.folder is not None:
            return open(os.path.join(self.folder, name), "rb")
        store, root = self._opened()
        try:
            return store.open(posixpath.join(root, name), "rb")
        except OSError:
            raise
        except Exception as error:  # of zipfile and stores
            raise OSError(f"{type(error).__name__}: {error}") from error

    def size(self, name: str) -> int | None:
        """Bytes of a file of this machine; None if that is not known without asking."""
        try:
            if self.folder is not None:
                return os.path.getsize(os.path.join(self.folder, name))
            store, root = self._opened()
            return store.info(posixpath.join(root, name))["size"] if self.is_zip else None
        except OSError:
            return None

    def read(self, name: str, what: str) -> bytes:
        """The "image" or "caption" that a file holds. Raises BadSample."""
        try:
            if "://" in name:
                raise ValueError(f"{name} is a URL: fetch images once, with img2dataset for example")
            with self.open(name) as file:
                data = file.read(LARGEST[what] + 1)
        except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            folder = posixpath.join(str(self), posixpath.dirname(name))
            lost = f"files of {folder} cannot be read ({getattr(error, 'strerror', None) or error})"
            raise BadSample(f"missing {what}", lost) from error
        if len(data) > LARGEST[what]:
            raise too_large(what)
        return data

    def _opened(self) -> tuple[fsspec.AbstractFileSystem, str]:
        process, opened = self._store
        if process != os.getpid():
            store, root = (ZipFileSystem(self.place), "") if self.is_zip else fsspec.url_to_fs(self.place)
            opened = store, posixpath.join(root, self.below).rstrip("/")
            self._store = os.getpid(), opened
        return opened

    def __str__(self) -> str:
        return posixpath.join(self.place, self.below).rstrip("/")


def _walk(folder: Path) -> Iterator[str]:
    """Names of the files below a folder, links to folders followed, each folder once."""
    seen = set()
    for place, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(place)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        below = "" if place == str(folder) else os.path.relpath(place, folder).replace(os.sep, "/") + "/"
        yield from (below + file for file in files)


def read_lines(folder: Path, name: str) -> list[str] | None:
    """The lines of the file `name` in a folder or the one above, without spaces around them; None without such a file.

    Empty lines stay but for those at the end: labels count lines, so that one left out would shift the others.
    """
    for place in (folder, folder.resolve().parent):
        if (place / name).is_file():
            return [line.strip() for line in (place / name).read_text(encoding="utf-8").rstrip().splitlines()]
    return None

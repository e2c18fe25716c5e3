"""Brings an index up to what its folders hold: only files whose content is new are embedded."""

import hashlib
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch import nn

from ..cores import usual_workers
from ..data.samples import IMAGE_ENDINGS, BadSample, Source, decoding
from ..embeddings.chunks import CHUNK, Chunks, Options
from ..embeddings.encoder import Encoder, prepared
from ..errors import UsageError
from ..open_image_hfclip import open_image
from ..zero_shot import device_of
from .scan import File, Problem, scan
from .store import Manifest, Record, Snapshot, Store


SECONDS = 10  # between commits, at least; a kill loses no more
COMMITTING = 0.02  # share of the time that commits take, at most
Progress = Callable[[int, int], None]


class Counts(NamedTuple):
    """What an update did, in images."""

    embedded: int
    """New or changed ones that were put through the model."""
    copied: int
    """New files of a content that was known."""
    moved: int
    restored: int
    deleted: int
    unchanged: int
    problems: dict[str, int]
    """Files without a row, by kind."""
    missing_folders: list[str]
    """Folders that are not there now; their images stay in the index."""

    def __str__(self) -> str:
        words = [f"{value:,} {name}" for name, value in zip(self._fields[:6], self[:6], strict=True) if value]
        words += [f"{count:,} with {kind}" for kind, count in sorted(self.problems.items())]
        words += [f"{folder} is not there, and its images are kept" for folder in self.missing_folders]
        return ", ".join(words) or "nothing to do"


class Content(NamedTuple):
    """What is known of a file that was read."""

    hash: bytes
    width: int
    height: int


class Files(Chunks):
    """Chunks of files, whose keys are `Content`s; those of a known content are not decoded."""

    def __init__(self, files: list[File], known: Iterable[bytes], processor: Any, options: Options, size: int):
        source = Source()
        source.length = len(files)
        super().__init__(source, processor, options, size)
        self.files, self.known = files, frozenset(known)

    def _sample(self, index: int) -> dict:
        result = {"key": None, "label": None, "captions": [], "pixels": None, "problem": None}
        try:
            data = _read(self.files[index].path)
            digest = hashlib.blake2b(data, digest_size=16).digest()
            if digest in self.known:
                return {**result, "key": Content(digest, 0, 0)}
            with decoding(data):
                image = open_image(data)
            return {**result, "key": Content(digest, *image.size), "pixels": self._pixels(image)}
        except BadSample as bad:
            return {**result, "problem": bad.kind}


def _read(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except PermissionError as error:
        raise BadSample("no permission") from error
    except OSError as error:  # gone since it was listed, or the disk fails
        raise BadSample("missing image") from error


class Update:
    """One update of a store, by the process that holds its lock.

    Args:
        snapshot: what the store holds; None for a new one.
        manifest: what it is to hold, with the folders to look at and those that are not.
    """

    def __init__(self, store: Store, manifest: Manifest, snapshot: Snapshot | None):
        self.store, self.manifest = store, manifest
        self.snapshot_rows = snapshot.rows if snapshot else np.zeros((0, manifest.model["dim"]), np.float16)
        self.records: list[Record] = snapshot.records() if snapshot else []
        self.problems = {problem.path: problem for problem in snapshot.problems} if snapshot else {}
        self.new_rows: list[np.ndarray] = []  # since the last commit
        self.counts: Counter = Counter()
        # Of several records of one path, at most one is alive, and comes last.
        order = sorted(range(len(self.records)), key=lambda number: not self.records[number].deleted)
        self.by_path = {self.records[number].path: number for number in order}
        self.by_hash: dict[bytes, list[int]] = {}
        for number, record in enumerate(self.records):
            self.by_hash.setdefault(record.hash, []).append(number)
        self.alive_before = [number for number, record in enumerate(self.records) if not record.deleted]
        self.committed, self.commit_seconds = time.monotonic(), 0.0

    # -------------------------------------------------------------------------------------------------------- listing

    def compare(self, folders: list[str]) -> list[File]:
        """Marks what is gone and what has come back under `folders`; returns the files that must be read."""
        found = scan(folders, self.manifest.include_hidden)
        before, self.problems = self.problems, {p: v for p, v in self.problems.items() if not is_below(p, folders)}
        to_read, seen = [], set()
        for file in found:
            seen.add(file.path)
            if isinstance(file, Problem):
                self.problems[file.path] = file
                continue
            number, known = self.by_path.get(file.path), before.get(file.path)
            if number is not None and self._is(number, file):
                self.counts["restored" if self.records[number].deleted else "unchanged"] += 1
                self.records[number].deleted = False
            elif known is not None and (known.size, known.modified) == (file.size, file.modified):
                self.problems[file.path] = known
            else:
                to_read.append(file)
        for record in self.records:
            if not record.deleted and record.path not in seen and is_below(record.path, folders):
                record.deleted = True
        return to_read

    def _is(self, number: int, file: File) -> bool:
        return (self.records[number].size, self.records[number].modified) == (file.size, file.modified)

    # -------------------------------------------------------------------------------------------------------- reading

    def embed(self, model: nn.Module, processor: Any, files: list[File], progress: Progress | None) -> None:
        """Reads files, embeds those of new content, and commits now and then, whatever ends it."""
        device = device_of(model)
        batch_size = 32 if device.type == "cpu" else 256
        options = Options(("images",), {}, batch_size, self.manifest.model["precision"], "float16")
        chunks = Files(files, self.by_hash, processor, options, CHUNK)
        num_workers = usual_workers(device.type == "cpu") if len(files) > CHUNK else 0
        try:
            with prepared(model, options.precision) as bare, Encoder(bare, processor, options) as encoder:
                for number, inputs in chunks.load(list(range(len(chunks))), num_workers, "indexing", False):
                    # Batches are filled up: a few images are a batch of their own.
                    encoder.options = options._replace(batch_size=min(batch_size, max(len(inputs["readable"]), 1)))
                    self._take([files[index] for index in chunks.indices(number)], encoder(inputs))
                    done = chunks.indices(number).stop
                    self.store.tell_progress(done, len(files))
                    if progress:
                        progress(done, len(files))
                    if time.monotonic() - self.committed > max(SECONDS, self.commit_seconds / COMMITTING):
                        self.commit()
        finally:
            self.commit()

    def differs_from(self, snapshot: Snapshot) -> bool:
        """Whether `compare` has found anything but what the store holds."""
        deleted = np.array([record.deleted for record in self.records], bool)
        is_same = self.manifest == snapshot.manifest and list(self.problems.values()) == snapshot.problems
        return not is_same or bool((deleted == snapshot.alive).any())

    def commit(self) -> None:
        start = time.monotonic()
        self.manifest = self.store.commit(self.manifest, self.records, self.problems.values(), self.new_rows)
        self.new_rows, self.committed = [], time.monotonic()
        self.commit_seconds = self.committed - start

    def _take(self, files: list[File], result: dict) -> None:
        problems = dict(result["problems"])
        rows = result.get("image_embeds")
        for place, (file, content) in enumerate(zip(files, result["keys"], strict=True)):
            if place in problems:
                self._remove(file.path)
                self.problems[file.path] = Problem(file.path, problems[place], file.size, file.modified)
            else:
                self._place(file, content, None if content.hash in self.by_hash else rows[place])

    def _place(self, file: File, content: Content, row: np.ndarray | None) -> None:
        """Gives a file a record: its own, that of a file of this content that is gone, or a new one."""
        number = self._alive_at(file.path)
        if number is not None and self.records[number].hash == content.hash:  # only its time has changed
            self.counts["unchanged"] += 1
        else:
            self._remove(file.path)
            same = self.by_hash.setdefault(content.hash, [])
            number = next((other for other in same if self.records[other].deleted), None)
            if number is None:
                number = self._add(content, same, row)
            else:
                self.counts["restored" if self.records[number].path == file.path else "moved"] += 1
        record = self.records[number]
        record.path, record.size, record.modified, record.deleted = *file, False
        self.by_path[file.path] = number

    def _add(self, content: Content, same: list[int], row: np.ndarray | None) -> int:
        """Adds a record without path; of known content, with what is known of it. Returns its id."""
        self.counts["embedded" if row is not None else "copied"] += 1
        if row is None:
            original = self.records[same[0]]
            row, content = self._row(same[0]), Content(original.hash, original.width, original.height)
        self.new_rows.append(row)
        self.records.append(Record("", 0, 0, *content))
        same.append(len(self.records) - 1)
        return same[-1]

    def _row(self, number: int) -> np.ndarray:
        """The row of an image, also of one that is not committed yet."""
        count = self.manifest.count
        if number >= count:
            return self.new_rows[number - count]
        if number >= len(self.snapshot_rows):
            self.snapshot_rows = self.store.read().rows
        return self.snapshot_rows[number]

    def _alive_at(self, path: str) -> int | None:
        number = self.by_path.get(path)
        return None if number is None or self.records[number].deleted else number

    def _remove(self, path: str) -> None:
        if (number := self._alive_at(path)) is not None:
            self.records[number].deleted = True

    def result(self, missing_folders: list[str]) -> Counts:
        self.counts["deleted"] = sum(self.records[number].deleted for number in self.alive_before)
        counts = (self.counts[name] for name in Counts._fields[:6])
        kinds = Counter(problem.kind for problem in self.problems.values())
        return Counts(*counts, dict(kinds), missing_folders)


def run_update(
    store: Store,
    manifest: Manifest,
    snapshot: Snapshot | None,
    folders: list[str],
    open_model: Callable[[], tuple[nn.Module, Any]],
    progress: Progress | None,
) -> Counts:
    """Updates the images under `folders`; the model is opened if there is something to embed."""
    update = Update(store, manifest, snapshot)
    there = [folder for folder in folders if os.path.isdir(folder)]
    files = update.compare(there)
    if snapshot is None and not files:
        found = f": {update.result([])}" if update.problems else ""
        raise UsageError(
            f"found no image in {' '.join(folders)}{found}. Expected files of {', '.join(IMAGE_ENDINGS)}."
        )
    if files or snapshot is None or update.differs_from(snapshot):
        update.commit()
    if files:
        update.embed(*open_model(), files, progress)
    return update.result([folder for folder in folders if folder not in there])


def outermost(folders: Iterable[str]) -> tuple[str, ...]:
    """Absolute names of folders without those that lie in others, in order."""
    folders = sorted({os.path.abspath(os.path.expanduser(folder)) for folder in folders})
    return tuple(folder for folder in folders if not is_below(folder, [f for f in folders if f != folder]))


def is_below(path: str, folders: Iterable[str]) -> bool:
    return any(path == folder or path.startswith(folder.rstrip(os.sep) + os.sep) for folder in folders)

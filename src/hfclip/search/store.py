"""An index on the disk: plain files that numpy and pyarrow read, whole after every kill.

    store.json              which generation counts: its number of rows, the folders, the model
    rows.npy                (rows, dim) float16, row i is the unit embedding of image i; rows are only ever added
    files-000012.parquet    of generation 12: a row per image, path (bytes), size, modified (ns), hash (of the content),
                            width, height, deleted
    problems-000012.jsonl   files without a row, with the kind of problem; paths as `os.fsdecode` gives them
    lock, indexing.json     who writes, and how far it is

A change adds rows to the end of `rows.npy`, writes the tables of the next generation, and renames `store.json` into
place. Until that moment nothing of it counts, rows after the last one that counts are overwritten by the next change,
and who has an earlier generation open keeps it.
"""

import functools
import json
import math
import os
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from filelock import FileLock, Timeout

from ..errors import UsageError
from .scan import Problem


FORMAT = 1
MANIFEST, ROWS, LOCK, PROGRESS = "store.json", "rows.npy", "lock", "indexing.json"
SCHEMA = pa.schema(
    {
        "path": pa.binary(),
        "size": pa.int64(),
        "modified": pa.int64(),
        "hash": pa.binary(16),
        "width": pa.int32(),
        "height": pa.int32(),
        "deleted": pa.bool_(),
    }
)


@dataclass(slots=True)
class Record:
    """An image of the index; its place in the list is its id, and its row."""

    path: str
    size: int
    modified: int
    hash: bytes
    width: int
    height: int
    deleted: bool = False


@dataclass(frozen=True)
class Manifest:
    """What `store.json` holds."""

    model: dict[str, Any]
    """`name`, `fingerprint` of the weights, `preprocessing` (a hash), `precision`, `dim`."""
    folders: tuple[str, ...] = ()
    include_hidden: bool = False
    generation: int = 0
    count: int = 0
    """Rows that count."""
    format: int = FORMAT


class Snapshot:
    """One generation of a store, which stays as it is."""

    def __init__(self, manifest: Manifest, table: pa.Table, rows: np.ndarray, problems: list[Problem]):
        self.manifest, self.table, self.rows, self.problems = manifest, table, rows, problems
        self._columns: dict[str, np.ndarray] = {}

    @cached_property
    def alive(self) -> np.ndarray:
        """(rows,) which images are there."""
        return ~self.column("deleted")

    @cached_property
    def num_alive(self) -> int:
        return int(self.alive.sum())

    def column(self, name: str) -> np.ndarray:
        """(rows,) numbers of the table."""
        if name not in self._columns:
            self._columns[name] = self.table[name].to_numpy()
        return self._columns[name]

    @cached_property
    def tensor(self) -> torch.Tensor:
        """(rows, dim), mapped; in memory and of float32 where this machine is slow with float16."""
        rows = torch.from_numpy(self.rows)
        return rows if multiplies_halves() else rows.float()

    def path(self, number: int) -> str:
        return os.fsdecode(self.table["path"][number].as_py())

    def records(self) -> list[Record]:
        columns = (self.table[name].to_pylist() for name in SCHEMA.names)
        return [Record(os.fsdecode(path), *rest) for path, *rest in zip(*columns, strict=True)]


@functools.cache
def multiplies_halves() -> bool:
    """Whether this machine takes less than twice its time in float32 for a float16 matrix times a vector.

    Processors with AVX2 or later take a third of it: they read half of the bytes.
    """
    matrix, seconds = torch.ones(1024, 512), {}
    for dtype in (torch.float32, torch.float16) * 5:
        rows, start = matrix.to(dtype), time.perf_counter()
        rows @ rows[0]
        seconds[dtype] = min(seconds.get(dtype, math.inf), time.perf_counter() - start)
    return seconds[torch.float16] < 2 * seconds[torch.float32]


class Store:
    """A folder that holds an index."""

    def __init__(self, folder: str | os.PathLike):
        self.folder = Path(folder).expanduser()

    def signature(self) -> tuple[int, int] | None:
        """Changes with the generation; None where there is no store."""
        try:
            found = os.stat(self.folder / MANIFEST)
        except FileNotFoundError:
            return None
        return found.st_ino, found.st_mtime_ns

    def read(self) -> Snapshot:
        """The latest generation.

        Raises:
            UsageError: there is no store, it is damaged, or it was written by a later version.
        """
        if self.signature() is None:
            raise UsageError(
                f"{self.folder} holds no index of images. Make one: hfclip index FOLDER --model MODEL --store {self.folder}"
            )
        for attempt in range(3):
            try:
                return self._read()
            except FileNotFoundError:  # another generation has come while this one was read
                if attempt == 2:
                    raise self._damaged("a table is missing") from None
            except (ValueError, TypeError, KeyError, OSError) as error:
                raise self._damaged(error) from error

    def _read(self) -> Snapshot:
        content = json.loads((self.folder / MANIFEST).read_text(encoding="utf-8"))
        if content["format"] > FORMAT:
            raise UsageError(
                f"{self.folder} is of format {content['format']}, expected at most {FORMAT}. Update hfclip."
            )
        manifest = Manifest(**{**content, "folders": tuple(content["folders"])})
        table = pq.read_table(self._table(manifest.generation), schema=SCHEMA)
        lines = self._problems(manifest.generation).read_text(encoding="utf-8").splitlines()
        problems = [Problem(**json.loads(line)) for line in lines]
        if len(table) != manifest.count:
            raise ValueError(f"{len(table)} files for {manifest.count} rows")
        return Snapshot(manifest, table, self._map_rows(manifest), problems)

    def _map_rows(self, manifest: Manifest) -> np.ndarray:
        shape = manifest.count, manifest.model["dim"]
        if not manifest.count:
            return np.zeros(shape, np.float16)
        with open(self.folder / ROWS, "rb") as file:
            np.lib.format.read_magic(file)
            np.lib.format.read_array_header_1_0(file)
            # Copy on write: torch warns of arrays that cannot be written.
            return np.memmap(self.folder / ROWS, np.float16, mode="c", offset=file.tell(), shape=shape)

    def _damaged(self, error: object) -> UsageError:
        return UsageError(f"{self.folder} is damaged ({error}). Remove it and index its folders again.")

    def _table(self, generation: int) -> Path:
        return self.folder / f"files-{generation:06d}.parquet"

    def _problems(self, generation: int) -> Path:
        return self.folder / f"problems-{generation:06d}.jsonl"

    # ------------------------------------------------------------------------------------------------------- writing

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Makes this process the only writer. The system opens the lock of a process that dies.

        Raises:
            UsageError: another process writes.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.folder / LOCK, timeout=1)
        try:
            lock.acquire()
        except Timeout:
            pid = (self._progress() or {}).get("pid", "unknown")
            raise UsageError(
                f"{self.folder} is being indexed by process {pid}. Wait for it, or end it: what it has done is kept."
            ) from None
        try:
            self.tell_progress(0, 0)
            yield
        finally:
            (self.folder / PROGRESS).unlink(missing_ok=True)
            lock.release()

    def tell_progress(self, done: int, total: int) -> None:
        with suppress(OSError):  # of a full disk: the next commit says so
            self._write(self.folder / PROGRESS, json.dumps({"pid": os.getpid(), "done": done, "total": total}))

    def problems_file(self) -> Path:
        """Lists the files without a row."""
        return self._problems(self.read().manifest.generation)

    def indexing(self) -> tuple[int, int] | None:
        """(done, total) images of the process that indexes now, if one does."""
        if (progress := self._progress()) is None:
            return None
        try:
            with FileLock(self.folder / LOCK, timeout=0):
                return None  # it was killed
        except Timeout:
            return progress["done"], progress["total"]

    def _progress(self) -> dict | None:
        try:
            return json.loads((self.folder / PROGRESS).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None

    def commit(
        self, manifest: Manifest, records: list[Record], problems: Iterable[Problem], rows: list[np.ndarray]
    ) -> Manifest:
        """Adds rows and makes the tables of the next generation count. Returns its manifest."""
        count, generation = manifest.count + len(rows), manifest.generation + 1
        if rows:
            self._append(manifest, np.stack(rows).astype(np.float16))
        columns = [
            pa.array(
                [os.fsencode(r.path) if name == "path" else getattr(r, name) for r in records], SCHEMA.field(name).type
            )
            for name in SCHEMA.names
        ]
        with open(self._table(generation), "wb") as file:
            pq.write_table(pa.table(columns, schema=SCHEMA), file, compression="zstd")
            _flush(file)
        lines = (json.dumps(problem._asdict()) + "\n" for problem in problems)
        self._write(self._problems(generation), "".join(lines))
        manifest = Manifest(**{**asdict(manifest), "count": count, "generation": generation})
        self._write(self.folder / MANIFEST, json.dumps(asdict(manifest), indent=1))
        self._remove_before(generation - 1)
        return manifest

    def _append(self, manifest: Manifest, rows: np.ndarray) -> None:
        path, count, dim = self.folder / ROWS, manifest.count, manifest.model["dim"]
        with open(path, "r+b" if path.exists() else "w+b") as file:
            header = {"descr": "<f2", "fortran_order": False, "shape": (count + len(rows), dim)}
            np.lib.format.write_array_header_1_0(file, header)  # of one length, whatever the number of rows
            file.seek(count * dim * 2, os.SEEK_CUR)
            file.write(rows.tobytes())
            file.truncate()
            _flush(file)

    def _write(self, path: Path, text: str) -> None:
        beside = path.with_name(f".{path.name}")
        with open(beside, "w", encoding="utf-8") as file:
            file.write(text)
            _flush(file)
        os.replace(beside, path)

    def _remove_before(self, generation: int) -> None:
        for path in self.folder.glob("*-[0-9]*.*"):
            if int(path.stem.rpartition("-")[2]) < generation:
                with suppress(OSError):  # open elsewhere, on Windows
                    path.unlink()


def _flush(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())

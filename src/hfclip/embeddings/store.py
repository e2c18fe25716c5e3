"""Chunks of rows on the disk, and the folder of mapped arrays that they become."""

import json
import os
import shutil
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from ..errors import UsageError


HEADER = "embeddings.json"
OF_CAPTIONS = ("text_embeds", "caption_ids")  # arrays with a row per caption; others have one per sample
ROWS_OF_A_TABLE = 16_384  # written at a time


class Embeddings:
    """Rows of a data set, in memory or mapped from a folder.

    Attributes:
        image_embeds: (num_samples, dim), unit length; zero where the image could not be read.
        text_embeds: (num_captions, dim), unit length; the captions of sample i are the rows offsets[i] to
            offsets[i + 1].
        offsets: (num_samples + 1,).
        caption_ids: (num_captions,), see `hfclip.data.samples.caption_id`.
        label_ids: (num_samples,), the index of each sample's class in `labels`, -1 for none.
        layers: features by the name of their module, (num_samples, ...) each.
        header: what they are of: `model`, `scale` of its similarities, `labels`, `precision`, `fingerprint`.
    """

    def __init__(self, header: dict, arrays: dict[str, np.ndarray], folder: Path | None = None):
        self.header, self.folder, self.scale = header, folder, header["scale"]
        self.labels: list[str] | None = header.get("labels")
        for name in ("image_embeds", "text_embeds", "offsets", "caption_ids", "label_ids"):
            setattr(self, name, arrays.get(name))
        self.layers = {name.removeprefix("layer."): a for name, a in arrays.items() if name.startswith("layer.")}
        self._keys = arrays.get("keys")

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __reduce__(self):
        if self.folder is None:
            return super().__reduce__()
        return Embeddings.open, (self.folder,)  # pickled, a mapped array would be read whole

    @cached_property
    def keys(self) -> list[str]:
        """Names of the samples within their source."""
        return [key.decode() for key in self._keys]

    @property
    def problems(self) -> dict[int, str]:
        """What was wrong with the samples that could not be read."""
        found = self.header["problems"].items()
        return dict(sorted((index, kind) for kind, indices in found for index in indices))

    @classmethod
    def open(cls, folder: str | os.PathLike) -> "Embeddings":
        """What `embed` has stored, mapped.

        Raises:
            UsageError: if it is not there or not complete.
        """
        folder = Path(folder).expanduser()
        try:
            header = json.loads((folder / HEADER).read_text(encoding="utf-8"))
            arrays = {path.stem: np.load(path, mmap_mode="r") for path in folder.glob("*.npy")}
            return cls({"problems": {}, **header}, arrays, folder)
        except (OSError, ValueError, KeyError) as error:
            raise UsageError(f"{folder} holds no stored embeddings ({error}). Make them again.") from error

    def to_parquet(self, path: str | os.PathLike) -> None:
        """Writes a table with a row per sample: key, label, problem, image_embeds, text_embeds. Needs pyarrow."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        def vectors(rows: np.ndarray) -> pa.Array:
            return pa.FixedSizeListArray.from_arrays(pa.array(np.ascontiguousarray(rows).ravel()), rows.shape[1])

        writer, problems = None, self.problems
        for start in range(0, len(self), ROWS_OF_A_TABLE):
            stop = min(start + ROWS_OF_A_TABLE, len(self))
            offsets = self.offsets[start : stop + 1]
            columns = {
                "key": pa.array(self.keys[start:stop]),
                "label": pa.array(self.label_ids[start:stop]),
                "problem": pa.array([problems.get(index) for index in range(start, stop)], pa.string()),
            }
            if self.image_embeds is not None:
                columns["image_embeds"] = vectors(self.image_embeds[start:stop])
            if self.text_embeds is not None:
                rows = vectors(self.text_embeds[offsets[0] : offsets[-1]])
                columns["text_embeds"] = pa.ListArray.from_arrays(
                    pa.array((offsets - offsets[0]).astype(np.int32)), rows
                )
            table = pa.table(columns)
            writer = writer or pq.ParquetWriter(path, table.schema)
            writer.write_table(table)
        writer.close()


class Store:
    """A folder of embeddings while it is made: its chunks lie beside it in `.<name>.partial`."""

    def __init__(self, folder: Path, fingerprint: str):
        self.folder, self.fingerprint = folder, fingerprint
        self.partial = folder.with_name(f".{folder.name}.partial") / fingerprint[:32]

    def is_complete(self) -> bool:
        """Whether there is nothing to be done. Raises UsageError if the folder holds something else."""
        if not self.folder.exists():
            self.partial.mkdir(parents=True, exist_ok=True)
            return False
        is_whole = (self.folder / HEADER).exists()
        if not is_whole or Embeddings.open(self.folder).header.get("fingerprint") != self.fingerprint:
            raise UsageError(
                f"{self.folder} exists and holds something else: other data, another model or other options. Remove it "
                "or choose another folder."
            )
        return True

    def chunk(self, number: int) -> Path:
        return self.partial / f"chunk-{number:05d}.safetensors"

    def write(self, number: int, result: dict) -> None:
        path = self.chunk(number)
        beside = path.with_name(f".{path.name}.{os.getpid()}")
        arrays = {name: value for name, value in result.items() if isinstance(value, np.ndarray)}
        save_file(arrays, beside, {name: json.dumps(result[name]) for name in ("keys", "problems")})
        os.replace(beside, path)

    def read(self, number: int) -> dict:
        with safe_open(self.chunk(number), "np") as file:
            about = {name: json.loads(value) for name, value in file.metadata().items()}
            return {**about, **{name: file.get_tensor(name) for name in file.keys()}}

    def finish(self, num_chunks: int, header: dict) -> None:
        """Joins the chunks to the folder, which has its name when it is whole."""
        whole = self.partial / "whole"
        shutil.rmtree(whole, ignore_errors=True)
        whole.mkdir()

        def allocate(name: str, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
            return np.lib.format.open_memmap(whole / f"{name}.npy", mode="w+", dtype=dtype, shape=shape)

        header, arrays = join(num_chunks, self.read, {"fingerprint": self.fingerprint, **header}, allocate)
        for array in arrays.values():
            array.flush()
        (whole / HEADER).write_text(json.dumps(header, indent=1), encoding="utf-8")
        os.replace(whole, self.folder)
        shutil.rmtree(self.partial.parent, ignore_errors=True)


def join(
    num_chunks: int,
    chunk: Callable[[int], dict],
    header: dict,
    allocate: Callable[[str, tuple[int, ...], Any], np.ndarray],
) -> tuple[dict, dict[str, np.ndarray]]:
    """The header and the arrays of all chunks, filled one after the other.

    Raises:
        UsageError: if nothing at all could be read.
    """
    kinds, counts, problems, lengths, width = {}, [np.zeros(1, np.int64)], {}, [0, 0], 1
    for place in range(num_chunks):
        result = chunk(place)
        for index, kind in result["problems"]:
            problems.setdefault(kind, []).append(lengths[0] + index)
        lengths = [lengths[0] + len(result["keys"]), lengths[1] + len(result["caption_ids"])]
        width = max(width, *(len(key.encode()) for key in result["keys"]))
        counts.append(result.pop("num_captions"))
        kinds |= {name: (a.shape[1:], a.dtype) for name, a in result.items() if isinstance(a, np.ndarray)}
    if not kinds.keys() & {"image_embeds", "text_embeds"}:
        found = ", ".join(f"{len(indices)} with {kind}" for kind, indices in problems.items()) or "no caption"
        raise UsageError(f"Nothing can be embedded of {lengths[0]} samples ({result['keys'][-1]} is one): {found}.")
    kinds |= {"keys": ((), f"S{width}")}
    arrays = {
        name: allocate(name, (lengths[name in OF_CAPTIONS], *shape), kind) for name, (shape, kind) in kinds.items()
    }
    starts = [0, 0]
    for place in range(num_chunks):
        result = chunk(place)
        result["keys"] = np.array([key.encode() for key in result["keys"]])
        for name in kinds.keys() & result.keys():
            start = starts[name in OF_CAPTIONS]
            arrays[name][start : start + len(result[name])] = result[name]
        starts = [starts[0] + len(result["keys"]), starts[1] + len(result["caption_ids"])]
    arrays["offsets"] = allocate("offsets", (lengths[0] + 1,), np.int64)
    arrays["offsets"][:] = np.concatenate(counts).cumsum()
    first = arrays["image_embeds" if "image_embeds" in arrays else "text_embeds"]
    sizes = {"dim": first.shape[1], "num_samples": lengths[0], "num_captions": lengths[1]}
    return {**header, **sizes, "problems": problems}, arrays

"""CLIP checkpoints read as data: TorchScript archives, torch.save zips and safetensors files, no code of a file is run.

    file -> its kind, by its first bytes -> names, shapes and places of the tensors (header or pickle only)
         -> `Checkpoint`, a mapping that reads one tensor from its place in the file when it is asked for

TorchScript archives and torch.save files are zips of a pickle (`data.pkl`, read by `pickles`) and one record of raw
bytes per storage. Nothing is unpacked to disk, nothing compressed is inflated, and every size is checked against the
file before memory is taken for it.
"""

import hashlib
import json
import math
import os
import re
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from tqdm.auto import tqdm

from ..foreign_hfclip import WEIGHTS
from .pickles import MAX_TENSORS, CheckpointError, Dtype, Entry, Span, Storage, flatten, interpret


# Far above any CLIP, far below what exhausts a machine.
MAX_ZIP_ENTRIES = 250_000
MAX_ZIP_DIRECTORY = 32 * 2**20  # bytes
MAX_PICKLE = 64 * 2**20  # bytes
PIECE = 2**20  # bytes read at a time where a file is only passed through

DTYPES = {
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "BOOL": torch.bool},
    **{"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8},
    **{"U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "C64": torch.complex64},
    **{"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2},
}
# What a folder may hold, best first.
FOLDER_FILES = (*WEIGHTS[:2], "open_clip_model.safetensors", *WEIGHTS[2:], "open_clip_pytorch_model.bin")
# In a folder for OpenCLIP and transformers both, OpenCLIP's.
OPENCLIP_WEIGHTS = tuple(name for name in FOLDER_FILES if name.startswith("open_clip_"))
OPENCLIP_FILES = tuple(dict.fromkeys((*OPENCLIP_WEIGHTS, *FOLDER_FILES)))
# First bytes of files that are often taken for checkpoints, what they are, and what to do.
DOWNLOAD = "download the file itself"
LOOKALIKES = (
    (rb"version https://git-lfs", "a Git LFS pointer, not the file it points to", "fetch it with `git lfs pull`"),
    (rb"\s*<(!doctype|html|head|body|\?xml|error)", "a web page or an error message of a server", DOWNLOAD),
    (rb"\x1f\x8b|BZh|\xfd7zXZ|7z\xbc\xaf\x27\x1c|\x28\xb5\x2f\xfd|Rar!", "a compressed file", "unpack it first"),
    (rb"PK\x05\x06", "an empty zip archive", DOWNLOAD),
    (
        rb"\x80[\x00-\x05]|.{257}ustar",
        "a bare pickle or a tar file, as torch wrote them before 1.6 (or as other programs do)",
        "where you trust it, load it in torch with weights_only=True and save it again with torch.save(weights, path)",
    ),
)


class Checkpoint(Mapping[str, torch.Tensor]):
    """Tensors by flattened name ("state_dict.visual.conv1.weight"), read from the file one at a time when asked for.

    The order is the file's. `checkpoint[name]` is a contiguous CPU tensor with memory of its own, never a view of a
    memory map; it is not kept. `shape` and `dtype` read nothing.

    Attributes:
        path: the file; for shards their index.
        files: it, or the shards.
        format: "torchscript", "torch" or "safetensors".
        scalars: numbers, strings and bools found beside the tensors, by flattened name.
    """

    def __init__(
        self, path: Path, format: str, files: list[Path], entries: dict[str, Entry], scalars: dict[str, Any]
    ) -> None:
        self.path = path
        self.format = format
        self.scalars = scalars
        self.files = files
        self.entries = entries
        self._intact: set[Span] = set()
        self._sha256: str | None = None

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def __contains__(self, name: object) -> bool:
        return name in self.entries

    def shape(self, name: str) -> torch.Size:
        return torch.Size(self.entries[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        return self.entries[name].dtype

    def __getitem__(self, name: str) -> torch.Tensor:
        """Reads a tensor.

        Raises:
            KeyError: no tensor of this name.
            CheckpointError: the file is shorter than when it was opened, or its bytes do not fit its checksum.
        """
        entry = self.entries[name]
        if 0 in entry.shape:
            return torch.empty(entry.shape, dtype=entry.dtype)
        itemsize = entry.dtype.itemsize
        with errors_of(f"{entry.span.path}, tensor {name!r}"):
            data = read_bytes(entry.span, entry.offset * itemsize, entry.extent * itemsize)
            # Many tensors may share one storage (flattened parameters): its checksum is taken once.
            if entry.span.crc is not None and entry.span not in self._intact:
                check_crc(entry.span, data if data.numel() == entry.span.size else None)
                self._intact.add(entry.span)
        return data.view(entry.dtype).as_strided(entry.shape, entry.stride).contiguous()

    def sha256(self) -> str:
        """SHA-256 of the file in hexadecimal; for shards, of their sorted hexadecimal digests written one after the
        other. Shows a bar for files above 100 MB."""
        if self._sha256 is not None:
            return self._sha256
        size = sum(file.stat().st_size for file in self.files)
        with tqdm(total=size, desc="SHA-256", unit="B", unit_scale=True, disable=size <= 100 * 10**6) as bar:
            digests = sorted(sha256_of(path, bar.update) for path in self.files)
        several = hashlib.sha256("".join(digests).encode()).hexdigest()
        self._sha256 = digests[0] if len(digests) == 1 else several
        return self._sha256


def sha256_of(path: Path, report: Callable[[int], object] = lambda count: None) -> str:
    """SHA-256 of a file in hexadecimal; `report` is told the bytes of each piece."""
    digest = hashlib.sha256()
    with errors_of(path), path.open("rb") as file:
        while piece := file.read(PIECE):
            digest.update(piece)
            report(len(piece))
    return digest.hexdigest()


class View(Mapping[str, torch.Tensor]):
    """Some tensors of a mapping under other names, read when asked for.

    Args:
        names: the new names -> the old; None keeps all.
        dtype: in which tensors of floating point are given; None is their own.
    """

    def __init__(
        self,
        tensors: Mapping[str, torch.Tensor],
        names: Mapping[str, str] | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.tensors, self.dtype = tensors, dtype
        self.names = {name: name for name in tensors} if names is None else names

    def __getitem__(self, name: str) -> torch.Tensor:
        return rounded(self.tensors[self.names[name]], self.dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)

    def __contains__(self, name: object) -> bool:
        return name in self.names

    def on_meta(self) -> dict[str, torch.Tensor]:
        """Shapes and dtypes of a checkpoint's tensors; nothing is read."""
        shape, dtype = self.tensors.shape, self.tensors.dtype
        return {new: torch.empty(shape(old), dtype=dtype(old), device="meta") for new, old in self.names.items()}


def rounded(tensor: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    """`tensor` in `dtype` if it is floating point; as it is for None."""
    return tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor


def open_checkpoint(path: str | Path, names: tuple[str, ...] = FOLDER_FILES) -> Checkpoint:
    """Opens a checkpoint file, or a folder with one under one of `names`, best first; reads no tensor data.

    Raises:
        CheckpointError: no such file, another kind of file, an incomplete, damaged or forged one, or one that needs
            code to be run.
    """
    path = Path(path)
    with errors_of(path):
        if path.is_dir():
            path = find_in_folder(path, names)
        if not path.is_file():
            raise CheckpointError("no such file; expected a checkpoint file or a folder with one.")
    with errors_of(path):
        return open_shards(path) if path.name.endswith(".index.json") else open_file(path)


def open_file(path: Path) -> Checkpoint:
    if check_kind(path) == "zip":
        return open_zip(path)
    return Checkpoint(path, "safetensors", [path], *read_safetensors(path))


@contextmanager
def errors_of(place: Path | str) -> Iterator[None]:
    """Names the place that an error is about."""
    try:
        yield
    except CheckpointError as error:
        raise CheckpointError(f"{place}: {error}") from error
    except OSError as error:
        raise CheckpointError(f"{place}: cannot be read ({error.strerror or error}).") from error


def find_in_folder(folder: Path, names: tuple[str, ...]) -> Path:
    for name in names:
        if (folder / name).is_file():
            return folder / name
    found = sorted(item.name for item in folder.iterdir())[:10]
    raise CheckpointError(f"no checkpoint in this folder: found {found}, expected one of {list(names)}.")


def check_kind(path: Path) -> str:
    """ "zip" or "safetensors", by the first bytes of the file."""
    with path.open("rb") as file:
        head = file.read(512)
    if not head:
        raise CheckpointError("the file is empty; download or copy it again.")
    for pattern, kind, advice in LOOKALIKES:
        if re.match(pattern, head, re.IGNORECASE | re.DOTALL):
            raise CheckpointError(f"this is {kind}; {advice}.")
    if head.startswith(b"PK\x03\x04"):
        return "zip"
    if path.suffix == ".safetensors" or head[8:9] == b"{":
        return "safetensors"
    raise CheckpointError(
        f"the file begins with {head[:8]!r}; expected a zip archive of torch (TorchScript or torch.save) or a "
        "safetensors file."
    )


# Bytes


def read_bytes(span: Span, start: int, size: int) -> torch.Tensor:
    """`size` bytes of `span` from `start` as (size,) uint8."""
    data = torch.empty(size, dtype=torch.uint8)
    with span.path.open("rb") as file:
        file.seek(span.start + start)
        if file.readinto(memoryview(data.numpy())) != size:
            raise CheckpointError("the file ends too early; download or copy it again.")
    return data


def check_crc(span: Span, data: torch.Tensor | None = None) -> None:
    """Compares the CRC-32 of a span with the stated one; `data`: the bytes of the whole span, if they are at hand."""
    crc = 0
    if data is not None:
        crc = zlib.crc32(memoryview(data.numpy()))
    else:
        for start in range(0, span.size, PIECE):
            crc = zlib.crc32(memoryview(read_bytes(span, start, min(PIECE, span.size - start)).numpy()), crc)
    if crc != span.crc:
        raise CheckpointError(
            "its bytes do not fit the checksum in the file: it is damaged (download or copy it again), or was saved "
            "without checksums (torch.serialization.set_crc32_options(False))."
        )


# safetensors files


def read_safetensors(path: Path) -> tuple[dict[str, Entry], dict[str, str]]:
    """Places of the tensors, and the metadata. The library judges the file; the bytes are then read directly, because
    its tensors are views of a memory map."""
    try:
        with safe_open(path, framework="np"):
            pass
    except SafetensorError as error:
        raise CheckpointError(f"no complete safetensors file ({error}); download or copy it again.") from error
    with path.open("rb") as file:
        header_size = struct.unpack("<Q", file.read(8))[0]
        header = json.loads(file.read(header_size))
    values = header.pop("__metadata__", None) or {}
    if not 0 < len(header) <= MAX_TENSORS:
        raise CheckpointError(f"{len(header)} tensors in it; expected 1 to {MAX_TENSORS}.")
    entries = {}
    for name, record in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        if record["dtype"] not in DTYPES:
            raise CheckpointError(f"tensor {name!r} has dtype {record['dtype']}, which torch cannot hold.")
        begin, end = record["data_offsets"]
        shape = tuple(record["shape"])
        # (a, b, c) -> (b * c, c, 1)
        stride = tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))
        span = Span(path, 8 + header_size + begin, end - begin)
        entries[name] = Entry(span, DTYPES[record["dtype"]], shape, stride)
    return entries, values


# Zip archives of torch


def open_zip(path: Path) -> Checkpoint:
    with path.open("rb") as file:
        records = list_records(file)
        pickles = [name for name in records if name.endswith("/data.pkl") and name.count("/") == 1]
        if len(pickles) != 1:
            raise CheckpointError(
                f"a zip archive with {len(pickles)} pickles `<folder>/data.pkl`; torch writes exactly one. Unpack the "
                "archive if it holds a checkpoint, and pass that."
            )
        prefix = pickles[0].removesuffix("data.pkl")
        archive = Archive(path, file, records, prefix)
        if f"{prefix}byteorder" in records and archive.read("byteorder") != b"little":
            raise CheckpointError("a big-endian archive; save it again on a little-endian machine.")
        entries, values = flatten(interpret(archive.read("data.pkl"), archive.storage))
    return Checkpoint(path, "torchscript" if f"{prefix}constants.pkl" in records else "torch", [path], entries, values)


def list_records(file: BinaryIO) -> dict[str, zipfile.ZipInfo]:
    """The entries of a zip by name, none of them read; all that could make an entry ambiguous is refused."""
    file_size = os.fstat(file.fileno()).st_size
    check_directory(file, file_size)
    try:
        entries = zipfile.ZipFile(file).infolist()
    except Exception as error:  # zipfile raises BadZipFile, struct.error, UnicodeDecodeError, NotImplementedError ...
        raise CheckpointError(f"its zip directory cannot be read ({error}); download or copy it again.") from error
    if len(entries) > MAX_ZIP_ENTRIES:
        raise CheckpointError(f"a zip archive of {len(entries)} entries; expected at most {MAX_ZIP_ENTRIES}.")
    records = {entry.filename: entry for entry in entries}
    if len(records) < len(entries):
        raise CheckpointError("two entries of the zip archive have one name; the file is forged.")
    for entry in entries:
        name = entry.orig_filename
        if name != entry.filename or re.search(r"^/|\\|\0|(^|/)\.\.(/|$)", name):
            raise CheckpointError(f"the zip archive has an entry with the unsafe name {name[:100]!r}.")
    end = file_size
    for entry in sorted(entries, key=lambda entry: -entry.header_offset):
        # 30: a local header without its name.
        if entry.header_offset < 0 or entry.header_offset + 30 + len(entry.filename) + entry.compress_size > end:
            raise CheckpointError(
                f"zip entry {entry.filename[:100]!r} claims {entry.compress_size} bytes that are not its own; the "
                "file is damaged or forged."
            )
        end = entry.header_offset
    return records


def check_directory(file: BinaryIO, file_size: int) -> None:
    """Bounds the zip's directory, which zipfile reads as a whole, by what the end of the file says of it."""
    file.seek(max(0, file_size - 98))
    tail = file.read().rjust(98, b"\0")
    if tail[76:80] != b"PK\x05\x06":
        raise CheckpointError("the zip archive does not end as torch ends it: incomplete; download or copy it again.")
    directory_size = struct.unpack("<I", tail[88:92])[0]
    if tail[56:60] == b"PK\x06\x07":  # zip64: the sizes that count are in a record of 56 bytes before
        if tail[:4] != b"PK\x06\x06" or struct.unpack("<Q", tail[64:72])[0] != file_size - 98:
            raise CheckpointError("the zip archive has a misplaced directory; it is damaged or forged.")
        directory_size = struct.unpack("<Q", tail[40:48])[0]
    if directory_size > min(MAX_ZIP_DIRECTORY, file_size):
        raise CheckpointError(
            f"a zip directory of {directory_size} bytes in a file of {file_size}; expected at most {MAX_ZIP_DIRECTORY}."
        )


@dataclass(frozen=True)
class Archive:
    """The records of an archive, by their names within its folder `prefix`."""

    path: Path
    file: BinaryIO
    entries: dict[str, zipfile.ZipInfo]
    prefix: str

    def read(self, name: str) -> bytes:
        span = self.span(name)
        if span.size > MAX_PICKLE:
            raise CheckpointError(f"zip entry {name!r} has {span.size} bytes; expected at most {MAX_PICKLE}.")
        data = read_bytes(span, 0, span.size)
        check_crc(span, data)
        return data.numpy().tobytes()

    def storage(self, reference: Any) -> "Storage":
        # ("storage", type, key, device, numel); torch 1.4 and 1.5 add a None.
        if type(reference) is not tuple or len(reference) not in (5, 6) or reference[0] != "storage":
            raise CheckpointError("its pickle refers to something outside of it that is no storage; it is forged.")
        kind, key, numel = reference[1], reference[2], reference[4]
        if not (isinstance(kind, Dtype) and type(key) is str and type(numel) is int):
            raise CheckpointError("its pickle refers to a storage of no known type; the file is forged.")
        folder = "data" if f"{self.prefix}data/{key}" in self.entries else "tensors"
        span = self.span(f"{folder}/{key}")
        itemsize = kind.dtype.itemsize if kind.dtype else 1
        if span.size // itemsize != numel:
            raise CheckpointError(
                f"storage {key[:100]!r} has {span.size} bytes, but its pickle says {numel} elements of {itemsize}; the "
                "file is damaged or forged."
            )
        return Storage(span, kind.dtype)

    def span(self, name: str) -> Span:
        """Where the bytes of a record lie: after its local header, which must agree with the directory."""
        name = self.prefix + name
        if name not in self.entries:
            raise CheckpointError(f"zip entry {name[:100]!r} is missing; the file is damaged or forged.")
        entry = self.entries[name]
        if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1 or entry.compress_size != entry.file_size:
            raise CheckpointError(
                f"zip entry {name!r} is compressed or encrypted, which torch never does. Unpack the archive and zip it "
                "again without compression (`zip -0 -r`), or save the checkpoint again."
            )
        self.file.seek(entry.header_offset)
        header = self.file.read(30)
        if len(header) < 30 or header[:4] != b"PK\x03\x04":
            raise CheckpointError(f"zip entry {name!r} has no header where the directory says; the file is damaged.")
        name_size, extra_size = struct.unpack("<HH", header[26:30])
        if self.file.read(name_size) != name.encode("utf-8" if entry.flag_bits & 0x800 else "cp437"):
            raise CheckpointError(f"zip entry {name!r} has another name in the directory; the file is forged.")
        return Span(self.path, entry.header_offset + 30 + name_size + extra_size, entry.file_size, entry.CRC)


# Shards


def open_shards(index: Path) -> Checkpoint:
    """A folder's shards, in the order of their names; index and shards must agree on every tensor."""
    if index.stat().st_size > MAX_PICKLE:
        raise CheckpointError(f"an index of more than {MAX_PICKLE} bytes; the file is forged.")
    try:
        weight_map = dict(json.loads(index.read_bytes())["weight_map"])
        if not weight_map:
            raise ValueError("weight_map is empty")
    except Exception as error:  # no JSON, no such key, values of other types, nested beyond measure
        raise CheckpointError(f"no index of shards ({type(error).__name__}: {error}).") from error
    suffix, kind = (".bin", "torch") if index.name.endswith(".bin.index.json") else (".safetensors", "safetensors")
    unsafe = [name for name in weight_map.values() if not re.fullmatch(rf"[^/\\:\0]+\{suffix}", str(name))]
    if unsafe:
        raise CheckpointError(f"the index names {unsafe[:3]}; expected plain names of {suffix} files.")
    files = [index.parent / name for name in sorted(set(weight_map.values()))]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise CheckpointError(f"the index names shards that are missing: {missing[:5]}; download them too.")
    entries: dict[str, Entry] = {}
    scalars: dict[str, Any] = {}
    for file in files:
        with errors_of(file):
            shard = open_file(file)
            if shard.format != kind:
                raise CheckpointError(f"a {shard.format} file, expected {kind} as its name says; download it again.")
        wrong = shard.keys() ^ {name for name, holder in weight_map.items() if holder == file.name}
        if wrong:
            raise CheckpointError(f"the index and {file.name} disagree on {sorted(wrong)[:5]}; download both again.")
        entries |= shard.entries
        scalars |= shard.scalars
    return Checkpoint(index, kind, files, entries, scalars)

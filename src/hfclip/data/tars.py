"""Which files a tar holds and where, read from its headers, which are checked before they are believed.

As strict as `tarfile`, and stricter with numbers, where it takes signs. Headers that extend the next one are read
one after the other, however many there are, and what they say is bounded: a tar of hostile headers costs a pass over
its bytes. Damage costs what it hits: reading goes on with the next header.

    block -> _parse: name, size, kind -> a file; or _extension: what it says of the next file
          -> no header: _next_header
"""

import hashlib
import os
import re
import tarfile
import uuid
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

import numpy as np

from .samples import IMAGE_ENDINGS, SHORT, BadSample, is_empty, text_captions


BLOCK = tarfile.BLOCKSIZE
CHUNK = 2048 * BLOCK
LONGEST_EXTENSION = 1 << 20  # bytes of a long name, or of extended attributes
LARGEST_SIZE = 1 << 62
LONG = (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)
EXTENSIONS = (*LONG, tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.XGLTYPE)
FILES = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE)
# Only links, folders and devices have no contents, whatever their size says.
WITHOUT_CONTENTS = tuple(set(tarfile.SUPPORTED_TYPES) - {*FILES, *EXTENSIONS, tarfile.GNUTYPE_SPARSE})
RECORD = re.compile(rb"(\d{1,20}) ")  # begins with its length


def files_of(file: BinaryIO, damage: set[str]) -> Iterator[tuple[str, int, int]]:
    """Name, first byte and size of each regular file that is whole. What is wrong with the tar is put into `damage`."""
    end = file.seek(0, os.SEEK_END)
    offset, headers, said, always = 0, 0, {}, {}  # said of the next file, and of all that follow
    while offset is not None:
        block = _read(file, offset, BLOCK)
        if len(block) < BLOCK:
            damage.add("truncated shard")
            break
        start, header = offset + BLOCK, _parse(block)
        if header is None:
            offset, said = _next_header(file, start), {}
            if any(block) or offset is not None:  # a whole tar ends with nothing but zeros
                damage.add("damaged shard")
            continue
        name, size, kind = header
        headers += 1
        if kind in EXTENSIONS and start + size <= end:
            length = _padded(size) if kind in LONG else size  # a name ends with a zero, as tarfile has it
            new = _extension(kind, _read(file, start, length) if size <= LONGEST_EXTENSION else None)
            if "broken" in new:
                damage.add("damaged shard")
            if kind == tarfile.XGLTYPE:
                always |= {key: value for key, value in new.items() if key != "broken"}
            else:
                said = {**new, **said}  # the first one counts, as for tarfile
            offset = start + _padded(size)
            continue
        if kind == tarfile.GNUTYPE_SPARSE:
            is_extended = block[482]
            while is_extended and len(block := _read(file, start, BLOCK)) == BLOCK:
                start, is_extended = start + BLOCK, block[504]
        about, said = {**always, **said}, {}
        size = about.get("size", size)
        if kind in WITHOUT_CONTENTS:
            size = 0
        if start + size > end:  # cut off, or it never was so large
            offset = _lost(file, start, damage)
            continue
        if kind in FILES and not {"broken", "sparse"} & about.keys():
            yield about.get("path", name), start, size
        offset = start + _padded(size)
    if damage and not headers:
        damage.clear()
        damage.add("not a tar")


def _lost(file: BinaryIO, offset: int, damage: set[str]) -> int | None:
    """Where to go on after a header whose contents are not all there; None if nothing follows."""
    following = _next_header(file, offset)
    damage.add("truncated shard" if following is None else "damaged shard")
    return following


def _parse(block: bytes) -> tuple[str, int, bytes] | None:
    """Name, size and kind, or None if this is no header."""
    try:
        if (plain := _parse_plain(block)) is not None:
            return plain
        member = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        if block[124] not in (0o200, 0o377):  # else the size is written in base 256
            _octal(block[124:136])
    except (tarfile.HeaderError, ValueError):
        return None
    return (member.name, member.size, member.type) if 0 <= member.size <= LARGEST_SIZE else None


def _parse_plain(block: bytes) -> tuple[str, int, bytes] | None:
    """The same for an ordinary header of a regular file, many times faster than tarfile; None if it is not one."""
    kind = block[156:157]
    if kind not in (tarfile.REGTYPE, tarfile.AREGTYPE) or block[124] > 127:
        return None
    if _octal(block[148:156]) != sum(block) - sum(block[148:156]) + 8 * 32:  # itself taken as blanks
        return None
    name = block[:100].partition(b"\0")[0]
    if block[257:263] == b"ustar\0" and (prefix := block[345:500].partition(b"\0")[0]):
        name = prefix + b"/" + name
    if name.endswith(b"/"):  # an old way to say that it is a folder
        return None
    return name.decode("utf-8", "surrogateescape"), _octal(block[124:136]), kind


def _octal(field: bytes) -> int:
    digits = field.partition(b"\0")[0].strip()
    if digits.strip(b"01234567"):  # int() would take signs and underscores
        raise ValueError(f"{field!r} is no octal number")
    return int(digits or b"0", 8)


def _extension(kind: bytes, data: bytes | None) -> dict:
    """What a header before a file says of it: `path`, `size`, `sparse`; `broken` if it is not to be understood."""
    if data is None:
        return {"broken": True}
    if kind in LONG:
        name = data.partition(b"\0")[0].decode("utf-8", "surrogateescape")
        return {"path": name} if kind == tarfile.GNUTYPE_LONGNAME else {}
    said, place = {}, 0
    while place < len(data) and data[place]:
        length = RECORD.match(data, place)
        record = data[length.end() : place + int(length[1])] if length else b""
        key, equals, value = record.partition(b"=")
        if not (key and equals and value.endswith(b"\n") and place + int(length[1]) <= len(data)):
            return {"broken": True}
        place += int(length[1])
        if key == b"path":
            said["path"] = value[:-1].decode("utf-8", "surrogateescape").rstrip("/")
        elif key == b"size":
            if not re.fullmatch(rb"\d{1,18}\n", value):
                return {"broken": True}
            said["size"] = int(value)
        elif key.startswith(b"GNU.sparse."):
            said["sparse"] = True
    return said


def _next_header(file: BinaryIO, offset: int) -> int | None:
    """Where the next block lies that is a header, by its checksum."""
    while len(data := _read(file, offset, CHUNK)) >= BLOCK:
        sums = np.frombuffer(data, np.uint8, len(data) // BLOCK * BLOCK).reshape(-1, BLOCK)[:, 148:156]
        is_octal = ((sums >= ord("0")) & (sums <= ord("7"))) | (sums == ord(" ")) | (sums == 0)
        for number in np.flatnonzero(is_octal.all(axis=1) & sums.any(axis=1)).tolist():
            if _parse(data[number * BLOCK : (number + 1) * BLOCK]) is not None:
                return offset + number * BLOCK
        offset += CHUNK
    return None


def _read(file: BinaryIO, offset: int, size: int) -> bytes:
    file.seek(offset)
    return file.read(size)


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


# ---------------------------------------------------------------------------------------------------------------------
# Index
# ---------------------------------------------------------------------------------------------------------------------

KINDS = {**dict.fromkeys(IMAGE_ENDINGS, "image"), "txt": "text", "json": "json", "cls": "label", "npy": "labels"}
# Where one sample's members lie in its tar: byte offset and size, -1 where there is none; the number in its .cls, -1 if
# there is none, -2 if it is no number; the offset of a member of its name that is not read; and whether its .txt is blank.
PLACED = ("image", "text", "json", "labels")
MEMBERS = np.dtype(
    [(f"{member}_{what}", np.int64) for member in PLACED for what in ("offset", "size")]
    + [("label", np.int64), ("other_offset", np.int64), ("is_blank", np.bool_)]
)
# What reading a sample takes. Those of all samples are in memory: 37 bytes each. The kind of a caption is its member's
# place in `PLACED`; `labels` stand for a caption where there is no other.
SAMPLE = np.dtype(
    [(f"{member}_{what}", np.int64) for member in ("image", "caption") for what in ("offset", "size")]
    + [("kind", np.uint8), ("label", np.int32)]
)


def load_index(shard: Path, cache: Path | None) -> tuple[np.ndarray, set[str]]:
    """`index_tar`, kept in the cache, if there is one, where the tar is whole."""
    if cache is None:
        return index_tar(shard)
    state = shard.stat()
    identity = f"{shard.resolve()}|{state.st_size}|{state.st_mtime_ns}|{sorted(KINDS)}|{MEMBERS}"
    path = cache / f"{hashlib.sha256(identity.encode()).hexdigest()[:32]}.npy"
    with suppress(OSError, ValueError, EOFError):  # not there, or damaged
        return np.load(path), set()
    index, damage = index_tar(shard)
    if not damage:
        temporary = path.with_name(f"{path.stem}.{uuid.uuid4().hex}.tmp.npy")
        with suppress(OSError):  # a full disk: it is made again next time
            np.save(temporary, index)
            os.replace(temporary, path)
        temporary.unlink(missing_ok=True)
    return index, damage


def index_tar(shard: Path) -> tuple[np.ndarray, set[str]]:
    """The `MEMBERS` of each sample, and what is wrong with the tar.

    Members of one name are a sample, wherever they lie; a second image or caption of a name begins another sample.
    Names end at the last dot (`v1.0_1.jpg`). But where the part up to the first dot names a sample, too (`1.jpg`), a
    member such as `1.seg.png` is a further field of it, as webdataset has it, unless it has an image and a caption.
    """
    rows, by_name, damage = [], {}, set()
    with open(shard, "rb", buffering=0) as file:
        for path, start, length in files_of(file, damage):
            folder, _, base = path.rpartition("/")
            stem, _, ending = base.rpartition(".")
            if is_hidden(path):
                continue
            kind, name = KINDS.get(ending.lower(), "other"), (folder, stem or base)
            row = by_name.get(name)
            if row is None or kind in row and kind in ("image", "text", "json"):
                row = by_name[name] = {"name": name}
                rows.append(row)
            row.setdefault(kind, (start, length))
            if kind == "text" and length <= SHORT:
                with suppress(BadSample):  # told when it is read
                    row["is_blank"] = is_empty(text_captions(_read(file, start, length)))
            if kind == "label":
                digits = _read(file, start, min(length, 20)).strip()
                row["label"] = int(digits) if digits.isdigit() and int(digits) < 2**31 else -2
    index = [_members(row) for row in rows if _is_sample(row, by_name)]
    return np.array(index, MEMBERS), damage


def is_hidden(path: str) -> bool:
    """Whether systems have put a file there, not people."""
    return path.rpartition("/")[2].startswith(".") or path.startswith("__MACOSX/") or "/__MACOSX/" in path


def _is_sample(row: dict, by_name: dict) -> bool:
    (folder, stem), has_caption = row["name"], "text" in row or "json" in row
    return "." not in stem or "image" in row and has_caption or (folder, stem.partition(".")[0]) not in by_name


def _members(row: dict) -> tuple[int, ...]:
    places = (row.get(kind, (-1, -1)) for kind in PLACED)
    numbers = [number for place in places for number in place]
    return *numbers, row.get("label", -1), row.get("other", (-1, -1))[0], row.get("is_blank", False)


def select_samples(
    members: np.ndarray,
    key: str | None,
    damage: set[str],
    labels: bool = False,
    required: bool = True,
    without_empty: bool = False,
) -> tuple[np.ndarray, Counter, dict[str, int]]:
    """The `SAMPLE` of those that have an image and a caption; what is left out by reason, and where an example lies.

    Args:
        key: `caption_key`. With one, only .json members count; without, .txt members come first.
        labels: Samples may have a label, or several, instead of a caption.
        required: Samples have to have a caption.
        without_empty: Samples whose .txt is blank are left out, too.
    """
    no_image = members["image_offset"] < 0
    is_json = (members["text_offset"] < 0) | (key is not None)
    no_caption = np.where(is_json, members["json_offset"], members["text_offset"]) < 0
    kinds = np.where(is_json, PLACED.index("json"), PLACED.index("text"))
    if labels:
        kinds[no_caption & (members["labels_offset"] >= 0)] = PLACED.index("labels")
        no_caption &= (members["label"] < 0) & (members["labels_offset"] < 0)
    no_caption &= required
    is_blank = members["is_blank"] & (kinds == PLACED.index("text")) & ~no_image & without_empty
    others = no_image & (members["text_offset"] < 0) & (members["json_offset"] < 0) & (members["label"] == -1)
    left_out, examples = Counter(dict.fromkeys(damage, 1)), {}
    reasons = {"missing image": no_image & ~others, "missing caption": no_caption & ~others, "unknown format": others}
    reasons["empty caption"] = is_blank
    for reason, of_samples in reasons.items():
        if count := int(of_samples.sum()):
            left_out[reason], first = count, members[of_samples.argmax()]
            places = [int(first[f"{kind}_offset"]) for kind in ("image", "other", "text", "json", "labels")]
            if there := [place for place in places if place >= 0]:
                examples[reason] = there[0]
    is_kept = ~no_image & ~no_caption & ~is_blank
    kept, kinds = members[is_kept], kinds[is_kept]
    samples = np.empty(len(kept), SAMPLE)
    for what in ("offset", "size"):
        samples[f"image_{what}"] = kept[f"image_{what}"]
        of_kinds = [kept[f"{kind}_{what}"] for kind in PLACED]
        samples[f"caption_{what}"] = np.choose(kinds, of_kinds)
    samples["kind"], samples["label"] = kinds, kept["label"]
    return samples, left_out, examples


def name_in(header: bytes) -> str | None:
    """The name that a header has, cut if it is long; None if it is damaged."""
    parsed = _parse(header)
    return parsed and parsed[0]

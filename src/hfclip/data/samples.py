"""One sample of image-caption data, what can be wrong with it, and the sequence that every source is.

A sample is read at random and never decoded by its source, so that the order of the data is the reader's alone.
Whatever is wrong with a source as a whole is a `UsageError` when it is opened, whatever is wrong with one sample is a
`BadSample` when it is read.
"""

import hashlib
import json
import os
import re
import sys
import unicodedata
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError
from tqdm import tqdm

from ..bpe_hfclip import clean


# What can be wrong with a sample, by the name under which it is counted.
PROBLEMS = (
    "missing image",
    "missing caption",
    "empty image",
    "empty caption",
    "not an image",
    "unreadable image",
    "too large image",
    "unreadable caption",
    "truncated shard",
    "unreadable shard",
)
CAPTION_KEYS = ("text", "caption", "captions", "texts", "sentences", "title", "txt", "TEXT")
IMAGE_ENDINGS = tuple("jpg jpeg jfif png webp gif bmp tif tiff avif heic heif ppm pgm".split())
HOW_CAPTIONS_ARE_GIVEN = (
    "Captions are given by a .txt or .json file of the image's name beside it, by metadata.csv or metadata.jsonl with "
    "the columns file_name and text, by a csv, tsv, jsonl or parquet file with a column of images and one of captions, "
    "or by the names of class folders, two or more."
)
HELD_OUT = ("test", "validation", "val", "dev")  # splits, in the order of preference
# Bytes that no image and no caption has: what is longer is not read into memory.
LARGEST = {"image": 1 << 30, "caption": 1 << 24}
SHORT = 32  # bytes of a caption's file that may be empty: it is looked at when its source is opened
SIGNATURES = (b"\xff\xd8", b"\x89PNG", b"RIFF", b"GIF8")  # of image files, damaged ones too
INVISIBLE = ("Cc", "Cf", "Mn", "Zl", "Zp", "Zs")  # in Unicode: control, format, marks on nothing, and white space


class Sample(NamedTuple):
    """An image as it is stored, with its captions; without any where none are required."""

    image: bytes | Image.Image
    captions: list[str]
    key: str
    """Its name within the source."""
    label: int | None = None
    """The index of its class in `Source.labels`."""


class Keys(NamedTuple):
    """Under which names a source has its images and captions; None: the usual ones."""

    image: str | None = None
    caption: str | None = None
    required: bool = True
    """Whether samples without captions are left out."""


class BadSample(Exception):
    """A sample that cannot be used.

    Args:
        kind: one of `PROBLEMS`, under which it is counted.
        lost: what else is gone since the source was opened, in words.
    """

    def __init__(self, kind: str, lost: str | None = None):
        super().__init__(kind)
        self.kind, self.lost = kind, lost


class Source:
    """A sequence of samples.

    Attributes:
        length: how many samples there are, or are to be used.
        skipped: how many were left out when the source was opened, by reason.
        examples: the name of one of those, by reason.
        labels: names of the classes, if the samples have labels.
    """

    labels: list[str] | None = None

    def __init__(self):
        self.length, self.skipped, self.examples = 0, Counter(), {}

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Sample:
        """Raises BadSample."""
        raise NotImplementedError

    def content(self, index: int) -> Sample:
        """The sample for fingerprints: of a source that makes images, what they are made of in their place.

        Raises BadSample.
        """
        return self[index]

    def captions(self, index: int) -> list[str]:
        """The captions of a sample without its image. Raises BadSample."""
        raise NotImplementedError

    def label(self, index: int) -> int | None:
        """The number of a sample's class in `labels`, if it has one. Raises BadSample."""
        return None

    def label_row(self, index: int) -> np.ndarray | None:
        """A number per class in `labels`, above 0 for those of a sample, if it may have several. Raises BadSample."""
        return None

    def name(self, index: int) -> str:
        """Where a sample lies, for messages."""
        return f"sample {index}"

    def parts(self, name: str) -> tuple[list[str], list[int], list[float]]:
        """Names, lengths and weights of the sources that batches are filled from: of one called `name`, itself."""
        return [name], [len(self)], [1.0]

    def skip(self, reason: str, example: str | None = None, count: int = 1) -> None:
        """Counts what is left out."""
        self.skipped[reason] += count
        if example is not None:
            self.examples.setdefault(reason, example)

    def describe_skipped(self) -> str:
        """What was left out, in words; empty for nothing."""
        examples = {reason: f" ({example})" for reason, example in self.examples.items()}
        return ", ".join(f"{count} with {reason}{examples.get(reason, '')}" for reason, count in self.skipped.items())


@contextmanager
def decoding(image: bytes | Image.Image) -> Iterator[None]:
    """Turns the errors of whatever decodes `image` inside into `BadSample`."""
    if image == b"":
        raise BadSample("empty image")
    if isinstance(image, bytes) and image[4:10] == b"ftyphe" and "HEIF" not in Image.OPEN:
        try:
            import pillow_heif
        except ImportError:
            hint = ImportError("HEIC images are read after `pip install 'hfclip[heic]'`")
            raise BadSample("unreadable image") from hint
        pillow_heif.register_heif_opener()
    try:
        yield
    except ValueError as error:
        is_image = not isinstance(error.__cause__, UnidentifiedImageError) or image.startswith(SIGNATURES)
        if "PIL.Image.MAX_IMAGE_PIXELS" in str(error):
            raise too_large("image") from error
        raise BadSample("unreadable image" if is_image else "not an image") from error


def too_large(what: str) -> BadSample:
    """What is wrong with an "image" or "caption" of more than `LARGEST` bytes."""
    return BadSample("too large image" if what == "image" else "unreadable caption")


def caption_list(value: Any) -> list[str]:
    """A caption or a list of captions as a list. Raises BadSample."""
    captions = [value] if isinstance(value, str) else value
    if captions is None:
        raise BadSample("missing caption")
    if not isinstance(captions, list) or not all(isinstance(caption, str) for caption in captions):
        raise BadSample("unreadable caption") from TypeError(f"found {value!r:.80}, expected text or a list of texts")
    try:
        "".join(captions).encode()
    except UnicodeEncodeError as error:  # half a character, which JSON can say: "\\ud83d"
        raise BadSample("unreadable caption") from error
    return captions


def json_captions(data: bytes | str, key: str | None) -> list[str]:
    """The captions that a JSON object has under `key`, or under the first of the usual keys. Raises BadSample."""
    try:
        record = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise BadSample("unreadable caption") from error
    if not isinstance(record, dict):
        raise BadSample("unreadable caption") from TypeError(f"found {record!r:.80}, expected an object")
    return caption_list(record.get(key or next((key for key in CAPTION_KEYS if key in record), None)))


def text_captions(data: bytes) -> list[str]:
    """The caption that a text file is. Raises BadSample."""
    try:
        return [data.decode("utf-8")]
    except ValueError as error:
        raise BadSample("unreadable caption") from error


def say(message: str) -> None:
    """Writes a line for the user, once a machine."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        tqdm.write(message, file=sys.stderr)


def usable_captions(source: Source, index: int) -> list[str]:
    """The captions of a sample that are not blank; none if they cannot be read."""
    try:
        return not_blank(source.captions(index))
    except BadSample:
        return []


def not_blank(captions: list[str]) -> list[str]:
    """The captions that are not empty after cleaning, stripped.

    Blank are white space, also in HTML (`&nbsp;`), marks of byte order and characters without width.
    """
    return [caption.strip() for caption in captions if not _is_blank(caption)]


def is_empty(value: Any) -> bool:
    """Whether a caption is blank, or each of a list of them."""
    captions = [value] if isinstance(value, str) else value
    return isinstance(captions, list) and all(isinstance(c, str) for c in captions) and not not_blank(captions)


def _is_blank(caption: str) -> bool:
    if "&" not in caption and re.search("[a-zA-Z0-9]", caption):  # nearly all, without the slow cleaning
        return False
    return all(unicodedata.category(sign) in INVISIBLE for sign in clean(caption))


def caption_id(caption: str) -> int:
    """63 bits that are the same for the same caption, in every process and on every machine."""
    return int.from_bytes(hashlib.blake2b(caption.encode(), digest_size=8).digest(), "little") >> 1

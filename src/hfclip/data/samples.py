"""One sample of image-caption data, what can be wrong with it, and the sequence that every source is.

A sample is read at random and never decoded by its source, so that the order of the data is the reader's alone.
Whatever is wrong with a source as a whole is a `UsageError` when it is opened, whatever is wrong with one sample is a
`BadSample` when it is read.
"""

import hashlib
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from PIL import Image, UnidentifiedImageError

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
CAPTION_KEYS = ("text", "caption", "captions", "texts", "sentences")
SIGNATURES = (b"\xff\xd8", b"\x89PNG", b"RIFF", b"GIF8")  # of image files, damaged ones too
INVISIBLE = ("Cc", "Cf", "Mn", "Zl", "Zp", "Zs")  # in Unicode: control, format, marks on nothing, and white space


class Sample(NamedTuple):
    """An image as it is stored, with its captions."""

    image: bytes | Image.Image
    captions: list[str]
    key: str
    """Its name within the source."""
    label: int | None = None
    """The index of its class in `Source.labels`."""


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
        labels: names of the classes, if the samples have labels.
    """

    length: int
    skipped: Counter
    labels: list[str] | None = None

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Sample:
        """Raises BadSample."""
        raise NotImplementedError

    def captions(self, index: int) -> list[str]:
        """The captions of a sample without its image. Raises BadSample."""
        raise NotImplementedError


@contextmanager
def decoding(image: bytes | Image.Image) -> Iterator[None]:
    """Turns the errors of whatever decodes `image` inside into `BadSample`."""
    if image == b"":
        raise BadSample("empty image")
    try:
        yield
    except ValueError as error:
        is_image = not isinstance(error.__cause__, UnidentifiedImageError) or image.startswith(SIGNATURES)
        too_large = "PIL.Image.MAX_IMAGE_PIXELS" in str(error)
        kind = "too large image" if too_large else "unreadable image" if is_image else "not an image"
        raise BadSample(kind) from error


def caption_list(value: Any) -> list[str]:
    """A caption or a list of captions as a list. Raises BadSample."""
    captions = [value] if isinstance(value, str) else value
    if captions is None:
        raise BadSample("missing caption")
    if not isinstance(captions, list) or not all(isinstance(caption, str) for caption in captions):
        raise BadSample("unreadable caption")
    try:
        "".join(captions).encode()
    except UnicodeEncodeError as error:  # half a character, which JSON can say: "\\ud83d"
        raise BadSample("unreadable caption") from error
    return captions


def usable_captions(source: Source, index: int) -> list[str]:
    """The captions of a sample that are not blank; none if they cannot be read."""
    try:
        return not_blank(source.captions(index))
    except BadSample:
        return []


def not_blank(captions: list[str]) -> list[str]:
    """Those captions of which something is left when they are cleaned, stripped.

    Blank are white space, also in HTML (`&nbsp;`), marks of byte order and characters without width.
    """
    return [caption.strip() for caption in captions if not _is_blank(caption)]


def _is_blank(caption: str) -> bool:
    if "&" not in caption and re.search("[a-zA-Z0-9]", caption):  # nearly all, without the slow cleaning
        return False
    return all(unicodedata.category(sign) in INVISIBLE for sign in clean(caption))


def caption_id(caption: str) -> int:
    """63 bits that are the same for the same caption, in every process and on every machine."""
    return int.from_bytes(hashlib.blake2b(caption.encode(), digest_size=8).digest(), "little") >> 1

"""Images as a browser gets them: thumbnails, originals of types that are safe to show, and what was uploaded."""

import hashlib
import io
import os
import stat
import tempfile
from collections import OrderedDict
from contextlib import suppress
from pathlib import Path

import PIL.Image
from starlette.exceptions import HTTPException
from starlette.responses import FileResponse, Response
from torch import Tensor

from ..open_image_hfclip import FORMATS, open_image


THUMBNAIL = (768, 256)  # pixels, at most: rows of thumbnails are of one height
LARGEST_UPLOAD = 20 * 2**20
MAX_PIXELS = 2**26  # 8192 x 8192
# What browsers show, and run nothing in. Other formats reach them as JPEG.
SHOWN = {"JPEG": "image/jpeg", "PNG": "image/png", "WEBP": "image/webp", "GIF": "image/gif", "AVIF": "image/avif"}
LARGEST_SHOWN = (2048, 2048)  # of those others


class Thumbnails:
    """WebP thumbnails, kept in a folder where it can be written: one per image and time of its last change."""

    def __init__(self, folder: Path):
        self.folder = folder

    def get(self, hit) -> bytes:
        place = self.folder / f"{hit.id // 1000}" / f"{hit.id}-{int(hit.modified * 1000):x}.webp"
        with suppress(OSError):
            return place.read_bytes()
        data = thumbnail(read_image(hit.path, THUMBNAIL))
        with suppress(OSError):  # a store that is full, or another's, serves as well
            place.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=place.parent, delete=False) as file:
                file.write(data)
            os.replace(file.name, place)
        return data


def thumbnail(image: PIL.Image.Image) -> bytes:
    image.thumbnail(THUMBNAIL, PIL.Image.Resampling.LANCZOS, reducing_gap=3)
    return encode(image, "WEBP", quality=80)


def original(hit, as_download: bool) -> Response:
    """An indexed image as it lies on the disk, or as JPEG where browsers do not show its format."""
    path = Path(hit.path)
    with _open(path) as image:
        kind = SHOWN.get(image.format)
    name = printable(path.name)
    if as_download:
        return FileResponse(path, media_type="application/octet-stream", filename=name)
    if kind:
        return FileResponse(path, media_type=kind, filename=name, content_disposition_type="inline")
    image = read_image(path, LARGEST_SHOWN)
    image.thumbnail(LARGEST_SHOWN, PIL.Image.Resampling.LANCZOS, reducing_gap=3)
    return Response(encode(image.convert("RGB"), "JPEG", quality=90), media_type="image/jpeg")


def read_image(source: str | Path | bytes, wanted: tuple[int, int] | None = None) -> PIL.Image.Image:
    """A decoded image, upright; a JPEG at a fraction of its size, down to `wanted`, where that is all that is wanted."""
    with _open(source) as image:
        if wanted:
            image.draft(None, (max(wanted), max(wanted)))
        try:
            return open_image(image)
        except ValueError as error:
            raise HTTPException(415, f"{error}") from error


def _open(source: str | Path | bytes) -> PIL.Image.Image:
    """An image of which only the header is read. Raises HTTPException for what is none, and for one too large."""
    PIL.Image.init()
    formats = [name for name in FORMATS if name in PIL.Image.OPEN]
    try:
        if not isinstance(source, bytes) and not stat.S_ISREG(os.stat(source).st_mode):
            raise FileNotFoundError  # a pipe would not be read to its end
        image = PIL.Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=formats)
    except OSError as error:
        if isinstance(source, bytes) or isinstance(error, PIL.UnidentifiedImageError):
            raise HTTPException(415, f"found no image, expected one of {', '.join(formats)}.") from error
        raise HTTPException(
            404, "the image is no longer there, or may not be read. Index its folder again."
        ) from error
    except Exception as error:  # PIL's parsers raise nearly anything on damaged headers
        raise HTTPException(415, f"the image cannot be decoded ({type(error).__name__}).") from error
    if image.width * image.height > MAX_PIXELS:
        image.close()
        raise HTTPException(413, f"found {image.width} x {image.height} pixels, expected at most {MAX_PIXELS:,}.")
    return image


def encode(image: PIL.Image.Image, kind: str, **options) -> bytes:
    if image.mode not in ("RGB", "RGBA", "L"):
        image = image.convert("RGBA" if image.has_transparency_data else "RGB")
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def printable(text: str) -> str:
    """A file name of any bytes as text that JSON and headers can hold."""
    return os.fsencode(text).decode("utf-8", "replace")


class Uploads:
    """Embeddings and thumbnails of the images that were uploaded last, by names that follow from their content."""

    def __init__(self, number: int = 64):
        self.number, self.kept = number, OrderedDict()

    def add(self, data: bytes, embedding: Tensor, thumbnail: bytes) -> str:
        key = hashlib.sha256(data).hexdigest()[:24]
        self.kept[key] = embedding, thumbnail
        self.kept.move_to_end(key)
        while len(self.kept) > self.number:
            self.kept.popitem(last=False)
        return key

    def get(self, key: str) -> tuple[Tensor, bytes]:
        if key not in self.kept:
            raise HTTPException(404, "the uploaded image is no longer kept. Drop it again.")
        return self.kept[key]

"""Images of any origin as loaded PIL images: decoded, upright, 8 bits a channel; what is no such image is refused."""

import base64
import io
import os
import re
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import PIL.ExifTags
import PIL.Image
import torch

from .download_hfclip import download


ImageSource = PIL.Image.Image | np.ndarray | torch.Tensor | bytes | str | os.PathLike

_ORIENTATION = PIL.ExifTags.Base.Orientation
_TURNS = {
    2: PIL.Image.Transpose.FLIP_LEFT_RIGHT,
    3: PIL.Image.Transpose.ROTATE_180,
    4: PIL.Image.Transpose.FLIP_TOP_BOTTOM,
    5: PIL.Image.Transpose.TRANSPOSE,
    6: PIL.Image.Transpose.ROTATE_270,
    7: PIL.Image.Transpose.TRANSVERSE,
    8: PIL.Image.Transpose.ROTATE_90,
}
# Formats of photographs, the last two with a plugin of the user's. PIL opens many more: EPS would start Ghostscript.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM", "HEIF", "JXL")


def open_image(source: ImageSource, input_data_format: str | None = None) -> PIL.Image.Image:
    """Decode `source` into a loaded PIL image: upright, 8 bits a channel, otherwise in its own mode.

    Args:
        source: PIL image (never modified), encoded bytes, path, http(s) URL, base64 string, numpy array or tensor.
            Files are of one of `FORMATS`; replies to a URL are bounded (see `download`). Arrays are (height, width),
            (height, width, channels) or (channels, height, width) with 1, 3 or 4 channels, either uint8 or floating
            point in 0..1; floats are rounded to the nearest of the 256 levels.
        input_data_format: "channels_first" or "channels_last", for arrays whose shape does not tell. Of two readings
            the one with three channels counts. (4, height, width) is refused without it, since four grey images look
            the same.

    An EXIF orientation is applied, as `transformers.image_utils.load_image` does (openai/CLIP ignores it); a tag that
    cannot be read counts as none. 16-bit grey keeps its high byte (`value >> 8`), as PIL does with 16-bit RGB; PIL's
    own conversion would clip everything above 255 to white.

    Raises `ValueError` for damaged files, other formats, images above PIL's size limit, empty images, arrays of other
    shapes, ranges or types, and modes `I` and `F` where their range is unknown; `TypeError` for anything that is not an
    image.
    """
    if isinstance(source, (np.ndarray, torch.Tensor)):
        return _image_from_array(source, input_data_format)
    file = None if isinstance(source, PIL.Image.Image) else _as_file(source)
    PIL.Image.init()  # registers all formats, once
    formats = [name for name in FORMATS if name in PIL.Image.OPEN]
    try:
        if file is None:
            image = source
            image.load()
        else:
            with PIL.Image.open(file, formats=formats) as image:  # closes the file, keeps the pixels
                image.load()
    except PIL.Image.DecompressionBombError as error:
        raise ValueError(f"{error} Set PIL.Image.MAX_IMAGE_PIXELS higher if you trust its origin.") from error
    except PIL.UnidentifiedImageError as error:
        raise ValueError(
            f"the image cannot be decoded ({_unknown_format(file)}). Expected one of {', '.join(formats)}: convert it, "
            "or pass it as a PIL image if you trust its origin."
        ) from error
    except Exception as error:  # PIL's codecs raise nearly anything on damaged data
        raise ValueError(
            f"the image cannot be decoded ({type(error).__name__}: {error}). Expected a complete image file; fetch it "
            "again or leave it out."
        ) from error
    if 0 in image.size:
        raise ValueError(f"the image is empty: {image.width} x {image.height} (width x height). Leave it out.")
    return _to_eight_bits(_upright(image), image.format)


def _as_file(source: bytes | str | os.PathLike) -> io.BytesIO | str | os.PathLike:
    """What `PIL.Image.open` accepts, for encoded bytes, a path, a URL or a base64 string."""
    if isinstance(source, bytes):
        return io.BytesIO(source)
    if not isinstance(source, (str, os.PathLike)):
        raise TypeError(
            f"expected a PIL image, numpy array, torch tensor, bytes, path or URL, found {type(source).__name__}."
        )
    if os.path.isfile(source):
        return source
    if os.path.isdir(source):
        raise ValueError(f"{shortened(source)} is a directory. Expected an image: pass the files in it.")
    text = str(os.fspath(source))
    if isinstance(source, str) and (scheme := re.match(r"([a-z][a-z0-9+.-]*)://", text, re.IGNORECASE)):
        if scheme[1].lower() not in ("http", "https"):
            raise ValueError(
                f"{shortened(text)} has the scheme {scheme[1]!r}, expected http or https. Fetch it yourself."
            )
        return io.BytesIO(download(text))
    try:
        return io.BytesIO(base64.b64decode(text.rpartition("base64,")[2], validate=True))
    except ValueError:
        raise ValueError(f"{shortened(text)} is neither an existing file, nor a URL, nor a base64 image.") from None


def _unknown_format(file: io.BytesIO | str | os.PathLike) -> str:
    """What a file is that is of none of `FORMATS`, by its first bytes; nothing in it is decoded."""
    if isinstance(file, io.BytesIO):
        head = file.getvalue()[:16]
    else:
        with open(file, "rb") as opened:
            head = opened.read(16)
    for name, (_, has_signature) in PIL.Image.OPEN.items():
        with suppress(Exception):  # signatures are longer than some files
            found = has_signature and has_signature(head)
            if isinstance(found, str):  # a format whose library Pillow was built without
                return found
            if found:
                return f"its {name} header is damaged" if name in FORMATS else f"its format is {name}"
    return f"it begins with {head!r}" if head else "it is empty"


def _upright(image: PIL.Image.Image) -> PIL.Image.Image:
    try:
        turn = _TURNS.get(image.getexif().get(_ORIENTATION))
    except Exception:  # malformed EXIF leaves the pixels sound; PIL raises what its parser happens to meet
        return image
    if turn is None:
        return image
    # PIL.ImageOps.exif_transpose would also write the other tags anew, and fail where they are malformed
    image = image.transpose(turn)
    for key in ("exif", "Raw profile type exif", "XML:com.adobe.xmp", "xmp"):
        image.info.pop(key, None)  # or a second call would turn it again
    return image


def _to_eight_bits(image: PIL.Image.Image, file_format: str | None) -> PIL.Image.Image:
    # PIL opens 16-bit grey of these formats with mode I: PGM always, PNG before Pillow 11
    if image.mode.startswith("I;16") or (image.mode == "I" and file_format in ("PNG", "PPM")):
        return PIL.Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError(
            f"mode {image.mode!r} holds 32-bit values of unknown range. Expected 8 or 16 bits a channel: scale it to "
            "0..255 and convert it to 'L' first."
        )
    return image


def _image_from_array(array: np.ndarray | torch.Tensor, input_data_format: str | None) -> PIL.Image.Image:
    """PIL image of mode L, RGB or RGBA from an array as `open_image` describes it."""
    if isinstance(array, torch.Tensor):
        array = array.detach().cpu()
        array = (array.float() if array.is_floating_point() else array).numpy()
    if array.size == 0:
        raise ValueError(f"the image is empty: shape {array.shape}. Leave it out.")
    array = _channels_last(array, input_data_format)
    if np.issubdtype(array.dtype, np.floating):
        low, high = array.min(), array.max()
        if not (low >= 0 and high <= 1):  # also false for NaN
            raise ValueError(
                f"a floating point image must lie in 0..1, found {low}..{high}. Divide it by its white level, or pass "
                "8-bit values with dtype uint8."
            )
        array = np.rint(array * 255).astype(np.uint8)
    elif array.dtype != np.uint8:
        raise ValueError(
            f"expected an array of uint8 or of floating point values in 0..1, found {array.dtype}. Convert it to one "
            "of them."
        )
    return PIL.Image.fromarray(array.squeeze(-1) if array.shape[-1] == 1 else array)


def _channels_last(array: np.ndarray, input_data_format: str | None) -> np.ndarray:
    # (height, width) or (channels, height, width) or (height, width, channels) -> (height, width, channels)
    if array.ndim == 2:
        return array[..., None]
    if array.ndim != 3:
        raise ValueError(f"expected an image of 2 or 3 dimensions, found shape {array.shape}.")
    shape = array.shape
    if input_data_format is None:
        input_data_format = data_format_of(shape)
        if input_data_format == "channels_first" and shape[0] == 4:
            raise ValueError(
                f"shape {shape} is one RGBA image or four grey ones. Say input_data_format='channels_first' for the "
                "one, pass list(images) for the four."
            )
    if input_data_format not in ("channels_first", "channels_last"):
        raise ValueError(
            f"input_data_format must be 'channels_first' or 'channels_last', found {input_data_format!r}."
        )
    if input_data_format == "channels_first":
        array = array.transpose(1, 2, 0)
    if array.shape[2] not in (1, 3, 4):
        raise ValueError(
            f"expected 1 (grey), 3 (RGB) or 4 (RGBA) channels, found shape {shape}. Grey images without a channel "
            "dimension go into a list: list(images)."
        )
    return array


def data_format_of(shape: Sequence[int]) -> str:
    """Where the channels of an image of three dimensions are, as `open_image` says."""
    fits_first, fits_last = shape[0] in (1, 3, 4), shape[2] in (1, 3, 4)
    if fits_first and fits_last and (shape[0] == 3) == (shape[2] == 3):
        raise ValueError(
            f"shape {tuple(shape)} can be read with the channels first or last. Say which with "
            "input_data_format='channels_first' or 'channels_last'."
        )
    # with two candidates, the one of three channels: (1, 1, 3) is one RGB pixel
    return "channels_first" if fits_first and (not fits_last or shape[0] == 3) else "channels_last"


def shortened(text: Any) -> str:
    """A name, or what was given in place of one, of a length that an error message can show."""
    text = str(text)
    return text if len(text) <= 200 else f"{text[:200]}..."

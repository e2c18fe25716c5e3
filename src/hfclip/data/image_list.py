"""Images as people have them: paths, folders, patterns of names, PIL images, arrays, lists of these."""

import glob
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from ..errors import UsageError
from ..open_image_hfclip import open_image
from .samples import IMAGE_ENDINGS, BadSample, Sample, Source


class ImageList(Source):
    """Images without captions, each opened when it is asked for.

    Args:
        images: what `find_images` takes, but for URLs.

    Raises:
        UsageError: if there are none, or some are URLs.
    """

    def __init__(self, images: Any):
        super().__init__()
        self.images, _ = find_images(images)
        self.length = len(self.images)
        if not self.length:
            raise UsageError("images: found none, expected at least one.")
        urls = [image for image in self.images if isinstance(image, str) and "://" in image]
        if urls:
            raise UsageError(f"images: found the URL {urls[0]!r}, expected files. Fetch it once, and give its path.")
        for image in self.images:
            if isinstance(image, (str, os.PathLike)) and not os.path.isfile(image):
                raise UsageError(
                    f"images: found no file {str(image)!r}, expected one, a folder or a pattern of names."
                )

    def __getitem__(self, index: int) -> Sample:
        image = self.images[index]
        if isinstance(image, (str, os.PathLike)):
            try:
                return Sample(Path(image).read_bytes(), [], str(image))
            except (OSError, ValueError) as error:
                raise BadSample("missing image", str(error)) from error
        if not isinstance(image, (bytes, Image.Image)):
            try:
                image = open_image(image)
            except ValueError as error:
                raise BadSample("unreadable image") from error
        return Sample(image, [], self.name(index))

    def captions(self, index: int) -> list[str]:
        return []

    def name(self, index: int) -> str:
        image = self.images[index]
        return str(image) if isinstance(image, (str, os.PathLike)) else f"image {index}"


def find_images(images: Any) -> tuple[Sequence, bool]:
    """Single images, and whether several were given.

    Args:
        images: one image (a path, URL, PIL image, array or encoded bytes); a folder, whose images are taken with those
            of the folders below, in the order of their names; a pattern such as "photos/*.jpg"; a list of all these; or
            a 4-D array.

    Raises:
        UsageError: a folder without images.
        TypeError: a list within a list.
    """
    if getattr(images, "ndim", 0) == 4:
        return images, True  # whole: the second dimension of a batch is that of the channels, if it can be
    if not isinstance(images, (list, tuple)):
        found = _named(images)
        return ([images], False) if found is None else (found, True)
    nested = [index for index, image in enumerate(images) if isinstance(image, (list, tuple))]
    if nested:
        raise TypeError(f"image {nested[0]} is a list: expected one list of images, without lists in it.")
    return [single for image in images for single in (_named(image) or [image])], True


def _named(image: Any) -> list[str] | None:
    """The images that a folder or a pattern names; None for what is one image."""
    if not isinstance(image, (str, os.PathLike)) or "://" in str(image) or os.path.isfile(image):
        return None
    path = os.path.expanduser(image)
    if os.path.isdir(path):
        names = (os.path.join(folder, name) for folder, _, names in os.walk(path) for name in names)
        found = sorted(
            name
            for name in names
            if name.lower().endswith(tuple(f".{ending}" for ending in IMAGE_ENDINGS))
            and not any(part.startswith(".") for part in os.path.relpath(name, path).split(os.sep))
        )
        if not found:
            raise UsageError(
                f"images: found no image in {str(image)!r}, expected files of {', '.join(IMAGE_ENDINGS)}."
            )
        return found
    found = filter(os.path.isfile, glob.glob(path, recursive=True)) if glob.has_magic(path) else ()
    return sorted(found) or None

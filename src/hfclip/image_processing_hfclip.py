"""Images as OpenAI's CLIP sees them: every pixel equal to the `_transform` of openai/CLIP (`clip/clip.py`).

source -> `open_image` (decoded, upright, 8 bits a channel) -> resize -> crop -> RGB (uint8) -> `normalize` (float32).
The functions need no processor and serve data workers; `HFCLIPImageProcessor` is the same path as transformers
expects it. Resizing is PIL's whether or not torchvision is installed; only `resize_backend="torch"` changes that.
"""

import difflib
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import PIL.Image
import torch
from transformers import BatchFeature
from transformers.image_processing_utils import BaseImageProcessor
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD, PILImageResampling, SizeDict
from transformers.processing_utils import ImagesKwargs, Unpack

from .foreign_hfclip import foreign, is_foreign, pinned
from .open_image_hfclip import ImageSource, data_format_of, open_image, shortened


ResizeBackend = Literal["pil", "torch"]

MAX_EDGE = 4096  # pixels of a processed image: one of 4096 x 4096 takes 200 MB
_MAX_NUMBER = 1e6
_BICUBIC = PILImageResampling.BICUBIC
# PIL's filters that torch also has with antialiasing
_TORCH_MODES = {PILImageResampling.BILINEAR: "bilinear", _BICUBIC: "bicubic"}


def _resized(
    image: PIL.Image.Image, size: Mapping | SizeDict, resample: int, resize_backend: ResizeBackend
) -> PIL.Image.Image:
    """`image` resized to `size`, {"shortest_edge"} (torchvision's rounding) or {"height", "width"}, by PIL in
    its mode, by torch as RGB where that comes within 2 levels of PIL.

    Raises `ValueError` before anything is allocated when the result would exceed twice `PIL.Image.MAX_IMAGE_PIXELS`,
    which is also where PIL refuses to open a file (default 178,956,970 pixels).
    """
    width, height = image.size
    if "shortest_edge" in size:
        edge, short, long = size["shortest_edge"], min(width, height), max(width, height)
        new_long = int(edge * long / short)
        new_width, new_height = (edge, new_long) if width <= height else (new_long, edge)
    else:
        new_width, new_height = size["width"], size["height"]
    limit = PIL.Image.MAX_IMAGE_PIXELS
    if limit is not None and new_width * new_height > 2 * limit:
        raise ValueError(
            f"resizing {width} x {height} (width x height) gives {new_width} x {new_height} = "
            f"{new_width * new_height:,} pixels, more than the {2 * limit:,} allowed (twice "
            "PIL.Image.MAX_IMAGE_PIXELS). Crop the image first, or set PIL.Image.MAX_IMAGE_PIXELS higher."
        )
    if (new_width, new_height) == image.size:
        return image
    # PIL takes the nearest pixel of palettes and weighs colours by alpha. torch resizes rows before columns, as PIL does,
    # but newer versions of Pillow do not where an image is tall or shrinks in height more than in width.
    is_near = image.mode in ("L", "RGB") and "shortest_edge" in size and height <= 2 * width
    if resize_backend == "pil" or not is_near:
        return image.resize((new_width, new_height), resample)
    # (height, width, 3) -> (1, 3, height, width), channels last in memory, which torch's kernel prefers
    pixels = torch.from_numpy(np.array(_to_rgb(image))).permute(2, 0, 1)[None]
    pixels = torch.nn.functional.interpolate(
        pixels, (new_height, new_width), mode=_TORCH_MODES[resample], antialias=True
    )
    return PIL.Image.merge("RGB", [PIL.Image.fromarray(band) for band in pixels[0].numpy()])


def _to_rgb(image: PIL.Image.Image) -> PIL.Image.Image:
    return image if image.mode == "RGB" else image.convert("RGB")


def _center_cropped(image: PIL.Image.Image, height: int, width: int) -> np.ndarray:
    """The middle of `image` as RGB, (height, width, 3) uint8, rounded as by torchvision; black where it is smaller."""
    # torchvision pads by half the missing pixels, rounded down, and rounds the offset of a crop half to even
    left, pad_left = round(max(image.width - width, 0) / 2), max(width - image.width, 0) // 2
    top, pad_top = round(max(image.height - height, 0) / 2), max(height - image.height, 0) // 2
    right, bottom = min(left + width, image.width), min(top + height, image.height)
    crop = np.asarray(_to_rgb(image.crop((left, top, right, bottom))))
    if crop.shape[:2] == (height, width):
        return crop
    canvas = np.zeros((height, width, 3), np.uint8)
    canvas[pad_top : pad_top + bottom - top, pad_left : pad_left + right - left] = crop
    return canvas


def center_square_crop(source: ImageSource, size: int, resize_backend: ResizeBackend = "pil") -> np.ndarray:
    """OpenAI's transform up to the pixels: shorter side to `size` by bicubic resizing, then the central square.

    Returns (size, size, 3) uint8, RGB. Palettes, alpha and CMYK become RGB after the crop, as in openai/CLIP. Raises
    as `open_image`, and `ValueError` for a resized image beyond twice `PIL.Image.MAX_IMAGE_PIXELS`.
    """
    resized = _resized(open_image(source), {"shortest_edge": size}, _BICUBIC, resize_backend)
    return _center_cropped(resized, size, size)


def random_square_crop(
    source: ImageSource, size: int, generator: np.random.Generator, resize_backend: ResizeBackend = "pil"
) -> np.ndarray:
    """The paper's only augmentation (section 2.4): shorter side to `size` by bicubic resizing, then a random square.

    Returns (3, size, size) uint8, RGB. Takes two numbers from `generator` whatever the image's shape, so that the
    stream of random numbers does not depend on the images. Raises as `center_square_crop`.
    """
    image = _resized(open_image(source), {"shortest_edge": size}, _BICUBIC, resize_backend)
    vertical, horizontal = generator.random(2)  # in [0, 1)
    top, left = int(vertical * (image.height - size + 1)), int(horizontal * (image.width - size + 1))
    crop = _to_rgb(image.crop((left, top, left + size, top + size)))
    return np.ascontiguousarray(np.asarray(crop).transpose(2, 0, 1))  # (size, size, 3) -> (3, size, size)


def normalize(
    pixels: np.ndarray,
    mean: Sequence[float] | None = OPENAI_CLIP_MEAN,
    std: Sequence[float] | None = OPENAI_CLIP_STD,
    rescale_factor: float = 1 / 255,
    out: np.ndarray | None = None,
) -> np.ndarray:
    """(height, width, 3) uint8 -> (3, height, width) float32, bit for bit torchvision's ToTensor and Normalize.

    `mean=None` leaves the rescaled values as they are; `out` receives the result if given.
    """
    if out is None:
        out = np.empty((3, *pixels.shape[:2]), np.float32)
    out[...] = pixels.transpose(2, 0, 1)
    if rescale_factor == 1 / 255:
        out /= np.float32(255)  # as ToTensor: multiplying by the rounded reciprocal differs in the last bit
    elif rescale_factor != 1:
        out *= np.float32(rescale_factor)
    if mean is not None:
        out -= np.asarray(mean, np.float32)[:, None, None]
        out /= np.asarray(std, np.float32)[:, None, None]
    return out


def to_pixel_values(source: ImageSource, size: int) -> np.ndarray:
    """OpenAI's whole transform: the normalised central square of `source`, (3, size, size) float32."""
    return normalize(center_square_crop(source, size))


class HFCLIPImageProcessorKwargs(ImagesKwargs, total=False):
    """Options of `HFCLIPImageProcessor` beside those that all image processors of transformers share.

    resize_backend (`str`): "pil" or "torch".
    """

    resize_backend: ResizeBackend | None


_OPTIONS = (
    "do_resize",
    "size",
    "resample",
    "do_center_crop",
    "crop_size",
    "do_rescale",
    "rescale_factor",
    "do_normalize",
    "image_mean",
    "image_std",
    "do_convert_rgb",
    "resize_backend",
)
# options of transformers' image processors that a call may give, where they ask for what is done anyway
_AS_IT_IS = {
    "data_format": (None, "channels_first"),
    "default_to_square": (None, False),
    "disable_grouping": (None, False, True),
    "do_pad": (None, False),
}
# what files saved by transformers' CLIP processors hold besides, without effect on the pixels
_INERT = {
    "_valid_processor_keys",
    "data_format",
    "default_to_square",
    "device",
    "disable_grouping",
    "feature_extractor_type",
    "image_processor_type",
    "processor_class",
    "return_tensors",
}


class HFCLIPImageProcessor(BaseImageProcessor):
    """Turns images into `pixel_values`, pixel for pixel as openai/CLIP.

    Images may be PIL images, arrays, tensors, encoded bytes, paths or URLs (see `open_image`), alone, in batches (4-d
    arrays) or in nested lists, which are flattened; they need not be of one size. Palettes, alpha, CMYK and grey are
    resized and cropped in their own mode and become RGB afterwards, as in openai/CLIP.

    Args:
        do_resize: Resize to `size`.
        size: Pixels: an integer or {"shortest_edge"} keeps the aspect ratio; {"height", "width"} does not.
        resample: PIL's filter. PIL resizes palette and 1-bit images with the nearest pixel whatever the filter.
        do_center_crop: Cut the middle; where the image is smaller, the rest is black.
        crop_size: Pixels: an integer or {"height", "width"}. Default: the square or rectangle of `size`. A crop that is
            that of `size` follows a `size` given in a call or to `from_pretrained`; any other stays as it is.
        do_rescale: Multiply 8-bit values by `rescale_factor`. If false they stay in 0..255, except those of floating
            point arrays, which stay in 0..1.
        rescale_factor: 1/255 by default.
        do_normalize: Subtract `image_mean` and divide by `image_std`, three numbers each (red, green, blue).
        do_convert_rgb: If false, an image that is not RGB is refused.
        resize_backend: "pil" is exact. "torch" resizes RGB and grey images to a shortest edge with torch's antialiased
            kernel on the CPU (the one torchvision uses for tensors), bilinear and bicubic only: less than half of
            the time of resizing, at most 2 levels of 255 away. Images of other modes, those more than twice as tall as wide and a
            `size` of height and width take PIL, too. It is saved with the other options and never chosen by itself.

    Every option may be given again in a call; None stands for the default. Raises `TypeError` for unknown options and
    values of a wrong type, `ValueError` for values out of range; an error about an image names its place in the input.
    """

    valid_kwargs = HFCLIPImageProcessorKwargs
    model_input_names = ["pixel_values"]
    _auto_class = "AutoImageProcessor"  # saved folders carry this code, for where hfclip is not installed

    do_resize = True
    size = {"shortest_edge": 224}
    resample = _BICUBIC
    do_center_crop = True
    crop_size = None
    do_rescale = True
    rescale_factor = 1 / 255
    do_normalize = True
    image_mean = OPENAI_CLIP_MEAN
    image_std = OPENAI_CLIP_STD
    do_convert_rgb = True
    resize_backend = "pil"

    def __init__(self, **kwargs: Unpack[HFCLIPImageProcessorKwargs]):
        auto_map = kwargs.pop("auto_map", None)  # where remote code lies: kept, and saved again
        super().__init__(**({"auto_map": auto_map} if auto_map else {}))
        options = {name: value for name, value in kwargs.items() if name in _OPTIONS or (value and name not in _INERT)}
        for name, value in self._options(options).items():
            setattr(self, name, value)

    @property
    def backend(self) -> str:
        """The library that resizes, under the name by which transformers' image processors report it."""
        return self.resize_backend

    def fetch_images(self, image_url_or_urls: Any) -> Any:
        """Paths and URLs as they are: `preprocess` opens one at a time, so that no list exhausts the open files."""
        return image_url_or_urls

    def preprocess(
        self,
        images: Any,
        return_tensors: str | None = None,
        input_data_format: str | None = None,
        device: str | torch.device | None = None,
        **kwargs: Unpack[HFCLIPImageProcessorKwargs],
    ) -> BatchFeature:
        """`pixel_values`, float32: a tensor (batch, 3, height, width) on `device` for `return_tensors="pt"`, an array
        for "np", for None a list of arrays (3, height, width), which may differ in size."""
        options = self._options(kwargs)
        if return_tensors not in (None, "pt", "np"):
            raise ValueError(f"return_tensors must be 'pt', 'np' or None, found {return_tensors!r}.")
        crops, factors = [], []
        for index, (image, data_format) in enumerate(_flat(images, input_data_format)):
            try:
                crops.append(_cropped(open_image(image, data_format), options))
            except (TypeError, ValueError) as error:
                kind = TypeError if isinstance(error, TypeError) else ValueError
                raise kind(f"image {index}{_name(image)}: {error}") from error
            factors.append(_rescale_factor(image, options))
        if not crops:
            raise ValueError("expected at least one image, found none.")
        sizes = {crop.shape[:2] for crop in crops}
        if return_tensors is not None and len(sizes) > 1:
            raise ValueError(
                f"images of sizes {sorted(sizes)} (height, width) do not fit one tensor. Use do_center_crop=True, a "
                "size with height and width, or return_tensors=None."
            )
        mean, std = (options["image_mean"], options["image_std"]) if options["do_normalize"] else (None, None)
        if return_tensors is None:
            arrays = [normalize(crop, mean, std, factor) for crop, factor in zip(crops, factors)]
            return BatchFeature({"pixel_values": arrays})
        batch = np.empty((len(crops), 3, *crops[0].shape[:2]), np.float32)
        for crop, factor, out in zip(crops, factors, batch):
            normalize(crop, mean, std, factor, out)
        return BatchFeature({"pixel_values": torch.from_numpy(batch).to(device) if return_tensors == "pt" else batch})

    def _options(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """All options, those `given` before the processor's own, checked and in one form."""
        for name, value in given.items():
            if name not in _OPTIONS and value not in _AS_IT_IS.get(name, (None,)):
                near = difflib.get_close_matches(name, _OPTIONS, n=1, cutoff=0.0)[0]
                raise TypeError(f"{type(self).__name__} has no option {name!r}. The nearest is {near!r}.")
        options = {name: getattr(self, name) if given.get(name) is None else given[name] for name in _OPTIONS}
        if given.get("crop_size") is None and self.crop_size == _crop_of(_size("size", self.size)):
            options["crop_size"] = _crop_of(_size("size", options["size"]))
        return _checked(options)

    def to_dict(self) -> dict[str, Any]:
        """The options, and where remote code lies. Other attributes are no options, and a file with them is refused."""
        names = {*_OPTIONS, *_INERT, "auto_map"}
        return {name: value for name, value in super().to_dict().items() if name in names}

    @classmethod
    def get_image_processor_dict(cls, pretrained_model_name_or_path, **kwargs):
        kwargs = pinned(pretrained_model_name_or_path, kwargs)
        if is_foreign(pretrained_model_name_or_path, kwargs):
            return foreign(pretrained_model_name_or_path).open_image_processor(pretrained_model_name_or_path, **kwargs)
        return super().get_image_processor_dict(pretrained_model_name_or_path, **kwargs)

    @classmethod
    def from_dict(cls, image_processor_dict: dict[str, Any], **kwargs):
        if kwargs.get("size") is not None and kwargs.get("crop_size") is None:
            options = cls(**image_processor_dict)._options({"size": kwargs["size"]})
            kwargs["crop_size"] = options["crop_size"]  # or the saved one, made for another size, would stay
        return super().from_dict(image_processor_dict, **kwargs)


def _flat(images: Any, data_format: str | None) -> Iterator[tuple[ImageSource, str | None]]:
    """The single images in nested lists and batches, in order, each with the place of its channels where known."""
    if isinstance(images, (list, tuple)):
        for item in images:
            if data_format is None and _has_four_planes(item):
                yield item, "channels_first"  # each entry of a list is one image: they are those of RGBA
            else:
                yield from _flat(item, data_format)
    elif isinstance(images, (np.ndarray, torch.Tensor)) and images.ndim == 4:
        data_format = data_format or data_format_of(images.shape[1:])
        yield from ((image, data_format) for image in images)
    else:
        yield images, data_format


def _has_four_planes(image: Any) -> bool:
    """Whether an array is (4, height, width) and cannot be (height, width, channels)."""
    shape = image.shape if isinstance(image, (np.ndarray, torch.Tensor)) else ()
    return len(shape) == 3 and shape[0] == 4 and shape[2] not in (1, 3, 4)


def _name(image: Any) -> str:
    name = image if isinstance(image, (str, os.PathLike)) else getattr(image, "filename", "")
    return f" ({shortened(name)})" if name else ""


def _cropped(image: PIL.Image.Image, options: Mapping[str, Any]) -> np.ndarray:
    # any mode and size -> (height, width, 3) uint8
    if not options["do_convert_rgb"] and image.mode != "RGB":
        raise ValueError(f"found mode {image.mode!r}, expected RGB. Use do_convert_rgb=True.")
    if options["do_resize"]:
        image = _resized(image, options["size"], options["resample"], options["resize_backend"])
    if options["do_center_crop"]:
        return _center_cropped(image, options["crop_size"]["height"], options["crop_size"]["width"])
    return np.asarray(_to_rgb(image))


def _rescale_factor(image: Any, options: Mapping[str, Any]) -> float:
    if options["do_rescale"]:
        return options["rescale_factor"]
    if isinstance(image, torch.Tensor):
        return 1 / 255 if image.is_floating_point() else 1
    return 1 / 255 if isinstance(image, np.ndarray) and np.issubdtype(image.dtype, np.floating) else 1


def _checked(options: Mapping[str, Any]) -> dict[str, Any]:
    """`options` with sizes as `SizeDict`, mean and standard deviation as tuples of three floats."""
    options = dict(options)
    for name in ("do_resize", "do_center_crop", "do_rescale", "do_normalize", "do_convert_rgb"):
        if not isinstance(options[name], bool):
            raise TypeError(f"{name} must be True or False, found {options[name]!r}.")
    options["size"] = size = _size("size", options["size"])
    crop_size = options["crop_size"]
    options["crop_size"] = _crop_of(size) if crop_size is None else _size("crop_size", crop_size)
    try:
        options["resample"] = PILImageResampling(options["resample"])
    except ValueError:
        filters = {int(member): member.name for member in PILImageResampling}
        raise ValueError(f"resample must be one of PIL's {filters}, found {options['resample']!r}.") from None
    factor = options["rescale_factor"]
    if not _is_number(factor) or factor < 1 / _MAX_NUMBER:
        raise ValueError(f"rescale_factor must be a positive number, found {factor!r}.")
    for name in ("image_mean", "image_std"):
        values = options[name]
        if not isinstance(values, (list, tuple)) or len(values) != 3 or not all(map(_is_number, values)):
            raise ValueError(f"{name} must be three numbers (red, green, blue), found {values!r}.")
        options[name] = tuple(values)
    if min(options["image_std"]) < 1 / _MAX_NUMBER:
        raise ValueError(f"image_std must be positive, at least {1 / _MAX_NUMBER}, found {options['image_std']}.")
    if options["resize_backend"] not in ("pil", "torch"):
        raise ValueError(f"resize_backend must be 'pil' or 'torch', found {options['resize_backend']!r}.")
    if options["resize_backend"] == "torch" and options["resample"] not in _TORCH_MODES:
        raise ValueError(
            f"resize_backend 'torch' resizes by 2 (bilinear) or 3 (bicubic), found {options['resample']}."
        )
    return options


def _is_number(value: Any) -> bool:
    # also false for NaN, and for what float32 would make infinite
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= _MAX_NUMBER


def _crop_of(size: SizeDict) -> SizeDict:
    """The crop that takes all of `size`: the square of its shortest edge, or its rectangle."""
    return _size("crop_size", size.get("shortest_edge") or size)


def _size(name: str, value: Any) -> SizeDict:
    """`value` as {"height", "width"} or, for `size`, {"shortest_edge"}; an integer is the shorter side or a square."""
    edges = value
    if isinstance(value, int):
        edges = {"shortest_edge": value} if name == "size" else {"height": value, "width": value}
    elif isinstance(value, (list, tuple)) and len(value) == 2:
        edges = {"height": value[0], "width": value[1]}
    if isinstance(edges, (Mapping, SizeDict)):
        edges = dict(edges)
        known = set(edges) == {"height", "width"} or (name == "size" and set(edges) == {"shortest_edge"})
        if known and all(type(edge) is int and 0 < edge <= MAX_EDGE for edge in edges.values()):
            return SizeDict(**edges)
    keys = "height and width, or shortest_edge" if name == "size" else "height and width"
    raise ValueError(
        f"{name} must be a positive integer up to {MAX_EDGE} or a dict of such ({keys}), found {value!r}."
    )


__all__ = ["HFCLIPImageProcessor"]

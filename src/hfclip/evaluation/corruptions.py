"""Images that are harder on purpose: pixel corruptions at five severities, and words written onto images.

    Corrupted(source, "defocus_blur", severity=3)      the same samples, each corrupted
    Typographic(source)                                the same samples, each with the name of a wrong class on it

The kinds and their five parameters are those of ImageNet-C (Hendrycks and Dietterich 2019, arXiv:1903.12261; read in
hendrycks/robustness, `imagenet_c/corruptions.py`): twelve of its nineteen, those that need nothing but numpy and Pillow.
Pixels differ a little from the published files: images are corrupted as CLIP sees them (shorter side to 224 pixels,
centre crop), the noise is drawn anew, blur and zoom are computed here, and nothing is stored as JPEG.

What happens to an image is a function of the seed, the kind, the severity and the image's key: it is the same in every
process, in any order and on any machine.
"""

import hashlib
import io
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import nn

from ..data.samples import BadSample, Sample, Source, decoding
from ..errors import UsageError
from ..image_processing_hfclip import HFCLIPImageProcessor
from ..open_image_hfclip import open_image
from .data import LabelledFolder
from .predictions import embed_names, embed_readable
from .task import Plot, Result


SIZE = 224  # pixels a side, at which the parameters are meant
SEVERITIES = (1, 2, 3, 4, 5)


# ---------------------------------------------------------------------------------------------------------------------
# Corruptions: (height, width, 3) in 0..1, a parameter and a random generator -> the same; what leaves 0..1 is clipped.
# ---------------------------------------------------------------------------------------------------------------------


def _impulse_noise(x: np.ndarray, amount: float, random: np.random.Generator) -> np.ndarray:
    drawn = random.random(x.shape)
    return np.where(drawn < amount, drawn < amount / 2, x)


def _gaussian_blur(x: np.ndarray, sigma: float, random: np.random.Generator) -> np.ndarray:
    offsets = np.arange(-4 * sigma, 4 * sigma + 1)
    line = np.exp(-(offsets**2) / (2 * sigma**2))
    return _convolved(x, np.outer(line, line), "edge")


def _defocus_blur(x: np.ndarray, level: tuple[int, float], random: np.random.Generator) -> np.ndarray:
    radius, softness = level
    offsets = np.arange(-max(radius, 8) - 1, max(radius, 8) + 2)
    disk = (np.add.outer(offsets**2, offsets**2) <= radius**2).astype(float)
    reach = 1 if radius <= 8 else 2
    line = np.exp(-(np.arange(-reach, reach + 1) ** 2) / (2 * softness**2))
    return _convolved(x, _convolved(disk[..., None], np.outer(line, line), "edge")[..., 0], "reflect")


def _convolved(x: np.ndarray, kernel: np.ndarray, border: str) -> np.ndarray:
    """Each channel convolved with a square kernel, which is made to sum to 1."""
    reach, (height, width, _) = len(kernel) // 2, x.shape
    padded = np.pad(x, ((reach, reach), (reach, reach), (0, 0)), border)
    spectrum = np.fft.rfft2(padded, axes=(0, 1)) * np.fft.rfft2(kernel / kernel.sum(), padded.shape[:2])[..., None]
    return np.fft.irfft2(spectrum, padded.shape[:2], axes=(0, 1))[2 * reach :, 2 * reach :][:height, :width]


def _zoom_blur(x: np.ndarray, level: tuple[float, float], random: np.random.Generator) -> np.ndarray:
    image, (height, width, _) = _to_image(x), x.shape
    zoomed = [x]
    for zoom in np.arange(1, *level):
        left, top = (width - width / zoom) / 2, (height - height / zoom) / 2
        box = (left, top, width - left, height - top)
        zoomed.append(_to_array(image.resize((width, height), Image.Resampling.BILINEAR, box)))
    return np.mean(zoomed, axis=0)


def _brightness(x: np.ndarray, more: float, random: np.random.Generator) -> np.ndarray:
    """A higher value at the same hue and saturation."""
    value = x.max(axis=2, keepdims=True)
    brighter = np.minimum(value + more, 1)
    return np.where(value > 0, x * brighter / np.maximum(value, 1e-9), brighter)


def _contrast(x: np.ndarray, factor: float, random: np.random.Generator) -> np.ndarray:
    mean = x.mean(axis=(0, 1))
    return (x - mean) * factor + mean


def _saturate(x: np.ndarray, level: tuple[float, float], random: np.random.Generator) -> np.ndarray:
    """Another saturation at the same hue and value; grey has the hue of red, as in skimage's HSV."""
    value = x.max(axis=2, keepdims=True)
    saturation = (value - x.min(axis=2, keepdims=True)) / np.maximum(value, 1e-9)
    new = np.clip(saturation * level[0] + level[1], 0, 1)
    reddish = value * (1 - new * (0, 1, 1))
    return np.where(saturation > 0, value - (value - x) * new / np.maximum(saturation, 1e-9), reddish)


def _pixelate(x: np.ndarray, share: float, random: np.random.Generator) -> np.ndarray:
    height, width, _ = x.shape
    small = _to_image(x).resize((max(int(width * share), 1), max(int(height * share), 1)), Image.Resampling.BOX)
    return _to_array(small.resize((width, height), Image.Resampling.BOX))


def _jpeg_compression(x: np.ndarray, quality: int, random: np.random.Generator) -> np.ndarray:
    file = io.BytesIO()
    _to_image(x).save(file, "JPEG", quality=quality)
    return _to_array(Image.open(file))


def _to_image(x: np.ndarray) -> Image.Image:
    return Image.fromarray((np.clip(x, 0, 1) * 255).round().astype(np.uint8))


def _to_array(image: Image.Image) -> np.ndarray:
    return np.asarray(image, np.float64) / 255


class Corruption(NamedTuple):
    apply: Callable[[np.ndarray, Any, np.random.Generator], np.ndarray]
    levels: tuple
    """The parameter at each severity."""


CORRUPTIONS = {
    "gaussian_noise": Corruption(
        lambda x, c, random: x + random.normal(0, c, x.shape), (0.08, 0.12, 0.18, 0.26, 0.38)
    ),
    "shot_noise": Corruption(lambda x, c, random: random.poisson(x * c) / c, (60, 25, 12, 5, 3)),
    "impulse_noise": Corruption(_impulse_noise, (0.03, 0.06, 0.09, 0.17, 0.27)),
    "speckle_noise": Corruption(
        lambda x, c, random: x + x * random.normal(0, c, x.shape), (0.15, 0.2, 0.35, 0.45, 0.6)
    ),
    "gaussian_blur": Corruption(_gaussian_blur, (1, 2, 3, 4, 6)),
    "defocus_blur": Corruption(_defocus_blur, ((3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5))),
    "zoom_blur": Corruption(_zoom_blur, ((1.11, 0.01), (1.16, 0.01), (1.21, 0.02), (1.26, 0.02), (1.31, 0.03))),
    "brightness": Corruption(_brightness, (0.1, 0.2, 0.3, 0.4, 0.5)),
    "contrast": Corruption(_contrast, (0.4, 0.3, 0.2, 0.1, 0.05)),
    "saturate": Corruption(_saturate, ((0.3, 0), (0.1, 0), (2, 0), (5, 0.1), (20, 0.2))),
    "pixelate": Corruption(_pixelate, (0.6, 0.5, 0.4, 0.3, 0.25)),
    "jpeg_compression": Corruption(_jpeg_compression, (25, 18, 15, 10, 7)),
}


def corrupt(image: Image.Image, kind: str, severity: int, key: str = "", seed: int = 0) -> Image.Image:
    """An RGB image corrupted; the parameters are meant for 224 pixels a side.

    Args:
        kind: one of `CORRUPTIONS`.
        severity: 1 to 5.
        key: of the image, by which its noise differs from that of others.

    Raises:
        UsageError: for another kind or severity.
    """
    _check(kind, severity)
    corruption = CORRUPTIONS[kind]
    random = _generator(seed, kind, severity, key)
    return _to_image(corruption.apply(_to_array(image), corruption.levels[severity - 1], random))


def _check(kind: str, severity: int) -> None:
    if kind not in CORRUPTIONS:
        raise UsageError(f"found the corruption {kind!r}, expected one of {', '.join(CORRUPTIONS)}.")
    if severity not in SEVERITIES:
        raise UsageError(f"found the severity {severity!r}, expected one of {', '.join(map(str, SEVERITIES))}.")


def _generator(*parts: Any) -> np.random.Generator:
    """Random numbers that are a function of `parts` alone."""
    digest = hashlib.blake2b("\0".join(map(str, parts)).encode(), digest_size=16).digest()
    return np.random.default_rng(int.from_bytes(digest, "little"))


# ---------------------------------------------------------------------------------------------------------------------
# Sources
# ---------------------------------------------------------------------------------------------------------------------


class Altered(Source):
    """The samples of a source, each with another image. A subclass says which, by `alter`."""

    def __init__(self, source: Source):
        super().__init__()
        self.source, self.length, self.labels = source, len(source), source.labels
        self.crop = HFCLIPImageProcessor(size=SIZE, do_rescale=False, do_normalize=False)

    def alter(self, image: Image.Image, sample: Sample) -> Image.Image:
        """The image instead of one that is RGB and 224 x 224, as CLIP sees it."""
        raise NotImplementedError

    def __getitem__(self, index: int) -> Sample:
        sample = self.source[index]
        with decoding(sample.image):
            pixels = self.crop(open_image(sample.image), return_tensors="np")["pixel_values"][0]
        image = Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0)).astype(np.uint8))
        return sample._replace(image=self.alter(image, sample))

    def captions(self, index: int) -> list[str]:
        return self.source.captions(index)

    def label(self, index: int) -> int | None:
        return self.source.label(index)


class Corrupted(Altered):
    """The samples of a source, each corrupted in its own way: see `corrupt`."""

    def __init__(self, source: Source, kind: str, severity: int, seed: int = 0):
        super().__init__(source)
        _check(kind, severity)
        self.kind, self.severity, self.seed = kind, severity, seed

    def alter(self, image: Image.Image, sample: Sample) -> Image.Image:
        return corrupt(image, self.kind, self.severity, sample.key, self.seed)


class Typographic(Altered):
    """The samples of a labelled source, each with the name of a wrong class written onto it.

    Args:
        source: what has `labels`, two or more.
        seed: of the choice of the class and of the place.

    Raises:
        UsageError: if there is no wrong class.
    """

    LINE = SIZE // 8  # pixels, the height of the letters of a name that is short enough

    def __init__(self, source: Source, seed: int = 0):
        super().__init__(source)
        self.seed = seed
        if len(set(source.labels or ())) < 2:
            raise UsageError(
                f"found the labels {source.labels}, expected two different ones or more to write a wrong one."
            )

    def written(self, sample: Sample) -> int:
        """The class whose name is written onto a sample: any but its own, each as likely."""
        others = [number for number, name in enumerate(self.labels) if name != self.labels[sample.label]]
        return others[int(_generator(self.seed, sample.key).integers(len(others)))]

    def alter(self, image: Image.Image, sample: Sample) -> Image.Image:
        if sample.label is None:
            raise BadSample("missing caption")
        text, draw = self.labels[self.written(sample)], ImageDraw.Draw(image)
        font = ImageFont.load_default(self.LINE)
        longest = draw.textlength(text, font)
        if longest > 0.94 * SIZE:
            font = ImageFont.load_default(max(self.LINE * 0.94 * SIZE / longest, 6))
        left, top, right, bottom = draw.textbbox((0, 0), text, font)
        room = max(SIZE - (right - left), 1), max(SIZE - (bottom - top), 1)
        place = _generator(self.seed, "place", sample.key).integers(0, room)
        place = int(place[0]) - left, int(place[1]) - top
        draw.text(place, text, "white", font, stroke_width=2, stroke_fill="black")
        return image


# ---------------------------------------------------------------------------------------------------------------------
# Tasks
# ---------------------------------------------------------------------------------------------------------------------


def corruptions(
    model: nn.Module,
    processor: Any,
    data: LabelledFolder,
    *,
    kinds: Sequence[str] = tuple(CORRUPTIONS),
    severities: Sequence[int] = SEVERITIES,
    seed: int = 0,
    **embedding,
) -> Result:
    """Zero-shot accuracy on images that are corrupted in twelve ways, at five severities each.

    Args:
        kinds: corruptions.
        severities: of each, 1 to 5.
        seed: of what is random in them.

    Returns:
        `clean_top1`, `<kind>_top1` (mean over severities), `corrupted_top1` (mean over kinds) and `retained`, its share of
        the clean accuracy; table "corruptions" with a row per kind and severity.
    """
    for kind in kinds:
        for severity in severities:
            _check(kind, severity)
    if not kinds or not severities:
        raise UsageError("corruptions: found no kind or no severity, expected one of each or more.")
    source, label_embeds = data.samples.source, embed_names(model, processor, data.labels, data.templates, **embedding)

    def accuracy(altered: Source) -> float:
        return embed_readable(model, processor, altered, **embedding).compare(label_embeds).top1

    clean = accuracy(source)
    rows = [
        {"corruption": kind, "severity": severity, "top1": accuracy(Corrupted(source, kind, severity, seed))}
        for kind in kinds
        for severity in severities
    ]
    by_kind = {kind: float(np.mean([row["top1"] for row in rows if row["corruption"] == kind])) for kind in kinds}
    mean = float(np.mean(list(by_kind.values())))
    return Result(
        {
            "clean_top1": clean,
            "corrupted_top1": mean,
            "retained": mean / clean if clean else 0.0,
            **{f"{kind}_top1": value for kind, value in by_kind.items()},
        },
        headline="corrupted_top1",
        tables={"corruptions": rows},
        plots=[Plot("corruptions", "severity", "top1", series="corruption", title="Accuracy on corrupted images")],
        protocol={"parameters": {kind: list(CORRUPTIONS[kind].levels) for kind in kinds}, "pixels": SIZE},
        notes=[
            "Kinds and parameters are ImageNet-C's; the pixels are computed here, not those of its published files."
        ],
    )


def typographic(model: nn.Module, processor: Any, data: LabelledFolder, *, seed: int = 0, **embedding) -> Result:
    """Zero-shot classification of images onto which the name of a wrong class is written.

    Args:
        seed: of the choice of the class and of its place.

    Returns:
        `attack_rate`, the share of images that are taken for what is written on them; `written_label_rate_before`, the
        share that was without the writing; `clean_top1` and `top1`.
    """
    attacked = Typographic(data.samples.source, seed)
    label_embeds = embed_names(model, processor, data.labels, data.templates, **embedding)
    before = embed_readable(model, processor, attacked.source, **embedding).compare(label_embeds)
    images = embed_readable(model, processor, attacked, **embedding)
    after = images.compare(label_embeds)
    written = np.array([attacked.written(attacked.source[place]) for place in images.places])
    return Result(
        {
            "attack_rate": float((after.best == written).mean()),
            "written_label_rate_before": float((before.best == written).mean()),
            "clean_top1": before.top1,
            "top1": after.top1,
        },
        headline="attack_rate",
        protocol={
            "text": f"name of a wrong class, letters of {Typographic.LINE} of {SIZE} pixels or less, white on black"
        },
    )

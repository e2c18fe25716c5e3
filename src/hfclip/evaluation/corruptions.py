"""Images that are harder on purpose: pixel corruptions at five severities, and words written onto images.

    Corrupted(source, "defocus_blur", severity=3)      the same samples, each corrupted
    Typographic(source)                                the same samples, each with the name of a wrong class on it

The kinds and their parameters are those of ImageNet-C, in `corruption_kinds`.
Pixels differ a little from the published files: images are corrupted as CLIP sees them (shorter side to 224 pixels,
centre crop), the noise is drawn anew, blur and zoom are computed here, and nothing is stored as JPEG.

What happens to an image is a function of the seed, the kind, the severity and the image's key: it is the same in every
process, in any order and on any machine.
"""

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import PIL
from PIL import Image, ImageDraw, ImageFont
from torch import nn

from .. import __version__
from ..data.samples import BadSample, Sample, Source, decoding
from ..errors import UsageError
from ..image_processing_hfclip import HFCLIPImageProcessor
from ..open_image_hfclip import open_image
from .corruption_kinds import CORRUPTIONS, to_array, to_image
from .data import LabelledFolder
from .shared import embed_names, embed_readable
from .task import Plot, Result


SIZE = 224  # pixels a side, at which the parameters are meant
SEVERITIES = (1, 2, 3, 4, 5)


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
    return to_image(corruption.apply(to_array(image), corruption.levels[severity - 1], random))


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
    """The samples of a source, each with another image. A subclass says which, by `alter`.

    Args:
        how: all that `alter` depends on beside the sample.
    """

    def __init__(self, source: Source, how: str):
        super().__init__()
        self.source, self.length, self.labels = source, len(source), source.labels
        self.how = f"{how}, hfclip {__version__}, numpy {np.__version__}, Pillow {PIL.__version__}"
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

    def content(self, index: int) -> Sample:
        sample = self.source.content(index)
        image = sample.image if isinstance(sample.image, bytes) else sample.image.tobytes()
        return sample._replace(image=image + self.how.encode())

    def captions(self, index: int) -> list[str]:
        return self.source.captions(index)

    def label(self, index: int) -> int | None:
        return self.source.label(index)


class Corrupted(Altered):
    """The samples of a source, each corrupted in its own way: see `corrupt`."""

    def __init__(self, source: Source, kind: str, severity: int, seed: int = 0):
        super().__init__(source, f"{kind}, severity {severity}, seed {seed}")
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
        super().__init__(source, f"words of a wrong class of {source.labels}, seed {seed}")
        self.seed = seed
        if len(set(source.labels or ())) < 2:
            raise UsageError(
                f"found the labels {source.labels}, expected two different ones or more to write a wrong one."
            )

    def written(self, key: str, label: int) -> int:
        """The class whose name is written onto a sample: any but its own, each as likely."""
        others = [number for number, name in enumerate(self.labels) if name != self.labels[label]]
        return others[int(_generator(self.seed, key).integers(len(others)))]

    def alter(self, image: Image.Image, sample: Sample) -> Image.Image:
        if sample.label is None:
            raise BadSample("missing caption")
        text, draw = self.labels[self.written(sample.key, sample.label)], ImageDraw.Draw(image)
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
    """Zero-shot accuracy on images that are corrupted in eighteen ways, at five severities each.

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
    written = np.array([attacked.written(*about) for about in zip(images.keys, images.targets, strict=True)])
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

"""Contact sheets: what a model saw, what it should have said and what it said; and images side by side."""

import math
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, ImageOps


_CARD, _PADDING, _LINE = 192, 12, 22  # pixels: side of an enlarged image, space around it, height of a line of text
_INK, _FAINT, _PAPER, _RIGHT, _WRONG = "#1f2933", "#7b8794", "#ffffff", "#2f9e5b", "#d64545"


def draw_predictions(
    path: str | Path,
    images: Sequence[Image.Image],
    truths: Sequence[str],
    predictions: Sequence[Sequence[dict]],
    *,
    title: str = "",
    columns: int = 6,
) -> None:
    """Writes a contact sheet: every image, upright and whole, with its truth and its three best labels, green if the first
    is right.

    Args:
        truths: the right label of each image.
        predictions: for each image its labels, best first, as `{"label": str, "score": float}` with scores in [0, 1].

    Raises:
        ValueError: if there is nothing to draw, or the three sequences differ in length.
    """
    if not len(images) == len(truths) == len(predictions) > 0:
        raise ValueError(
            "draw_predictions needs as many truths and predictions as images, and at least one: "
            f"found {len(images)} images, {len(truths)} truths and {len(predictions)} predictions."
        )
    columns = min(columns, len(images))
    rows = math.ceil(len(images) / columns)
    width, height, header = _CARD + 2 * _PADDING, _CARD + 4 * _LINE + 3 * _PADDING, 44 if title else 0
    sheet = Image.new("RGB", (columns * width + _PADDING, rows * height + header + _PADDING), "#e9edf1")
    draw = ImageDraw.Draw(sheet)
    if title:
        draw.text((_PADDING + 4, header / 2 + 4), title, _INK, ImageFont.load_default(20), anchor="lm")
    for index, (image, truth, ranked) in enumerate(zip(images, truths, predictions, strict=True)):
        left, top = index % columns * width + _PADDING, index // columns * height + header + _PADDING
        _draw_card(sheet, draw, (left, top, width - _PADDING, height - _PADDING), image, truth, ranked[:3])
    sheet.save(path)


def _draw_card(sheet: Image.Image, draw: ImageDraw.ImageDraw, box, image, truth: str, ranked: Sequence[dict]) -> None:
    left, top, width, height = box
    verdict = _RIGHT if ranked[0]["label"] == truth else _WRONG
    draw.rounded_rectangle((left, top, left + width, top + height), radius=8, fill=_PAPER, outline=verdict, width=3)
    inset = (width - _CARD) // 2
    picture = _fitted(image)
    sheet.paste(picture, (left + inset + (_CARD - picture.width) // 2, top + inset + (_CARD - picture.height) // 2))
    text_left, text_right = left + inset + 4, left + width - inset - 4
    y = top + inset + _CARD + _LINE // 2 + 4
    bold, plain = ImageFont.load_default(15), ImageFont.load_default(13)
    draw.text((text_left, y), truth, _INK, bold, anchor="lm")
    for entry in ranked:
        y += _LINE
        right = entry["label"] == truth
        bar = (text_right - text_left) * min(max(entry["score"], 0.0), 1.0)
        draw.rectangle((text_left - 4, y - 9, text_left - 4 + bar + 8, y + 9), fill="#cdeed9" if right else "#f3d9d6")
        draw.text((text_left, y), entry["label"], _RIGHT if right else _FAINT, plain, anchor="lm")
        draw.text((text_right, y), f"{entry['score']:.0%}", _RIGHT if right else _FAINT, plain, anchor="rm")


def draw_pairs(
    path: str | Path, pairs: Sequence[tuple[Image.Image, Image.Image, str, bool]], *, columns: int = 4
) -> None:
    """Writes a contact sheet of pairs of images, each with a line of words, green if they count as the same.

    Raises:
        ValueError: if there is nothing to draw.
    """
    if not pairs:
        raise ValueError("draw_pairs needs at least one pair, found none.")
    columns = min(columns, len(pairs))
    width, height = 2 * _CARD + 3 * _PADDING, _CARD + _LINE + 2 * _PADDING
    size = columns * (width + _PADDING) + _PADDING, math.ceil(len(pairs) / columns) * (height + _PADDING) + _PADDING
    sheet = Image.new("RGB", size, "#e9edf1")
    draw, plain = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    for index, (*images, words, is_same) in enumerate(pairs):
        left, top = index % columns * (width + _PADDING) + _PADDING, index // columns * (height + _PADDING) + _PADDING
        box, colour = (left, top, left + width, top + height), _RIGHT if is_same else _WRONG
        draw.rounded_rectangle(box, radius=8, fill=_PAPER, outline=colour, width=3)
        for side, image in enumerate(map(_fitted, images)):
            middle = left + _PADDING + side * (_CARD + _PADDING) + _CARD // 2
            sheet.paste(image, (middle - image.width // 2, top + _PADDING + (_CARD - image.height) // 2))
        draw.text((left + _PADDING, top + height - _LINE // 2 - 4), words[:56], colour, plain, anchor="lm")
    sheet.save(path)


def _fitted(image: Image.Image) -> Image.Image:
    """The whole image in its proportions, as large as a card shows it."""
    image = ImageOps.exif_transpose(image).convert("RGB")
    size = (max(round(_CARD * side / max(image.size)), 1) for side in image.size)
    return image.resize(tuple(size), Image.Resampling.LANCZOS)

"""Queries: words and images with weights, as vectors; and which of the ranked images are strong matches."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from ..errors import UsageError
from ..open_image_hfclip import shortened
from ..zero_shot import device_of, evaluating


# A few words are embedded in these sentences, whose embeddings are averaged: models have seen captions, not words.
TEMPLATES = ("{}", "a photo of {}.", "a picture of {}.", "an image of {}.")
SHORT = 5  # words
CANDIDATES = 500  # images among which strong matches are looked for
LEAST_Z = 2.0  # of a strong match
CHANCE = 5  # images that may be as good by chance
SAME = 0.999  # cosine of what is the image of the query itself

Term = str | int | Image.Image | Tensor


@dataclass(frozen=True)
class Query:
    """A sum of terms.

    Attributes:
        terms: weights, and what they weigh: a text, the id of an image of the index, a PIL image, or an embedding.
    """

    terms: tuple[tuple[float, Term], ...]


def parse_query(text: str) -> Query:
    """The query that a line says: "two parrots + beach - 2:people".

    Terms are divided by a plus or minus between spaces; a number and a colon before a term is its weight.

    Raises:
        UsageError: there is no term, or one is empty.
    """
    parts = re.split(r"(?:^|\s)([+-])(?=\s)", " " + text.strip() + " ")
    signs, words = ["+", *parts[1::2]], [part.strip() for part in parts[::2]]
    if not words[0] and len(words) > 1:
        signs, words = signs[1:], words[1:]
    terms = []
    for sign, term in zip(signs, words, strict=True):
        weight, term = re.fullmatch(r"(?:(\d+(?:\.\d*)?|\.\d+):)?\s*(.*)", term, re.DOTALL).groups()
        if not term:
            raise UsageError(f"query: found {shortened(text)!r}, expected words, also between and after + and -.")
        terms.append((float(weight or 1) * (1 if sign == "+" else -1), term))
    return Query(tuple(terms))


@torch.no_grad()
def embed_query_texts(model: nn.Module, processor: Any, texts: Sequence[str]) -> list[Tensor]:
    """(dim,) unit embedding of each text; of a short one the mean over `TEMPLATES`, again of unit length."""
    prompts = [[form.format(text) for form in TEMPLATES] if len(text.split()) <= SHORT else [text] for text in texts]
    inputs = processor(text=sum(prompts, []), padding=True, truncation=True, return_tensors="pt").to(device_of(model))
    with evaluating(model) as model:
        embeds = model.encode_text(inputs["input_ids"], inputs.get("attention_mask"), normalize=False)
    parts = F.normalize(embeds.float(), dim=-1).cpu().split(list(map(len, prompts)))
    return [F.normalize(part.mean(0), dim=-1) for part in parts]


@torch.no_grad()
def embed_query_image(model: nn.Module, processor: Any, image: Image.Image) -> Tensor:
    """(dim,) unit embedding of an image."""
    inputs = processor(images=image, return_tensors="pt").to(device_of(model))
    with evaluating(model) as model:
        embeds = model.encode_image(inputs["pixel_values"].to(model.dtype), normalize=False)
    return F.normalize(embeds[0].float(), dim=-1).cpu()


def count_strong(scores: np.ndarray, z: np.ndarray, count: int) -> int:
    """How many of the best images are strong matches, relative to how the query matches all images.

    Scores of different queries and models cannot be compared, so no fixed score divides good from bad. Candidates have
    a z that fewer than `CHANCE` of all images would exceed if scores were normally distributed, and at least `LEAST_Z`.
    They are cut at the largest gap to the next score, where the gap after the i-th counts i z times: in the tail of a
    normal distribution these products are alike. The image of the query itself, and copies of it, are no part of that.

    Args:
        scores: of the best images, falling.
        z: the same as z-scores.
        count: all images.
    """
    same = int((scores > SAME).sum())
    z = z[same:]
    candidates = int((z >= max(LEAST_Z, NormalDist().inv_cdf(1 - min(CHANCE / count, 0.5)))).sum())
    if not candidates:
        return same
    after = np.append(z[1:], z[-1:])[:candidates]
    gaps = (z[:candidates] - after) * np.arange(1, candidates + 1) * z[:candidates]
    return same + int(gaps.argmax()) + 1

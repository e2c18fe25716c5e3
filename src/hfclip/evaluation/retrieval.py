"""Retrieval between images and their captions: recall at k and median rank in both directions.

Images and captions are compared in tiles of `chunk_size` on both sides, so that memory does not grow with their number.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers.modeling_utils import unwrap_model

from ..data.samples import Sample, Source, usable_captions
from ..embeddings import embed
from ..errors import UsageError
from ..zero_shot import device_of
from .metrics import median_rank, top_k_accuracy
from .shared import ROWS, Images, check_text_tower, embed_sentences
from .task import Result


KS = (1, 5, 10)


def retrieval(
    model: nn.Module, processor: Any, data: Source, *, prefix: str = "", ks: Sequence[int] = KS, **embedding
) -> Result:
    """Recall between the images and captions of `data`; samples without one of them are left out.

    Args:
        prefix: words before each caption. The paper has "a photo of" for Flickr30k and MSCOCO.
        ks: values of k.
        embedding: options of `hfclip.embeddings.embed`; `precision` is "fp32" if it is not given.

    Returns:
        What `retrieval_recall` measures, `mean_recall@k` of both ways, `text_retrieval_median_rank` and
        `image_retrieval_median_rank` (from 1), and `unreadable_images` that have captions if there are any.

    Raises:
        UsageError: no sample has both an image and a caption; a model without a text tower.
    """
    model, embedding = unwrap_model(model), {"precision": "fp32", **embedding}
    check_text_tower(model)
    if not any(usable_captions(data, index) for index in range(len(data))):
        raise UsageError(f"retrieval: found {len(data)} samples and no image with a caption, expected at least one.")
    num_captions = np.zeros(len(data), np.int64)

    def sentences() -> Iterator[str]:
        for index in range(len(data)):
            captions = usable_captions(data, index)
            num_captions[index] = len(captions)
            yield from (f"{prefix} {caption}".strip() for caption in captions)

    text_embeds, rows = embed_sentences(model, processor, sentences(), **embedding)
    images = embed(model, processor, Images(data), what=("images",), **embedding).image_embeds
    unreadable = ~images.any(axis=1)
    kept = ~unreadable & (num_captions > 0)
    if not kept.any():
        raise UsageError(f"retrieval: found {len(kept)} samples and no readable image with a caption.")
    owner = np.repeat(np.arange(len(kept)), num_captions)
    of_kept = kept[owner]
    arrays = images[kept], text_embeds[rows[of_kept]], (kept.cumsum() - 1)[owner[of_kept]]
    ranks = retrieval_ranks(*(torch.from_numpy(array).to(device_of(model)) for array in arrays))
    metrics = _recalls(*ranks, ks)
    for k in ks:
        metrics[f"mean_recall@{k}"] = (
            metrics[f"text_retrieval_recall@{k}"] + metrics[f"image_retrieval_recall@{k}"]
        ) / 2
    for name, of_query in zip(("text", "image"), ranks, strict=True):
        metrics[f"{name}_retrieval_median_rank"] = median_rank(of_query.cpu())
    num_unreadable = int((unreadable & (num_captions > 0)).sum())
    metrics |= {"unreadable_images": num_unreadable} if num_unreadable else {}
    protocol = {"images": int(kept.sum()), "captions": int(of_kept.sum()), "prefix": prefix}
    return Result(metrics, headline=f"text_retrieval_recall@{min(ks)}", protocol=protocol)


class Pairs(Source):
    """Images in memory with one caption each."""

    def __init__(self, images: Sequence, texts: Sequence[str]):
        super().__init__()
        self.images, self.texts, self.length = images, texts, len(texts)

    def __getitem__(self, index: int) -> Sample:
        return Sample(self.images[index], self.captions(index), str(index))

    def captions(self, index: int) -> list[str]:
        return [self.texts[index]]


def retrieval_recall(
    image_embeds: Tensor,
    text_embeds: Tensor,
    image_of_text: Tensor | Sequence[int],
    ks: Sequence[int] = KS,
    *,
    chunk_size: int = ROWS,
) -> dict[str, float]:
    """Share of queries whose match is among the k most similar candidates (paper table 13).

    Args:
        image_embeds, text_embeds, image_of_text, chunk_size: see `retrieval_ranks`.
        ks: values of k.

    Returns:
        `text_retrieval_recall@k` (image -> text) and `image_retrieval_recall@k` (text -> image), fractions in 0..1.

    Raises:
        ValueError: k below 1, and what `retrieval_ranks` raises.
    """
    if not ks or min(ks) < 1:
        raise ValueError(f"found ks {tuple(ks)}: expected values of k of at least 1.")
    return _recalls(*retrieval_ranks(image_embeds, text_embeds, image_of_text, chunk_size=chunk_size), ks)


def _recalls(text_ranks: Tensor, image_ranks: Tensor, ks: Sequence[int]) -> dict[str, float]:
    ranks = {"text": text_ranks.cpu(), "image": image_ranks.cpu()}
    return {
        f"{name}_retrieval_recall@{k}": top_k_accuracy(of_query, k) for name, of_query in ranks.items() for k in ks
    }


@torch.no_grad()
def retrieval_ranks(
    image_embeds: Tensor, text_embeds: Tensor, image_of_text: Tensor | Sequence[int], *, chunk_size: int = ROWS
) -> tuple[Tensor, Tensor]:
    """Candidates of others that are at least as similar to each query as its best match, from 0.

    Text retrieval takes an image as query and looks for any of its captions, image retrieval takes a caption and looks
    for its one image. A candidate as similar as the match counts as better, so that equal embeddings earn nothing.

    Args:
        image_embeds: `(num_images, dim)`, unit norm (trusted: candidates are ranked by dot product).
        text_embeds: `(num_texts, dim)`, unit norm.
        image_of_text: `(num_texts,)` integers, the image each text belongs to; any number of texts an image, at least
            one.
        chunk_size: images, and texts, compared at a time.

    Returns:
        `(num_images,)` ranks of text retrieval and `(num_texts,)` of image retrieval.

    Raises:
        ValueError: shapes that do not fit, embeddings that are not finite, an image without text, a text without
            image, `chunk_size` below 1.
    """
    image_of_text = torch.as_tensor(image_of_text, device=text_embeds.device)
    _check_inputs(image_embeds, text_embeds, image_of_text, chunk_size)
    # With the texts in the order of their images, matches lie in the few tiles along the diagonal.
    order = image_of_text.argsort(stable=True)
    tiles = partial(_tiles, image_embeds, text_embeds, image_of_text, order, chunk_size)
    # Half precision would make candidates equal that are not.
    dtype = torch.promote_types(image_embeds.dtype, torch.float32)
    best_of_image, best_of_text = (
        torch.full((len(embeds),), -torch.inf, dtype=dtype, device=embeds.device)
        for embeds in (image_embeds, text_embeds)
    )
    for rows, columns, scores, own in tiles(dtype, only_matches=True):
        scores.masked_fill_(~own, -torch.inf)
        best_of_image[rows] = torch.maximum(best_of_image[rows], scores.amax(dim=1))
        best_of_text[columns] = torch.maximum(best_of_text[columns], scores.amax(dim=0))
    text_ranks, image_ranks = (torch.zeros_like(best, dtype=torch.int64) for best in (best_of_image, best_of_text))
    for rows, columns, scores, own in tiles(dtype):
        if own is not None:
            scores.masked_fill_(own, -torch.inf)
        text_ranks[rows] += (scores >= best_of_image[rows, None]).sum(dim=1)
        image_ranks[columns] += (scores >= best_of_text[columns]).sum(dim=0)
    return text_ranks, torch.empty_like(image_ranks).scatter_(0, order, image_ranks)


def _tiles(
    images: Tensor,
    texts: Tensor,
    image_of_text: Tensor,
    order: Tensor,
    size: int,
    dtype: torch.dtype,
    only_matches: bool = False,
) -> Iterator[tuple[slice, slice, Tensor, Tensor | None]]:
    """Tiles of the similarities of images and of texts in `order`.

    Yields:
        Rows and columns, the scores, which are the caller's until the next tile, and which of them are of matches; None
        without any, and such tiles are left out if `only_matches`.
    """
    owners, spans = image_of_text[order], list(_spans(len(texts), size))
    ends = owners[torch.tensor([(start, stop - 1) for _, start, stop in spans])].tolist()
    # One place for all tiles: what is allocated for each is not always given back.
    tile = images.new_empty(min(size, len(images)), min(size, len(texts)), dtype=dtype)
    for (first_text, start, stop), (first_owner, last_owner) in zip(spans, ends, strict=True):
        columns, some_texts = slice(start, stop), texts[order[first_text:stop]].to(dtype)
        for first_image, top, bottom in _spans(len(images), size):
            has_matches = first_owner < bottom and last_owner >= top
            if only_matches and not has_matches:
                continue
            with torch.autocast(images.device.type, enabled=False):  # its products would be of half precision
                scores = torch.mm(images[first_image:bottom].to(dtype), some_texts.T, out=tile)
            own = None
            if has_matches:
                own = torch.arange(top, bottom, device=images.device)[:, None] == owners[columns]
            yield slice(top, bottom), columns, scores[top - first_image :, start - first_text :], own


def _spans(total: int, size: int) -> Iterator[tuple[int, int, int]]:
    """Where to begin computing, the first that is new, and the end.

    All are of one size, and the last one begins early for that: products of other shapes add in another order, and
    equal embeddings would differ.
    """
    for start in range(0, total, size):
        stop = min(start + size, total)
        yield max(stop - size, 0), start, stop


def _check_inputs(image_embeds: Tensor, text_embeds: Tensor, image_of_text: Tensor, chunk_size: int) -> None:
    if image_embeds.ndim != 2 or text_embeds.ndim != 2 or image_embeds.shape[1] != text_embeds.shape[1]:
        raise ValueError(
            f"image_embeds is {tuple(image_embeds.shape)} and text_embeds {tuple(text_embeds.shape)}: expected "
            "(num_images, dim) and (num_texts, dim)."
        )
    if image_of_text.shape != text_embeds.shape[:1] or image_of_text.is_floating_point():
        raise ValueError(
            f"image_of_text is {tuple(image_of_text.shape)} of {image_of_text.dtype}: expected one integer for each "
            f"of {len(text_embeds)} texts."
        )
    if len(image_embeds) == 0 or chunk_size < 1:
        raise ValueError(f"found {len(image_embeds)} images, chunk_size {chunk_size}: expected at least 1 of each.")
    for name, embeds in (("image_embeds", image_embeds), ("text_embeds", text_embeds)):
        if not all(some.isfinite().all() for some in embeds.split(chunk_size)):
            raise ValueError(f"{name} holds values that are not finite: they have no rank. Check the model's weights.")
    outside = image_of_text[(image_of_text < 0) | (image_of_text >= len(image_embeds))]
    if len(outside):
        raise ValueError(f"image_of_text names image {outside[0].item()}: expected 0 to {len(image_embeds) - 1}.")
    without = (torch.bincount(image_of_text, minlength=len(image_embeds)) == 0).nonzero().flatten().tolist()
    if without:
        raise ValueError(f"{len(without)} images have no text, the first is {without[0]}: leave them out.")

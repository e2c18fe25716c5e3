"""Retrieval between images and their captions: recall at k in both directions.

A chunk of queries is compared with all candidates at a time, so memory is `chunk_size` x candidates, never the whole
matrix.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..data.samples import Sample, Source
from ..embeddings import embed
from ..errors import UsageError
from ..zero_shot import device_of
from .task import Result


def retrieval(model: nn.Module, processor: Any, data: Source, **options) -> Result:
    """Recall between the images and captions of `data`; samples without one of them are left out.

    Args:
        options: of `hfclip.embeddings.embed`.

    Returns:
        What `retrieval_recall` measures, and `unreadable_images` that have captions if there are any.

    Raises:
        UsageError: no sample has both an image and a caption.
    """
    found = embed(model, processor, data, **{"precision": "fp32", **options})
    num_captions = np.diff(found.offsets)
    unreadable = ~found.image_embeds.any(axis=1)
    kept = ~unreadable & (num_captions > 0)
    if not kept.any():
        raise UsageError(f"retrieval: found {len(found)} samples and no image with a caption, expected at least one.")
    owner = np.repeat(np.arange(len(found)), num_captions)
    of_kept = kept[owner]
    arrays = found.image_embeds[kept], found.text_embeds[of_kept], (kept.cumsum() - 1)[owner[of_kept]]
    metrics = retrieval_recall(*(torch.from_numpy(array).to(device_of(model)) for array in arrays))
    num_unreadable = int((unreadable & (num_captions > 0)).sum())
    metrics |= {"unreadable_images": num_unreadable} if num_unreadable else {}
    return Result(metrics, headline="text_retrieval_recall@1")


class Pairs(Source):
    """Images in memory with one caption each."""

    def __init__(self, images: Sequence, texts: Sequence[str]):
        super().__init__()
        self.images, self.texts, self.length = images, texts, len(texts)

    def __getitem__(self, index: int) -> Sample:
        return Sample(self.images[index], self.captions(index), str(index))

    def captions(self, index: int) -> list[str]:
        return [self.texts[index]]


@torch.no_grad()
def retrieval_recall(
    image_embeds: Tensor,
    text_embeds: Tensor,
    image_of_text: Tensor | Sequence[int],
    ks: Sequence[int] = (1, 5, 10),
    *,
    chunk_size: int = 1024,
) -> dict[str, float]:
    """Share of queries whose match is among the k most similar candidates (paper table 13).

    Text retrieval takes an image as query and counts a hit if any of its captions is among the first k texts; image
    retrieval takes a caption as query and looks for its one image. A candidate as similar as the match counts as
    better, so that equal embeddings earn nothing.

    Args:
        image_embeds: `(num_images, dim)`, unit norm (trusted: candidates are ranked by dot product).
        text_embeds: `(num_texts, dim)`, unit norm.
        image_of_text: `(num_texts,)` integers, the image each text belongs to; any number of texts an image, at least
            one.
        ks: values of k.
        chunk_size: queries compared at a time.

    Returns:
        `text_retrieval_recall@k` (image -> text) and `image_retrieval_recall@k` (text -> image), fractions in 0..1.

    Raises:
        ValueError: shapes that do not fit, embeddings that are not finite, an image without text, a text without
            image, k or `chunk_size` below 1.
    """
    image_of_text = torch.as_tensor(image_of_text, device=text_embeds.device)
    _check_inputs(image_embeds, text_embeds, image_of_text, ks, chunk_size)
    # Half precision would make candidates equal that are not.
    dtype = torch.promote_types(image_embeds.dtype, torch.float32)
    images, texts = image_embeds.to(dtype), text_embeds.to(dtype)
    image_index = torch.arange(len(images), device=images.device)
    text_ranks = _ranks(images, image_index, texts, image_of_text, chunk_size)
    image_ranks = _ranks(texts, image_of_text, images, image_index, chunk_size)
    recall = {f"text_retrieval_recall@{k}": (text_ranks < k).sum().item() / len(images) for k in ks}
    recall.update({f"image_retrieval_recall@{k}": (image_ranks < k).sum().item() / len(texts) for k in ks})
    return recall


def _ranks(queries: Tensor, query_ids: Tensor, candidates: Tensor, candidate_ids: Tensor, chunk_size: int) -> Tensor:
    """`(num_queries,)`: how many candidates of another id are at least as similar as the best of the query's own."""
    ranks = []
    for chunk, ids in zip(queries.split(chunk_size), query_ids.split(chunk_size), strict=True):
        # (chunk, dim) @ (dim, num_candidates) -> (chunk, num_candidates)
        with torch.autocast(chunk.device.type, enabled=False):  # its products would be of half precision
            scores = chunk @ candidates.T
        own = ids[:, None] == candidate_ids
        best = scores.masked_fill(~own, -torch.inf).amax(dim=1, keepdim=True)
        ranks.append(((scores >= best) & ~own).sum(dim=1))
    return torch.cat(ranks)


def _check_inputs(
    image_embeds: Tensor, text_embeds: Tensor, image_of_text: Tensor, ks: Sequence[int], chunk_size: int
) -> None:
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
    if len(image_embeds) == 0 or not ks or min(ks) < 1 or chunk_size < 1:
        raise ValueError(
            f"found {len(image_embeds)} images, ks {tuple(ks)}, chunk_size {chunk_size}: expected at least 1 of each."
        )
    for name, embeds in (("image_embeds", image_embeds), ("text_embeds", text_embeds)):
        if not embeds.isfinite().all():
            raise ValueError(f"{name} holds values that are not finite: they have no rank. Check the model's weights.")
    outside = image_of_text[(image_of_text < 0) | (image_of_text >= len(image_embeds))]
    if len(outside):
        raise ValueError(f"image_of_text names image {outside[0].item()}: expected 0 to {len(image_embeds) - 1}.")
    without = (torch.bincount(image_of_text, minlength=len(image_embeds)) == 0).nonzero().flatten().tolist()
    if without:
        raise ValueError(f"{len(without)} images have no text, the first is {without[0]}: leave them out.")

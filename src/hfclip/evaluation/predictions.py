"""Images of a source that a model has embedded, and what they score against embedded labels."""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor, nn

from ..data.samples import Source
from ..embeddings import embed
from ..errors import UsageError
from ..zero_shot import Template
from .shared import Images, embed_prompts


class Predictions(NamedTuple):
    scores: np.ndarray
    """(num_images, num_labels), cosines."""
    targets: np.ndarray
    """(num_images,), the right label of each; -1 for none."""

    @property
    def best(self) -> np.ndarray:
        return self.scores.argmax(axis=1)

    @property
    def hits(self) -> np.ndarray:
        return self.best == self.targets

    @property
    def top1(self) -> float:
        return float(self.hits.mean())


class EmbeddedImages(NamedTuple):
    """Those images of a source that can be read."""

    embeds: np.ndarray
    targets: np.ndarray
    """(num_images,), the right label of each; -1 for none."""
    places: np.ndarray
    """(num_images,), where they are in the source."""
    scale: float
    """The factor that makes logits of cosines."""

    def compare(self, label_embeds: Tensor) -> Predictions:
        """Cosines with labels, (num_labels, dim), that `embed_names` has embedded."""
        return Predictions(self.embeds @ label_embeds.float().cpu().numpy().T, self.targets)

    def keys(self, source: Source) -> list[str]:
        """Their names within the source."""
        return [source[int(place)].key for place in self.places]


def embed_names(
    model: nn.Module, processor: Any, labels: Sequence[str], templates: Iterable[Template], **embedding
) -> Tensor:
    """(num_labels, dim) classifiers of labels; labels may repeat."""
    return embed_prompts(model, processor, labels, templates, **embedding).ensemble()


def embed_readable(
    model: nn.Module, processor: Any, source: Source, *, labelled: bool = True, **embedding
) -> EmbeddedImages:
    """Embeds the images of a source, and leaves out those that cannot be read, or have no label if that is needed.

    Args:
        embedding: options of `hfclip.embeddings.embed`; `precision` is "fp32" if it is not given.

    Raises:
        UsageError: none is left, or embeddings are not finite.
    """
    found = embed(model, processor, Images(source), what=("images",), **{"precision": "fp32", **embedding})
    labels = [source.label(place) for place in range(len(source))]
    targets = np.array([-1 if label is None else label for label in labels], np.int64)
    kept = np.asarray(found.image_embeds).any(axis=1) & ((targets >= 0) | (not labelled))
    if not kept.any():
        needed = " and has a label" if labelled else ""
        raise UsageError(f"none of {len(found)} images can be read{needed}, expected at least one.")
    embeds = found.image_embeds[kept].astype(np.float32)
    if not np.isfinite(embeds).all():
        raise UsageError("the model gives embeddings that are not finite: check its weights, or evaluate in float32.")
    return EmbeddedImages(embeds, targets[kept], np.flatnonzero(kept), found.scale)

"""Embeddings that a teacher has stored of the training data, written by training/embed.py."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from hfclip.data.samples import Source, caption_id, usable_captions
from hfclip.embeddings import Embeddings
from hfclip.errors import UsageError


NUM_PROBED = 64
IMAGES, TEXTS = "teacher_image_embeds", "teacher_text_embeds"  # columns of a batch


class StoredEmbeddings:
    """A teacher's embeddings of all images and captions of a source.

    An image's row is of its central square, prepared as the teacher's images are: the student's random crops show parts
    of it.

    Raises:
        UsageError: if they are not there, or not finished.
    """

    def __init__(self, folder: str | Path):
        try:
            self.stored = Embeddings.open(folder)
        except UsageError as error:
            raise UsageError(
                f"distill.embeddings: {error} `hfclip embed` does; it ends an interrupted folder if started again."
            ) from error
        if self.stored.image_embeds is None or self.stored.text_embeds is None:
            raise UsageError(f"distill.embeddings: {folder} holds no embeddings of images and texts both.")
        self.folder, self.scale = self.stored.folder, self.stored.scale

    @classmethod
    def open(cls, folder: str | Path, source: Source) -> "StoredEmbeddings":
        """The embeddings in `folder`, of the samples of `source`.

        Raises:
            UsageError: if they are of other data: some samples' captions are compared here, and those of all samples
                when they are looked up.
        """
        stored, length = cls(folder), len(source)
        if len(stored.stored) < length:
            raise UsageError(
                f"distill.embeddings: {folder} holds {len(stored.stored)} samples, expected the {length} of data.train. "
                "Store them again by `hfclip embed`."
            )
        for index in np.linspace(0, length - 1, min(length, NUM_PROBED)).astype(int).tolist():
            for caption in usable_captions(source, index):
                stored.row_of(index, caption)
        return stored

    def row_of(self, sample: int, caption: str) -> int:
        """The row of a caption of a sample.

        Raises:
            UsageError: if the sample had no such caption.
        """
        start, stop = self.stored.offsets[sample : sample + 2].tolist()
        found = np.flatnonzero(self.stored.caption_ids[start:stop] == caption_id(caption))
        if not len(found):
            raise UsageError(
                f"distill.embeddings: {self.folder} was made for other data: {self._name(sample)} had no caption {caption!r}. "
                "Store the embeddings again by `hfclip embed`."
            )
        return start + int(found[0])

    def targets(self, samples: list[int], captions: list[str]) -> dict[str, Tensor]:
        """Unit embeddings of images and texts, `(len(samples), dim)` float32 each, as columns of a batch.

        Args:
            samples: places in the source.
            captions: one of each sample's, stripped.

        Raises:
            UsageError: if the data is not what was embedded, or could not be read then.
        """
        rows = [self.row_of(sample, caption) for sample, caption in zip(samples, captions, strict=True)]
        images, texts = (
            torch.from_numpy(np.asarray(array[places], np.float32))
            for array, places in ((self.stored.image_embeds, samples), (self.stored.text_embeds, rows))
        )
        unread = (images.norm(dim=1) < 0.5) | (texts.norm(dim=1) < 0.5)
        if unread.any():
            sample = samples[int(unread.int().argmax())]
            raise UsageError(
                f"distill.embeddings: {self._name(sample)} could not be read when {self.folder} was made. Store "
                "the embeddings again by `hfclip embed`."
            )
        return {IMAGES: F.normalize(images, dim=1), TEXTS: F.normalize(texts, dim=1)}

    def _name(self, sample: int) -> str:
        return f"sample {sample} ({self.stored.keys[sample]})"

    def embed(self, part: dict) -> tuple[Tensor, Tensor]:
        """Those of a part of a batch."""
        return part[IMAGES], part[TEXTS]

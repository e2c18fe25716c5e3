"""Embeddings that a teacher has stored of the training data, written by training/embed.py."""

import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from hfclip.data.samples import Source, caption_id, usable_captions
from hfclip.errors import UsageError


HEADER = "embeddings.json"
ARRAYS = ("offsets", "caption_ids", "image_embeds", "text_embeds")
NUM_PROBED = 64
IMAGES, TEXTS = "teacher_image_embeds", "teacher_text_embeds"  # columns of a batch


class StoredEmbeddings:
    """A teacher's embeddings of all images and captions of a source, written by training/embed.py.

    `image_embeds.npy` (num_samples, dim) and `text_embeds.npy` (num_captions, dim) are float16 and mapped, not read;
    the captions of sample i are the rows offsets[i] to offsets[i + 1], known by their `caption_ids`. An image's row is
    of its central square, prepared as the teacher's images are: the student's random crops show parts of it.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.header = json.loads((folder / HEADER).read_text(encoding="utf-8"))
        self.scale = self.header["scale"]
        for name in ARRAYS:
            setattr(self, name, np.load(folder / f"{name}.npy", mmap_mode="r"))

    def __reduce__(self):
        return StoredEmbeddings, (self.folder,)  # pickled, a mapped array would be read whole

    @classmethod
    def open(cls, folder: str | Path, source: Source) -> "StoredEmbeddings":
        """The embeddings in `folder`, of the samples of `source`.

        Raises:
            UsageError: if they are not there, not finished, or of other data: some samples' captions are compared
                here, and those of all samples when they are looked up.
        """
        folder = Path(folder).expanduser()
        try:
            stored = cls(folder)
        except (OSError, ValueError, KeyError) as error:
            raise UsageError(
                f"distill.embeddings: {folder} holds no stored embeddings ({error}). Make them by training/embed.py; "
                "it ends an interrupted folder if started again."
            ) from error
        length = len(source)
        if stored.header["num_samples"] < length:
            raise UsageError(
                f"distill.embeddings: {folder} holds {stored.header['num_samples']} samples, expected the {length} "
                "of data.train. Store them again by training/embed.py."
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
        start, stop = self.offsets[sample : sample + 2].tolist()
        found = np.flatnonzero(self.caption_ids[start:stop] == caption_id(caption))
        if not len(found):
            raise UsageError(
                f"distill.embeddings: {self.folder} was made for other data: sample {sample} had no caption {caption!r}. "
                "Store the embeddings again by training/embed.py."
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
            for array, places in ((self.image_embeds, samples), (self.text_embeds, rows))
        )
        unread = (images.norm(dim=1) < 0.5) | (texts.norm(dim=1) < 0.5)
        if unread.any():
            sample = samples[int(unread.int().argmax())]
            raise UsageError(
                f"distill.embeddings: sample {sample} could not be read when {self.folder} was made. Store the "
                "embeddings again by training/embed.py."
            )
        return {IMAGES: F.normalize(images, dim=1), TEXTS: F.normalize(texts, dim=1)}

    def embed(self, part: dict) -> tuple[Tensor, Tensor]:
        """Embeddings of a part of a batch, images and texts."""
        return part[IMAGES], part[TEXTS]

"""Rows of a batch of texts: where they end, how they are padded, and encodings that are made when asked for."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from typing import NamedTuple

import numpy as np
from tokenizers import Encoding
from transformers import BatchEncoding
from transformers.utils import PaddingStrategy


class Layout(NamedTuple):
    """Where the rows of a batch end; lengths in tokens, special tokens included."""

    num_special_tokens: int
    limit: int | None  # rows are cut to this length, if any
    stride: int
    padding: PaddingStrategy
    max_length: int | None
    multiple: int | None
    side: str

    @property
    def room(self) -> int | None:
        """Longest row without its special tokens."""
        return None if self.limit is None else self.limit - self.num_special_tokens

    def width(self, longest: int) -> int | None:
        """Length that rows are padded to, if any."""
        if self.padding == PaddingStrategy.DO_NOT_PAD:
            return None
        width = longest if self.padding == PaddingStrategy.LONGEST else self.max_length
        if self.multiple:
            width += -width % self.multiple
        return width if self.limit is None else min(width, self.limit)


class LazyBatchEncoding(BatchEncoding):
    """A `BatchEncoding` that makes its Rust encodings (tokens, words, offsets) when they are first asked for.

    Pickled (by the workers of a data loader) it is a plain `BatchEncoding` of its data.
    """

    _make_encodings: Callable[[], list[Encoding]] | None = None
    _made_encodings: list[Encoding] | None = None

    @property
    def _encodings(self) -> list[Encoding] | None:
        if self._made_encodings is None and self._make_encodings is not None:
            self._made_encodings = self._make_encodings()
        return self._made_encodings

    @_encodings.setter
    def _encodings(self, encodings: list[Encoding] | None):
        self._made_encodings = encodings

    def __reduce_ex__(self, protocol):
        return BatchEncoding, (self.data,)


def pad_rows(rows: list[list[int]], width: int, pad_id: int, side: str) -> dict[str, np.ndarray]:
    """Ids and attention mask, (len(rows), width) int64 each."""
    lengths = np.fromiter(map(len, rows), np.int64, len(rows))[:, None]
    columns = np.arange(width)
    mask = columns < lengths if side == "right" else columns >= width - lengths
    ids = np.full(mask.shape, pad_id, np.int64)
    ids[mask] = np.fromiter(chain.from_iterable(rows), np.int64, lengths.sum())
    return {"input_ids": ids, "attention_mask": mask.astype(np.int64)}

"""Where samples come from, by name: built-in scenes, WebDataset tars, tables, and mixtures of them."""

import math
import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from ..errors import UsageError
from .samples import Sample, Source
from .scenes import Scenes
from .shards import CACHE, find_shards
from .streaming import StreamSource
from .tables import TableSource
from .webdataset import ShardSource


NUM_SCENES = 50_000


def open_source(
    name: str | Mapping[str, float],
    *,
    split: str | None = None,
    image_key: str | None = None,
    caption_key: str | None = None,
    max_samples: int | None = None,
    image_size: int = 224,
    cache_dir: str | os.PathLike = CACHE,
    disk: float | None = None,
) -> Source:
    """Opens image-caption data by its name.

    Args:
        name: "scenes", a path, a URL, a pattern of these, or a data set on the Hub. A mapping of names to weights mixes
            them: a `MixtureSource`, whose sources are all read with the same settings.
        split: of the built-in scenes, and of what `datasets` loads. None: the one that is held out.
        image_key: column of the images in a table. None: the usual names, whichever is there.
        caption_key: column of the captions, or their key in .json members of tars. None: .txt members, else the usual
            names.
        max_samples: uses only the first so many samples; of a mixture, those of each source.
        image_size: side in pixels of the built-in scenes.
        cache_dir: where remote files and the indices of tars are kept.
        disk: gigabytes of remote tars that are kept at a time (`StreamSource`). None: all are fetched first.

    Raises:
        UsageError: where nothing usable is found, or a weight is not a number above 0.
    """
    options = dict(image_key=image_key, caption_key=caption_key, max_samples=max_samples, cache_dir=cache_dir)
    cache = Path(cache_dir).expanduser()
    if isinstance(name, Mapping):
        if disk is not None:
            raise UsageError("disk: found a mixture, expected one URL of tars. Unset it, or name one source.")
        _check_weights(name)
        sources = {str(key): open_source(str(key), split=split, image_size=image_size, **options) for key in name}
        return MixtureSource(sources, list(name.values()))
    if name == "scenes" and disk is None:
        return SceneSource(split or "test", image_size, max_samples or NUM_SCENES)
    if disk is not None:
        source = StreamSource(name, caption_key, cache, int(disk * 1e9))
    elif shards := find_shards(name, cache):
        source = ShardSource(shards, caption_key, cache)
    else:
        source = TableSource.load(name, image_key, caption_key, split)
    if len(source) == 0:
        left_out = ", ".join(f"{n} with {kind}" for kind, n in source.skipped.items()) or "nothing"
        raise UsageError(f"{name!r} holds no usable pair of image and caption. Left out: {left_out}.")
    source.length = min(source.length, max_samples or source.length)
    return source


def _check_weights(mixture: Mapping) -> None:
    if not mixture:
        raise UsageError("Found an empty mixture, expected names of sources with their weights.")
    for name, weight in mixture.items():
        is_number = isinstance(weight, (int, float)) and not isinstance(weight, bool)
        if not (is_number and 0 < weight < math.inf):
            raise UsageError(
                f"{name!r} has the weight {weight!r}, expected a number above 0. Leave a source out that is not to be "
                "used."
            )


class MixtureSource(Source):
    """Several sources, one after the other, and the weights by which batches are filled from them.

    A weight is a source's share of each batch, relative to the other weights, whatever its size. An epoch is as many
    pairs as the sources have together.
    """

    def __init__(self, sources: Mapping[str, Source], weights: list[float]):
        self.names, self.sources, self.weights = list(sources), list(sources.values()), weights
        self.lengths = [len(source) for source in self.sources]
        self.starts, self.length = np.cumsum([0, *self.lengths]), sum(self.lengths)
        self.skipped = sum((source.skipped for source in self.sources), Counter())

    def __getitem__(self, index: int) -> Sample:
        source, index = self._find(index)
        return source[index]

    def captions(self, index: int) -> list[str]:
        source, index = self._find(index)
        return source.captions(index)

    def _find(self, index: int) -> tuple[Source, int]:
        number = int(np.searchsorted(self.starts, index, side="right")) - 1
        return self.sources[number], int(index - self.starts[number])


class SceneSource(Source):
    """The demonstration scenes of `hfclip.data.scenes`."""

    def __init__(self, split: str, image_size: int, num_scenes: int):
        self.scenes = Scenes(split, size=image_size, num_scenes=num_scenes)
        self.length, self.skipped = len(self.scenes), Counter()

    def __getitem__(self, index: int) -> Sample:
        scene = self.scenes[index]
        return Sample(scene["image"], [scene["text"]], str(index))

    def captions(self, index: int) -> list[str]:
        return [self.scenes.caption(index)]

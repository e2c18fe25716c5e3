"""A data set embedded once, by any number of processes: images, texts, and features of any layer.

    source = open_source("photos/{00..99}.tar")
    embeddings = embed(model, processor, source, cache_dir="~/.cache/hfclip/embeddings")
    embeddings.image_embeds[:5], embeddings.keys[:5], embeddings.problems

The samples of a source are cut into chunks. Chunk k is read, decoded and preprocessed by a worker of process
k % world_size while the model computes the one before, and its rows are renamed into place as `chunk-00042.safetensors`.
A chunk that is there is not computed again: that is all there is to resuming, after Ctrl-C and after SIGKILL, alone or
among several processes (of one file system). At the end the first process joins the chunks to arrays that are mapped,
not read, in a folder that appears whole or not at all.

A folder is of one content: the fingerprint of the samples (each is read once before, which is a fraction of decoding
it), the weights, the preprocessing and the options. With the same fingerprint it is opened, and nothing is computed.

A row depends on its own image or text alone, bit for bit in float32: the model always sees full batches (the last one
is filled up), images on their own, and texts with others of the same width, whose multiple of 8 follows from the text.
Neither the processes nor the workers nor the order of the samples change it.
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..cores import usual_workers
from ..data.image_list import ImageList
from ..data.samples import Source, not_blank
from ..errors import UsageError
from ..precision import settled_precision
from ..zero_shot import device_of
from .chunks import CHUNK, Chunks, Options, Pool
from .encoder import WIDTH, Encoder, prepared
from .processes import Processes, fingerprint_of
from .store import Embeddings, Store, join


__all__ = ["Embeddings", "TextList", "embed", "embed_images", "embed_texts"]


def embed(
    model: nn.Module,
    processor: Any,
    source: Source,
    *,
    folder: str | os.PathLike | None = None,
    cache_dir: str | os.PathLike | None = None,
    what: Sequence[Literal["images", "texts"]] = ("images", "texts"),
    layers: Mapping[str, Pool] | None = None,
    batch_size: int | None = None,
    num_workers: int | None = None,
    precision: str = "auto",
    dtype: Literal["float32", "float16"] = "float32",
    name: str = "",
    group: dist.ProcessGroup | None = None,
    alone: bool = False,
) -> Embeddings:
    """Unit embeddings of images and captions, the same on every process: those that torchrun or `accelerate` started.

    Args:
        model, processor: a `HFCLIPModel` on its device, left as it was, and its `HFCLIPProcessor`.
        source: what `hfclip.data.sources.open_source` returns.
        folder: where the embeddings are stored, and found again. None: in `cache_dir`, else in memory alone.
        cache_dir: holds a folder per fingerprint.
        what: "images", "texts" or both.
        layers: modules of the model by name ("vision_model.encoder.layers.3"), whose output for each image is kept:
            its "mean" over tokens or places, the "first" token, "all" of it, or the module's "input" instead.
        batch_size: images, or texts, that the model sees at a time. None: 32 on a CPU, else 256.
        num_workers: processes that read and decode beside this one. None: what the machine has for it.
        precision: "fp32", "bf16", "fp16" or "auto": bf16 where the hardware has it.
        dtype, name: of what is stored, and of the model in its header.
        group: the processes that share the work. None: all of them, or with `alone` this one.

    Raises:
        UsageError: if no image or no caption can be read, or the folder holds something else.
    """
    if "images" in what and getattr(getattr(model, "config", None), "is_naflex", False):
        raise UsageError("model: NaFlex takes images each in its own shape, and `embed` squares of one size.")
    device, processes = device_of(model), Processes.find(group, alone)
    batch_size = min(batch_size or (32 if device.type == "cpu" else 256), len(source))
    precision = processes.gather(settled_precision(precision, device)[0])[0]
    options = Options(tuple(what), dict(layers or {}), batch_size, precision, dtype)
    in_memory = folder is None and cache_dir is None
    # What is not stored is shared more evenly in chunks of one batch.
    chunks = Chunks(source, processor, options, batch_size if in_memory else batch_size * max(CHUNK // batch_size, 1))
    if num_workers is None:
        num_workers = usual_workers(device.type == "cpu") if len(source) > CHUNK else 0
    if in_memory:
        computed, header = _compute(model, chunks, processes, num_workers, None)
        computed = {number: result for part in processes.gather(computed) for number, result in part.items()}
        return Embeddings(*join(len(chunks), computed.__getitem__, header, lambda _, *array: np.zeros(*array)))
    fingerprint = fingerprint_of(model, chunks, processes, num_workers)
    store = Store(Path(folder if folder is not None else Path(cache_dir) / fingerprint[:32]).expanduser(), fingerprint)
    if not store.is_complete():
        _, header = _compute(model, chunks, processes, num_workers, store)
        processes.gather(None)  # all chunks are there
        if processes.rank == 0:
            store.finish(len(chunks), {"model": name, **header})
        processes.gather(None)
    return Embeddings.open(store.folder)


def _compute(
    model: nn.Module, chunks: Chunks, processes: Processes, num_workers: int, store: Store | None
) -> tuple[dict[int, dict], dict]:
    """Computes this process's chunks, but for those that are stored. Returns those that are not, and what they are of."""
    todo = range(processes.rank, len(chunks), processes.size)
    todo = [number for number in todo if store is None or not store.chunk(number).exists()]
    computed = {}
    settings = chunks.processor, chunks.options, getattr(chunks.source, "width", WIDTH)
    with prepared(model, chunks.options.precision) as bare, Encoder(bare, *settings) as encoder:
        for number, inputs in chunks.load(todo, num_workers, "embedding", processes.rank == 0):
            if store is None:
                computed[number] = encoder(inputs)
            else:
                store.write(number, encoder(inputs))
    return computed, {"scale": encoder.scale, "labels": chunks.source.labels, "precision": chunks.options.precision}


def embed_images(model: nn.Module, processor: Any, images: Any, **options) -> Tensor:
    """Unit embeddings (num_images, dim), float32, of what people have, batch by batch and without a graph.

    Args:
        images: a path, a folder, a pattern such as "photos/*.jpg", a PIL image, an array, encoded bytes, or a list of
            these. Folders and patterns give their images in the order of their names.
        options: `batch_size`, `num_workers` and `precision` of `embed`.

    Raises:
        UsageError: for no images, URLs, and images that cannot be read; it names the first one.
    """
    found = embed(model, processor, ImageList(images), what=("images",), alone=True, **options)
    for index, kind in found.problems.items():
        raise UsageError(
            f"{found.keys[index]}: {kind}. Leave it out; {len(found.problems)} of {len(found)} cannot be read."
        )
    return torch.from_numpy(found.image_embeds)


def embed_texts(model: nn.Module, processor: Any, texts: str | Iterable[str], **options) -> Tensor:
    """Unit embeddings (num_texts, dim), float32, of a text or several; `options` as in `embed_images`.

    Raises:
        UsageError: for no texts, or empty ones.
    """
    source = TextList([texts] if isinstance(texts, str) else list(texts))
    return torch.from_numpy(embed(model, processor, source, what=("texts",), alone=True, **options).text_embeds)


class TextList(Source):
    """Texts without images. Raises UsageError for none, or empty ones."""

    def __init__(self, texts: list[str]):
        super().__init__()
        self.texts, self.length = texts, len(texts)
        empty = [index for index, text in enumerate(texts) if not not_blank([text])]
        if empty or not texts:
            raise UsageError(f"texts: found {f'text {empty[0]} empty' if empty else 'none'}, expected words.")

    def captions(self, index: int) -> list[str]:
        return [self.texts[index]]

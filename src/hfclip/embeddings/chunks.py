"""Samples read, decoded and preprocessed in worker processes, a chunk at a time."""

import hashlib
import json
import signal
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

import numpy as np
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from ..data.samples import BadSample, Source, decoding, not_blank, usable_captions
from ..image_processing_hfclip import HFCLIPImageProcessor
from ..open_image_hfclip import open_image


CHUNK = 256  # samples, if a batch is not larger

Pool = Literal["mean", "first", "all", "input"]


class Options(NamedTuple):
    what: tuple[str, ...]
    layers: dict[str, Pool]
    batch_size: int
    precision: str
    dtype: str


class Chunks(Dataset):
    """Samples by chunk: `keys`, `labels`, `captions` of each, `pixels` of those in `readable`, `problems`."""

    def __init__(self, source: Source, processor: Any, options: Options, size: int):
        self.source, self.processor, self.options, self.size = source, processor, options, size
        images = getattr(processor, "image_processor", None)
        # A quarter of the bytes to hand over; the model's device normalises them, to the same bits.
        self.as_bytes = is_plain(images)

    def __len__(self) -> int:
        return -(-len(self.source) // self.size)

    def indices(self, number: int) -> range:
        return range(number * self.size, min((number + 1) * self.size, len(self.source)))

    def load(self, numbers: list[int], num_workers: int, task: str, shows: bool) -> Iterator[tuple[int, Any]]:
        """Chunks, or their fingerprints if the task is "reading", in order."""
        read = self.fingerprint if task == "reading" else self.__getitem__
        loader = DataLoader(
            _Mapped(read, numbers),
            batch_size=None,
            collate_fn=_as_it_is,
            num_workers=min(num_workers, len(numbers)),
            worker_init_fn=_ignore_interrupts,
        )
        total = sum(len(self.indices(number)) for number in numbers)
        with tqdm(total=total, desc=task, unit="sample", disable=None if shows else True, leave=False) as bar:
            for number, found in zip(numbers, loader, strict=True):
                yield number, found
                bar.update(len(self.indices(number)))

    def __getitem__(self, number: int) -> dict:
        samples = [self._sample(index) for index in self.indices(number)]
        readable = [place for place, sample in enumerate(samples) if sample["pixels"] is not None]
        result = {name: [sample[name] for sample in samples] for name in ("key", "label", "captions")}
        result["problems"] = [(place, s["problem"]) for place, s in enumerate(samples) if s["problem"]]
        # An array, which workers send through a pipe: tensors would go through /dev/shm, 64 MB in containers.
        pixels = np.stack([samples[place]["pixels"] for place in readable]) if readable else None
        return {**result, "readable": readable, "pixels": pixels}

    def _sample(self, index: int) -> dict:
        key, label, captions, pixels, problem = str(index), None, [], None, None
        try:
            if "images" in self.options.what:
                image, captions, key, label = self.source[index]
                pixels = self._pixels(image)
            else:
                captions, label = self.source.captions(index), self.source.label(index)
        except BadSample as bad:
            captions, problem = captions or usable_captions(self.source, index), bad.kind
        captions = not_blank(captions) if "texts" in self.options.what else []
        return {"key": key, "label": label, "captions": captions, "pixels": pixels, "problem": problem}

    def _pixels(self, image: Any) -> np.ndarray:
        with decoding(image):
            image = open_image(image)
            if self.as_bytes:
                raw = {"do_rescale": False, "do_normalize": False, "return_tensors": "np"}
                return self.processor.image_processor(image, **raw)["pixel_values"][0].astype(np.uint8)
            return self.processor(images=image, return_tensors="pt")["pixel_values"][0].numpy()

    def fingerprint(self, number: int) -> bytes:
        """16 bytes of the content of a chunk."""
        digest = hashlib.blake2b(digest_size=16)
        for index in self.indices(number):
            for part in self._content(index):
                digest.update(len(part).to_bytes(8, "little"))
                digest.update(part)
        return digest.digest()

    def _content(self, index: int) -> Iterator[bytes]:
        try:
            if "images" in self.options.what:
                image, captions, key, label = self.source.content(index)
                if not isinstance(image, bytes):
                    yield f"{image.mode} {image.size}".encode()
                    image = image.tobytes()
                yield image
            else:
                captions, key, label = self.source.captions(index), "", self.source.label(index)
            yield json.dumps([captions, key, label]).encode()
        except BadSample as bad:
            yield json.dumps([bad.kind, usable_captions(self.source, index)]).encode()


def is_plain(images: Any) -> bool:
    """Whether an image processor rescales and normalises 8-bit pixels as `HFCLIPImageProcessor` does."""
    return (
        type(images) is HFCLIPImageProcessor
        and images.do_normalize
        and (images.do_rescale and images.rescale_factor == 1 / 255)
    )


class _Mapped(Dataset):
    """The values of a function."""

    def __init__(self, function: Callable[[int], Any], numbers: list[int]):
        self.function, self.numbers = function, numbers

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, place: int) -> Any:
        return self.function(self.numbers[place])


def _as_it_is(value: Any) -> Any:
    return value


def _ignore_interrupts(worker: int) -> None:
    """Ctrl-C reaches all processes; the first one ends the others."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

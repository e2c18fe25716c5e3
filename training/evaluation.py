"""What is measured while a model trains: zero-shot accuracy, and retrieval on held-out pairs.

Data is opened before the run starts, so that a wrong path costs nothing. The work is split over the processes on the
model itself, never through a distributed wrapper, whose forward would wait for processes that are done already.
"""

import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from PIL import Image
from tqdm import tqdm

from hfclip import HFCLIPModel, HFCLIPProcessor, ZeroShotClassifier
from hfclip.data import draw_predictions, retrieval_task, zero_shot_tasks
from hfclip.data.samples import BadSample, Source, usable_captions
from hfclip.errors import UsageError
from hfclip.evaluation.retrieval import retrieval_recall
from hfclip.evaluation.zero_shot import UndecodableImage, load_labelled_folder, zero_shot_accuracy
from hfclip.zero_shot import evaluating

from .config import Config
from .data.batches import open_data
from .machine import num_workers


NUM_PICTURES = 24


class LabelledSet(NamedTuple):
    """`samples[i]` is `(image, index of its label)`."""

    name: str
    labels: list[str]
    templates: list[str]
    samples: Sequence[tuple[Any, int]]


class HeldOutPairs(NamedTuple):
    """`captions[i]` are the texts of `images[i]`; unreadable images are left out when they are met."""

    images: Sequence[Any]
    captions: list[list[str]]


class Evaluator:
    """All evaluations of a run. `model` arguments are the bare model; calls are collective and restore its mode."""

    def __init__(self, config: Config, accelerator: Accelerator, processor: HFCLIPProcessor, image_size: int):
        self.accelerator, self.processor, self.config = accelerator, processor, config
        self.labelled = _open_labelled(config.eval.zero_shot, image_size) if config.eval.zero_shot else []
        self.pairs = _open_pairs(config, image_size) if config.eval.retrieval else None

    @property
    def measures_anything(self) -> bool:
        return bool(self.labelled or self.pairs)

    @torch.no_grad()
    def __call__(self, model: HFCLIPModel) -> dict[str, float]:
        """Fractions in 0..1 by name, the same on every process. Empty if nothing is to be measured."""
        results = {}
        with evaluating(model), self.accelerator.autocast():
            for task in self.labelled:
                measured = zero_shot_accuracy(
                    model,
                    self.processor,
                    task.samples,
                    task.labels,
                    task.templates,
                    batch_size=self.config.eval.batch_size,
                    num_workers=num_workers(self.config.data.num_workers),
                )
                del measured["num_samples"]
                unreadable = measured.pop("num_skipped")
                measured |= {"unreadable_images": unreadable} if unreadable else {}
                results |= {f"{task.name}/{name}": value for name, value in measured.items()}
            if self.pairs:
                results |= {f"retrieval/{name}": value for name, value in self._retrieval(model).items()}
        return results

    def _retrieval(self, model: HFCLIPModel) -> dict[str, float]:
        images = self._embed(model, self.pairs.images, self._image_embeds)
        texts = [text for captions in self.pairs.captions for text in captions]
        text_embeds = self._embed(model, texts, self._text_embeds)
        owner = torch.tensor(
            [i for i, captions in enumerate(self.pairs.captions) for _ in captions], device=images.device
        )
        # An unreadable image has a zero in the place of its unit embedding.
        usable = images.norm(dim=1) > 0.5
        new_index = usable.cumsum(0) - 1
        kept = usable[owner]
        recall = retrieval_recall(images[usable], text_embeds[kept], new_index[owner[kept]])
        return recall | ({"unreadable_images": int((~usable).sum())} if not usable.all() else {})

    def _embed(self, model: HFCLIPModel, items: Sequence, embed) -> torch.Tensor:
        """Embeddings (len(items), dim) in float32 on every process, of which each computes a share."""
        rank, num_ranks, size = (
            self.accelerator.process_index,
            self.accelerator.num_processes,
            self.config.eval.batch_size,
        )
        share = range(rank, len(items), num_ranks)
        parts = [torch.zeros(0, model.config.projection_dim, device=model.device)]
        starts = tqdm(range(0, len(share), size), desc="Retrieval", disable=None if rank == 0 else True, leave=False)
        parts += [embed(model, [items[i] for i in share[start : start + size]]) for start in starts]
        local = torch.cat(parts)
        padding = math.ceil(len(items) / num_ranks) - len(local)
        gathered = self.accelerator.gather(torch.cat([local, local.new_zeros(padding, local.shape[1])]))
        # (ranks * rows, dim) -> (rows, ranks, dim) -> (rows * ranks, dim): item i is row i // ranks of rank i % ranks
        return gathered.view(num_ranks, -1, local.shape[1]).transpose(0, 1).flatten(0, 1)[: len(items)]

    def _image_embeds(self, model: HFCLIPModel, images: list) -> torch.Tensor:
        pixels, readable = [], []
        for i, image in enumerate(images):
            try:
                pixels.append(self.processor(images=image, return_tensors="pt")["pixel_values"])
                readable.append(i)
            except (ValueError, TypeError):
                continue
        embeds = torch.zeros(len(images), model.config.projection_dim, device=model.device)
        if pixels:
            pixel_values = torch.cat(pixels).to(model.device)
            embeds[readable] = F.normalize(model.encode_image(pixel_values, normalize=False).float(), dim=-1)
        return embeds

    def _text_embeds(self, model: HFCLIPModel, texts: list[str]) -> torch.Tensor:
        tokens = self.processor(text=texts, padding=True, truncation=True, return_tensors="pt").to(model.device)
        embeds = model.encode_text(tokens["input_ids"], tokens["attention_mask"], normalize=False)
        return F.normalize(embeds.float(), dim=-1)  # in half precision, lengths are off by up to a part in 256

    def draw(self, model: HFCLIPModel, path: Path) -> Path | None:
        """A picture of predictions for images spread over the first labelled set; None without any. Not collective."""
        if not self.labelled:
            return None
        task = self.labelled[0]
        step = max(len(task.samples) // NUM_PICTURES, 1)
        drawn = []
        for i in range(0, len(task.samples), step)[:NUM_PICTURES]:
            with suppress(UndecodableImage):
                drawn.append(task.samples[i])
        if not drawn:
            return None
        images, targets = zip(*drawn, strict=True)
        labels = list(dict.fromkeys(task.labels))
        predictions = ZeroShotClassifier(model, self.processor, labels, task.templates)(list(images), top_k=3)
        draw_predictions(path, images, [task.labels[t] for t in targets], predictions, title=task.name)
        return path


def _open_labelled(name: str, image_size: int) -> list[LabelledSet]:
    if name == "scenes":
        tasks = zero_shot_tasks(size=image_size)
        pairs = (list(zip(task.images, task.targets, strict=True)) for task in tasks)
        return [
            LabelledSet(f"zero_shot/{task.name}", task.labels, task.templates, p)
            for task, p in zip(tasks, pairs, strict=True)
        ]
    try:
        folder = load_labelled_folder(Path(name).expanduser())
    except (OSError, ValueError) as error:
        raise UsageError(f"eval.zero_shot: {error}") from error
    return [LabelledSet("zero_shot", folder.labels, folder.templates, folder.samples)]


def _open_pairs(config: Config, image_size: int) -> HeldOutPairs:
    if config.eval.retrieval == "scenes":
        task = retrieval_task(size=image_size)
        return HeldOutPairs(task.images, [[text] for text in task.texts])
    data = replace(config.data, max_samples=config.eval.max_samples)
    try:
        source = open_data(config.eval.retrieval, data, None, image_size)
    except UsageError as error:
        raise UsageError(f"eval.retrieval: {error}") from error
    indices, captions = [], []
    for index in range(len(source)):
        if texts := usable_captions(source, index):
            indices.append(index)
            captions.append(texts)
    if not indices:
        raise UsageError(f"eval.retrieval: {config.eval.retrieval!r} holds no usable pair.")
    return HeldOutPairs(_Images(source, indices), captions)


class _Images(Sequence):
    """Encoded images of a source, read when asked for; an unreadable one is empty bytes."""

    def __init__(self, source: Source, indices: list[int]):
        self.source, self.indices = source, indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, position: int) -> bytes | Image.Image:
        try:
            return self.source[self.indices[position]].image
        except BadSample:
            return b""

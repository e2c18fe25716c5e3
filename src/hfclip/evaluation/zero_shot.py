"""Zero-shot accuracy on a labelled data set.

labels, templates, samples -> embeddings, shared by all ranks -> classifier -> hits -> accuracy
"""

from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..data.samples import BadSample, Sample, Source, say
from ..embeddings import embed
from ..open_image_hfclip import open_image
from ..zero_shot import (
    DEFAULT_TEMPLATES,
    Template,
    ZeroShotClassifier,
    check_labels,
    evaluating,
)
from .data import LabelledFolder, LazyImages, UndecodableImage, load_labelled_folder
from .task import Result


__all__ = [
    "LabelledFolder",
    "LabelledImages",
    "LazyImages",
    "UndecodableImage",
    "load_labelled_folder",
    "zero_shot",
    "zero_shot_accuracy",
]


ROWS = 1024  # images compared with all labels at a time


class LabelledImages(Protocol):
    """Anything with a length that gives `(image, target)` for an index; `target` is the index of a label."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[Any, int]: ...


def zero_shot_accuracy(
    model: nn.Module,
    processor: Any,
    dataset: LabelledImages,
    labels: Iterable[str],
    templates: Iterable[Template] = DEFAULT_TEMPLATES,
    *,
    batch_size: int = 64,
    top_k: Sequence[int] = (1, 5),
    num_workers: int = 0,
    group: dist.ProcessGroup | None = None,
    **embedding,
) -> dict[str, float | int]:
    """Share of images whose label is among the k best of a prompt-ensembled classifier (paper 3.1).

    Every rank of the process group embeds a share of the images on its own copy of the model, so every rank returns the
    same result and every image counts once. Equal scores are ranked in
    the order of the labels, as argmax does; labels may repeat, as in OpenAI's list for ImageNet, and then the later
    one of two can only be found at k = 2.

    Args:
        model: a `HFCLIPModel`; a distributed wrapper is taken off, its mode is restored afterwards.
        processor: a `HFCLIPProcessor`.
        dataset: `(image, target)` pairs, e.g. the samples of [`load_labelled_folder`].
        labels: name of each target.
        templates: see [`ZeroShotClassifier`].
        batch_size: images embedded at a time on each rank.
        top_k: values of k. A k that is not below the number of labels gives 1.
        num_workers: processes a rank that read and preprocess images.
        group: ranks that share the work. Default: all if `torch.distributed` is initialised, else this process.
        embedding: further options of `hfclip.embeddings.embed`; `precision` is "fp32" if it is not given.

    Returns:
        `top<k>` for each k and `mean_per_class_recall` (mean over the classes that occur of their top-1 accuracy),
        fractions in 0..1, over `num_samples` images; `num_skipped` more raised [`UndecodableImage`].

    Raises:
        ValueError: an empty data set or none of its images decodable, a target that is no index of `labels`, k below 1, logits that are not finite,
            and what [`ZeroShotClassifier`] raises.
    """
    if len(dataset) == 0:
        raise ValueError("the data set is empty: expected at least one (image, target).")
    if not top_k or min(top_k) < 1:
        raise ValueError(f"top_k is {tuple(top_k)}: expected values of k of at least 1.")
    labels = check_labels(labels)
    distinct = list(dict.fromkeys(labels))
    classifier = ZeroShotClassifier(model, processor, distinct, templates)
    options = {"batch_size": batch_size, "num_workers": num_workers, "precision": "fp32", "group": group, **embedding}
    found = embed(classifier.model, processor, _Labelled(dataset, len(labels)), what=("images",), **options)
    readable = found.image_embeds.any(axis=1)
    if not readable.any():
        raise ValueError(f"none of the {len(dataset)} images can be decoded: expected at least one.")
    if lost := sorted(set(found.label_ids[~readable]) - {-1, *found.label_ids[readable]}):
        say(f"Not measured, since none of their images can be read: {', '.join(labels[target] for target in lost)}.")
    targets = torch.from_numpy(found.label_ids[readable]).to(classifier.label_embeds.device)
    ranks = _ranks_of_targets(classifier, torch.from_numpy(found.image_embeds[readable]), labels, targets)
    # One row a class: its images, and of those the hits at 1 and at each k.
    counts = torch.zeros(len(labels), 2 + len(top_k), dtype=torch.int64, device=targets.device)
    hits = [torch.ones_like(ranks), ranks < 1, *(ranks < k for k in top_k)]
    counts = counts.index_add_(0, targets, torch.stack(hits, dim=1).long()).cpu()
    occurring = counts[counts[:, 0] > 0].double()
    num_samples, _, *hits = counts.sum(dim=0).tolist()
    return {
        **{f"top{k}": hit / num_samples for k, hit in zip(top_k, hits, strict=True)},
        "mean_per_class_recall": (occurring[:, 1] / occurring[:, 0]).mean().item(),
        "num_samples": num_samples,
        "num_skipped": len(dataset) - num_samples,
    }


def zero_shot(
    model: nn.Module, processor: Any, data: LabelledFolder, *, top_k: Sequence[int] = (1, 5), **options
) -> Result:
    """The task of `zero_shot_accuracy`, on labelled images.

    Args:
        data: what has `labels`, `templates` and `samples`, such as a [`LabelledFolder`].
        top_k: values of k of the accuracy that counts a label among the k best.
        options: of `zero_shot_accuracy`.

    Returns:
        Its fractions, and `unreadable_images` if there are any.
    """
    metrics = zero_shot_accuracy(model, processor, data.samples, data.labels, data.templates, top_k=top_k, **options)
    del metrics["num_samples"]
    num_unreadable = metrics.pop("num_skipped")
    metrics |= {"unreadable_images": num_unreadable} if num_unreadable else {}
    return Result(metrics, headline=f"top{min(top_k)}", protocol={"templates": len(data.templates)})


def _ranks_of_targets(classifier: ZeroShotClassifier, embeds: Tensor, labels: list[str], targets: Tensor) -> Tensor:
    """`(num_images,)`: labels ahead of each image's target. The labels may repeat those of the classifier."""
    columns = torch.tensor([classifier.labels.index(label) for label in labels], device=targets.device)
    ranks = []
    with evaluating(classifier.model) as model:
        for some, targets_of_some in zip(embeds.split(ROWS), targets.split(ROWS), strict=True):
            image_embeds = some.to(targets.device)
            logits = model(image_embeds=image_embeds, text_embeds=classifier.label_embeds).logits_per_image
            ranks.append(_rank_of_target(logits[:, columns], targets_of_some))
    return torch.cat(ranks)


def _rank_of_target(logits: Tensor, targets: Tensor) -> Tensor:
    """`(batch, num_labels)`, `(batch,)` -> `(batch,)`: labels ahead of the target, 0 if it is the best."""
    if not logits.isfinite().all():
        raise ValueError("the model gives logits that are not finite: check its weights, or evaluate in float32.")
    of_target = logits.gather(1, targets[:, None])
    earlier = torch.arange(logits.shape[1], device=logits.device) < targets[:, None]
    return ((logits > of_target) | ((logits == of_target) & earlier)).sum(dim=1)


class _Labelled(Source):
    """Pairs of image and target as samples, without captions."""

    def __init__(self, dataset: LabelledImages, num_labels: int):
        super().__init__()
        self.dataset, self.num_labels, self.length = dataset, num_labels, len(dataset)

    def __getitem__(self, index: int) -> Sample:
        try:
            if isinstance(self.dataset, LazyImages):  # with the class of an image that cannot be decoded
                image, _, _, target = self.dataset.source[index]
            else:
                image, target = self.dataset[index]
        except UndecodableImage as error:
            raise BadSample("unreadable image") from error
        if not 0 <= target < self.num_labels:
            raise ValueError(f"found target {target}: expected 0 to {self.num_labels - 1}, an index of `labels`.")
        return Sample(image if isinstance(image, bytes) else open_image(image), [], str(index), int(target))

    def captions(self, index: int) -> list[str]:
        return []

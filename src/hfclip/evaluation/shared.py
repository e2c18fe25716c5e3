"""What tasks share: embeddings of images alone, and of the sentences that name classes.

Neither knows labels or captions, so that under one `cache_dir` tasks that ask different things of the same images embed
them once, and classifiers of the same names and templates are there already.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal, NamedTuple, Protocol, get_args

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data.samples import BadSample, Sample, Source, say
from ..embeddings import Embeddings, TextList, embed
from ..errors import UsageError
from ..open_image_hfclip import open_image
from ..zero_shot import Template, check_labels, check_templates, check_tokenizer, device_of, fill_template
from .data import LazyImages, UndecodableImage


ROWS = 1024  # images compared with others at a time
Metric = Literal["top1", "mean_per_class_recall", "mean_top1_top5", "roc_auc", "map_11_point"]
SENTENCES = 16  # embedded at a time on a CPU: batches are of one length and filled up, and many lengths are rare


class LabelledImages(Protocol):
    """Anything with a length that gives `(image, target)` for an index; `target` is the index of a label."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[Any, int]: ...


class Images(Source):
    """The images of a source with their keys, without labels and captions."""

    def __init__(self, source: Source):
        super().__init__()
        self.source, self.length = source, len(source)

    def __getitem__(self, index: int) -> Sample:
        return self.source[index]._replace(captions=[], label=None)

    def content(self, index: int) -> Sample:
        return self.source.content(index)._replace(captions=[], label=None)

    def captions(self, index: int) -> list[str]:
        return []


def distinct(words: Iterable[str]) -> list[str]:
    """Words without repetitions, in their order."""
    return list(dict.fromkeys(words))


class Scores(NamedTuple):
    """What labels score against images, in cosines."""

    scores: np.ndarray
    """(num_images, num_labels)."""
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


class Embedded(NamedTuple):
    """The images of a source that can be read, embedded."""

    found: Embeddings
    """Of all images."""
    readable: np.ndarray
    """The indices of those that could be read."""
    targets: np.ndarray
    """(num_readable,) labels, -1 for none; or (num_readable, num_labels), see `metrics.precision_and_recall`."""

    @property
    def embeds(self) -> np.ndarray:
        """(num_readable, dim), float32."""
        return self.found.image_embeds[self.readable].astype(np.float32, copy=False)

    @property
    def keys(self) -> list[str]:
        """Their names within the source."""
        return [self.found.keys[place] for place in self.readable]

    def blocks(self, size: int = ROWS) -> Iterator[np.ndarray]:
        """(at most `size`, dim) embeddings."""
        readable = (self.readable[start : start + size] for start in range(0, len(self.readable), size))
        return (self.found.image_embeds[places] for places in readable)

    def part(self, kept: np.ndarray) -> "Embedded":
        """Some of the images."""
        return self._replace(readable=self.readable[kept], targets=self.targets[kept])

    def compare(self, label_embeds: Tensor) -> Scores:
        """Cosines with labels, (num_labels, dim)."""
        return Scores(self.embeds @ label_embeds.float().cpu().numpy().T, self.targets)


class Prompts(NamedTuple):
    """Embeddings of all sentences that templates make of labels: `embeds[rows[t, l]]` is of template t and label l."""

    embeds: np.ndarray
    rows: np.ndarray
    labels: list[str]
    templates: list[str]

    def of_template(self, number: int) -> Tensor:
        """`(num_labels, dim)` unit embeddings of one template."""
        return torch.from_numpy(self.embeds[self.rows[number]]).float()

    def ensemble(self) -> Tensor:
        """`(num_labels, dim)` means over the templates, again of unit length (paper 3.1.4).

        Raises:
            ValueError: an embedding is not finite.
        """
        total = sum(self.of_template(number).double() for number in range(len(self.rows)))
        if not total.isfinite().all():
            broken = self.labels[(~total.isfinite()).any(dim=1).nonzero()[0].item()]
            raise ValueError(f"the text embedding of label {broken!r} is not finite: the model's weights are damaged.")
        return F.normalize(total, dim=-1).float()


def embed_prompts(
    model: nn.Module, processor: Any, labels: Iterable[str], templates: Iterable[Template], **embedding
) -> Prompts:
    """Embeds each sentence that the templates make of the labels once; processes share the work.

    Args:
        embedding: options of `hfclip.embeddings.embed`. With a `cache_dir` nothing is embedded that is there already,
            by the fingerprint of the weights, the sentences and the tokenizer.

    Raises:
        UsageError: a model without a text tower.
        ValueError, TypeError: see [`ZeroShotClassifier`].
    """
    check_text_tower(model)
    check_tokenizer(model, processor)
    labels, templates = check_labels(labels), check_templates(templates)
    prompts = [[fill_template(template, label) for label in labels] for template in templates]
    embeds, rows = embed_sentences(model, processor, [prompt for row in prompts for prompt in row], **embedding)
    rows = rows.reshape(len(templates), len(labels))
    return Prompts(embeds, rows, labels, [fill_template(template, "{}") for template in templates])


def embed_names(
    model: nn.Module, processor: Any, labels: Sequence[str], templates: Iterable[Template], **embedding
) -> Tensor:
    """(num_labels, dim) classifiers of labels, which may repeat: see `embed_prompts`."""
    return embed_prompts(model, processor, labels, templates, **embedding).ensemble()


def embed_sentences(
    model: nn.Module, processor: Any, sentences: Iterable[str], **embedding
) -> tuple[np.ndarray, np.ndarray]:
    """Embeds sentences that may repeat, each once and without much padding; processes share the work.

    Args:
        embedding: options of `hfclip.embeddings.embed`, but for the size of batches, which is of images.

    Returns:
        `(num_distinct, dim)` unit embeddings, and the row of each sentence.

    Raises:
        UsageError: no sentence, or an empty one.
    """
    numbers: dict[str, int] = {}
    number_of = np.fromiter((numbers.setdefault(sentence, len(numbers)) for sentence in sentences), np.int64)
    texts, blocks = list(numbers), range(0, len(numbers), ROWS)
    tokens = (processor(text=texts[start : start + ROWS], padding=False, truncation=True) for start in blocks)
    order = np.argsort([len(ids) for block in tokens for ids in block["input_ids"]], kind="stable")
    row_of = np.argsort(order)
    batch_size = SENTENCES if device_of(model).type == "cpu" else None
    options = {"precision": "fp32", **embedding, "num_workers": 0, "batch_size": batch_size}
    found = embed(model, processor, _ByLength([texts[number] for number in order]), what=("texts",), **options)
    return found.text_embeds, row_of[number_of]


def embed_readable(
    model: nn.Module, processor: Any, source: Source, targets: np.ndarray | None = None, **embedding
) -> Embedded:
    """Embeds the images of a source, and leaves out those that cannot be read.

    Args:
        targets: of all images, of one label or several. None: the labels of the source.
        embedding: options of `hfclip.embeddings.embed`; `precision` is "fp32" if it is not given.

    Raises:
        UsageError: none can be read, or embeddings are not finite.
    """
    if targets is None:
        labels = [source.label(place) for place in range(len(source))]
        targets = np.array([-1 if label is None else label for label in labels], np.int64)
    return _readable(_embed(model, processor, Images(source), **embedding), targets, source.labels)


def embed_labelled(
    model: nn.Module, processor: Any, dataset: LabelledImages, labels: Sequence[str], **embedding
) -> Embedded:
    """Embeds labelled images, whatever their labels are: see `shared`.

    Args:
        dataset: pairs of image and target; or, where it has `targets` as `LazyImages` may have them, several labels.
        embedding: options of `hfclip.embeddings.embed`.

    Raises:
        ValueError: see `zero_shot_accuracy`.
    """
    if len(dataset) == 0:
        raise ValueError("the data set is empty: expected at least one (image, target).")
    if isinstance(dataset, LazyImages):
        source, targets = dataset.source, dataset.targets
        if targets is None:
            targets = np.array([_checked(source.label(place), len(labels)) for place in range(len(source))])
        return embed_readable(model, processor, source, targets, **embedding)
    found = _embed(model, processor, _Pairs(dataset, len(labels)), **embedding)
    return _readable(found, found.label_ids, labels)


def _embed(model: nn.Module, processor: Any, source: Source, **embedding) -> Embeddings:
    return embed(model, processor, source, what=("images",), **{"precision": "fp32", **embedding})


def _readable(found: Embeddings, targets: np.ndarray, labels: Sequence[str] | None) -> Embedded:
    """What can be read, with a word for the user on classes of which nothing can."""
    is_readable = found.image_embeds.any(axis=1)
    if not is_readable.any():
        raise UsageError(f"none of the {len(found)} images can be decoded: expected at least one.")
    if targets.ndim == 1 and (lost := sorted(set(targets[~is_readable]) - {-1, *targets[is_readable]})):
        say(f"Not measured, since none of their images can be read: {', '.join(labels[target] for target in lost)}.")
    images = Embedded(found, np.flatnonzero(is_readable), targets[is_readable])
    if not all(np.isfinite(block).all() for block in images.blocks()):
        raise UsageError("the model gives embeddings that are not finite: check its weights, or evaluate in float32.")
    return images


def check_metric(metric: Metric | None, labels: Sequence[str], targets: np.ndarray | None) -> Metric:
    """The metric, or the usual one for None: top-1 accuracy, or 11-point mAP where images have several labels.

    Args:
        targets: rows of labels, None where each image has one.

    Raises:
        UsageError: the data do not allow it.
    """
    metric = metric or ("map_11_point" if targets is not None else "top1")
    if metric not in get_args(Metric):
        raise UsageError(f"metric: found {metric!r}, expected one of {', '.join(get_args(Metric))}.")
    if (metric == "map_11_point") != (targets is not None):
        found = "one label per image" if targets is None else "several labels per image"
        raise UsageError(f"metric: found {metric!r} for data with {found}, expected another one, or none given.")
    if metric == "roc_auc" and len(labels) != 2:
        raise UsageError(f"metric: found 'roc_auc' for {len(labels)} classes, expected data of two.")
    return metric


def check_text_tower(model: nn.Module) -> None:
    """Refuses a model that embeds no text."""
    if not hasattr(model, "get_text_features"):
        raise UsageError(
            f"found a {type(model).__name__}, which has no text tower; expected a model of images and texts, such as "
            "HFCLIPModel, to compare images with words. Without text there is the linear probe."
        )


class _ByLength(TextList):
    """Texts in the order of their lengths: neighbours make a batch."""

    width = 2


def _checked(target: int | None, num_labels: int) -> int:
    if target is None or not 0 <= target < num_labels:
        raise ValueError(f"found target {target}: expected 0 to {num_labels - 1}, an index of `labels`.")
    return int(target)


class _Pairs(Source):
    """Pairs of image and target as samples, without captions."""

    def __init__(self, dataset: LabelledImages, num_labels: int):
        super().__init__()
        self.dataset, self.num_labels, self.length = dataset, num_labels, len(dataset)

    def __getitem__(self, index: int) -> Sample:
        try:
            image, target = self.dataset[index]
        except UndecodableImage as error:
            raise BadSample("unreadable image") from error
        image = image if isinstance(image, bytes) else open_image(image)
        return Sample(image, [], str(index), _checked(target, self.num_labels))

    def captions(self, index: int) -> list[str]:
        return []

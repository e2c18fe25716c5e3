"""Zero-shot accuracy on a labelled data set, and reading of labelled folders.

folder -> labels, templates, samples -> classifier -> hits of this rank's share -> one sum over ranks -> accuracy
"""

import tarfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import PIL.Image
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from transformers.utils.logging import tqdm

from ..image_processing_hfclip import open_image
from ..zero_shot import DEFAULT_TEMPLATES, Template, ZeroShotClassifier, check_labels, check_templates


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
) -> dict[str, float | int]:
    """Share of images whose label is among the k best of a prompt-ensembled classifier (paper 3.1).

    Every rank of the process group evaluates the images [rank::world_size] on its own copy of the model, and one sum
    joins the counts, so every rank returns the same result and every image counts once. Equal scores are ranked in
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
    rank, world_size = 0, 1
    if dist.is_available() and dist.is_initialized():
        rank, world_size = dist.get_rank(group), dist.get_world_size(group)
    share = _Share(dataset, range(rank, len(dataset), world_size))
    loader = DataLoader(share, batch_size, num_workers=num_workers, collate_fn=_Collate(processor, len(labels)))

    distinct = list(dict.fromkeys(labels))
    classifier = ZeroShotClassifier(model, processor, distinct, templates)
    columns = torch.tensor([distinct.index(label) for label in labels], device=classifier.model.device)
    # One row a class: its images, and of those the hits at 1 and at each k. Integers, so sums have no order.
    counts = torch.zeros(len(labels), 2 + len(top_k), dtype=torch.int64, device=columns.device)
    for batch in tqdm(loader, desc="Zero-shot accuracy", disable=None if rank == 0 else True):
        if batch is None:
            continue
        pixel_values, targets = map(torch.from_numpy, batch)
        targets = targets.to(columns.device)
        ranks = _rank_of_target(classifier.logits(pixel_values=pixel_values)[:, columns], targets)
        hits = [torch.ones_like(ranks), ranks < 1, *(ranks < k for k in top_k)]
        counts.index_add_(0, targets, torch.stack(hits, dim=1).long())
    if world_size > 1:
        dist.all_reduce(counts, group=group)

    counts = counts.cpu()
    if not counts.any():
        raise ValueError(f"none of the {len(dataset)} images can be decoded: expected at least one.")
    occurring = counts[counts[:, 0] > 0].double()
    num_samples, _, *hits = counts.sum(dim=0).tolist()
    return {
        **{f"top{k}": hit / num_samples for k, hit in zip(top_k, hits, strict=True)},
        "mean_per_class_recall": (occurring[:, 1] / occurring[:, 0]).mean().item(),
        "num_samples": num_samples,
        "num_skipped": len(dataset) - num_samples,
    }


def _rank_of_target(logits: Tensor, targets: Tensor) -> Tensor:
    """`(batch, num_labels)`, `(batch,)` -> `(batch,)`: labels ahead of the target, 0 if it is the best."""
    if not logits.isfinite().all():
        raise ValueError("the model gives logits that are not finite: check its weights, or evaluate in float32.")
    of_target = logits.gather(1, targets[:, None])
    earlier = torch.arange(logits.shape[1], device=logits.device) < targets[:, None]
    return ((logits > of_target) | ((logits == of_target) & earlier)).sum(dim=1)


class UndecodableImage(ValueError):
    """An image that an evaluation leaves out and counts."""


class _Share(Dataset):
    """The samples at `indices`; None in the place of one that cannot be decoded."""

    def __init__(self, dataset: LabelledImages, indices: range):
        self.dataset, self.indices = dataset, indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> tuple[Any, int] | None:
        try:
            return self.dataset[self.indices[index]]
        except UndecodableImage:
            return None


class _Collate:
    """`(image, target)` pairs -> `(batch, channels, height, width)` pixel values and `(batch,)` targets.

    Samples that are None are left out; a batch of nothing else is None. Both are arrays, which workers send through a
    pipe: tensors would go through /dev/shm, of which containers have 64 MB.
    """

    def __init__(self, processor: Any, num_labels: int):
        self.processor = processor
        self.num_labels = num_labels

    def __call__(self, samples: list[tuple[Any, int] | None]) -> tuple[np.ndarray, np.ndarray] | None:
        decoded = [sample for sample in samples if sample is not None]
        if not decoded:
            return None
        images, targets = zip(*decoded, strict=True)
        outside = [target for target in targets if not 0 <= target < self.num_labels]
        if outside:
            raise ValueError(f"found target {outside[0]}: expected 0 to {self.num_labels - 1}, an index of `labels`.")
        pixel_values = self.processor(images=list(images), return_tensors="pt")["pixel_values"]
        return pixel_values.numpy(), np.array(targets)


class _Entry(NamedTuple):
    """Where the bytes of one image lie: a whole file, or a part of a tar file."""

    name: str
    target: int
    path: Path
    offset: int = 0
    size: int = -1


class LazyImages(Sequence):
    """`(PIL image, target)` pairs, read and decoded when asked for. Safe to share with worker processes.

    Raises UndecodableImage with the name of an image that cannot be decoded.
    """

    def __init__(self, entries: Sequence[_Entry]):
        self.entries = entries

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> tuple[PIL.Image.Image, int]:
        entry = self.entries[index]
        with open(entry.path, "rb") as file:
            file.seek(entry.offset)
            data = file.read(entry.size)
        try:
            return open_image(data), entry.target
        except ValueError as error:
            raise UndecodableImage(f"{entry.name} cannot be decoded: {error}") from error


class LabelledFolder(NamedTuple):
    """`labels[target]` names the target of a sample; `templates` are those of the folder or the default."""

    labels: list[str]
    templates: list[str]
    samples: LazyImages


IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".pgm"}
SHARD_IMAGE_SUFFIXES = {"jpg", "jpeg", "png", "webp"}
CLASSNAMES_FILE = "classnames.txt"
TEMPLATES_FILE = "zeroshot_classification_templates.txt"


def load_labelled_folder(path: str | Path) -> LabelledFolder:
    """Labels, templates and samples of a folder in one of two layouts; images are not opened yet.

    - WebDataset as clip-benchmark publishes it: uncompressed tars, in which each image `<key>.jpg|png|webp` has a
      `<key>.cls` with the index of its label. `classnames.txt` is required.
    - A folder a class with images anywhere below it. Targets count the folders in alphabetical order; labels are the
      lines of `classnames.txt`, or else the folders' names with underscores read as spaces.

    `classnames.txt` (a label a line) and `zeroshot_classification_templates.txt` (a template a line, `{c}` for the
    label; empty lines do not count) are looked for in `path`, then in the folder above, which holds them for all splits. Samples come in the
    order of shards (numerically) and members, or of paths.

    Raises:
        FileNotFoundError: `path` does not exist.
        ValueError: neither layout, files that do not fit together, damaged shards, empty labels, a template without
            placeholder.
    """
    path = Path(path)
    if not path.is_dir():
        raise FileNotFoundError(
            f"{path} is not a folder: expected one with .tar shards or a subfolder for each class."
        )
    shards = sorted(path.glob("*.tar"), key=lambda shard: (len(shard.stem), shard.stem))
    class_folders = sorted(folder for folder in path.iterdir() if folder.is_dir() and not folder.name.startswith("."))
    labels = _lines_of(path, CLASSNAMES_FILE)
    if shards:
        entries = _shard_entries(path, shards, labels)
    elif class_folders:
        entries, labels = _class_folder_entries(path, class_folders, labels)
    else:
        raise ValueError(f"{path} holds neither .tar shards nor subfolders: expected shards or a subfolder a class.")
    templates = [line for line in _lines_of(path, TEMPLATES_FILE) if line] or DEFAULT_TEMPLATES
    return LabelledFolder(check_labels(labels), check_templates(templates), LazyImages(entries))


def _lines_of(path: Path, name: str) -> list[str]:
    """Lines of the file `name` in `path` or above it, without spaces around them; none if there is no such file.

    Empty lines stay but for those at the end: targets count lines, so that a label left out would shift the others.
    """
    for folder in (path, path.resolve().parent):
        if (folder / name).is_file():
            return [line.strip() for line in (folder / name).read_text(encoding="utf-8").rstrip().splitlines()]
    return []


def _class_folder_entries(path: Path, folders: list[Path], labels: list[str]) -> tuple[list[_Entry], list[str]]:
    entries = [
        _Entry(str(file), target, file)
        for target, folder in enumerate(folders)
        for file in sorted(folder.rglob("*"))
        if file.suffix.lower() in IMAGE_SUFFIXES and not file.name.startswith(".")
    ]
    if not entries:
        splits = [str(folder) for folder in folders if any(folder.glob("*.tar"))]
        remedy = f"Give one of its splits: {', '.join(splits)}." if splits else "Expected a subfolder a class."
        raise ValueError(f"{path} holds no images below its {len(folders)} subfolders. {remedy}")
    if labels and len(labels) != len(folders):
        raise ValueError(
            f"{CLASSNAMES_FILE} has {len(labels)} lines but {path} {len(folders)} subfolders: expected as many."
        )
    return entries, labels or [folder.name.replace("_", " ") for folder in folders]


def _shard_entries(path: Path, shards: list[Path], labels: list[str]) -> list[_Entry]:
    if not labels:
        raise ValueError(f"{path} has .tar shards but no {CLASSNAMES_FILE}, in it or above: expected a label a line.")
    declared = path / "nshards.txt"
    if declared.is_file() and int(declared.read_text()) != len(shards):
        raise ValueError(
            f"{path} has {len(shards)} shards, but nshards.txt says {declared.read_text().strip()}: fetch them all."
        )
    entries = [entry for shard in shards for entry in _entries_of(shard)]
    outside = [entry for entry in entries if not 0 <= entry.target < len(labels)]
    if outside:
        entry = outside[0]
        raise ValueError(
            f"{entry.name} has class {entry.target}: expected 0 to {len(labels) - 1}, a line of {CLASSNAMES_FILE}."
        )
    return entries


def _entries_of(shard: Path) -> list[_Entry]:
    """Images of one shard in the order of the file. A sample's key is its name up to the first dot."""
    images: dict[str, tarfile.TarInfo] = {}
    targets: dict[str, int] = {}
    try:
        with tarfile.open(shard, "r:") as tar:
            for member in filter(tarfile.TarInfo.isfile, tar):
                folder, slash, file = member.name.rpartition("/")
                stem, _, suffix = file.partition(".")
                if suffix.lower() in SHARD_IMAGE_SUFFIXES:
                    images[folder + slash + stem] = member
                elif suffix.lower() == "cls":
                    targets[folder + slash + stem] = int(tar.extractfile(member).read())
            # tarfile takes a shard that was cut between two members for a shorter one.
            tar.fileobj.seek(tar.offset)
            if tar.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise tarfile.ReadError("it ends without the block of zeros that closes a tar file")
    except (tarfile.TarError, ValueError) as error:
        raise ValueError(f"{shard} cannot be read ({type(error).__name__}: {error}): fetch it again.") from error
    halves = sorted(images.keys() ^ targets.keys())
    if halves:
        raise ValueError(
            f"{shard}: {len(halves)} samples have an image or a .cls file but not both, the first is {halves[0]!r}."
        )
    return [
        _Entry(f"{shard}/{image.name}", targets[key], shard, image.offset_data, image.size)
        for key, image in images.items()
    ]

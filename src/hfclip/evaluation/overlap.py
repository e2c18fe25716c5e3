"""Overlap of evaluation data with training data, and what it does to accuracy (paper section 5, figure 17, appendix C).

    evaluation images -> embeddings, in memory
    training images, streamed once: a block of embeddings at a time -> the most similar one of each evaluation image
    similarity >= threshold -> overlap, else clean -> accuracies of both, tests, a list of the clean images

What is similar is the detector's to say: the model itself, any other hfclip folder (trained for this with augmentations,
as the paper's is), or "phash", a perceptual hash. A threshold is set by looking at pairs around it (`pairs.png`), anew
for each data set; the training data are not read again for that.
"""

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ..data.contact_sheet import draw_pairs
from ..data.samples import Source, decoding
from ..data.sources import open_source
from ..embeddings import embed
from ..embeddings.processes import Processes
from ..errors import UsageError, as_usage_error
from ..image_processing_hfclip import HFCLIPImageProcessor
from ..open_image_hfclip import open_image
from ..zero_shot import device_of
from .data import Data, File, LabelledFolder, Part, digest_of_data
from .plots import draw
from .shared import embed_names, embed_readable
from .task import Plot, Result


BLOCK = 16_384  # training images whose embeddings are in memory at a time
ROWS = 1024  # evaluation images compared with a block at a time
CONFIDENCE = 0.995  # of the interval, and
ALPHA = 0.05  # the level of the test, as in the paper
NUM_PAIRS = 24  # on a contact sheet


# ---------------------------------------------------------------------------------------------------------------------
# Detection
# ---------------------------------------------------------------------------------------------------------------------


class Nearest(NamedTuple):
    """The training image that is most similar to each evaluation image: its cosine, and its place in the source."""

    similarity: np.ndarray
    index: np.ndarray


def find_nearest(
    model: nn.Module, processor: Any, queries: np.ndarray, training: Source, *, block: int = BLOCK, **embedding
) -> Nearest:
    """Exact nearest neighbours of embeddings among the images of a source, each of which is read once.

    Processes of torch.distributed share the blocks, and all return the same.

    Args:
        model, processor: the detector.
        queries: (num_images, dim), unit embeddings of the detector.
        block: training images whose embeddings are in memory at a time.
        embedding: options of `hfclip.embeddings.embed`; nothing is stored.
    """
    processes, device = Processes.find(None, False), device_of(model)
    embedding = {"precision": "fp32", **embedding, "cache_dir": None, "alone": True}
    queries = torch.from_numpy(np.ascontiguousarray(queries, np.float32)).to(device)
    best = torch.full((len(queries),), -torch.inf, device=device)
    place = torch.full((len(queries),), -1, dtype=torch.int64, device=device)
    for start in range(processes.rank * block, len(training), processes.size * block):
        part = Part(training, range(start, min(start + block, len(training))))
        found = embed(model, processor, part, what=("images",), **embedding).image_embeds
        value, nearest = _best_of(queries, torch.from_numpy(np.asarray(found, np.float32)).to(device))
        better = value > best
        best, place = torch.where(better, value, best), torch.where(better, nearest + start, place)
    parts = processes.gather((best.cpu().numpy(), place.cpu().numpy()))
    similarity, index = (np.stack(arrays) for arrays in zip(*parts, strict=True))
    # The first of equals, whatever process has found it.
    first = np.lexsort((index, -similarity), axis=0)[0]
    columns = np.arange(len(first))
    return Nearest(similarity[first, columns], index[first, columns])


def _best_of(queries: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """The largest product of each query with the rows, and the row; those of zeros could not be read."""
    unreadable = ~rows.any(dim=1)
    values, places = [], []
    for some in queries.split(ROWS):
        value, place = (some @ rows.T).masked_fill_(unreadable, -torch.inf).max(dim=1)
        values.append(value)
        places.append(place)
    return torch.cat(values), torch.cat(places)


class PerceptualHash(nn.Module):
    """A detector without weights: 64 signs of the low frequencies of an image of 32 x 32 grey pixels.

    The cosine of two hashes is 1 - d / 32, where d counts the bits in which they differ.
    """

    SIDE, BITS = 32, 8

    def __init__(self):
        super().__init__()
        angles = math.pi * torch.outer(torch.arange(self.BITS), torch.arange(self.SIDE) + 0.5) / self.SIDE
        self.register_buffer("waves", torch.cos(angles.double()))
        self.register_buffer("grey", torch.tensor([0.299, 0.587, 0.114]).double())
        self.logit_scale = nn.Parameter(torch.zeros(()), requires_grad=False)
        self.device, self.dtype = torch.device("cpu"), torch.float32

    @classmethod
    def with_processor(cls) -> tuple["PerceptualHash", HFCLIPImageProcessor]:
        size = {"height": cls.SIDE, "width": cls.SIDE}
        return cls(), HFCLIPImageProcessor(size=size, do_center_crop=False, do_normalize=False)

    def encode_image(self, pixel_values: Tensor, normalize: bool = False) -> Tensor:
        """(batch, 3, 32, 32) -> (batch, 64) of -1 and 1, or of unit length."""
        pixels = torch.einsum("bchw,c->bhw", pixel_values.double(), self.grey)
        waves = (self.waves @ pixels @ self.waves.T).flatten(1)
        signs = torch.where(waves > waves.median(dim=1, keepdim=True).values, 1.0, -1.0)
        return signs / self.BITS if normalize else signs


# ---------------------------------------------------------------------------------------------------------------------
# Statistics
# ---------------------------------------------------------------------------------------------------------------------


def overlap_statistics(hits: np.ndarray, is_overlap: np.ndarray, num_data_sets: int = 1) -> dict[str, float]:
    """What the images that overlap do to accuracy.

    Args:
        hits: whether each image was classified rightly.
        is_overlap: whether each is in the training data, too.
        num_data_sets: tested together, by which Bonferroni's correction divides the level of 5 %.

    Returns:
        `top1`, `clean_top1`, `overlap_top1`; `gain`, the first minus the second, the paper's measure; `p_value` that as many
        hits or more come by the clean accuracy (one-sided binomial test); `overlap_top1_low` and `_high`, the Clopper-Pearson
        interval of 99.5 %; `is_significant`, 0 or 1. Those of the overlap are left out where there is none.

    Raises:
        UsageError: no image is clean, lengths differ, or scipy is missing.
    """
    try:
        from scipy.stats import binomtest
    except ImportError as error:
        raise UsageError("The tests are scipy's: `pip install 'hfclip[evaluate]'`.") from error
    hits, is_overlap = np.asarray(hits, bool), np.asarray(is_overlap, bool)
    if hits.shape != is_overlap.shape or hits.ndim != 1 or is_overlap.all():
        raise UsageError(
            f"found {int(is_overlap.sum())} images of overlap among {len(hits)}, expected some that are clean: raise the "
            "threshold."
        )
    clean, number = float(hits[~is_overlap].mean()), int(is_overlap.sum())
    result = {"top1": float(hits.mean()), "clean_top1": clean, "overlap": number / len(hits), "overlap_images": number}
    result["gain"] = result["top1"] - clean
    if number:
        right = int(hits[is_overlap].sum())
        low, high = binomtest(right, number).proportion_ci(CONFIDENCE, method="exact")
        p_value = float(binomtest(right, number, clean, alternative="greater").pvalue)
        result |= {"overlap_top1": right / number, "overlap_top1_low": float(low), "overlap_top1_high": float(high)}
        result |= {"p_value": p_value, "is_significant": float(p_value < ALPHA / num_data_sets)}
    return result


# ---------------------------------------------------------------------------------------------------------------------
# Task
# ---------------------------------------------------------------------------------------------------------------------


def overlap(
    model: nn.Module,
    processor: Any,
    data: LabelledFolder,
    *,
    training: Data | None = None,
    threshold: float | None = None,
    detector: File | None = None,
    folder: str | None = None,
    num_data_sets: int = 1,
    **embedding,
) -> Result:
    """Zero-shot accuracy on images that are in the training data, too, and on those that are not.

    Args:
        training: what the model was trained on, by any name that `hfclip.data.open_source` reads.
        threshold: cosine from which on an image counts as one of the training data.
        detector: a model folder, or "phash", whose cosine is 1 - d / 32 for d bits of 64. None: the model itself.
        folder: of `pairs.png`, pairs around the threshold to look at; `clean.txt`, the keys of the clean images; and
            `nearest.npz`, so that another threshold does not read the training data again.
        num_data_sets: that are tested together, for Bonferroni's correction (35 in the paper).

    Returns:
        What `overlap_statistics` measures; arrays "similarity" and "nearest", the place of the most similar training image.
    """
    if training is None or threshold is None or not -1 <= threshold <= 1:
        raise UsageError(
            f"overlap: training is {training} and threshold {threshold}, expected the name of the training data and a cosine "
            "from -1 to 1."
        )
    if num_data_sets < 1:
        raise UsageError(f"num_data_sets is {num_data_sets}, expected 1 or more.")
    source, of_training = data.samples.source, open_source(training, require_captions=False)
    images = embed_readable(model, processor, source, **embedding)
    found = images.compare(embed_names(model, processor, data.labels, data.templates, **embedding))
    nearest = _nearest(model, processor, source, images, of_training, (training, detector), folder, embedding)
    is_overlap = nearest.similarity >= threshold
    metrics = overlap_statistics(found.hits, is_overlap, num_data_sets)
    if folder is not None and Processes.find(None, False).rank == 0:
        (Path(folder) / "clean.txt").write_text(
            "".join(f"{key}\n" for key, both in zip(images.keys, is_overlap, strict=True) if not both),
            encoding="utf-8",
        )
        draw_pairs(Path(folder) / "pairs.png", list(_pairs(source, images.readable, of_training, nearest, threshold)))
    return Result(
        metrics,
        headline="overlap",
        arrays={"similarity": nearest.similarity, "nearest": nearest.index},
        protocol={"training": training, "detector": detector or "the model", "threshold": threshold},
        notes=["The threshold decides what counts as overlap: look at pairs around it, for each data set."],
    )


def _nearest(
    model: nn.Module,
    processor: Any,
    source: Source,
    images: Any,
    training: Source,
    names: tuple[str, str | None],
    folder: str | None,
    embedding: dict,
) -> Nearest:
    """The neighbours, from an earlier run in `folder` if it had the same training data and embeddings to compare."""
    queries = images.embeds
    if names[1] is not None:
        model, processor = _open_detector(names[1], device_of(model))
        embedding = {name: value for name, value in embedding.items() if name != "cache_dir"}
        queries = embed_readable(model, processor, source, **embedding).embeds
    about = f"{digest_of_data(names[0])} {len(training)} {names[1]}".encode() + queries.tobytes()
    about, path = hashlib.sha256(about).hexdigest(), None if folder is None else Path(folder, "nearest.npz")
    if path is not None and path.is_file():
        with as_usage_error(path), np.load(path) as stored:
            if str(stored["about"]) == about:
                return Nearest(stored["similarity"], stored["index"])
    nearest = find_nearest(model, processor, queries, training, **embedding)
    if path is not None and Processes.find(None, False).rank == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez(path, about=about, **nearest._asdict())
    return nearest


def _open_detector(name: str, device: torch.device) -> tuple[nn.Module, Any]:
    if name == "phash":
        return PerceptualHash.with_processor()
    from .running import open_model

    model, processor, _ = open_model(name, "detector")
    return model.to(device), processor


def _pairs(
    source: Source, places: np.ndarray, training: Source, nearest: Nearest, threshold: float
) -> Iterator[tuple[Any, Any, str, bool]]:
    """Evaluation image, training image, words and whether they count as the same, around the threshold."""
    wanted = np.argsort(np.abs(nearest.similarity - threshold), kind="stable")[:NUM_PAIRS]
    for number in sorted(wanted, key=lambda number: -nearest.similarity[number]):
        similarity, sample = float(nearest.similarity[number]), training[int(nearest.index[number])]
        pair = []
        for image in (source[int(places[number])].image, sample.image):
            with decoding(image):
                pair.append(open_image(image))
        yield *pair, f"{similarity:.3f}  {sample.key}", similarity >= threshold


def overlap_summary(
    model: None, processor: None, data: Sequence[Mapping[str, Any]], *, figure: str | None = None
) -> Result:
    """What the paper says of all its data sets together, from stored results of "overlap".

    Args:
        figure: file that the gains are drawn into (figure 17); its ending says how (.png, .svg).

    Returns:
        Median and mean overlap, how many data sets have none, how many accuracies moved by more than 0.1 points, and how
        many did significantly, by Bonferroni's correction for the number of data sets.
    """
    rows = [{"name": result["data"][0]["name"], **result["metrics"]} for result in data if result["task"] == "overlap"]
    if not rows:
        raise UsageError("overlap-summary: found no result of overlap, expected one for each data set.")
    shares = np.array([row["overlap"] for row in rows])
    metrics = {
        "data_sets": len(rows),
        "data_sets_without_overlap": int((shares == 0).sum()),
        "median_overlap": float(np.median(shares)),
        "mean_overlap": float(shares.mean()),
        "significant": sum(row.get("p_value", 1) < ALPHA / len(rows) for row in rows),
        "moved_by_0.1_points": sum(abs(row["gain"]) > 0.001 for row in rows),
        "largest_gain": float(max(row["gain"] for row in rows)),
    }
    for row in rows:
        row["significance"] = next((words for level, words in LEVELS if row.get("p_value", 1) < level), "p >= 0.05")
    tables = {"overlap": rows, "accuracies": [_against_clean(row) for row in rows if "p_value" in row]}
    style = {"series": "significance", "kind": "scatter", "x_label": "share of the images that overlap"}
    gain = Plot("overlap", "overlap", "gain", label="name", title="Accuracy on all minus on clean images", **style)
    words = {"title": "Accuracy on overlap minus on clean images", "error": ("low", "high")}
    plots = [gain, Plot("accuracies", "overlap", "difference", **words, **style)]
    if figure is not None and draw(gain, tables, figure) is None:
        raise UsageError("overlap-summary: found no data set to draw, expected at least one.")
    return Result(metrics, headline="mean_overlap", tables=tables, plots=plots)


LEVELS = ((1e-3, "p < 0.001"), (0.05, "p < 0.05"))


def _against_clean(row: Mapping[str, Any]) -> dict[str, Any]:
    """Accuracy on the overlap of a data set beside that on its clean images, with the interval (figure 17)."""
    ends = {"difference": "overlap_top1", "low": "overlap_top1_low", "high": "overlap_top1_high"}
    differences = {name: row[column] - row["clean_top1"] for name, column in ends.items()}
    return {**{name: row[name] for name in ("name", "overlap", "significance")}, **differences}

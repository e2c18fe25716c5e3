"""Frames of videos that are alike, and whether a classifier is right on all of them (paper 3.3, table 16).

The data are a folder of frames with `labels.json`, `{frame: [right classes]}`, and `pmsets.json`, `{anchor: [frames
near it]}`, in it or in its `metadata`, as ImageNet-Vid-Robust has them. pm-0 is the share of anchors that are right,
pm-k that of anchors that are right with all their frames, of which there are k before and k after.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from ..data.image_list import ImageList
from ..errors import UsageError, as_usage_error
from .data import DataSet, File
from .robustness import members_by_map, read_class_map, restrict
from .shared import embed_names, embed_readable
from .task import Result


def frames(
    model: nn.Module,
    processor: Any,
    data: Sequence[DataSet],
    *,
    class_map: File | None = None,
    **embedding,
) -> Result:
    """Accuracy on anchor frames of videos (pm-0), and on anchors with all frames near them (pm-10; paper table 16).

    Args:
        data: the reference, whose classes the classifier has, and a folder of frames with `labels.json` and
            `pmsets.json`.
        class_map: JSON file or folder of metadata that gives each class, by its number, its classes of the reference.

    Returns:
        `pm0` and `pmk`, and `unreadable_images`, which count as wrong, if there are any.
    """
    if len(data) != 2 or class_map is None:
        raise UsageError(
            f"frames: found {len(data)} data sets and {'no' if class_map is None else 'a'} class_map, expected the "
            "reference, a folder of frames, and a class_map."
        )
    data[1].refuse_parts()
    reference, folder = data[0].labelled(), Path(data[1].places.get(None, ""))
    labels, sets = _read_frames(folder)
    mapping = read_class_map(class_map)
    with as_usage_error(f"{class_map} (classes of frames are numbers)"):
        count = 1 + max(map(int, [*mapping, *(number for many in labels.values() for number in many)]))
    numbers = [str(number) for number in range(count)]
    members = members_by_map(data[1].name, numbers, reference.labels, mapping)
    label_embeds = embed_names(model, processor, reference.labels, reference.templates, **embedding)
    needed = sorted({*sets, *(frame for near in sets.values() for frame in near)})
    images = ImageList([folder / frame for frame in needed])
    found = embed_readable(model, processor, images, **embedding)
    scores = restrict(found.compare(label_embeds).scores, members)
    best = dict.fromkeys(needed, -1) | {
        needed[place]: of.argmax() for place, of in zip(found.readable, scores, strict=True)
    }
    anchors, whole = pm_accuracy(best, labels, sets)
    unreadable = len(needed) - len(found.readable)
    metrics = {"pm0": anchors, "pmk": whole} | ({"unreadable_images": unreadable} if unreadable else {})
    return Result(
        metrics,
        headline="pmk",
        protocol={"anchors": len(sets), "frames": len(needed), "score of a class": "maximum over its members"},
    )


def pm_accuracy(
    best: Mapping[str, int], labels: Mapping[str, Sequence[int]], sets: Mapping[str, Sequence[str]]
) -> tuple[float, float]:
    """Share of anchors that are right, and of those that are right with all frames near them.

    Args:
        best: the class that each frame is taken for.
        labels: right classes of frames; a frame without any has its anchor's.
        sets: the frames near each anchor.
    """
    right, whole = [], []
    for anchor, near in sets.items():
        right.append(best[anchor] in labels[anchor])
        whole.append(right[-1] and all(best[frame] in labels.get(frame, labels[anchor]) for frame in near))
    return float(np.mean(right)), float(np.mean(whole))


def _read_frames(folder: Path) -> tuple[dict[str, list[int]], dict[str, list[str]]]:
    found = []
    for name in ("labels.json", "pmsets.json"):
        place = next((place for place in (folder / name, folder / "metadata" / name) if place.is_file()), None)
        if place is None:
            raise UsageError(
                f"{folder} has no {name}, neither in it nor in its metadata, expected a folder of frames."
            )
        with as_usage_error(place):
            found.append(json.loads(place.read_text(encoding="utf-8")))
    labels, sets = found
    if without := [anchor for anchor in sets if not labels.get(anchor)] or (["any"] if not sets else []):
        raise UsageError(f"{folder}: found no label for the anchor {without[0]}, expected one of each in labels.json.")
    return labels, sets

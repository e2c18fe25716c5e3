"""Zero-shot classification of videos by their middle frame, or by the mean of several frames (paper table 15)."""

from typing import Any

import numpy as np
import torch
from torch import nn

from ..data.files import read_lines
from ..data.videos import VideoFrames
from ..errors import UsageError
from ..zero_shot import DEFAULT_TEMPLATES, check_templates
from . import metrics
from .data import TEMPLATES_FILE, DataSet
from .shared import embed_names, embed_readable
from .task import Result


def video(model: nn.Module, processor: Any, data: DataSet, *, num_frames: int = 1, **embedding) -> Result:
    """Zero-shot accuracy on videos in class folders: see `hfclip.data.videos`.

    Args:
        num_frames: of each video, at equal distances, whose embeddings are averaged. 1: the middle frame.

    Returns:
        `top1`, `top5` and `mean_top1_top5`, the metric of Kinetics; `unreadable_videos`, of which no frame could be read,
        if there are any.
    """
    data.refuse_parts()
    source = VideoFrames(data.where(), num_frames)
    templates = [line for line in read_lines(source.folder, TEMPLATES_FILE) or () if line] or DEFAULT_TEMPLATES
    label_embeds = embed_names(model, processor, source.labels, check_templates(templates), **embedding)
    found = embed_readable(model, processor, source, **embedding)
    videos, first, owner = np.unique(found.readable // num_frames, return_index=True, return_inverse=True)
    scores = torch.from_numpy(mean_of_frames(found.embeds, owner)) @ label_embeds.T
    ranks = metrics.rank_of_target(scores, torch.from_numpy(found.targets[first]))
    measured = {f"top{k}": metrics.top_k_accuracy(ranks, k) for k in (1, 5)}
    measured["mean_top1_top5"] = metrics.mean_of_top1_and_top5(ranks)
    lost = len(source.videos) - len(videos)
    return Result(
        measured | ({"unreadable_videos": lost} if lost else {}),
        headline="top1",
        protocol={"frames": "middle" if num_frames == 1 else f"mean of {num_frames}", "templates": list(templates)},
    )


def mean_of_frames(embeds: np.ndarray, owner: np.ndarray) -> np.ndarray:
    """Unit means, (num_videos, dim), of the unit embeddings of frames; `owner` is the number of each one's video."""
    sums = np.zeros((owner.max() + 1, embeds.shape[1]))
    np.add.at(sums, owner, embeds)
    lengths = np.linalg.norm(sums, axis=1, keepdims=True)
    if not (lengths > 0).all():
        raise UsageError("found a video whose frames cancel each other out, or without a frame: it has no mean.")
    return (sums / lengths).astype(np.float32)

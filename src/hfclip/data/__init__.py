"""Images with captions or labels, read from whatever holds them; and the built-in scenes."""

from .contact_sheet import draw_predictions
from .samples import BadSample, Sample, Source
from .scenes import Scenes, retrieval_task, zero_shot_tasks
from .sources import open_source


__all__ = [
    "BadSample",
    "Sample",
    "Scenes",
    "Source",
    "draw_predictions",
    "open_source",
    "retrieval_task",
    "zero_shot_tasks",
]

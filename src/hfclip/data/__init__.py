"""Built-in demonstration data, and pictures of what a model says about it."""

from .contact_sheet import draw_predictions
from .scenes import Scenes, retrieval_task, zero_shot_tasks


__all__ = ["Scenes", "draw_predictions", "retrieval_task", "zero_shot_tasks"]

"""What is measured while a model trains: zero-shot accuracy, and retrieval on held-out pairs.

Data is opened before the run starts, so that a wrong path costs nothing. The work is split over the processes on the
model itself, never through a distributed wrapper, whose forward would wait for processes that are done already.
"""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from accelerate import Accelerator

from hfclip import HFCLIPModel, HFCLIPProcessor, ZeroShotClassifier
from hfclip.data import draw_predictions, retrieval_task, zero_shot_tasks
from hfclip.data.samples import Source
from hfclip.errors import UsageError
from hfclip.evaluation import Result
from hfclip.evaluation.retrieval import Pairs, retrieval
from hfclip.evaluation.zero_shot import UndecodableImage, load_labelled_folder, zero_shot

from .config import Config
from .data.batches import open_data
from .machine import num_workers


NUM_PICTURES = 24
BATCH_SIZE = 256  # images or texts at a time on each process
LOGGED = ("top", "mean_per_class_recall", "text_retrieval_recall", "image_retrieval_recall", "unreadable_images")
MAX_PAIRS = 5000  # held-out, of a retrieval evaluation: more make recall harder


class LabelledSet(NamedTuple):
    """`samples[i]` is `(image, index of its label)`."""

    name: str
    labels: list[str]
    templates: list[str]
    samples: Sequence[tuple[Any, int]]


class Evaluator:
    """All evaluations of a run. `model` arguments are the bare model; calls are collective and restore its mode."""

    def __init__(self, config: Config, accelerator: Accelerator, processor: HFCLIPProcessor, image_size: int):
        self.accelerator, self.processor, self.config = accelerator, processor, config
        self.labelled = _open_labelled(config.eval.zero_shot, image_size) if config.eval.zero_shot else []
        self.pairs = _open_pairs(config, image_size) if config.eval.retrieval else None

    @property
    def measures_anything(self) -> bool:
        return bool(self.labelled or self.pairs)

    def __call__(self, model: HFCLIPModel) -> dict[str, Result]:
        """What each task measured, the same on every process. Empty if nothing is to be measured."""
        tasks = [(labelled.name, zero_shot, labelled) for labelled in self.labelled]
        tasks += [("retrieval", retrieval, self.pairs)] if self.pairs else []
        workers = num_workers(self.config.data.num_workers)
        options = {"batch_size": BATCH_SIZE, "num_workers": workers}
        with self.accelerator.autocast():
            results = {name: task(model, self.processor, data, **options) for name, task, data in tasks}
        return {name: replace(result, metrics=_logged(result.metrics)) for name, result in results.items()}

    def draw(self, model: HFCLIPModel, path: Path) -> Path | None:
        """An image of predictions for images spread over the first labelled set; None without any. Not collective."""
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


def _logged(metrics: Mapping[str, float]) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if name.startswith(LOGGED)}


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
    if folder.samples.targets is not None:
        raise UsageError(
            f"eval.zero_shot: {name} has several labels per image, expected one. `hfclip evaluate` takes it."
        )
    return [LabelledSet("zero_shot", folder.labels, folder.templates, folder.samples)]


def _open_pairs(config: Config, image_size: int) -> Source:
    if config.eval.retrieval == "scenes":
        task = retrieval_task(size=image_size)
        return Pairs(task.images, task.texts)
    data = replace(config.data, max_samples=MAX_PAIRS)
    try:
        return open_data(config.eval.retrieval, data, None, image_size)
    except UsageError as error:
        raise UsageError(f"eval.retrieval: {error}") from error

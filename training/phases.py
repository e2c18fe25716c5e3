"""Cheaper parts of a run before the full resolution: smaller images, shorter texts, fewer patches.

`data.phases` lists them in order, each so many epochs long; what is left of the run is at the settings of the model
(CLIPA, arXiv:2305.07017; FLIP, arXiv:2212.00794). `Phases.at` is a pure function of the step.
"""

import bisect
import difflib
import math
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from hfclip import HFCLIPConfig
from hfclip.errors import UsageError

from .config import Config, _require


class Phase(NamedTuple):
    """What the steps of a phase have in common."""

    image_size: int
    """Side of the images in pixels."""
    text_length: int
    """Tokens of a caption at most, start and end among them."""
    patch_dropout: float
    """Share of the patches that are dropped, 0 to below 1."""


class Phases:
    """The phases of a run, checked.

    Args:
        given: `data.phases`: mappings of `epochs` (above 0) and of some of `image_size`, `text_length` and
            `patch_dropout`; what a phase leaves out is as in `full`.
        full: The model's own settings, for the rest of the run. None of a phase may be above its size or length.
        stride: Pixels that an image's side must be a multiple of: the patch of a ViT, 32 for a ResNet.
        steps_per_epoch, total_steps: Of the run.

    Raises:
        UsageError: for an unknown name, a wrong type or value, or phases that last longer than the run.
    """

    def __init__(self, given: list[dict], full: Phase, *, stride: int, steps_per_epoch: int, total_steps: int):
        self.phases = [_checked(entry, full, stride, f"data.phases[{i}]") for i, entry in enumerate(given)] + [full]
        epochs, self.ends = 0.0, []
        for i, entry in enumerate(given):
            epochs += entry["epochs"]
            self.ends.append(round(epochs * steps_per_epoch))
            if self.ends[-1] == (self.ends[-2] if i else 0):
                raise UsageError(
                    f"data.phases[{i}].epochs: found {entry['epochs']!r}, less than a step; an epoch has "
                    f"{steps_per_epoch} steps. Leave the phase out or make it longer."
                )
        if self.ends and self.ends[-1] > total_steps:
            raise UsageError(
                f"data.phases: they are {epochs:g} epochs, {self.ends[-1]} steps, expected at most the {total_steps} "
                "steps of the run. Shorten them, or raise optim.epochs or optim.steps."
            )

    def at(self, step: int) -> Phase:
        """The phase of step `step` (from 0) of the run."""
        return self.phases[bisect.bisect_right(self.ends, step)]


def build_phases(
    config: Config, architecture: HFCLIPConfig, tokenizer: PreTrainedTokenizerBase, steps_per_epoch: int, stop: int
) -> Phases:
    """The phases of a run of this model; of one that asks for none, its full settings all the way.

    Raises:
        UsageError: as `Phases`, and for `patch_dropout` where the image tower has no patches to drop.
    """
    vision = architecture.vision_config
    full = Phase(architecture.image_size, tokenizer.model_max_length, getattr(vision, "patch_dropout", 0.0))
    if not architecture.has_patches and any(entry.get("patch_dropout") for entry in config.data.phases):
        raise UsageError(f"data.phases: a {vision.model_type} tower has no patches to drop. Leave patch_dropout out.")
    return Phases(
        config.data.phases, full, stride=architecture.image_stride, steps_per_epoch=steps_per_epoch, total_steps=stop
    )


def _checked(entry: dict, full: Phase, stride: int, name: str) -> Phase:
    known = ("epochs", *Phase._fields)
    for key in entry:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f"Did you mean {near[0]!r}?" if near else f"Expected some of: {', '.join(known)}."
            raise UsageError(f"{name}: unknown setting {key!r}. {hint}")

    epochs, phase = entry.get("epochs"), full._replace(**{key: entry[key] for key in entry if key != "epochs"})
    _require(_is_number(epochs) and epochs > 0, f"{name}.epochs", epochs, "a number above 0")
    size, length, dropout = phase
    good = _is_whole(size) and 0 < size <= full.image_size and (size % stride == 0 or size == full.image_size)
    expected = f"a multiple of {stride} (pixels), at most the {full.image_size} of the model"
    _require(good, f"{name}.image_size", size, expected)
    good = _is_whole(length) and 3 <= length <= full.text_length
    _require(good, f"{name}.text_length", length, f"3 (start, a token, end) to the model's {full.text_length} tokens")
    _require(_is_number(dropout) and 0 <= dropout < 1, f"{name}.patch_dropout", dropout, "0 <= value < 1")
    return phase._replace(patch_dropout=float(dropout))


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)

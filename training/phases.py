"""Cheaper parts of a run before the full resolution: smaller images, shorter texts, fewer patches.

`data.phases` lists them in order, each with its number of epochs; what is left of the run is at the settings of the model
(CLIPA, arXiv:2305.07017; FLIP, arXiv:2212.00794). `Phases.at` is a pure function of the step.
"""

import bisect
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from hfclip import HFCLIPConfig
from hfclip.errors import UsageError

from .config import Config, PhaseConfig
from .typed import require


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
        given: `data.phases`; what a phase leaves out is as in `full`.
        full: The model's own settings, for the rest of the run. None of a phase may be above its size or length.
        stride: Pixels that an image's side must be a multiple of: the patch of a ViT, 32 for a ResNet.
        steps_per_epoch, total_steps: Of the run.

    Raises:
        UsageError: for sizes that the model has not, or phases that last longer than the run.
    """

    def __init__(self, given: list[PhaseConfig], full: Phase, *, stride: int, steps_per_epoch: int, total_steps: int):
        self.phases = [_checked(entry, full, stride, f"data.phases[{i}]") for i, entry in enumerate(given)] + [full]
        epochs, self.ends = 0.0, []
        for i, entry in enumerate(given):
            epochs += entry.epochs
            self.ends.append(round(epochs * steps_per_epoch))
            if self.ends[-1] == (self.ends[-2] if i else 0):
                raise UsageError(
                    f"data.phases[{i}].epochs: found {entry.epochs!r}, less than a step; an epoch has "
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
    if not architecture.has_patches and any(entry.patch_dropout for entry in config.data.phases):
        raise UsageError(f"data.phases: a {vision.model_type} tower has no patches to drop. Leave patch_dropout out.")
    return Phases(
        config.data.phases, full, stride=architecture.image_stride, steps_per_epoch=steps_per_epoch, total_steps=stop
    )


def _checked(entry: PhaseConfig, full: Phase, stride: int, name: str) -> Phase:
    given = {key: getattr(entry, key) for key in Phase._fields}
    phase = full._replace(**{key: value for key, value in given.items() if value is not None})
    size, length, _ = phase
    good = size <= full.image_size and (size % stride == 0 or size == full.image_size)
    expected = f"a multiple of {stride} (pixels), at most the {full.image_size} of the model"
    require(good, f"{name}.image_size", size, expected)
    require(
        length <= full.text_length, f"{name}.text_length", length, f"at most the model's {full.text_length} tokens"
    )
    return phase

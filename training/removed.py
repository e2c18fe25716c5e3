"""Settings that runs had before, and what is said to those who still give them."""

import os
import sys
from typing import Any

from hfclip_errors import UsageError


TOWERS = (
    "Join the towers once, by `HFCLIPModel.from_vision_text_pretrained` as docs/training.md shows, and set "
    "model.checkpoint to the folder; for a run that goes on, to one of its checkpoints"
)
FIXED = "It has this value in all runs. Take it out"
# Name -> what it meant where it was left alone, which is still so, and what to do about any other value.
REMOVED: dict[str, tuple[Any, str]] = {
    "model.vision_checkpoint": (None, TOWERS),
    "model.text_checkpoint": (None, TOWERS),
    "model.projection_dim": (512, TOWERS),
    "data.cache_dir": ("~/.cache/hfclip", "Take it out, and set the environment variable HFCLIP_CACHE to that folder"),
    "data.max_bad_in_a_row": (50, FIXED),
    "optim.moments": ("float32", "Put moments in optim.bfloat16, or leave it out of there"),
    "optim.text_weights": ("float32", "Put text_weights in optim.bfloat16, or leave it out of there"),
    "run.keep_every_hours": (None, "Take it out, and raise run.keep_checkpoints or copy those that should stay"),
    "run.max_silence": (45.0, FIXED),
    "run.max_bad_steps": (20, FIXED),
    "eval.batch_size": (256, FIXED),
    "eval.max_samples": (5000, FIXED),
}
FLAGS = {"run.stop_after": "--stop-after", "run.profile": "--profile"}  # of the command, not of the run


def answer(name: str) -> str | None:
    """What to do in the place of a removed setting; None for any other name."""
    if name in FLAGS:
        return f"{name} is a flag of the command now. Give {FLAGS[name]}."
    if name in REMOVED:
        default, advice = REMOVED[name]
        found = f"It meant {default!r} by default, and still does" if advice == FIXED else advice
        return f"{name} is no setting any more. {found}."
    return None


def translate(values: dict, strict: bool = True) -> dict:
    """Returns the settings of a file without the removed ones: put in their heir, or left out.

    Args:
        strict: says which other values than the old defaults are left out, and refuses those that change the weights;
            without, all are left out in silence, as for a record of what was.

    Raises:
        UsageError: with what to do.
    """
    values = {name: {**section} if isinstance(section, dict) else section for name, section in values.items()}
    for name in (*REMOVED, *FLAGS):
        section, key = name.split(".")
        settings = values.get(section)
        if not isinstance(settings, dict) or key not in settings:
            continue
        value = settings.pop(key)
        default, advice = REMOVED.get(name, (value, ""))
        if section == "optim" and value == "bfloat16":
            settings["bfloat16"] = [*(settings.get("bfloat16") or []), key]
        elif strict and value != default:
            now = (
                f"it is always {default!r} now. Take it out" if advice == FIXED else f"it is no setting now. {advice}"
            )
            message = f"{name}: found {value!r}, but {now}."
            if section in ("model", "optim"):
                raise UsageError(message)
            if os.environ.get("LOCAL_RANK", "0") == "0":
                print(f"left out: {message}", file=sys.stderr)
    return values

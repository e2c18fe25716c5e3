"""What a name means: a folder or file here, or something on the Hub. What can only be here is not asked for there."""

import difflib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError

from .errors import UsageError, as_usage_error, in_words
from .foreign_hfclip import is_path
from .models import nearest_model


# Files of a model folder that say what goes with the weights.
PARTS = {
    "image processor": ("preprocessor_config.json", "processor_config.json"),
    "tokenizer": ("tokenizer.json", "tokenizer_config.json", "vocab.json", "vocab.txt", "spiece.model"),
}


def means_folder(name: str) -> bool:
    """Whether a name that is not here can mean nothing else than a file or folder here.

    "owner/name" may be on the Hub; but not if "owner" is a folder here.
    """
    return is_path(name) or os.path.isdir(os.path.dirname(name))


def nearest_folder(name: str) -> str:
    """A sentence on what lies nearest to a path that is not there."""
    path = Path(name).expanduser()
    parent = next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.is_dir())
    there = sorted(entry.name for entry in os.scandir(parent) if not entry.name.startswith("."))
    missing = path.absolute().relative_to(parent).parts
    if missing and (close := difflib.get_close_matches(missing[0], there, 1)):
        return f"Did you mean {os.path.relpath(parent / close[0])!r}?"
    return f"{os.path.relpath(parent)!r} is there and holds {', '.join(there[:5]) or 'nothing'}."


@contextmanager
def opening(name: str, setting: str) -> Iterator[None]:
    """Makes one line that begins with `setting` of what goes wrong while the model `name` is opened inside.

    Raises:
        UsageError: at once for a folder that is not here.
    """
    place = Path(name).expanduser()
    if not place.exists() and means_folder(name):
        raise UsageError(f"{setting}: found no folder {name!r}. {nearest_folder(name)}")
    with as_usage_error(setting, partial(_reason, place)):
        yield


def _reason(place: Path, error: Exception) -> str:
    causes = [error]
    while (cause := causes[-1].__cause__ or causes[-1].__context__) is not None and cause not in causes:
        causes.append(cause)
    if any(isinstance(cause, RepositoryNotFoundError) for cause in causes) and (hint := nearest_model(str(place))):
        return f"found no folder {str(place)!r} here, and nothing of that name on the Hub. {hint}"
    if any(isinstance(cause, LocalEntryNotFoundError | ConnectionError) for cause in causes):
        hint = f" {nearest_model(str(place))}".rstrip()
        return f"found no folder {str(place)!r} here, and the Hub cannot be reached. Give a folder, or connect first.{hint}"
    if place.is_dir():
        for part, files in PARTS.items():
            if part.split()[0] in str(error) and not any((place / file).exists() for file in files):
                return (
                    f"{str(place)!r} holds no {part} (found none of {', '.join(files)}). Save the model's processor "
                    "there: HFCLIPProcessor.save_pretrained."
                )
    return " ".join(in_words(error).split())

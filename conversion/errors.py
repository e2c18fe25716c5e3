"""The one error that the programs here print as a line, for what their user did; all others are faults of their own.

A mistake of the user (a wrong file, settings that make no sense, no space left) is raised on purpose, as a `UsageError`
that says what was found, what was expected and what to do. `convert.run` prints it. Whatever else is raised shows its
traceback, so that it can be fixed.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hfclip_errors import UsageError


@contextmanager
def refusals(place: Path | str) -> Iterator[None]:
    """Makes a UsageError that names `place` of whatever a library raises while it reads what the user's file holds.

    Only calls of libraries belong in the block: they refuse nonsense each in its own way, from ValueError to KeyError.
    """
    try:
        yield
    except UsageError:
        raise
    except Exception as error:
        kind = "" if isinstance(error, ValueError | OSError) else f"{type(error).__name__}: "
        raise UsageError(f"{place}: {kind}{error}") from error

"""Start and end of programs: mistakes that users can fix, told in one line with credentials masked.

A module beside the package because `import hfclip` imports torch, which takes seconds: a run with a misspelt setting is
refused before that. `hfclip.errors` has the errors.
"""

import errno
import importlib.metadata
import os
import re
import runpy
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from pathlib import Path


# What a machine refuses: no space, files too large, no permission, too many open files, a broken disk.
OF_THE_MACHINE = "ENOSPC EDQUOT EFBIG EACCES EPERM EROFS EMFILE EIO".split()


class UsageError(ValueError):
    """A mistake that the user can fix: what was found, what was expected, what to do."""

    exit_status = 2


def in_words(error: BaseException) -> str:
    """What an error says; of those whose message means nothing alone, such as a KeyError's, with its kind."""
    kind = "" if isinstance(error, ValueError | OSError) else f"{type(error).__name__}: "
    return f"{kind}{error}"


@contextmanager
def as_usage_error(place: Path | str, reason: Callable[[BaseException], str] = in_words) -> Iterator[None]:
    """Makes a UsageError that names `place` of whatever a library raises while it reads what the user's file holds.

    Only calls of libraries belong in the block: they refuse nonsense each in its own way, from ValueError to KeyError.
    """
    try:
        yield
    except UsageError:
        raise
    except Exception as error:
        raise UsageError(f"{place}: {reason(error)}") from error


def start_program(file: str, spec: ModuleSpec | None, extra: str) -> None:
    """Checks that the packages of `extra` are here; runs a program that was started by its path as a module instead.

    A module's imports are those of its package: the same file works as `python training/plan.py` in a clone and as
    `python -m hfclip.training.plan` where hfclip is installed.

    Args:
        file, spec: the program's `__file__` and `__spec__`.
        extra: what brings its packages, `pip install 'hfclip[extra]'`.
    """
    run(lambda: require_extra(extra))
    if spec is None:
        path = Path(file).resolve()
        sys.path[0] = str(path.parents[1])
        runpy.run_module(f"{path.parent.name}.{path.stem}", run_name="__main__", alter_sys=True)
        sys.exit()


def require_extra(extra: str) -> None:
    """Raises UsageError, with the command that helps, where a package of an optional dependency group is missing."""
    try:
        requirements = importlib.metadata.requires("hfclip") or []
    except importlib.metadata.PackageNotFoundError:  # the sources of a clone alone, whose user has seen to the rest
        return
    for requirement in requirements:
        name, _, condition = requirement.partition(";")
        name = re.match(r"[\w.-]+", name)[0]
        if re.search(rf"extra == ['\"]{extra}['\"]", condition) and not _is_installed(name):
            raise UsageError(f"found no package {name}, which this program needs. pip install 'hfclip[{extra}]'")


def _is_installed(name: str) -> bool:
    try:
        return bool(importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        return False


def run(main: Callable[[], None], interrupted: str = "Stopped.") -> None:
    """Runs a program: what its user can fix ends it with one line, Ctrl-C with `interrupted`, a bug with its traceback."""
    try:
        main()
        sys.stdout.flush()
    except UsageError as error:
        _end(f"error: {error}", error.exit_status)
    except BrokenPipeError:  # who read the output has left, as `head` does; Python would complain at its exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        if errno.errorcode.get(error.errno) not in OF_THE_MACHINE:
            raise
        _end(f"error: {error}", 2)
    except KeyboardInterrupt:
        _end(f"\n{interrupted}", 130)


def _end(message: str, status: int) -> None:
    print(redact(message), file=sys.stderr, flush=True)
    sys.exit(status)


# ---------------------------------------------------------------------------------------------------------------------
# Credentials in text: masked by form, so no list of the secrets at hand is needed, and what other libraries quote in
# their errors is covered as well.
# ---------------------------------------------------------------------------------------------------------------------

MASK = "***"
# Parameters of URLs that say what is fetched. All others may let somebody in: signatures, keys, tokens, tickets.
_PUBLIC = "alt|dl|download|export|format|id|name|page|part|path|prefix|raw|ref|revision|version|versionId"
# Of options as s3fs, gcsfs, adlfs and environment variables call them.
_SECRETS = (
    r"(?:[\w-]*(?:secret|password|passwd|credential|api[_-]?key|access[_-]?key(?:[_-]?id)?|account[_-]?key)s?"
    # Not every token is one: there are those of texts, max_tokens and eos_token.
    r"|(?:[\w-]*(?:access|api|auth|bearer|hf|hub|id|refresh|sas|security|session)[_-])?token)"
)
_PATTERNS = (
    # scheme://user:password@host and https://token@host; passwords may hold an "@"
    (
        re.compile(r"(?<=://)[^/?#\s'\"]*:[^/?#\s'\"]*@|(?<=https://)[^/?#\s'\"]+@|(?<=http://)[^/?#\s'\"]+@"),
        f"{MASK}@",
    ),
    # tokens of the Hugging Face Hub, and those in headers
    (re.compile(r"\bhf_[A-Za-z0-9]{16,}"), MASK),
    (re.compile(r"\b(Bearer)\s+[^\s'\"]+|(Authorization['\"]?\s*[:=]\s*['\"]?\w+)\s+[^\s'\"]+"), rf"\1\2 {MASK}"),
    # {key: value, secret_key: value}, {"secret_key": "value"} and AWS_SECRET_ACCESS_KEY=value
    (
        re.compile(
            rf"((?:[{{,]\s*|(?=['\"]))['\"]?(?:key|{_SECRETS})['\"]?\s*:\s*['\"]?)(?!\*|None\b|null\b)[^\s'\",}}]+",
            re.I,
        ),
        rf"\1{MASK}",
    ),
    (re.compile(rf"(?<![\w./-])({_SECRETS}=['\"]?)(?!\*)[^\s'\",}}&]+", re.I), rf"\1{MASK}"),
)
_URL = re.compile(r"\w:/[^\s'\"<>]+")  # with one slash where somebody has taken it for a path
# ?parameter=value of a URL; "::" begins another URL
_PARAMETER = re.compile(rf"([?&;#])(?!(?:{_PUBLIC})=)([\w.~%-]+)=(?:(?!::)[^&;#)}}\]])+", re.I)


def redact(text: str) -> str:
    """Masks each credential in `text`; text without any stays as it is."""
    text = _URL.sub(lambda url: _PARAMETER.sub(rf"\1\2={MASK}", url[0]), text)
    for pattern, replacement in _PATTERNS:
        text = pattern.sub(replacement, text)
    return text
